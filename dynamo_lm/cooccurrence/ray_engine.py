"""Counting on a Ray cluster, or on a Ray of this machine alone: the engine of `counting.count` whose workers are processes.

Pieces and partitions are tasks of pure functions. When a worker dies, Ray runs its task again; when a machine dies, Ray runs
again whatever made the runs that it held, from the pieces, which this process keeps in Ray's object store until the end.
Runs that do not fit the object store are on Ray's disks. A partition is the n-grams that begin with some tokens: only one
partition's rows need to fit a worker, and nothing but the table needs to fit this process.
"""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from typing import Any, TypeVar

from dynamo_lm import errors
from dynamo_lm.cooccurrence import ngrams
from dynamo_lm.cooccurrence.ngrams import Grams, Piece, Runs, Windows
from dynamo_lm.errors import InputError

RETRIES = 20  # of a task whose worker died
PARTITIONS = 4  # per CPU of the cluster, so that they end at about the same time

Result = TypeVar("Result")


class RayEngine:
    """The workers of the Ray cluster that this process belongs to or RAY_ADDRESS names, else of one started for it."""

    at_once = 1  # each worker has a piece, and memory, of its own

    def __init__(self, workers: int | None = None) -> None:
        """`workers`: of a Ray that is started here; default: one for every core."""
        try:
            import ray
        except ImportError as error:
            raise InputError("Counting on Ray needs the package ray: pip install 'dynamo-lm[ray]'.") from error
        for module in (errors, ngrams, sys.modules[__name__]):  # workers need Ray and NumPy, not this package
            ray.cloudpickle.register_pickle_by_value(module)
        self._ray: Any = ray
        self._workers, self._mine = workers, False
        self.partitions = 1

    def __enter__(self) -> "RayEngine":
        if not self._ray.is_initialized():
            quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
            try:
                self._ray.init(address="auto", **quiet)
            except ConnectionError:
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else it reports to its makers
                self._ray.init(address="local", num_cpus=self._workers, include_dashboard=False, **quiet)
            self._mine = True
        self._cpus = max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        self.partitions = PARTITIONS * self._cpus
        self._pieces: list[Any] = []
        self._runs: list[list[Any]] = []  # by piece and partition
        return self

    def __exit__(self, *error: Any) -> None:
        self._pieces, self._runs = [], []
        if self._mine:
            self._ray.shutdown()

    def count(self, windows: Windows, texts: Iterable[Piece], size: int) -> Iterator[int]:
        self._windows, self._size = self._ray.put(windows), size
        task = self._ray.remote(max_retries=RETRIES, num_returns=1 + len(windows.starts))(_count)

        def start(piece: Piece) -> Any:
            self._pieces.append(self._ray.put(piece))
            counted, *runs = task.remote(self._windows, self._pieces[-1])
            self._runs.append(runs)
            return counted

        return self._in_order(start, texts)

    def ranges(self, function: Callable[[Windows, int, Runs], Result]) -> Iterator[Result]:
        task = self._ray.remote(max_retries=RETRIES)(_ranges)

        def start(item: tuple[int, tuple[Any, ...]]) -> Any:
            return task.remote(self._windows, function, self._size, item[0], *item[1])

        for results in self._in_order(start, enumerate(zip(*self._runs, strict=True))):
            yield from deepcopy(results)  # what is read is part of the object store, which they would fill

    def _in_order(self, start: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """The results of the tasks that `start` begins for each item, at most two a CPU ahead."""
        pending: deque[Any] = deque()
        for item in items:
            if len(pending) == 2 * self._cpus:
                yield self._result(pending.popleft())
            pending.append(start(item))
        while pending:
            yield self._result(pending.popleft())

    def _result(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise InputError(str(error.cause)) from error
            raise
        except self._ray.exceptions.RayError as error:
            raise InputError(f"Ray gave up counting ({type(error).__name__}): {str(error).splitlines()[0]}") from error


def _count(windows: Windows, piece: Piece) -> list[Any]:
    """How many windows a piece has, then its runs by partition, None where it has none."""
    runs, counted = windows.count(piece)
    return [counted, *(runs.get(partition) for partition in range(len(windows.starts)))]


def _ranges(
    windows: Windows, function: Callable[..., Result], size: int, partition: int, *runs: Grams | None
) -> list[Result]:
    """`function` of every range of a partition."""
    filled = [run for run in runs if run is not None]
    if not filled:
        return []
    cuts = windows.ranges([keys for keys, _ in filled], size)
    return [
        function(windows, partition, [(keys[cut], counts[cut]) for (keys, counts), cut in zip(filled, slices, strict=True)])
        for slices in cuts
    ]
