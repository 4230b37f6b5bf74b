"""Runs before anything imports torch or transformers: no hub, no chatter, one thread (models here are tiny).

Both are imported where they are used: the process that hands tests out to others needs neither.
"""

import functools
import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DYNAMO_LM_KERNELS", "wait")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import settings

settings.register_profile("any machine", deadline=None)  # no test may depend on how busy the machine is
settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def quiet():
    import transformers

    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def kernels_are_built():
    """Once, before any test: a process that builds them says so on stderr, and tests compare what is said there."""
    from dynamo_lm.kernels import loader

    loader.available()


@pytest.fixture(scope="session", autouse=True)
def modules_are_not_searched_for_garbage():
    """Of a million objects, nearly all are torch's and transformers' own and stay to the end."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def the_parser_is_made_once():
    """Typer makes that of every verb anew in each call of `dynamo_lm.cli.main.main`, in a tenth of a second or two."""
    import typer.main

    typer.main.get_command = functools.cache(typer.main.get_command)


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Every test starts from the same state of torch's global generator, whichever tests run before it."""
    import torch

    torch.manual_seed(0)
