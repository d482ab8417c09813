"""What a client is told when it does not get what it asked for, in OpenAI's shape."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

BAD_REQUEST, SERVER_ERROR = "invalid_request_error", "server_error"
# Whoever was told that it takes too long should not ask for the same again: openai's client heeds this.
FINAL = {"x-should-retry": "false"}
_NO_JSON = "the body is no JSON object, or is not declared as application/json"
# Fields that may have several forms: a wrong one has a problem with each of them.
_OF_MANY_FORMS = ("prompt", "stop", "content")


class Refusal(Exception):
    """An answer with an error.

    :param param: the field of the request that is wrong.
    :param code: the reason in one word, for programs.
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
        """ASCII only: what was received, and is told again, may hold what UTF-8 has no bytes for."""
        return json.dumps(self.content).encode("ascii")


def mistake() -> Refusal:
    """Something that should not have happened; whoever tells a client so lets the exception go on to the log."""
    message = "the server made a mistake; its log tells which"
    return Refusal(500, message, code="internal_error", headers={"connection": "close"})  # uvicorn will close it


def no_json() -> Refusal:
    """The body cannot be read."""
    return Refusal(400, _NO_JSON)


def invalid(problems: Sequence[Mapping[str, Any]]) -> Refusal:
    """A body that is no JSON, or not of the form that is described.

    :param problems: as pydantic tells them.
    """
    where = problems[0]["loc"][1:]
    if problems[0]["type"] == "json_invalid" or not where:
        return no_json()
    forms = next((place for place, name in enumerate(where) if name in _OF_MANY_FORMS), len(where))
    where = where[: forms + 1]
    found = dict.fromkeys(one["msg"] for one in problems if one["loc"][1 : 1 + len(where)] == where)
    field = ".".join(map(str, where))
    return Refusal(400, f"{field}: {'; or '.join(found).replace('Input should be', 'must be')}", param=field)


def too_long(seconds: float) -> Refusal:
    """The time is up."""
    message = f"this took longer than the {seconds:g} seconds that a request may take; ask for less"
    return Refusal(408, message, code="timeout", headers=FINAL)


def too_many(limit: int) -> Refusal:
    """The queue is full."""
    message = f"{limit} completions wait already; try again in a moment"
    return Refusal(429, message, code="queue_full", headers={"retry-after": "1"})
