"""Error responses, in OpenAI's format."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

BAD_REQUEST, SERVER_ERROR = "invalid_request_error", "server_error"
# A request that timed out should not be repeated: openai's client honours this header.
FINAL = {"x-should-retry": "false"}
_NO_JSON = "the body is no JSON object, or is not declared as application/json"
# Fields of several types: pydantic reports a wrong value once for each type.
_OF_MANY_FORMS = ("prompt", "stop", "content")
# pydantic's words and ours, in order.
_WORDS = (
    (r"Field required", "this field is required"),
    (r"a valid dictionary( or object to extract fields from)?", "an object"),
    (r"Input should be None", "must be null"),
    (r"Input should be", "must be"),
    (r"(String|List|Dictionary) should have", "must have"),
    (r" after validation, not \d+", ""),
)


class Refusal(Exception):
    """An error response.

    :param param: the request's field with the error.
    :param code: a short machine-readable reason.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"content-type": "application/json", **(headers or {})}
        kind = BAD_REQUEST if status < 500 else SERVER_ERROR
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @property
    def body(self) -> bytes:
        """JSON in ASCII: received text that is quoted may hold lone surrogates, which UTF-8 cannot encode."""
        return json.dumps(self.content).encode("ascii")


def mistake() -> Refusal:
    """Response to an unexpected exception; the caller must also raise it, so that it is logged."""
    message = "the server made a mistake; its log tells which"
    return Refusal(500, message, code="internal_error", headers={"connection": "close"})  # uvicorn will close it


def no_json() -> Refusal:
    """Response to a body that is not a JSON object."""
    return Refusal(400, _NO_JSON)


def invalid(problems: Sequence[Mapping[str, Any]]) -> Refusal:
    """Response to a body that is not JSON or does not match the schema.

    :param problems: the errors that pydantic reports.
    """
    where = problems[0]["loc"][1:]
    if problems[0]["type"] == "json_invalid" or not where:
        return no_json()
    forms = next((place for place, name in enumerate(where) if name in _OF_MANY_FORMS), len(where))
    where = where[: forms + 1]
    found = dict.fromkeys(_in_words(one["msg"]) for one in problems if one["loc"][1 : 1 + len(where)] == where)
    field = ".".join(map(str, where))
    return Refusal(400, f"{field}: {'; or '.join(found)}", param=field)


def _in_words(message: str) -> str:
    for pattern, words in _WORDS:
        message = re.sub(pattern, words, message)
    return message


def too_long(seconds: float) -> Refusal:
    """Response to a request that takes too long."""
    message = f"this took longer than the {seconds:g} seconds that a request may take; ask for less"
    return Refusal(408, message, code="timeout", headers=FINAL)


def too_many(limit: int) -> Refusal:
    """Response when the queue is full."""
    message = f"{limit} completions wait already; try again in a moment"
    return Refusal(429, message, code="queue_full", headers={"retry-after": "1"})
