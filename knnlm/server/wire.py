"""Requests and answers of OpenAI's completions API, as they go over the wire. The import of pydantic.

Types are strict: "1" is no number, true is no number, and a field that nobody knows is refused rather than ignored.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
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
Tokens = Annotated[list[Token], Field(min_length=1)]
Prompt = Text | Annotated[list[Text], Field(min_length=1)] | Tokens | Annotated[list[Tokens], Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_encodable)]
Neutral = Annotated[float, Field(ge=0, le=0)]
"""Nothing but 0: clients send it, and it changes nothing."""


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class KnnOptions(_Request):
    """The kNN-LM's own settings; what is not given is what the server was started with."""

    lam: Annotated[float | None, Field(alias="lambda", ge=0, le=1)] = None
    k: Positive | None = None
    temperature: Annotated[float | None, Field(gt=0)] = None


class StreamOptions(_Request):
    """A last piece with the number of tokens."""

    include_usage: bool | None = None


class CompletionRequest(_Request):
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
    logit_bias: Annotated[dict[str, float] | None, Field(max_length=0)] = None
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
