"""Chat: what the model is shown of a conversation, what a person can say, a pipe, and a real pseudo-terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import time
from pathlib import Path

import processes
import pytest
import torch
from architectures import markov_dynamo
from commandline import END, Run, byte_tokenizer, neox
from rich.console import Console

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.cli.chat import Session, Terminal, read_message
from dynamo_lm.cli.demo_view import COLOURS
from dynamo_lm.data.chat_template import encode_chat
from dynamo_lm.errors import InputError
from dynamo_lm.serving.conversation import Conversation
from dynamo_lm.serving.settings import ChatSettings

PROMPT = ">\x1b[0m "
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def alphabet(context: int = 128) -> DynaMoForCausalLM:
    """Says the alphabet, over and over, whatever it is asked, two letters a step; after "!" it has nothing to say."""
    tokenizer = byte_tokenizer(258)
    letter = [tokenizer.convert_tokens_to_ids(mark) for mark in LETTERS]
    one, two = torch.zeros(258, 258), torch.zeros(258, 258)
    one[:, letter[0]], two[:, letter[1]] = 1, 1
    for place, token in enumerate(letter):
        for table, ahead in ((one, 1), (two, 2)):
            table[token] = 0
            table[token, letter[(place + ahead) % 26]] = 1
    return markov_dynamo(one, two, context=context)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alphabet")
    alphabet(context=8192).save_pretrained(folder)
    byte_tokenizer(258).save_pretrained(folder)
    return folder


@pytest.fixture
def run(capfd):
    return Run(capfd)


def said(monkeypatch, text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


# --- the conversation -----------------------------------------------------------


def talk_with(model: DynaMoForCausalLM, system: str | None = None, **settings) -> Conversation:
    return Conversation(model, byte_tokenizer(model.config.vocab_size), ChatSettings(**settings), system=system)


def answer_to(talk: Conversation, messages: list[dict[str, str]]) -> str:
    """What the model writes behind these messages, offline."""
    ids = torch.tensor([encode_chat(talk.tokenizer, messages)])
    out = talk.model.generate(ids, max_new_tokens=talk.settings.max_new_tokens, eos_token_id=talk.ends)
    return talk.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_an_answer_is_what_the_model_writes_behind_the_whole_conversation():
    model = DynaMoForCausalLM.from_base(neox(), num_heads=3).eval()
    talk = talk_with(model, "the sun", max_new_tokens=9)
    asked: list[dict[str, str]] = [{"role": "system", "content": "the sun"}]
    for text in ("a fox", "a bird"):
        asked.append({"role": "user", "content": text})
        heard: list[str] = []
        answer = talk.answer(text, on_text=heard.append)
        assert answer.text == answer_to(talk, asked) == "".join(heard).strip()
        assert answer.statistics.new_tokens == 9 and answer.left_out == 0
        asked.append({"role": "assistant", "content": answer.text})
    assert talk.messages == asked
    talk.reset()
    assert (talk.messages, talk.statistics) == (asked[:1], [])


def test_a_conversation_longer_than_the_context_leaves_its_oldest_turns_out():
    talk = talk_with(alphabet(context=128), "be short", max_new_tokens=8)
    turns: list[dict[str, str]] = []
    shown = []  # turns that each answer saw
    for number in range(6):
        answer = talk.answer(f"question {number}")
        assert answer.text == LETTERS[:8]
        turns.append({"role": "user", "content": f"question {number}"})
        shown.append((shown[-1] if shown else 0) + 1 - answer.left_out)
        everything = [talk.preface[0], *turns[-2 * shown[-1] + 1 :]]
        assert len(encode_chat(talk.tokenizer, everything)) + 8 <= 128
        if shown[-1] < number + 1:
            more = [talk.preface[0], *turns[-2 * shown[-1] - 1 :]]
            assert len(encode_chat(talk.tokenizer, more)) + 8 > 128
        turns.append({"role": "assistant", "content": answer.text})
    assert shown[:2] == [1, 2] and shown[-1] < 6  # a turn is about forty tokens
    assert talk.messages == [talk.preface[0], *turns]  # nothing is lost


def test_a_message_longer_than_the_context_is_refused_and_forgotten():
    talk = talk_with(alphabet(context=128))
    with pytest.raises(InputError, match="context is 128"):
        talk.answer("long " * 50)
    assert talk.messages == []
    assert talk.answer("short").text.startswith(LETTERS[:20])


def test_an_answer_ends_where_somebody_stops_it_and_stays_in_the_conversation():
    talk = talk_with(alphabet(), max_new_tokens=50)
    steps: list[str] = []
    answer = talk.answer("go on", on_text=steps.append, stopped=lambda: len(steps) >= 3)
    assert answer.text == "abcdef" == "".join(steps)  # a; bc; de; and one letter of the step that heard of it
    assert answer.statistics.step_sizes == [1, 2, 2, 1]
    assert talk.messages[-1]["content"] == "abcdef"


def test_an_answer_of_nothing_leaves_no_trace():
    model, tokenizer = alphabet(), byte_tokenizer(258)
    silent = torch.zeros(258, 258)
    silent[:, tokenizer.convert_tokens_to_ids(END)] = 1
    model = markov_dynamo(silent, silent)
    talk = talk_with(model)
    assert talk.answer("hello").text == "" and talk.messages == []


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"verify": "maybe"}, 'give "strict"'),
        ({"verify": -0.1}, "nats per token"),
        ({"eps_b": 1.5}, "0 to 1"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_new_tokens": 0}, "1 or more"),
    ],
)
def test_settings_out_of_range_are_refused(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        ChatSettings(**settings)


def test_a_seed_repeats_a_conversation_and_its_answers_differ():
    model = DynaMoForCausalLM.from_base(neox(), num_heads=2).eval()
    settings = {"temperature": 1.5, "max_new_tokens": 20, "seed": 5}
    first, second = talk_with(model, **settings), talk_with(model, **settings)
    texts = [[talk.answer("again").text for _ in range(2)] for talk in (first, second)]
    assert texts[0] == texts[1]
    first.messages.clear()
    assert first.answer("again").text != texts[0][0]


# --- what a person types --------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["one"], "one"),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (['"""one', "", '  two"""'], "one\n\n  two"),
        (['"""', "one\\", '"""'], "one\\"),
        (['"""one"""'], "one"),
        (['"""'], ""),  # the end of what is typed ends a message
        (["one\\"], "one\n"),
    ],
)
def test_a_message_may_have_several_lines(lines, message):
    asked: list[bool] = []

    def ask(more: bool) -> str:
        asked.append(more)
        if len(asked) > len(lines):
            raise EOFError
        return lines[len(asked) - 1]

    assert read_message(ask).removesuffix("\n") == message.removesuffix("\n")
    assert asked[0] is False and all(asked[1:])


def test_what_a_model_says_cannot_steer_the_terminal():
    terminal = Terminal()
    terminal.console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", highlight=False)
    terminal.write("a\x1b[2J\x07b\n[red]c\x9b1m", 0)
    written = terminal.console.file.getvalue()
    assert re.sub(r"\x1b\[38;2;41;182;246m|\x1b\[0m", "", written) == "a[2Jb\n[red]c1m"


# --- through a pipe -------------------------------------------------------------


def test_through_a_pipe_every_line_is_a_turn_and_stdout_has_the_answers_alone(run, folder, monkeypatch):
    said(monkeypatch, "hello\n\nand\\\nmore\n/stats\n//slashed\n")
    assert run("chat", folder, "-n", 4) == "abcd\nabcd\nabcd\n"
    assert "2 answers: 8 tokens in 6 forward passes: 1.33 per pass" in run.err and "\x1b" not in run.err


def test_commands_change_the_settings(run, folder, monkeypatch, tmp_path):
    file = tmp_path / "talk.jsonl"
    lines = ["/verify", "/eps 0.25", "/eps", "hello", "/verify 0.1", "/verify strict", "hello", f"/save {file}", "/reset"]
    said(monkeypatch, "\n".join([*lines, "/help", "/quit", "never"]))
    run("chat", folder, "-n", 3, "--system", "be kind")
    notes = run.err.splitlines()
    assert [line.partition(":")[0] for line in notes[:5]] == [
        "verify strict",
        "verify off, eps_b 0.25",
        "verify off, eps_b 0.25",
        "verify 0.1",
        "verify strict",
    ]
    assert f"{file}: 5 messages" in notes and "The conversation is forgotten." in notes and "/reset" in run.err
    assert json.loads(file.read_text())["messages"] == [
        {"role": "system", "content": "be kind"},
        *[{"role": "user", "content": "hello"}, {"role": "assistant", "content": "abc"}] * 2,
    ]


def test_saving_again_replaces_what_this_conversation_wrote_and_nothing_else(run, folder, monkeypatch, tmp_path):
    file, other = tmp_path / "talk.jsonl", tmp_path / "other"
    other.write_text("precious")
    said(monkeypatch, f"one\n/save {file}\ntwo\n/save {file}\n/save {other}\n")
    run("chat", folder, "-n", 3, status=2)
    assert "is there already" in run.err
    assert len(json.loads(file.read_text())["messages"]) == 4 and other.read_text() == "precious"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/fly", "no command '/fly'"),
        ("/stats now", "no command"),
        ("/eps 2", "0 to 1"),
        ("/eps much", "is not a number"),
        ("/verify sometimes", 'give "strict"'),
        ("/save", "needs the name"),
        ("/save talk", "nothing to save"),
        ("/save /nowhere/talk", "nothing to save"),
        ("/stats", "no answer yet"),
        ("word " * 9000, "context is 8192"),
        (b"\xff", "0xff"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(run, folder, monkeypatch, line, sentence):
    said(monkeypatch, line)
    assert sentence in run.refused("chat", folder)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--verify", "strict", "--eps-b", "0.5"), "belongs to --verify off"),
        (("--eps-b", "7"), "0 to 1"),
        (("--temperature", "-1"), "temperature"),
        (("-n", "0"), "1 or more"),
        (("--device", "toaster"), "--device"),
    ],
)
def test_options_that_make_no_sense_are_refused(run, folder, monkeypatch, options, sentence):
    said(monkeypatch, "hello\n")
    assert sentence in run.refused("chat", folder, *options)


def test_a_model_without_heads_is_refused(run, tmp_path, monkeypatch):
    neox().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert "no DynaMo heads" in run.refused("chat", tmp_path)


# --- at a terminal --------------------------------------------------------------


class Screen:
    """A program at a pseudo-terminal of its own, which Ctrl-C reaches as it would at a real one."""

    def __init__(self, *arguments: object) -> None:
        self.end, other = pty.openpty()
        terminal = Path(os.ttyname(other))
        self.program = processes.start(
            processes.command,
            *map(str, arguments),
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            environment={"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "100"},
            terminal=True,
        )
        self.other = other  # closed when the program has it open
        self.seen = ""

    def type(self, text: str) -> None:
        self.seen = ""
        os.write(self.end, text.encode())

    def wait_for(self, text: str, seconds: float = 300) -> str:
        """What was shown since something was typed, up to `text`."""
        give_up = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < give_up, f"waited for {text!r}, saw {self.seen!r}"
            if select.select([self.end], [], [], 0.1)[0]:
                if self.other is not None:
                    self.other = os.close(self.other)
                try:
                    self.seen += os.read(self.end, 4096).decode(errors="replace")
                except OSError:  # as Linux says that nobody is at the other end
                    assert text in self.seen, self.seen
        return self.seen

    def leaves(self) -> int:
        """The exit status, read to the end."""
        while True:
            try:
                if not os.read(self.end, 4096):
                    break
            except OSError:
                break
        os.close(self.end)
        self.program.join(30)
        return self.program.exitcode


def coloured(text: str, step: int) -> str:
    red, green, blue = (int(COLOURS[step % len(COLOURS)][at : at + 2], 16) for at in (1, 3, 5))
    return f"\x1b[38;2;{red};{green};{blue}m{text}\x1b[0m"


@pytest.fixture
def screen(folder):
    screen = Screen("chat", folder, "-n", 8000, "--prompt-lookup", 0)
    yield screen
    screen.program.kill()  # if it has not left
    screen.program.join()


def test_at_a_terminal_steps_have_colours_and_ctrl_c_stops_the_answer_and_not_the_program(screen):
    screen.wait_for("Ctrl-D leaves.")
    screen.wait_for(PROMPT)
    screen.type("hello\r")
    seen = screen.wait_for(coloured("lm", 6))
    steps = ["a", "bc", "de", "fg", "hi", "jk", "lm"]
    assert "".join(coloured(text, step) for step, text in enumerate(steps)) in seen
    screen.type("\x03")
    assert "of at most 2" in screen.wait_for("tokens/s")
    assert "stopped; " in screen.seen
    screen.wait_for(PROMPT)
    screen.type("/stats\r")
    assert "1 answer: " in screen.wait_for(PROMPT)
    screen.type("\x04")
    assert screen.leaves() == 0


def test_at_the_prompt_ctrl_c_asks_and_a_second_one_in_a_row_leaves():
    typed = iter([KeyboardInterrupt, "/help", KeyboardInterrupt, KeyboardInterrupt])

    class Typist(Terminal):
        def __init__(self):
            super().__init__()
            self.noted = []

        def ask(self, more):
            line = next(typed)
            if line is KeyboardInterrupt:
                raise line
            return line

        def note(self, text):
            self.noted.append(text.strip())

    typist = Typist()
    conversation = Conversation(alphabet(), byte_tokenizer(), ChatSettings())
    with pytest.raises(KeyboardInterrupt):
        Session(conversation, typist).run()
    assert typist.noted.count("Ctrl-C again or Ctrl-D leaves.") == 2
    assert next(typed, None) is None
