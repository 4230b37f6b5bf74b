"""The README's picture and its numbers, of one run: `python -m benchmarks.picture docs/demo.svg results/demo.json`."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from dynamo_lm.cli.demo_options import DemoOptions
from dynamo_lm.cli.demo_view import demo


def main() -> None:
    console = Console(record=True, width=100, highlight=False)
    options = DemoOptions(delay=False, repetitions=5, time_limit=600)
    demo("story", options, console=console, save=Path(sys.argv[2]))
    console.save_svg(sys.argv[1], title="dynamo-lm demo")


if __name__ == "__main__":
    main()
