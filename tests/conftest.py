"""Runs before anything imports torch or transformers: no hub, no chatter, one thread (models here are tiny)."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers


@pytest.fixture(scope="session", autouse=True)
def quiet():
    transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Every test starts from the same state of torch's global generator, whichever tests run before it."""
    torch.manual_seed(0)
