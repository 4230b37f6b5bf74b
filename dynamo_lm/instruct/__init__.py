"""Instruction tuning: conversations in any usual form, their chat template, filtering and self-distillation."""
