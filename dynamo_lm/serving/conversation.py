"""A conversation with a model: its messages, what of them fits into the context, and answers that come step by step.

In: a model, its tokenizer, dials, and what a person says. Out: answers as characters, step by step, and their statistics.
Knows nothing about terminals.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from dynamo_lm.backbone.token_limits import context_limit, token_ids
from dynamo_lm.data.chat_template import chat_template, encode_chat, end_of_turn
from dynamo_lm.decoding.detokenizer import IncrementalDetokenizer
from dynamo_lm.decoding.options import check_verify
from dynamo_lm.decoding.statistics import Statistics
from dynamo_lm.errors import InputError
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.sampling.options import Algorithm1


@dataclass
class GenerationSettings:
    """How answers are written; may be turned between any two. Raises InputError for values out of range."""

    verify: str | float = "strict"  # or "off", or a budget in nats per token
    eps_b: float | None = None  # under "off"; None: the model's own
    temperature: float | None = None  # 0: the likeliest tokens; None: 0 if verified, the model's under "off"
    max_new_tokens: int = 512
    seed: int = 0  # of the first answer; each one after it has the next

    def __post_init__(self) -> None:
        check_verify(self.verify)
        if self.eps_b is not None:
            Algorithm1(eps_b=self.eps_b)
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise InputError(f"The temperature is {self.temperature}; give 0 (the likeliest tokens) or more.")
        if self.max_new_tokens < 1:
            raise InputError(f"An answer of {self.max_new_tokens} tokens is none; give 1 or more.")


@dataclass(frozen=True)
class Answer:
    """What the model said."""

    text: str
    statistics: Statistics
    left_out: int  # turns that this answer no longer saw and the one before it did


class Conversation:
    """Turns of a person and a model.

    Attributes:
        messages: everything that was said, as {"role", "content"}.
        dials: of the next answer.
        statistics: of every answer since the beginning.
    """

    def __init__(
        self, model: DynaMoForCausalLM, tokenizer: Any, dials: GenerationSettings, *, system: str | None = None
    ) -> None:
        """
        Args:
            system: what the model is told before the first turn; never left out.

        Raises:
            InputError: the tokenizer has no chat template, and there can be none.
        """
        self.model, self.tokenizer, self.dials = model, chat_template(tokenizer), dials
        self.preface = [{"role": "system", "content": system}] if system else []
        own = token_ids(model.generation_config.eos_token_id)
        self.ends = token_ids([*own, tokenizer.eos_token_id, end_of_turn(tokenizer)])
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the preface."""
        self.messages = list(self.preface)
        self.statistics: list[Statistics] = []
        self._left_out = 0  # turns that the prompt begins behind

    def answer(
        self, text: str, *, on_text: Callable[[str], None] = lambda text: None, stopped: Callable[[], bool] = lambda: False
    ) -> Answer:
        """What the model says to `text`; both become part of the conversation, unless the answer is empty.

        Args:
            on_text: called after each step with the characters that it made certain, perhaps none.
            stopped: asked at each step; the answer ends where it says yes.

        Raises:
            InputError: the message alone is longer than the context, or the dials do not fit the model.
        """
        said = {"role": "user", "content": text}
        prompt, left_out = self._prompt(said)
        dials, off = self.dials, self.dials.verify == "off"
        sample = off if dials.temperature is None else dials.temperature > 0
        ids = torch.tensor([prompt], device=self.model.device)
        writer = IncrementalDetokenizer(self.tokenizer, prompt)
        begun = False

        def give(more: str) -> None:
            nonlocal begun
            more = more if begun else more.lstrip()  # templates and tokenizers differ in who writes the first space
            begun = begun or bool(more)
            on_text(more)

        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            verify=dials.verify,
            eps_b=dials.eps_b if off else None,
            do_sample=sample,
            max_new_tokens=dials.max_new_tokens,
            seed=dials.seed + len(self.statistics),
            eos_token_id=self.ends,
            stopping_criteria=StoppingCriteriaList([_Stopped(stopped)]),
            on_step=lambda row, new: give(writer.add(new)),
            return_dict_in_generate=True,
            **({"temperature": dials.temperature} if sample and dials.temperature is not None else {}),
        )
        give(writer.end())
        answer = writer.text.strip()
        newly, self._left_out = left_out - self._left_out, left_out
        self.statistics.append(output.statistics[0])
        if answer:
            self.messages += [said, {"role": "assistant", "content": answer}]
        return Answer(answer, output.statistics[0], newly)

    def save(self, file: Path) -> None:
        """Writes the conversation as one JSON line of messages, which `dynamo-lm finetune` reads.

        Raises:
            InputError: nothing was said, or the file cannot be written.
        """
        if len(self.messages) == len(self.preface):
            raise InputError("There is nothing to save yet; say something first.")
        try:
            file.write_text(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f'"{file}" cannot be written: {error.strerror}.') from error

    def _prompt(self, said: dict[str, str]) -> tuple[list[int], int]:
        """The tokens of the conversation with `said` behind it, and how many of the oldest turns they leave out.

        Room is kept for the answer, though no more than half of the context.
        """
        turns = self.messages[len(self.preface) :]
        context = context_limit(self.model.config)
        left_out = self._left_out
        while True:
            prompt = encode_chat(self.tokenizer, [*self.preface, *turns[2 * left_out :], said])
            room = min(self.dials.max_new_tokens, context // 2)
            if len(prompt) + room <= context or 2 * left_out >= len(turns):
                return prompt, left_out
            left_out += 1


class _Stopped(StoppingCriteria):
    """Ends a text when somebody asks for it."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.full((len(input_ids),), self.stopped())
