"""The JSON of requests and answers: OpenAI's fields for completions and chats, and this project's fields beside them.

Knows no model and no network. Numbers that JSON cannot hold (NaN, infinities) are refused; unknown fields are ignored, as
clients expect. The range of a field is checked here, whether the model supports it in `dynamo_lm.serving.requests`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

Finish = Literal["stop", "length"]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
MAX_STOP_STRINGS = 256  # each costs every token a search
UNLESS_NONE = Field(exclude_if=lambda value: value is None)  # a field of an answer that is left out where it says nothing
StopString = Annotated[str, Field(min_length=1, max_length=1000)]


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a pair, which JSON can hold and no text can
        raise ValueError("it holds characters that are no text") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]


# A field with values of several forms: each form has a tag, and a function gives the tag that a value should have, or None
# for a value of no form. So an error is one about that form, and not about the first form of all.


def _forms(form_of: Callable[[Any], str | None], description: str) -> Discriminator:
    return Discriminator(form_of, custom_error_type="no_form", custom_error_message=f"it must be {description}")


def _text_or_list(value: Any) -> str | None:
    return TEXT if isinstance(value, str) else LIST if isinstance(value, list) else None


def _form_of_verify(value: Any) -> str | None:
    if isinstance(value, str):
        return TEXT if value in ("strict", "off") else None
    return NUMBER if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _form_of_prompt(value: Any) -> str | None:
    if not isinstance(value, list):
        return TEXT if isinstance(value, str) else None
    if not value or isinstance(value[0], str):
        return LIST
    if isinstance(value[0], list):
        return LISTS
    return IDS if isinstance(value[0], int) and not isinstance(value[0], bool) else None


TEXT, NUMBER, LIST, IDS, LISTS = FORMS = ("<text>", "<number>", "<list>", "<token ids>", "<lists of token ids>")
Stop = Annotated[
    Annotated[StopString, Tag(TEXT)] | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS), Tag(LIST)],
    _forms(_text_or_list, "a text or a list of texts"),
]
Verify = Annotated[
    Annotated[Literal["strict", "off"], Tag(TEXT)] | Annotated[Finite, Field(ge=0), Tag(NUMBER)],
    _forms(_form_of_verify, '"strict", "off" or a number of nats per token, 0 or more'),
]
Prompt = Annotated[
    Annotated[Text, Tag(TEXT)]
    | Annotated[list[Text], Tag(LIST)]
    | Annotated[list[TokenId], Tag(IDS)]
    | Annotated[list[list[TokenId]], Tag(LISTS)],
    _forms(_form_of_prompt, "a text, a list of texts, a list of token ids, or a list of such lists"),
]


class APIError(Exception):
    """An error in OpenAI's form: one sentence, and an HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.retry_after = retry_after  # seconds

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}


# ------------------------------------------------------------------ requests


class StreamOptions(BaseModel):
    include_usage: bool | None = None  # one more chunk, with the tokens counted


class ResponseFormat(BaseModel):
    type: Literal["text"]


class Request(BaseModel):
    """What completions and chats have in common. None is the same as no value at all."""

    model_config = ConfigDict(strict=True)

    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None  # 0: the most likely
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Stop | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # This project's own
    verify: Verify | None = None
    eps_b: Annotated[Finite, Field(ge=0, le=1)] | None = None  # with verify "off"
    num_heads: Annotated[int, Field(ge=1)] | None = None  # the most tokens a step may give
    top_k: Annotated[int, Field(ge=1, le=1000)] | None = None
    repetition_penalty: Annotated[Finite, Field(ge=0.1, le=10)] | None = None

    # Not supported, some of them other servers': refused if set to a value that would change the text
    presence_penalty: Finite | None = None
    frequency_penalty: Finite | None = None
    logit_bias: dict[str, float] | None = None
    min_p: Finite | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    no_repeat_ngram_size: int | None = None
    grammar: str | None = None
    structured_outputs: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None


class CompletionRequest(Request):
    """POST /v1/completions"""

    prompt: Prompt
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: str | None = None


class TextPart(BaseModel):
    type: Literal["text"]
    text: Text


Content = Annotated[
    Annotated[Text, Tag(TEXT)] | Annotated[list[TextPart], Tag(LIST)],
    _forms(_text_or_list, "a text or a list of parts"),
]


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Request):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None


# ------------------------------------------------------------------ answers


class Head(BaseModel):
    """The first fields of every answer and chunk."""

    id: str
    object: str
    created: int
    model: str


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Figures(BaseModel):
    """Cost and quality of the texts; log-likelihood and regret are under the base model, in nats per token."""

    forwards: int  # of the model, the prompt's included
    new_tokens: int
    tokens_per_step: float
    ceiling: int  # the most tokens a step could give
    histogram: list[int]  # how many steps gave 1, 2, .. tokens
    backed_off: int  # steps that gave fewer tokens than the ceiling
    step_sizes: list[int] | None  # tokens of each step, in order; null where several texts are summed up
    mean_log_likelihood: float
    mean_regret: float
    verify: str | float
    eps_b: float | None  # null unless verify is "off"
    seed: int | None  # that repeats the text; null where several texts are summed up
    seconds: float  # from the first forward to the last
    timed_out: bool  # whether the server's time limit cut a text short


class Steps(BaseModel):
    """Beside a streamed chunk: the tokens that one step of decoding gave, each as text."""

    step: list[str]


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Finish | None = None
    dynamo: Annotated[Figures | None, UNLESS_NONE] = None


class Completion(Head):
    """The answer to a completion, and each chunk of a streamed one."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Annotated[Usage | None, UNLESS_NONE] = None
    dynamo: Annotated[Figures | Steps | None, UNLESS_NONE] = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish
    dynamo: Annotated[Figures | None, UNLESS_NONE] = None


class ChatCompletion(Head):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage
    dynamo: Figures


class Delta(BaseModel):
    role: Annotated[Literal["assistant"] | None, UNLESS_NONE] = None
    content: Annotated[str | None, UNLESS_NONE] = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None = None
    dynamo: Annotated[Figures | None, UNLESS_NONE] = None


class ChatChunk(Head):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Annotated[Usage | None, UNLESS_NONE] = None
    dynamo: Annotated[Figures | Steps | None, UNLESS_NONE] = None


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "dynamo-lm"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok", "stopping", "failed"]


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: Error
