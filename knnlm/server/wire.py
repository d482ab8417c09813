"""Requests and answers of OpenAI's completions API, as they go over the wire. The import of pydantic.

Types are strict: "1" is no number, true is no number, and a field that nobody knows is refused rather than ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


def _encodable(text: str) -> str:
    """JSON can write half of a surrogate pair, of which no tokenizer makes anything."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise PydanticCustomError("unicode", "Input should be Unicode text without half surrogate pairs")
    return text


def _integral(value: object) -> object:
    """JSON knows numbers only: 3.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_integral)]
Count = Annotated[int, Field(ge=0), BeforeValidator(_integral)]
Positive = Annotated[int, Field(ge=1), BeforeValidator(_integral)]
Text = Annotated[str, AfterValidator(_encodable)]
Token = Annotated[int, Field(ge=0, lt=1 << 31), BeforeValidator(_integral)]
# Of a list's wrong elements the first is enough: an error for each of a million takes gigabytes.
_SOME = Field(min_length=1, fail_fast=True)
Tokens = Annotated[list[Token], _SOME]
Prompt = Text | Annotated[list[Text], _SOME] | Tokens | Annotated[list[Tokens], _SOME]
Stop = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_encodable)]
Neutral = Annotated[float, Field(ge=0, le=0)]
"""Nothing but 0: clients send it, and it changes nothing."""


class Request(BaseModel):
    """A body, or a part of one."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, data: object) -> object:
        """Of unknown fields the first is enough, as of a list's elements."""
        if not isinstance(data, dict):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = [name for name in data if name not in known]
        return {name: data[name] for name in (*(data.keys() & known), *unknown[:1])}


class KnnOptions(Request):
    """The kNN-LM's own settings; what is not given is what the server was started with."""

    lam: Annotated[float | None, Field(alias="lambda", ge=0, le=1)] = None
    k: Positive | None = None
    temperature: Annotated[float | None, Field(gt=0)] = None


class StreamOptions(Request):
    """A last piece with the number of tokens."""

    include_usage: bool | None = None


class CompletionRequest(Request):
    """OpenAI's request, and `knn`. What is null is as if it were not there."""

    model: str
    prompt: Prompt
    max_tokens: Count | None = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    n: Positive | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: Integer | None = None
    logprobs: Annotated[int, Field(ge=0, le=20), BeforeValidator(_integral)] | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    knn: KnnOptions | None = None
    best_of: Annotated[Positive | None, Field(description="As n: the best of more is not looked for.")] = None
    frequency_penalty: Neutral | None = None
    presence_penalty: Neutral | None = None
    logit_bias: Annotated[dict[str, Any] | None, Field(max_length=0)] = None
    suffix: Annotated[str | None, Field(max_length=0)] = None


class Logprobs(BaseModel):
    """Lists of one length. Of a prompt's first token nothing is known."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(BaseModel):
    """One continuation of one prompt, or a piece of it."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Usage(BaseModel):
    """Numbers of tokens; each prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """The answer, or a piece of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class Model(BaseModel):
    """The kNN-LM that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["knnlm"] = "knnlm"


class Models(BaseModel):
    """There is one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """The server answers."""

    status: Literal["ok"] = "ok"


class ErrorBody(BaseModel):
    """What is wrong, where, and in one word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """OpenAI's shape of an error."""

    error: ErrorBody
