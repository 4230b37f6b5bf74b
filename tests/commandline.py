"""What tests of the command line share: a command line run in this process, a tokenizer, texts and a tiny base."""

from __future__ import annotations

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from dynamo_lm.cli.main import main

WORDS = [
    "the",
    "fox",
    "ran",
    "to",
    "a",
    "red",
    "house",
    "and",
    "saw",
    "one",
    "little",
    "bird",
    "with",
    "big",
    "eyes",
    "then",
    "it",
    "was",
    "happy",
    ".",
    "sad",
    "day",
    "night",
    "sun",
]
END = "<|end|>"
SMALL = ("--block-size", "32", "--batch-size", "4", "--validation-fraction", "0.1")


def texts(count: int = 60, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(draw.randint(20, 60))) for _ in range(count)]


def byte_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)


def neox(vocab_size: int = 300, **kwargs) -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    sizes["max_position_embeddings"] = 128
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=vocab_size, **sizes | kwargs))


class Run:
    """A command line carried out in this process: exit status, stdout, stderr."""

    def __init__(self, capfd: pytest.CaptureFixture):
        self.capfd = capfd

    def __call__(self, *arguments: object, status: int = 0) -> str:
        self.capfd.readouterr()
        found = main([str(argument) for argument in arguments])
        self.out, self.err = self.capfd.readouterr()
        assert found == status, self.err
        return self.out

    def refused(self, *arguments: object) -> str:
        """The one sentence that bad input must get."""
        assert self(*arguments, status=2) == ""
        assert "Traceback" not in self.err
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("dynamo-lm: ")
        return lines[0]
