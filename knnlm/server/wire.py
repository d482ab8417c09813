"""Request and response models of OpenAI's completions API.

Types are strict: "1" and true are not numbers, and an unknown field is refused rather than ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError


def _encodable(text: str) -> str:
    """Refuse lone surrogates, which JSON can hold but tokenizers cannot encode."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise PydanticCustomError("unicode", "Input should be Unicode text without half surrogate pairs")
    return text


def integral(value: object) -> object:
    """Convert 3.0 to 3: JSON does not distinguish them."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(integral)]
Count = Annotated[int, Field(ge=0), BeforeValidator(integral)]
Positive = Annotated[int, Field(ge=1), BeforeValidator(integral)]
Text = Annotated[str, AfterValidator(_encodable)]
Token = Annotated[int, Field(ge=0, lt=1 << 31), BeforeValidator(integral)]
# Only the first wrong element of a list is reported: an error for each of a million takes gigabytes.
_SOME = Field(min_length=1, fail_fast=True)
Tokens = Annotated[list[Token], _SOME]
Prompt = Text | Annotated[list[Text], _SOME] | Tokens | Annotated[list[Tokens], _SOME]
Stop = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_encodable)]
Neutral = Annotated[float, Field(ge=0, le=0)]
"""Only 0, which clients send and which has no effect."""
Nothing = Annotated[list[Any] | None, Field(max_length=0)]
"""A list that clients send empty where they use none of what it lists."""
Ignored = Annotated[Any, Field(description="Accepted and ignored: it cannot change the answer.")]


class Request(BaseModel):
    """A request body, or a part of one."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: object) -> object:
        """Refuse the first field that does not exist, with those that do: a misspelt one must not be ignored."""
        if isinstance(data, dict):
            known = [field.alias or name for name, field in cls.model_fields.items()]
            unknown = next((name for name in data if name not in known), None)
            if unknown is not None:
                problem = PydanticCustomError(
                    "unknown_field", "There is no such field, only {known}", {"known": ", ".join(known)}
                )
                raise ValidationError.from_exception_data(
                    cls.__name__, [InitErrorDetails(type=problem, loc=(unknown,), input=None)]
                )
        return data


class KnnOptions(Request):
    """Settings of retrieval and mixing; defaults are those of the server."""

    lam: Annotated[float | None, Field(alias="lambda", ge=0, le=1)] = None
    k: Positive | None = None
    temperature: Annotated[float | None, Field(gt=0)] = None
    citations: bool | None = None
    max_copy: Positive | None = None


class StreamOptions(Request):
    """Options of a stream; `include_usage` adds a last chunk with token counts."""

    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class Sampling(Request):
    """Fields shared by completion and chat requests. Null is the same as absent."""

    model: str
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    n: Positive | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: Integer | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    knn: KnnOptions | None = None
    frequency_penalty: Neutral | None = None
    presence_penalty: Neutral | None = None
    logit_bias: Annotated[dict[str, Any] | None, Field(max_length=0)] = None
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None


class Reloaded(BaseModel):
    """The generation of each datastore that is served from now on."""

    object: Literal["datastore"] = "datastore"
    id: str
    generations: list[int]
    keys: int


class CompletionRequest(Sampling):
    """OpenAI's completion request, with the additional field `knn`. Without a prompt, a new text is begun."""

    prompt: Prompt | None = None
    max_tokens: Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=20), BeforeValidator(integral)] | None = None
    echo: bool | None = None
    best_of: Annotated[
        Positive | None, Field(description="Must equal n: choosing the best of more is not supported.")
    ] = None
    suffix: Annotated[str | None, Field(max_length=0)] = None


class Logprobs(BaseModel):
    """Lists of equal length; null for the first token of an echoed prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class ChoiceDocument(BaseModel):
    """A document behind a choice: its share of the probability, and what that would have been without it."""

    document: str
    number: int
    share: float
    log_prob_without: float | None
    gain: float | None
    overlap: int
    verbatim: str


class ChoiceCitation(BaseModel):
    """The documents behind a choice, and the plain LM's share; null stands for an infinite number."""

    log_prob: float | None
    lm_share: float
    documents: list[ChoiceDocument]


class CompletionChoice(BaseModel):
    """One continuation of a prompt, or a chunk of it."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    citations: ChoiceCitation | None = None


class Usage(BaseModel):
    """Token counts; a prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """A completion, or a chunk of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Model(BaseModel):
    """The served kNN-LM."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["knnlm"] = "knnlm"


class Models(BaseModel):
    """The list of models, which has one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """The server accepts requests."""

    status: Literal["ok"] = "ok"


class ErrorBody(BaseModel):
    """An error: message, type, field and machine-readable code."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """OpenAI's error format."""

    error: ErrorBody
