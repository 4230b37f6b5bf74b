"""A conversation with a model: its messages, what of them fits into the context, and answers that come step by step.

In: a model, its tokenizer, settings, and messages. Out: answers as characters, step by step, and their statistics.
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
from dynamo_lm.decoding.statistics import Statistics
from dynamo_lm.errors import InputError
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.serving.settings import ChatSettings


@dataclass(frozen=True)
class Answer:
    """One answer of the model."""

    text: str
    statistics: Statistics
    left_out: int  # turns that this answer no longer saw and the one before it did


class Conversation:
    """Turns of a person and a model.

    Attributes:
        messages: all of them so far, as {"role", "content"}.
        settings: of the next answer.
        statistics: of every answer since the beginning.
    """

    def __init__(
        self, model: DynaMoForCausalLM, tokenizer: Any, settings: ChatSettings, *, system: str | None = None
    ) -> None:
        """
        Args:
            system: the system message before the first turn; never left out.

        Raises:
            InputError: the tokenizer has no chat template, and there can be none.
        """
        self.model, self.tokenizer, self.settings = model, chat_template(tokenizer), settings
        self.preface = [{"role": "system", "content": system}] if system else []
        own = token_ids(model.generation_config.eos_token_id)
        self.ends = token_ids([*own, tokenizer.eos_token_id, end_of_turn(tokenizer)])
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the preface."""
        self.messages = list(self.preface)
        self.statistics: list[Statistics] = []
        self._left_out = 0  # the oldest turns, which the prompt leaves out

    def answer(
        self, text: str, *, on_text: Callable[[str], None] = lambda text: None, stopped: Callable[[], bool] = lambda: False
    ) -> Answer:
        """Answers the message `text`; both become part of the conversation, unless the answer is empty.

        Args:
            on_text: called after each step with the characters that it completed, perhaps none.
            stopped: called at each step; the answer ends once it returns True.

        Raises:
            InputError: the message alone is longer than the context, or the settings do not fit the model.
        """
        message = {"role": "user", "content": text}
        prompt, left_out = self._prompt(message)
        settings, off = self.settings, self.settings.verify == "off"
        sample = off if settings.temperature is None else settings.temperature > 0
        ids = torch.tensor([prompt], device=self.model.device)
        detokenizer = IncrementalDetokenizer(self.tokenizer, prompt)
        begun = False

        def emit(new_text: str) -> None:
            nonlocal begun
            if not begun:  # templates and tokenizers differ in which of them writes the first space
                new_text = new_text.lstrip()
            begun = begun or bool(new_text)
            on_text(new_text)

        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            verify=settings.verify,
            eps_b=settings.eps_b if off else None,
            prompt_lookup_num_tokens=settings.prompt_lookup_num_tokens,
            do_sample=sample,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed + len(self.statistics),
            eos_token_id=self.ends,
            stopping_criteria=StoppingCriteriaList([_Stopped(stopped)]),
            on_step=lambda number, tokens: emit(detokenizer.add(tokens)),
            return_dict_in_generate=True,
            **({"temperature": settings.temperature} if sample and settings.temperature is not None else {}),
        )
        emit(detokenizer.end())
        answer = detokenizer.text.strip()
        newly, self._left_out = left_out - self._left_out, left_out
        self.statistics.append(output.statistics[0])
        if answer:
            self.messages += [message, {"role": "assistant", "content": answer}]
        return Answer(answer, output.statistics[0], newly)

    def save(self, file: Path) -> None:
        """Writes the conversation as one JSON line of messages, which `dynamo-lm finetune` reads.

        Raises:
            InputError: there is no message yet, or the file cannot be written.
        """
        if len(self.messages) == len(self.preface):
            raise InputError("There is nothing to save yet; say something first.")
        try:
            file.write_text(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f'"{file}" cannot be written: {error.strerror}.') from error

    def _prompt(self, message: dict[str, str]) -> tuple[list[int], int]:
        """The tokens of the conversation and the new message, and how many of the oldest turns they leave out.

        Room is kept for the answer, though no more than half of the context.
        """
        turns = self.messages[len(self.preface) :]
        context = context_limit(self.model.config)
        left_out = self._left_out
        while True:
            prompt = encode_chat(self.tokenizer, [*self.preface, *turns[2 * left_out :], message])
            room = min(self.settings.max_new_tokens, context // 2)
            if len(prompt) + room <= context or 2 * left_out >= len(turns):
                return prompt, left_out
            left_out += 1


class _Stopped(StoppingCriteria):
    """Ends a text when somebody asks for it."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.full((len(input_ids),), self.stopped())
