"""A stream of text that the first rank reads for all: blocks in, the same on every rank.

Windows go over the ranks' process group, on which a rank waits for a window as long as for any other message.
"""

from __future__ import annotations

from pathlib import Path

from dynamo_lm.data.streaming import StreamedBlocks, TextStream, Window, WindowLog
from dynamo_lm.training import ranks
from dynamo_lm.training.checkpoints import latest_checkpoint

FILE = "stream.jsonl"  # of the run's folder: where windows begin


def shared_blocks(stream: TextStream, folder: Path, block_size: int) -> StreamedBlocks:
    """The blocks of a stream, from where the newest checkpoint in `folder` needs them; every rank calls it.

    Raises:
        InputError: on every rank, for text that cannot be read or that is not what the run in `folder` read.
    """
    log: WindowLog | None = None

    def begin() -> None:
        nonlocal log
        stream.check()
        log = WindowLog(stream, folder / FILE, resume=latest_checkpoint(folder) is not None)

    def read(number: int) -> Window:
        assert log is not None
        return log.window(number)

    ranks.made_by_first(begin)
    return StreamedBlocks(
        lambda number: ranks.made_by_first(lambda: read(number)), stream.window, block_size, seed=stream.seed
    )
