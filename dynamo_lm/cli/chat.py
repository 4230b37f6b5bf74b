"""`dynamo-lm chat`: a conversation in a terminal, or one line a turn through a pipe."""

from __future__ import annotations

import random
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer
from rich.console import Console
from rich.text import Text

from dynamo_lm.cli.dataclass_options import dataclass_options
from dynamo_lm.cli.generate import weak_heads
from dynamo_lm.cli.options import DecodingModelOptions, Model, verification
from dynamo_lm.errors import InputError
from dynamo_lm.files import decode

if TYPE_CHECKING:
    from dynamo_lm.serving.conversation import Conversation
    from dynamo_lm.serving.settings import ChatSettings

HELP = """\
/verify strict|off|NATS  exactly what the model would write one token at a time; the paper's dynamic sampling; a budget
/eps 0.3                 how sure dynamic sampling must be, from 0 (fastest) to 1 (one token a step); turns /verify off
/stats                   what the last answer and all of them cost
/reset                   forget the conversation
/save FILE               write it as a line of JSON
/quit                    leave, as Ctrl-D does
A message of several lines: end all but the last with \\, or put \"\"\" before and after it. // begins one with a slash.
Ctrl-C stops an answer. Each colour is one forward pass."""
BLOCK = '"""'


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How answers are written."""

    PANEL: ClassVar[str] = "How answers are written"

    system: Annotated[str | None, "The system message: instructions to the model before the conversation."] = None
    verify: Annotated[
        str | None,
        typer.Option(
            metavar="strict|off|NATS",
            help="strict: exactly what the model would write one token at a time. off: the paper's dynamic sampling. "
            "A number: less likely than the model's own choices by at most that many nats a token. "
            "Default: strict, or off if --eps-b is given.",
        ),
    ] = None
    eps_b: Annotated[
        float | None,
        "Quality threshold of --verify off, 0 (fastest) to 1 (one token a step). Default: the model's own, else 0.5.",
    ] = None
    prompt_lookup_num_tokens: Annotated[
        int, typer.Option("--prompt-lookup", metavar="N", help="As in `generate`; with strict it changes no greedy text.")
    ] = 7
    temperature: Annotated[
        float | None,
        "Above 0, tokens are drawn at random, more adventurously above 1. Default: 0.7 with off, else 0.",
    ] = None
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="The longest answer, in tokens.")] = 512
    seed: Annotated[
        int | None,
        "Of the random numbers: the same seed and messages give the same answers. Default: another each time.",
    ] = None

    def settings(self) -> ChatSettings:
        """The options as settings. Raises InputError for those that do not go together or are out of range."""
        from dynamo_lm.serving.settings import ChatSettings

        usual = "strict" if self.eps_b is None else "off"
        verify = verification(usual if self.verify is None else self.verify)
        if self.eps_b is not None and verify != "off":
            raise InputError("--eps-b belongs to --verify off; verified decoding has no use for it.")
        return ChatSettings(
            verify=verify,
            eps_b=self.eps_b,
            prompt_lookup_num_tokens=self.prompt_lookup_num_tokens,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            seed=random.SystemRandom().randrange(2**31) if self.seed is None else self.seed,
        )


@dataclass_options
def chat(model: Model, answers: AnswerOptions, opening: DecodingModelOptions) -> None:
    """Talk with a model and see how many tokens each step gives.

    Uses the chat template of the model's tokenizer, or a plain one. When the conversation outgrows the model's context,
    its oldest turns are left out. Through a pipe, every line is a turn and stdout has the answers alone:

    `printf 'Tell a story.\\nAnother!\\n' | dynamo-lm chat story`
    """
    from dynamo_lm.backbone.token_limits import stated_context
    from dynamo_lm.serving.conversation import Conversation

    settings = answers.settings()
    network, tokenizer = opening.open(model)
    conversation = Conversation(network, tokenizer, settings, system=answers.system)
    if sys.stdin.isatty() and sys.stdout.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  (history, editing, and several pasted lines as one message)
        limit = stated_context(network.config)
        context = f"context {limit}, " if limit else ""
        Session(conversation, Terminal(), f"{model}: {network.num_heads} heads, {context}{describe(conversation)}").run()
    else:
        Session(conversation, Pipe()).run()


class Terminal:
    """A person at a terminal."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)

    def ask(self, more: bool) -> str:
        """The next line; `more` if it continues a message. Raises EOFError, KeyboardInterrupt and InputError."""
        try:
            line = input("\001\033[2m\002..\001\033[0m\002 " if more else "\001\033[1m\002>\001\033[0m\002 ")
            line.encode()  # where the locale is no UTF-8, strange bytes arrive as halves of characters
        except UnicodeError as error:
            raise InputError("The line is not valid UTF-8.") from error
        return line

    def write(self, text: str, step: int) -> None:
        """A step's characters, in the step's colour; nothing in them can steer the terminal."""
        from dynamo_lm.cli.demo_view import COLOURS

        harmless = "".join(mark for mark in text if mark in "\n\t" or unicodedata.category(mark) != "Cc")
        self.console.print(Text(harmless, style=COLOURS[step % len(COLOURS)]), end="", soft_wrap=True)

    def note(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, soft_wrap=True)

    def refuse(self, error: InputError) -> None:
        """Says what was wrong; the conversation goes on."""
        self.console.print(str(error), style="red", markup=False, soft_wrap=True)


class Pipe:
    """A program at the other end: answers go to stdout, all else to stderr, and the first mistake ends it."""

    def ask(self, more: bool) -> str:
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return decode(line, "stdin").removesuffix("\n").removesuffix("\r")

    def write(self, text: str, step: int) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)

    def refuse(self, error: InputError) -> None:
        raise error


class Session:
    """One conversation at a `Terminal` or through a `Pipe`."""

    def __init__(self, conversation: Conversation, interface: Terminal | Pipe, greeting: str = "") -> None:
        self.conversation, self.interface, self.greeting = conversation, interface, greeting
        self.saved: Path | None = None  # the one file that may be written again

    def run(self) -> None:
        """Turn by turn until the person leaves."""
        if self.greeting:
            self.interface.note(f"{self.greeting}. /help lists commands, Ctrl-D leaves.")
        interrupted = False
        while True:
            try:
                if not self.once():
                    return
                interrupted = False
            except KeyboardInterrupt:
                if interrupted or isinstance(self.interface, Pipe):
                    raise
                interrupted = True
                self.interface.note("\nCtrl-C again or Ctrl-D leaves.")

    def once(self) -> bool:
        """One message and what it asks for; False once the person leaves."""
        try:
            message = read_message(self.interface.ask)
            if message.startswith("/") and not message.startswith("//"):
                return self.command(message)
            if message.strip():
                self.turn(message.removeprefix("/"))
        except InputError as error:
            self.interface.refuse(error)
        except EOFError:
            if isinstance(self.interface, Terminal):
                self.interface.note("")
            return False
        return True

    def turn(self, message: str) -> None:
        """One answer, in colours; Ctrl-C ends it, a second one even before its step is over."""
        step = -1

        def show(text: str) -> None:
            nonlocal step
            step += 1
            self.interface.write(text, step)

        with _interruptible(isinstance(self.interface, Terminal)) as stopped:
            answer = self.conversation.answer(message, on_text=show, stopped=stopped)
        self.interface.write("\n", step)
        if answer.left_out:
            turns = "turn does" if answer.left_out == 1 else f"{answer.left_out} turns do"
            self.interface.note(f"The oldest {turns} not fit into the context any more; this answer was written without.")
        statistics = answer.statistics
        settings = self.conversation.settings
        warning = weak_heads([statistics], verify=settings.verify, temperature=settings.temperature)
        if warning is not None:
            self.interface.note(warning)
        if isinstance(self.interface, Terminal):
            rate = statistics.new_tokens / statistics.seconds if statistics.seconds else 0.0
            cost = f"{statistics.tokens_per_step:.2f} tokens per step of at most {statistics.ceiling}, {rate:.0f} tokens/s"
            self.interface.note(f"stopped; {cost}" if stopped() else cost)
        if not answer.text:
            self.interface.note("There was no answer; the message is forgotten.")

    def command(self, line: str) -> bool:
        """Carries out one command; False: to leave. Raises InputError."""
        name, _, rest = line.partition(" ")
        rest, conversation = rest.strip(), self.conversation
        if name == "/quit" and not rest:
            return False
        if name == "/verify":
            if rest:
                conversation.settings = replace(conversation.settings, verify=verification(rest))
            self.interface.note(describe(conversation))
        elif name == "/eps":
            if rest:
                conversation.settings = replace(conversation.settings, eps_b=_number(rest), verify="off")
            self.interface.note(describe(conversation))
        elif name == "/save":
            self.save(rest)
        elif name in ("/stats", "/reset", "/help") and not rest:
            {"/stats": self.stats, "/reset": self.reset, "/help": lambda: self.interface.note(HELP)}[name]()
        else:
            raise InputError(f"There is no command {line!r}; /help lists what there is.")
        return True

    def stats(self) -> None:
        from dynamo_lm.cli.generate import sentence

        answers = self.conversation.statistics
        if not answers:
            raise InputError("There is no answer yet.")
        self.interface.note(f"last answer: {sentence(answers[-1])}")
        tokens, forwards = sum(answer.new_tokens for answer in answers), sum(answer.forwards for answer in answers)
        seconds = sum(answer.seconds for answer in answers)
        rate = f"{tokens / seconds:.0f} tokens/s" if seconds else "no time"
        count = f"{len(answers)} answer{'s' * (len(answers) > 1)}"
        cost = f"{tokens} tokens in {forwards} forward passes: {tokens / forwards:.2f} per pass; {rate}"
        self.interface.note(f"{count}: {cost}")

    def reset(self) -> None:
        self.conversation.reset()
        self.interface.note("The conversation is forgotten.")

    def save(self, name: str) -> None:
        """Never over a file that was there before."""
        file = Path(name).expanduser()
        if not name:
            raise InputError("/save needs the name of a file.")
        if file.exists() and file != self.saved:
            raise InputError(f'"{name}" is there already; give another name.')
        self.conversation.save(file)
        self.saved = file
        self.interface.note(f"{name}: {len(self.conversation.messages)} messages")


def read_message(ask: Callable[[bool], str]) -> str:
    """One message: a line, lines that end in a backslash and the one after them, or what stands between triple quotes.

    Args:
        ask: gives the next line; called with whether it continues a message. Its EOFError ends a message that has begun.
    """
    lines = [ask(False)]
    try:
        if lines[0].lstrip().startswith(BLOCK):
            lines[0] = lines[0].lstrip().removeprefix(BLOCK)
            while not lines[-1].rstrip().endswith(BLOCK):
                lines.append(ask(True))
            lines[-1] = lines[-1].rstrip().removesuffix(BLOCK)
            return "\n".join(lines).strip("\n")
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1].removesuffix("\\")
            lines.append(ask(True))
    except EOFError:
        pass
    return "\n".join(lines)


@contextmanager
def _interruptible(catch: bool) -> Iterator[Callable[[], bool]]:
    """Ctrl-C sets what the yielded function returns; a second one raises KeyboardInterrupt, as does each without `catch`."""
    pressed = False
    if not catch:
        yield lambda: False
        return

    def press(*_: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def describe(conversation: Conversation) -> str:
    """How the next answer will be written, in a few words."""
    verify, own = conversation.settings.verify, getattr(conversation.model.generation_config, "eps_b", None)
    if verify == "strict":
        return "verify strict: exactly what one token a step would give"
    if verify != "off":
        return f"verify {verify}: at most {verify} nats a token less likely than strict"
    eps_b = conversation.settings.eps_b if conversation.settings.eps_b is not None else own if own is not None else "0.5"
    return f"verify off, eps_b {eps_b}: dynamic sampling"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f'"{text}" is not a number; eps_b is a probability, from 0 to 1.') from None
