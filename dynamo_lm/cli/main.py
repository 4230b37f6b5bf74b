"""The command line, one command per capability: `dynamo-lm demo | generate | train | count | info | bench | eval | ..`.

Bad input gets one sentence on stderr and exit status 2, Ctrl-C 130; a closed pipe is silent and gives 141.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

import dynamo_lm
from dynamo_lm.cli.bench import bench
from dynamo_lm.cli.calibrate import calibrate
from dynamo_lm.cli.chat import chat
from dynamo_lm.cli.count import count
from dynamo_lm.cli.demo import demo
from dynamo_lm.cli.eval_ablation import ablation
from dynamo_lm.cli.eval_completion import completion
from dynamo_lm.cli.eval_nlu import nlu
from dynamo_lm.cli.eval_perplexity import perplexity
from dynamo_lm.cli.export import export
from dynamo_lm.cli.finetune import finetune
from dynamo_lm.cli.generate import generate
from dynamo_lm.cli.info import info
from dynamo_lm.cli.report import report
from dynamo_lm.cli.serve import serve
from dynamo_lm.cli.train import train
from dynamo_lm.errors import InputError

BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141  # exit statuses, as shells know them
EXTRAS = {  # packages that only some commands need, by the extra that brings them
    "eval": ("lm_eval", "accelerate", "datasets", "matplotlib", "openai", "mauve", "faiss", "sacrebleu"),
    "train": ("tensorboard", "pyarrow", "peft"),
    "bench": ("xllamacpp", "gguf", "flashspec"),
    "serve": ("fastapi", "uvicorn", "prometheus_client", "structlog"),
}

app = typer.Typer(
    name="dynamo-lm",
    help="Language models that predict several tokens per forward pass, exactly or, within limits you set, faster.\n\n"
    "Begin with `dynamo-lm demo`. To do the same to a model of your own: `train` adds heads to it, `finetune` teaches it "
    "to answer, `count` makes the tables that make them agree, `generate` writes with it, `chat` talks with it, `serve` "
    "lets other programs do so, `info` says what a folder holds, `export` writes heads that other programs serve. "
    "`eval` measures it, `bench` races it, `calibrate` chooses its settings, `report` makes a page of it all.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        print(f"dynamo-lm {dynamo_lm.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


evaluation = typer.Typer(
    name="eval",
    help="Measure a model: how well each head predicts, what it knows, and how much faster it is at the same quality.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
EVALUATIONS = (perplexity, nlu, completion, ablation)
COMMANDS = (demo, generate, chat, serve, train, finetune, count, info, export, bench, calibrate, report)
for parent, commands in ((app, COMMANDS), (evaluation, EVALUATIONS)):
    for command in commands:
        parent.command()(command)
app.add_typer(evaluation)


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out a command line and return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _open_closed_streams()
    _tolerate_narrow_encodings()
    number = next((number for number, argument in enumerate(arguments, start=1) if not _is_text(argument)), None)
    if number is not None:
        return _complain(_no_text(number, arguments[number - 1]))
    if arguments and not {"-h", "--help", "--version"}.intersection(arguments):  # help needs neither torch nor transformers
        _quiet()
    try:
        status = app(arguments or ["--help"], prog_name="dynamo-lm", standalone_mode=False, obj=arguments)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except InputError as error:
        return _complain(str(error))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        extra = next((extra for extra, packages in EXTRAS.items() if missing in packages), None)
        if extra is None:
            raise
        return _complain(f'This needs the package {missing}; install it with: pip install "dynamo-lm[{extra}]"')
    except BrokenPipeError:
        return _reader_gone()
    except SystemExit as error:  # with which typer answers a closed pipe
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        return _reader_gone()
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted.")
        return INTERRUPTED
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return _complain("The disk is full; free some space and run the same command again.")
        if error.filename is None or error.errno not in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EISDIR):
            raise
        return _complain(f'"{error.filename}" cannot be used: {error.strerror}.')
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer raises for wrong usage; its class moved between versions
            raise
        depth = 2 if arguments[:1] == ["eval"] else 1
        names = [word for word in arguments[:depth] if not word.startswith("-")]
        message = error.format_message()
        stop = "" if message.endswith((".", "?")) else "."
        return _complain(f"{message}{stop} See `{' '.join(['dynamo-lm', *names, '--help'])}`.")


def _open_closed_streams() -> None:
    """Give standard streams that the caller has closed (`>&-`) the null device, as Python's print does without them."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open to the end


def _reader_gone() -> int:
    """The exit status where a pipe has no reader any more; the interpreter's last flush then has one."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE


def _no_text(number: int, argument: str) -> str:
    """What is wrong with an argument that is no text: its bytes, or the encoding that the locale says they have."""
    try:
        os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        return f"Argument {number} ({argument!a}) is not valid UTF-8; give it in UTF-8."
    encoding = sys.getfilesystemencoding()
    return f"Argument {number} ({argument!a}) is not {encoding}, the locale's encoding; set PYTHONUTF8=1 or LC_ALL=C.UTF-8."


def _is_text(argument: str) -> bool:
    """Whether there are no lone surrogates, as which Python passes on bytes that are not valid in the locale's encoding."""
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _tolerate_narrow_encodings() -> None:
    """Print "?" for characters that stdout's or stderr's encoding lacks (an emoji in cp1252) instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _complain(message: str) -> int:
    rank = os.environ.get("RANK", "0")  # of a training run of several processes, which often fail together
    print(f"dynamo-lm{'' if rank == '0' else f' (rank {rank})'}: " + " ".join(message.split()), file=sys.stderr)
    return BAD_INPUT


def _quiet() -> None:
    """Turn off the notes, warnings and progress bars of libraries."""
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow's, where TensorBoard finds one


if __name__ == "__main__":
    sys.exit(main())
