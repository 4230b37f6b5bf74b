"""Self-distillation: the questions of a set of conversations, with answers by the model that is to be tuned.

Heads that learn to predict what their base writes, and not what somebody else wrote, agree with it more often (Medusa,
arXiv 2401.10774, section 2.3). Answers are the base's own. This process writes them in large batches of one token a step,
which is the fastest way on any device because a batch makes good use of each weight that is read; or a server that holds the
same model does. Each answer is on disk as soon as it ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

from torch import nn

from dynamo_lm.data.chat_template import encode_chat, end_of_turn
from dynamo_lm.data.conversations import Messages
from dynamo_lm.decoding.batch import Batch
from dynamo_lm.decoding.sequence import SequenceState
from dynamo_lm.decoding.settings import resolve
from dynamo_lm.errors import InputError, first_line
from dynamo_lm.jsonl_cache import JsonlCache, key_of
from dynamo_lm.kernels.linear import arrange_for_batches
from dynamo_lm.model.checkpoint import identity
from dynamo_lm.model.modeling import DynaMoForCausalLM

LONGEST_PERIOD = 40  # tokens; a text that repeats more than that is not a loop
REPEATS = 3  # of a period that is taken for a loop; short periods need more
LOOK_EVERY = 8  # steps


class Question(NamedTuple):
    """One answer to be given."""

    number: int  # the conversation's
    messages: Messages
    prompt: list[int]
    room: int  # tokens of the answer at most
    seed: int


class Answer(NamedTuple):
    """An answer that has ended."""

    question: Question
    text: str
    tokens: int
    ids: Sequence[int] = ()  # its tokens, where this process wrote it
    finish: str = ""  # "stop", "length" or "loop", likewise


class Answerer(Protocol):
    """Who answers. `name` identifies model and settings; at most `capacity` questions are open at a time."""

    name: str
    capacity: int

    def ask(self, question: Question) -> None:
        """Opens a question."""

    def answers(self) -> list[Answer]:
        """Those that ended meanwhile; goes on until there is at least one where questions are open, or a step is done."""


class BatchAnswerer:
    """The model in this process, many questions at a time, one token a step."""

    def __init__(self, model: DynaMoForCausalLM, tokenizer: Any, *, temperature: float = 0.7, batch_size: int = 32):
        """temperature: 0 for the likeliest token.

        Raises:
            InputError: a temperature below 0.
        """
        if temperature < 0:
            raise InputError(f"--distill-temperature is {temperature}; give 0 or more.")
        self.name, self.capacity = f"{identity(model)} at {temperature}", batch_size
        self.model, self.tokenizer, self.temperature = model, tokenizer, temperature
        self.ends = [end_of_turn(tokenizer), tokenizer.eos_token_id]
        self.batch = Batch(model, 1)
        arrange_for_batches(cast(nn.Module, self.batch.model), batch_size)
        self.open: dict[SequenceState, Question] = {}
        self.steps = 0

    def ask(self, question: Question, temperature: float | None = None) -> None:
        """temperature: of this answer alone."""
        options = resolve(
            self.model,
            {"temperature": self.temperature if temperature is None else temperature, "num_heads": 1},
            max_new_tokens=question.room,
            end_tokens=self.ends,
        )
        self.open[self.batch.join(question.prompt, options, seed=question.seed, number=question.number)] = question

    def answers(self) -> list[Answer]:
        ended = []
        self.steps += 1
        for sequence in self.batch.step():
            tokens, finish = sequence.new_tokens, sequence.finished
            if finish is None and self.steps % LOOK_EVERY == 0 and (extra := repeated(tokens)):
                self.batch.leave(sequence)
                tokens, finish = tokens[:-extra], "loop"
            if finish is None:
                continue
            text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            ended.append(Answer(self.open.pop(sequence), text, len(tokens), tokens, finish))
        return ended


class EndpointAnswerer:
    """The same model on OpenAI-compatible servers (vLLM, llama.cpp), several requests at a time, which they take in turn."""

    def __init__(self, *base_urls: str, model: str, temperature: float = 0.7, requests: int = 32, timeout: float = 600):
        """Prepare the connection; no request is sent yet.

        Args:
            base_urls: such as http://localhost:8000/v1. The first names the answers, so that others may come and go.
            model: what the servers call it.
            requests: how many are open at a time.

        Raises:
            InputError: the openai package is missing, or a temperature below 0.
        """
        try:
            import openai
        except ImportError as error:
            raise InputError('Answers of a server need the openai package; `pip install "dynamo-lm[train]"`.') from error
        if temperature < 0:
            raise InputError(f"--distill-temperature is {temperature}; give 0 or more.")
        self.name, self.capacity = f"{base_urls[0]} {model} at {temperature}", requests
        clients = [openai.OpenAI(base_url=url, api_key="none", timeout=timeout, max_retries=5) for url in base_urls]
        self.clients = cycle(clients)
        self.model, self.temperature, self.errors = model, temperature, (openai.OpenAIError,)
        self.pool = ThreadPoolExecutor(requests)
        self.open: set[Future[Answer]] = set()

    def ask(self, question: Question) -> None:
        self.open.add(self.pool.submit(self._request, question, next(self.clients)))

    def answers(self) -> list[Answer]:
        ended, self.open = wait(self.open, return_when=FIRST_COMPLETED)
        try:
            return [future.result() for future in ended]
        except InputError:
            self.pool.shutdown(wait=False, cancel_futures=True)
            raise

    def _request(self, question: Question, client: Any) -> Answer:
        try:
            reply = client.chat.completions.create(
                model=self.model,
                messages=[dict(message) for message in question.messages],
                max_tokens=question.room,
                temperature=self.temperature,
                seed=question.seed,
            )
        except self.errors as error:
            raise InputError(
                f"The server at {client.base_url} gave no answer ({first_line(error)}); earlier answers are kept, so "
                "run the same command again when it does."
            ) from error
        text = (reply.choices[0].message.content or "").strip()
        return Answer(question, text, reply.usage.completion_tokens if reply.usage else 0)


def repeated(tokens: list[int]) -> int:
    """How many tokens at the end only repeat the ones before them: 0 unless the text has run into a loop.

    Greedy decoding of small models ends in loops, which heads would learn by heart.
    """
    for period in range(1, LONGEST_PERIOD + 1):
        times = REPEATS if period > 8 else 2 * REPEATS
        if len(tokens) >= times * period and tokens[-period:] * times == tokens[-times * period :]:
            return (times - 1) * period
    return 0


def distill(
    answerer: Answerer,
    tokenizer: Any,
    questions: Sequence[Messages],
    *,
    longest: int,
    max_new_tokens: int,
    seed: int = 0,
    cache: Path | None = None,
    progress: Callable[[int, int, int], None] = lambda done, total, tokens: None,
) -> list[Messages | None]:
    """The conversations with every answer replaced by the model's: a later question follows the model's own answers.

    Args:
        longest: tokens of a conversation, answer included.
        max_new_tokens: of an answer; one that reaches the limit is kept as far as it goes.
        seed: of all random numbers; an answer of a `BatchAnswerer` depends on it and on its prompt, not on the batch.
        cache: file of the answers (a `JsonlCache`), so that a stopped run resumes.
        progress: called with the answers done, their total number and the tokens generated for them.

    Returns:
        None where an answer was empty or had no room.
    """
    answered = JsonlCache(cache)
    results: list[Messages | None] = [[] for _ in questions]
    total = sum(message["role"] == "assistant" for messages in questions for message in messages)
    done = tokens = pending = 0
    # Prompts that are read together are padded to the longest, so neighbours should be alike.
    waiting = deque(sorted(range(len(questions)), key=lambda i: sum(len(m["content"]) for m in questions[i][:2])))

    def advance(index: int) -> bool:
        """Add the cached answers to a conversation; request the first that is missing and return whether there was one."""
        nonlocal done
        while (messages := results[index]) is not None and len(messages) < len(questions[index]):
            message = questions[index][len(messages)]
            if message["role"] != "assistant":
                messages.append(message)
                continue
            prompt = encode_chat(tokenizer, messages)
            room = min(max_new_tokens, longest - len(prompt))
            key = key_of(answerer.name, prompt, room, seed)
            if room >= 1 and key not in answered:
                answerer.ask(Question(index, list(messages), prompt, room, int(key[:7], 16)))
                keys[index] = key
                return True
            text = answered[key] if room >= 1 else None
            done += 1 if text else sum(later["role"] == "assistant" for later in questions[index][len(messages) :])
            progress(done, total, tokens)
            if text:
                messages.append({"role": "assistant", "content": text})
            else:
                results[index] = None
        return False

    keys: dict[int, str] = {}  # of conversations that wait for an answer
    while waiting or pending:
        while waiting and pending < answerer.capacity:
            pending += advance(waiting.popleft())
        for answer in answerer.answers() if pending else []:
            index = answer.question.number
            tokens += answer.tokens
            answered.put(keys.pop(index), answer.text or None)
            pending += advance(index) - 1
    return results
