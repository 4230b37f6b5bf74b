"""From a request to rows of decoding: prompts as tokens, options, seeds; and the limits that a request must keep to.

In: a request as `dynamo_lm.serving.protocol` checked it. Out: one `GenerationRequest` for every text that is to be written.
Whatever a
request leaves open is the model's own default, then OpenAI's. Knows no network.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dynamo_lm.backbone.token_limits import context_limit, end_tokens
from dynamo_lm.data.chat_template import encode_chat, end_of_turn
from dynamo_lm.decoding.batch import check_row
from dynamo_lm.decoding.detokenizer import IncrementalDetokenizer
from dynamo_lm.decoding.options import DecodingOptions, StoppingCriterion
from dynamo_lm.decoding.settings import resolve
from dynamo_lm.errors import InputError
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.serving.protocol import APIError, ChatRequest, CompletionRequest, Request
from dynamo_lm.serving.token_text import Vocabulary

COMPLETION_TOKENS = 16  # OpenAI's default for completions; chats may fill what is left
WIDEST = 100  # candidates of a head under "off": its grids grow with a power of it, and everybody waits for a step


@dataclass(frozen=True)
class Limits:
    """What one server carries; a request beyond is refused with the number in the message."""

    batch: int = 16  # texts decoded together
    queue: int = 64  # texts that wait
    prompt_tokens: int | None = None  # of one prompt; None: what the context leaves
    new_tokens: int | None = None  # of one text; None: what the context leaves
    seconds: float = 120.0  # from acceptance to the last token
    body: int = 2**20  # bytes

    def __post_init__(self) -> None:
        for name, value, least in (
            ("max-batch", self.batch, 1),
            ("max-queue", self.queue, 0),
            ("max-prompt-tokens", self.prompt_tokens, 1),
            ("max-tokens", self.new_tokens, 1),
            ("max-body", self.body, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"--{name} is {value}; give {least} or more.")
        if not 0 < self.seconds < float("inf"):
            raise InputError(f"--max-seconds is {self.seconds:g}; give a number above 0.")


@dataclass(frozen=True)
class GenerationSettings:
    """How a server decodes where a request does not say."""

    num_heads: int  # the ceiling, also of what a request may ask for
    verify: str | float = "strict"
    eps_b: float | None = None  # None: the model's own, else the paper's
    strict_only: bool = False


@dataclass(frozen=True)
class GenerationRequest:
    """One text that is to be written."""

    prompt: list[int]
    options: DecodingOptions
    seed: int
    stops: tuple[str, ...] = ()
    echo: str = ""  # what the answer repeats in front of the text
    choice: int = 0  # index of the text in the answer
    opens: bool = True  # whether it is the first text of its prompt


@dataclass
class StopStrings:
    """A stop rule: whether one row's new text holds a stop string. Made for one row, and called behind each new token."""

    writer: IncrementalDetokenizer
    seen: int = field(default=0)  # tokens of the row that the writer knows

    def __call__(self, tokens: Tensor) -> bool:
        self.writer.add(tokens[self.seen :].tolist())
        self.seen = len(tokens)
        return self.writer.ended


class RequestParser:
    """Translates requests for one model and tokenizer."""

    def __init__(self, model: DynaMoForCausalLM, tokenizer: Any, dials: GenerationSettings, limits: Limits):
        self.model, self.tokenizer, self.dials, self.limits = model, tokenizer, dials, limits
        self.vocabulary = Vocabulary(tokenizer)
        self.context = context_limit(model.config)
        self.longest_prompt = min(limits.prompt_tokens or self.context, self.context)
        self.ends = frozenset(end_tokens(model.generation_config, tokenizer))
        self.chat_ends = self.ends | ({end_of_turn(tokenizer)} if tokenizer.chat_template else set())

    # ------------------------------------------------------------------ requests

    def of_completion(self, request: CompletionRequest) -> list[GenerationRequest]:
        """Every text of a completion: of each prompt in turn, `n`.

        Raises:
            Refusal: an option that is not honoured, or a limit; the message names it.
        """
        refuse_unsupported(request)
        if request.suffix:
            raise APIError(400, "suffix is not supported; the text can only be continued.", param="suffix")
        if request.best_of is not None and request.best_of != (request.n or 1):
            raise APIError(400, "best_of is supported only as the same number as n.", param="best_of")
        prompts = self._prompts(request.prompt)
        echo, most = bool(request.echo), request.max_tokens
        if most == 0 and not (echo and request.logprobs is not None):
            raise APIError(
                400, "max_tokens is 0, which goes with echo and logprobs only; give 1 or more.", param="max_tokens"
            )
        asks: list[GenerationRequest] = []
        for ids, text in prompts:
            room = self._room(ids, COMPLETION_TOKENS if most is None else most, stated=most is not None)
            front = (self._decoded(ids) if text is None else text) if echo else ""
            scored = {"logprobs": request.logprobs, "prompt_logprobs": echo and request.logprobs is not None}
            asks += self._rows(request, ids, room, self.ends, first=len(asks), echo=front, **scored)
        return asks

    def of_chat(self, request: ChatRequest) -> list[GenerationRequest]:
        """Every text of a chat: the next message, `n` times.

        Raises:
            Refusal: as above, or messages that the chat template refuses.
        """
        refuse_unsupported(request)
        for name in ("tools", "functions"):
            if getattr(request, name):
                raise APIError(400, f"{name} are not supported.", param=name)
        if request.top_logprobs is not None and not request.logprobs:
            raise APIError(400, "top_logprobs goes with logprobs: true.", param="top_logprobs")
        roles = {"developer": "system"}  # OpenAI's newer name
        messages = [{"role": roles.get(each.role, each.role), "content": each.text} for each in request.messages]
        self._check_length("".join(message["content"] for message in messages))
        try:
            ids = encode_chat(self.tokenizer, messages)
        except InputError as error:
            raise APIError(400, str(error), param="messages") from error
        most = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        if most == 0:
            raise APIError(400, "max_tokens is 0; give 1 or more.", param="max_tokens")
        room = self._room(ids, self.context if most is None else most, stated=most is not None)
        alternatives = (request.top_logprobs or 0) if request.logprobs else None
        return self._rows(request, ids, room, self.chat_ends, first=0, logprobs=alternatives)

    # ------------------------------------------------------------------ prompts

    def _prompts(self, prompt: Any) -> list[tuple[list[int], str | None]]:
        """Every prompt as tokens and, if it came as text, as text."""
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        if not prompt:
            raise APIError(400, "prompt is empty; give a text, or token ids.", param="prompt")
        return [(self._encoded(each), each) if isinstance(each, str) else (list(each), None) for each in prompt]

    def _encoded(self, text: str) -> list[int]:
        self._check_length(text)
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        first = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        return ids or ([first] if first is not None else [])  # no text at all begins where every text begins

    def _check_length(self, text: str) -> None:
        """Refuses what cannot fit before time is spent on turning it into tokens."""
        if len(text) > self.longest_prompt * self.vocabulary.longest:
            raise APIError(
                400,
                f"The prompt has {len(text)} characters, which cannot fit into {self._prompt_limit()}.",
                param="prompt",
                code="context_length_exceeded",
            )

    def _prompt_limit(self) -> str:
        if self.longest_prompt < self.context:
            return f"the {self.longest_prompt} tokens that this server takes as a prompt (--max-prompt-tokens)"
        return f"the model's context of {self.context} tokens"

    def _room(self, ids: Sequence[int], wanted: int, *, stated: bool) -> int:
        """How many tokens may be written: those wanted, or as many as fit if nobody stated a number."""
        if len(ids) > self.longest_prompt:
            raise APIError(
                400,
                f"The prompt has {len(ids)} tokens, more than {self._prompt_limit()}.",
                param="prompt",
                code="context_length_exceeded",
            )
        fits, limit = self.context - len(ids), self.limits.new_tokens
        if not stated:
            return max(1, min(wanted, fits, limit or fits))
        if limit is not None and wanted > limit:
            raise APIError(
                400, f"max_tokens is {wanted}, but this server writes at most {limit} (--max-tokens).", param="max_tokens"
            )
        if wanted > fits:
            raise APIError(
                400,
                f"The prompt has {len(ids)} tokens and max_tokens is {wanted}, together more than the model's context of "
                f"{self.context} tokens.",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return wanted

    def _decoded(self, ids: Sequence[int]) -> str:
        if any(token >= self.model.config.vocab_size for token in ids):
            return ""  # `check_row` says it better
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    # ------------------------------------------------------------------ options

    def _rows(
        self, request: Request, ids: list[int], room: int, ends: frozenset[int], *, first: int, echo: str = "", **scored: Any
    ) -> list[GenerationRequest]:
        """`n` rows of one prompt, with seeds that follow each other."""
        seed = random.SystemRandom().randrange(2**31) if request.seed is None else request.seed
        stops = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
        asks = []
        for number in range(request.n or 1):
            rules: tuple[StoppingCriterion, ...] = (
                (StopStrings(IncrementalDetokenizer(self.tokenizer, ids, stops), len(ids)),) if stops else ()
            )
            try:
                options = self._options(request, max_new_tokens=room, end_tokens=ends, stops=rules, **scored)
                check_row(self.model, ids, options)
            except InputError as error:
                raise APIError(400, str(error)) from error
            asks.append(GenerationRequest(ids, options, (seed + number) % 2**63, stops, echo, first + number, number == 0))
        return asks

    def _options(self, request: Request, **more: Any) -> DecodingOptions:
        """How to decode, by the request, else the server, else the model's generation configuration, else OpenAI."""
        served = self.dials
        if served.strict_only and request.verify not in (None, "strict", 0):
            raise APIError(
                400, 'This server decodes exactly (--strict-only); leave verify out, or give "strict".', param="verify"
            )
        if (request.num_heads or 0) > served.num_heads:
            raise APIError(
                400,
                f"num_heads is {request.num_heads}, but this server has {served.num_heads}; give that or less.",
                param="num_heads",
            )
        options = resolve(self.model, request, served, self.model.generation_config, **more)
        if options.off and request.top_p not in (None, 1.0):
            raise APIError(400, 'top_p does not apply to verify "off"; use top_k, or verify "strict".', param="top_p")
        if options.off and (top_k := options.algorithm.top_k) > WIDEST:
            raise APIError(400, f'top_k is {top_k}, but verify "off" takes {WIDEST} at most here.', param="top_k")
        if not options.off and request.eps_b is not None:
            raise APIError(400, 'eps_b belongs to verify "off"; verified decoding has no use for it.', param="eps_b")
        return options


def refuse_unsupported(request: Request) -> None:
    """Raises Refusal for what would change the text and is not done."""
    for name in ("presence_penalty", "frequency_penalty", "logit_bias"):
        if getattr(request, name):
            raise APIError(400, f"{name} is not supported; leave it out, or see repetition_penalty.", param=name)
    if request.stream_options is not None and not request.stream:
        raise APIError(400, "stream_options goes with stream: true.", param="stream_options")
