"""The bodies of the reference engine's HTTP calls: OpenAI's completions with vLLM's additions, as far as they are offered.

A field that isn't here, or a value that isn't offered, is refused with a sentence: nothing is ignored silently.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, ValidationInfo, field_validator

from p2pkv.core.keys import MAX_TOKEN_ID
from p2pkv.engines.reference.engine import FinishReason

MAX_STOP_STRINGS = 4
"""As OpenAI takes them."""


def _only(offered: object, sentence: str) -> AfterValidator:
    """Refuses every value but `offered`."""

    def check(value: object) -> object:
        if value != offered:
            raise ValueError(sentence)
        return value

    return AfterValidator(check)


def _one_prompt(value: object) -> object:
    if not isinstance(value, str | list) or (isinstance(value, list) and not all(type(item) is int for item in value)):
        raise ValueError("must be one text or one list of token ids; send several prompts as several requests")
    return value


def _stop_strings(value: object) -> object:
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or len(strings) > MAX_STOP_STRINGS:
        raise ValueError(f"must be one text or a list of at most {MAX_STOP_STRINGS} texts")
    return tuple(strings)


TokenId = Annotated[StrictInt, Field(ge=0, le=MAX_TOKEN_ID)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Prompt = Annotated[str | list[TokenId], BeforeValidator(_one_prompt)]


class RequestBody(BaseModel):
    """What all requests have in common."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(RequestBody):
    """What a stream has besides the text: `include_usage`, one more chunk with the usage at its end."""

    include_usage: bool = False


class CompletionRequest(RequestBody):
    """`POST /v1/completions`. `return_token_ids` and `cache_salt` are vLLM's."""

    model: str
    prompt: Prompt
    max_tokens: int = Field(default=16, ge=1)
    temperature: Annotated[float, _only(0, "this engine decodes greedily: leave it out or send 0")] = 0
    n: Annotated[int, _only(1, "this engine gives one answer a request: leave it out or send 1")] = 1
    stop: Annotated[tuple[StopString, ...], BeforeValidator(_stop_strings)] = ()
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    cache_salt: str = Field(default="", max_length=1024)

    @field_validator("stream_options")
    @classmethod
    def _check_options(cls, options: StreamOptions | None, others: ValidationInfo) -> StreamOptions | None:
        if options is not None and not others.data.get("stream"):
            raise ValueError("only a stream takes them: leave them out or send stream: true")
        return options


class TokenizeRequest(RequestBody):
    """`POST /tokenize`, vLLM's."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(RequestBody):
    """`POST /detokenize`, vLLM's."""

    model: str | None = None
    tokens: list[TokenId]


class Choice(BaseModel):
    """The answer, or in a stream what it grew by.

    The token ids are null unless asked for; those of the prompt come with the first chunk. `finish_reason` is null in all but
    the last; `stop_reason` is the stop string, if one ended the answer.
    """

    index: Literal[0] = 0
    text: str
    logprobs: None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None
    token_ids: tuple[int, ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None


class PromptTokensDetails(BaseModel):
    """Where the prompt's KV came from: `cached_tokens` were loaded, the others computed; the last always is."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of one completion."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionReply(BaseModel):
    """Answer to `CompletionRequest`."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: tuple[Choice]
    usage: Usage


class CompletionChunk(BaseModel):
    """One event of a stream. With `include_usage` the last has the usage and no choice; without it none has `usage`."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: tuple[Choice, ...]
    usage: Usage | None


class TokenizeReply(BaseModel):
    """Answer to `TokenizeRequest`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None


class DetokenizeReply(BaseModel):
    """Answer to `DetokenizeRequest`."""

    prompt: str


class ModelCard(BaseModel):
    """One name under which the model is served; `root` is its own."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["p2pkv"] = "p2pkv"
    root: str
    parent: None = None
    max_model_len: int


class ModelsReply(BaseModel):
    """Answer to `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class HealthReply(BaseModel):
    """Answer to `GET /health`: the engine serves; `cache_problem` says why it does so without its cache, if it does."""

    cache_problem: str | None


class ErrorDetail(BaseModel):
    """What went wrong, as OpenAI and vLLM say it."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorReply(BaseModel):
    """Every refusal."""

    error: ErrorDetail
