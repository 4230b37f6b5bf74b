"""From a request to sequences to decode: prompts as tokens, options, seeds; and the limits that a request must keep to.

In: a request as `dynamo_lm.serving.protocol` checked it. Out: one `GenerationRequest` for each text of the answer. What a
request leaves open is the server's setting, then the model's own default, then OpenAI's. Knows no network.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dynamo_lm.backbone.token_limits import context_limit, end_tokens
from dynamo_lm.data.chat_template import encode_chat, end_of_turn
from dynamo_lm.decoding.detokenizer import IncrementalDetokenizer
from dynamo_lm.decoding.options import DecodingOptions, StoppingCriterion
from dynamo_lm.decoding.preconditions import check_sequence
from dynamo_lm.decoding.settings import resolve
from dynamo_lm.errors import InputError
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.serving.protocol import APIError, ChatRequest, CompletionRequest, Request
from dynamo_lm.serving.settings import ServerSettings
from dynamo_lm.serving.token_text import Vocabulary

COMPLETION_TOKENS = 16  # OpenAI's default for completions; chats may fill what is left
MAX_TOP_K = 100  # under "off": grids grow with a power of it, and everybody waits for a step
TOO_LONG = "context_length_exceeded"
UNSUPPORTED = (
    *("logit_bias", "min_p", "min_tokens", "ignore_eos", "stop_token_ids", "bad_words", "no_repeat_ngram_size", "grammar"),
    "structured_outputs",
)


@dataclass(frozen=True)
class Echo:
    """What an answer repeats in front of the text."""

    text: str = ""
    offsets: Sequence[int] = ()  # by token of the prompt: characters of `text` in front of it


@dataclass(frozen=True)
class GenerationRequest:
    """One text to write."""

    prompt: list[int]
    options: DecodingOptions
    seed: int
    stop_strings: tuple[str, ...] = ()
    echo: Echo = Echo()
    choice: int = 0  # index of the text in the answer
    first_of_prompt: bool = True  # whether it is the first text of its prompt


@dataclass
class StopStrings:
    """A stopping criterion: whether one sequence's new text holds a stop string. Made for one sequence, called after each
    new token."""

    detokenizer: IncrementalDetokenizer
    seen: int = field(default=0)  # tokens of the sequence that the detokenizer has

    def __call__(self, tokens: Tensor) -> bool:
        self.detokenizer.add(tokens[self.seen :].tolist())
        self.seen = len(tokens)
        return self.detokenizer.ended


class RequestParser:
    """Translates requests for one model and tokenizer."""

    def __init__(self, model: DynaMoForCausalLM, tokenizer: Any, settings: ServerSettings):
        self.model, self.tokenizer, self.settings, self.limits = model, tokenizer, settings, settings.limits
        self.vocabulary = Vocabulary(tokenizer)
        self.context = context_limit(model.config)
        self.longest_prompt = min(self.limits.max_prompt_tokens or self.context, self.context)
        self.end_tokens = frozenset(end_tokens(model.generation_config, tokenizer))
        self.chat_end_tokens = self.end_tokens | ({end_of_turn(tokenizer)} if tokenizer.chat_template else set())

    # ------------------------------------------------------------------ requests

    def completion(self, request: CompletionRequest) -> list[GenerationRequest]:
        """Every text of a completion: of each prompt in turn, `n`.

        Raises:
            APIError: an option that is not supported, or a limit; the message names it.
        """
        refuse_unsupported(request)
        if request.suffix:
            raise APIError(400, "suffix is not supported; the text can only be continued.", param="suffix")
        if request.best_of is not None and request.best_of != (request.n or 1):
            raise APIError(400, "best_of is supported only as the same number as n.", param="best_of")
        prompts = self._prompts(request.prompt)
        echo, limit, scored = bool(request.echo), request.max_tokens, request.logprobs is not None
        if limit == 0 and not (echo and scored):
            message = "max_tokens is 0, which goes with echo and logprobs only; give 1 or more."
            raise APIError(400, message, param="max_tokens")
        texts: list[GenerationRequest] = []
        for ids, text in prompts:
            length = self._length(ids, limit, COMPLETION_TOKENS)
            front = self._echo(ids, text) if echo else Echo()
            scores = {"logprobs": request.logprobs, "prompt_logprobs": echo and scored}
            texts += self._texts(request, ids, length, self.end_tokens, first=len(texts), echo=front, **scores)
        return texts

    def chat(self, request: ChatRequest) -> list[GenerationRequest]:
        """Every text of a chat: the next message, `n` times.

        Raises:
            APIError: as above, or messages that the chat template refuses.
        """
        refuse_unsupported(request)
        for name in ("tools", "functions"):
            if getattr(request, name):
                raise APIError(400, f"{name} are not supported.", param=name)
        if request.top_logprobs is not None and not request.logprobs:
            raise APIError(400, "top_logprobs goes with logprobs: true.", param="top_logprobs")
        roles = {"developer": "system"}  # OpenAI's newer name
        messages = [{"role": roles.get(each.role, each.role), "content": each.text} for each in request.messages]
        self._check_characters("".join(message["content"] for message in messages))
        try:
            ids = encode_chat(self.tokenizer, messages)
        except InputError as error:
            raise APIError(400, str(error), param="messages") from error
        limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        if limit == 0:
            raise APIError(400, "max_tokens is 0; give 1 or more.", param="max_tokens")
        alternatives = (request.top_logprobs or 0) if request.logprobs else None
        length = self._length(ids, limit, self.context)
        return self._texts(request, ids, length, self.chat_end_tokens, logprobs=alternatives)

    # ------------------------------------------------------------------ prompts

    def _prompts(self, prompt: Any) -> list[tuple[list[int], str | None]]:
        """Every prompt as tokens and, if it came as text, as text."""
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        if not prompt:
            raise APIError(400, "prompt is empty; give a text, or token ids.", param="prompt")
        return [(self._encoded(each), each) if isinstance(each, str) else (list(each), None) for each in prompt]

    def _encoded(self, text: str) -> list[int]:
        self._check_characters(text)
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        first = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        return ids or ([first] if first is not None else [])  # an empty text begins as every text does

    def _check_characters(self, text: str) -> None:
        """Refuses what cannot fit before time is spent on tokenizing it."""
        if len(text) > self.longest_prompt * self.vocabulary.longest:
            message = f"The prompt has {len(text)} characters, which cannot fit into {self._prompt_limit()}."
            raise APIError(400, message, param="prompt", code=TOO_LONG)

    def _prompt_limit(self) -> str:
        if self.longest_prompt < self.context:
            return f"the {self.longest_prompt} tokens that this server takes as a prompt (--max-prompt-tokens)"
        return f"the model's context of {self.context} tokens"

    def _length(self, ids: Sequence[int], wanted: int | None, default: int) -> int:
        """The most tokens to write: those wanted, or as many of the default as fit."""
        if len(ids) > self.longest_prompt:
            message = f"The prompt has {len(ids)} tokens, more than {self._prompt_limit()}."
            raise APIError(400, message, param="prompt", code=TOO_LONG)
        room, limit = self.context - len(ids), self.limits.max_tokens
        if wanted is None:
            return max(1, min(default, room, limit or room))
        if limit is not None and wanted > limit:
            message = f"max_tokens is {wanted}, but this server writes at most {limit} (--max-tokens)."
            raise APIError(400, message, param="max_tokens")
        if wanted > room:
            message = (
                f"The prompt has {len(ids)} tokens and max_tokens is {wanted}, together more than the model's context of "
                f"{self.context} tokens."
            )
            raise APIError(400, message, param="max_tokens", code=TOO_LONG)
        return wanted

    def _echo(self, ids: Sequence[int], text: str | None) -> Echo:
        """A prompt as the answer repeats it: the text as it came, else what the tokens stand for."""
        if any(token >= self.model.config.vocab_size for token in ids):
            return Echo()  # `check_sequence` refuses it with a better message
        if text is not None and self.tokenizer.is_fast:
            return Echo(text, _offsets(self.tokenizer, text, len(ids)))
        detokenizer = IncrementalDetokenizer(self.tokenizer, [])
        offsets = []
        for token in ids:
            detokenizer.add([token])
            offsets.append(detokenizer.start[0])
        front = detokenizer.text if text is None else text  # an incomplete character is completed by the new text
        return Echo(front, [min(offset, len(front)) for offset in offsets])

    # ------------------------------------------------------------------ options

    def _texts(
        self,
        request: Request,
        ids: list[int],
        length: int,
        ends: frozenset[int],
        *,
        first: int = 0,
        echo: Echo = Echo(),
        **scores: Any,
    ) -> list[GenerationRequest]:
        """`n` texts of one prompt, with seeds that follow each other."""
        seed = random.SystemRandom().randrange(2**31) if request.seed is None else request.seed
        stop_strings = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
        texts = []
        for number in range(request.n or 1):
            criteria: tuple[StoppingCriterion, ...] = ()
            if stop_strings:
                criteria = (StopStrings(IncrementalDetokenizer(self.tokenizer, ids, stop_strings), len(ids)),)
            try:
                options = self._options(
                    request, max_new_tokens=length, end_tokens=ends, stopping_criteria=criteria, **scores
                )
                check_sequence(self.model, ids, options)
            except InputError as error:
                raise APIError(400, str(error)) from error
            text_seed = (seed + number) % 2**63
            texts.append(GenerationRequest(ids, options, text_seed, stop_strings, echo, first + number, number == 0))
        return texts

    def _options(self, request: Request, **more: Any) -> DecodingOptions:
        """How to decode: by the request, else the server, else the model's generation configuration, else OpenAI."""
        served, most = self.settings.generation, self.settings.generation.num_heads
        if self.settings.strict_only and request.verify not in (None, "strict", 0):
            message = 'This server decodes exactly (--strict-only); leave verify out, or give "strict".'
            raise APIError(400, message, param="verify")
        if most is not None and (request.num_heads or 0) > most:
            message = f"num_heads is {request.num_heads}, but this server has {most}; give that or less."
            raise APIError(400, message, param="num_heads")
        options = resolve(self.model, request, served, self.model.generation_config, **more)
        if not options.off and request.eps_b is not None:
            message = 'eps_b belongs to verify "off"; verified decoding has no use for it.'
            raise APIError(400, message, param="eps_b")
        if options.off and request.top_p not in (None, 1.0):
            message = 'top_p does not apply to verify "off"; use top_k, or verify "strict".'
            raise APIError(400, message, param="top_p")
        if options.off and (top_k := options.algorithm.top_k) > MAX_TOP_K:
            message = f'top_k is {top_k}, but verify "off" takes {MAX_TOP_K} at most on this server.'
            raise APIError(400, message, param="top_k")
        return options


def _offsets(tokenizer: Any, text: str, count: int) -> list[int]:
    """By token of a text, the characters in front of it; those that the tokenizer adds have none of their own."""
    if not text:
        return [0] * count  # of a token that stands for an empty text
    offsets, end = [], 0
    for start, stop in tokenizer(text, verbose=False, return_offsets_mapping=True)["offset_mapping"]:
        offsets.append(min(start, end) if stop > start else end)  # some tokenizers leave a space out of a token's span
        end = max(end, stop)
    return offsets


def refuse_unsupported(request: Request) -> None:
    """Raises APIError for what would change the text and is not supported."""
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(request, name):
            raise APIError(400, f"{name} is not supported; leave it out, or see repetition_penalty.", param=name)
    for name in UNSUPPORTED:
        if getattr(request, name):
            raise APIError(400, f"{name} is not supported; leave it out.", param=name)
    if request.stream_options is not None and not request.stream:
        raise APIError(400, "stream_options goes with stream: true.", param="stream_options")
