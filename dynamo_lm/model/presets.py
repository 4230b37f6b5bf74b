"""The sizes of the paper: Pythia bases, their head counts and learning rates (method.md sections 1 and 2)."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import GPTNeoXConfig


@dataclass(frozen=True)
class Preset:
    """A model of the paper's suite: its base's shape and its learning rates (method.md sections 1 and 2)."""

    base: str  # hub id of the base
    layers: int
    hidden: int
    attention_heads: int
    vocab_size: int  # rows of the embedding, padding included
    lr_b: float  # LR_B: head-1 loss into stem and head 1
    lr_m: float  # LR_M: the new layers
    lr_mb: float  # LR_MB: heads 2..n into the stem

    @property
    def rates(self) -> dict[str, float]:
        """The three learning rates by the names of `TrainingOptions`."""
        return {"lr_b": self.lr_b, "lr_m": self.lr_m, "lr_mb": self.lr_mb}

    def base_config(self, context: int) -> GPTNeoXConfig:
        """The base's configuration with positions for `context` tokens; needs no hub, because the shape is known."""
        return GPTNeoXConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.attention_heads,
            intermediate_size=4 * self.hidden,
            max_position_embeddings=context,
        )


def _preset(size: str, layers: int, hidden: int, attention_heads: int, lr: float, vocab_size: int = 50304) -> Preset:
    base = f"EleutherAI/pythia-{size}"
    return Preset(base, layers, hidden, attention_heads, vocab_size, lr, lr * 100, lr / 10)


PRESETS: dict[str, Preset] = {
    "DynaMo-77M-T3": _preset("70m", 6, 512, 8, 1e-5),
    "DynaMo-180M-T3": _preset("160m", 12, 768, 12, 6e-6),
    "DynaMo-430M-T3": _preset("410m", 24, 1024, 16, 3e-6),
    "DynaMo-1.1B-T3": _preset("1b", 16, 2048, 8, 2e-6),
    "DynaMo-1.5B-T3": _preset("1.4b", 24, 2048, 16, 2e-6),
    "DynaMo-2.9B-T3": _preset("2.8b", 32, 2560, 32, 1.6e-6),
    "DynaMo-7.3B-T3": _preset("6.9b", 32, 4096, 32, 1.2e-6, 50432),
}
PAPER = PRESETS["DynaMo-77M-T3"]  # the model whose rates go for bases without a preset
