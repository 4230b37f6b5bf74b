"""A Ray of two workers counts what one process counts, byte for byte, also when its workers are killed."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dynamo_lm.cooccurrence.counting import BYTES, count
from dynamo_lm.cooccurrence.ray_engine import RayEngine
from dynamo_lm.errors import InputError

ray = pytest.importorskip("ray", reason="the package ray is not installed (pip install 'dynamo-lm[ray]')")

SETTINGS = {"vocab_size": 300, "order": 4, "tokenizer": "abc", "memory_mb": 2000 * BYTES / 2**20}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def text(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(300 * rng.random(rng.integers(1, 3000)) ** 3).astype(np.uint16) for _ in range(20)]


def kill_workers() -> int:
    """kill -9 to every worker process, which Ray titles by its task; the number killed."""
    titles = tuple(f"ray::{task}".encode() for task in ("IDLE", "_count", "_ranges"))
    folders = [folder for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    workers = [int(folder.name) for folder in folders if (folder / "cmdline").read_bytes().startswith(titles)]
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    return len(workers)


def bytes_of(tmp_path: Path, documents, **options) -> bytes:
    count(documents, **SETTINGS, **options).save(tmp_path / "table.safetensors")
    return (tmp_path / "table.safetensors").read_bytes()


@pytest.mark.parametrize("options", [{}, {"max_bytes": 60_000}], ids=["whole", "of a stated size"])
def test_ray_makes_the_file_of_one_process(tmp_path: Path, options: dict[str, int]) -> None:
    assert bytes_of(tmp_path, text(), engine=RayEngine(), **options) == bytes_of(tmp_path, text(), threads=1, **options)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds worker processes in /proc")
def test_killed_workers_do_not_change_a_count(tmp_path: Path) -> None:
    killed = []

    def documents() -> Iterator[np.ndarray]:
        for i, document in enumerate(text()):
            if i in (5, 12):
                killed.append(kill_workers())
            yield document

    def progress(tokens: int) -> None:
        if tokens == sum(map(len, text())):  # all pieces are counted: the workers of the second round
            killed.append(kill_workers())

    assert bytes_of(tmp_path, documents(), engine=RayEngine(), progress=progress) == bytes_of(tmp_path, text(), threads=1)
    assert len(killed) == 3 and all(killed)


def test_bad_tokens_are_one_sentence_from_ray_too() -> None:
    with pytest.raises(InputError, match=r"^Token id 300 is outside the vocabulary of 300; count .* ids.$"):
        count([np.array([0, 300])], engine=RayEngine(), **SETTINGS)
