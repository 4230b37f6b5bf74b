"""Judges of generated text."""
