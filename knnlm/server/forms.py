"""JSON forms of an answer: completions and chat completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from knnlm.server import chat_wire, wire
from knnlm.server.choices import Piece, TokenScore, Words


@dataclass(frozen=True)
class Head:
    """Fields shared by all documents of an answer."""

    id: str
    created: int
    model: str


class Form(Protocol):
    """Turns pieces into JSON documents; one instance for each answer."""

    prefix: str
    """Prefix of the answer's id."""

    def whole(self, head: Head, choices: Sequence[Sequence[Piece]], usage: wire.Usage) -> str:
        """All pieces of all choices."""

    def piece(self, head: Head, piece: Piece) -> str:
        """A piece of a stream."""

    def end(self, head: Head, usage: wire.Usage) -> str:
        """The last document of a stream, with the token counts."""


class CompletionForm:
    """OpenAI's completions.

    :param scored: log-probabilities are wanted.
    """

    prefix = "cmpl-"

    def __init__(self, words: Words, scored: bool) -> None:
        self._words, self._scored = words, scored

    def whole(self, head: Head, choices: Sequence[Sequence[Piece]], usage: wire.Usage) -> str:
        """All pieces of all choices."""
        return self._document(head, [self._choice(pieces) for pieces in choices], usage)

    def piece(self, head: Head, piece: Piece) -> str:
        """A piece of a stream."""
        return self._document(head, [self._choice([piece])], None)

    def end(self, head: Head, usage: wire.Usage) -> str:
        """The last piece of a stream."""
        return self._document(head, [], usage)

    def _document(self, head: Head, choices: list[wire.CompletionChoice], usage: wire.Usage | None) -> str:
        document = wire.Completion(id=head.id, created=head.created, model=head.model, choices=choices, usage=usage)
        return document.model_dump_json()

    def _choice(self, pieces: Sequence[Piece]) -> wire.CompletionChoice:
        logprobs = self._logprobs(_scores(pieces)) if self._scored else None
        return wire.CompletionChoice(
            index=pieces[-1].choice,
            text=_text(pieces),
            logprobs=logprobs,
            finish_reason=pieces[-1].finish,
            citations=_citation(pieces),
        )

    def _logprobs(self, scores: Sequence[TokenScore]) -> wire.Logprobs:
        return wire.Logprobs(
            tokens=[self._name(score) for score in scores],
            token_logprobs=[score.log_prob for score in scores],
            top_logprobs=[self._named(score) for score in scores],
            text_offset=[score.offset for score in scores],
        )

    def _named(self, score: TokenScore) -> dict[str, float] | None:
        """Log-probabilities by name of the likeliest tokens and the token itself; of equal names, the higher."""
        if score.log_prob is None:
            return None
        named = {self._name(score): score.log_prob}
        for token, log_prob in score.top:
            if token != score.token:
                name = self._words.name(token)
                named[name] = max(log_prob, named.get(name, log_prob))
        return named

    def _name(self, score: TokenScore) -> str:
        return self._words.name(score.token) if score.name is None else score.name


class ChatForm:
    """OpenAI's chat completions.

    :param scored: log-probabilities are wanted.
    """

    prefix = "chatcmpl-"

    def __init__(self, words: Words, scored: bool) -> None:
        self._words, self._scored = words, scored
        self._begun: set[int] = set()

    def whole(self, head: Head, choices: Sequence[Sequence[Piece]], usage: wire.Usage) -> str:
        """All pieces of all choices."""
        told = [
            chat_wire.ChatChoice(
                index=pieces[-1].choice,
                message=chat_wire.AssistantMessage(content=_text(pieces)),
                logprobs=self._logprobs(pieces),
                finish_reason=pieces[-1].finish,
                citations=_citation(pieces),
            )
            for pieces in choices
        ]
        document = chat_wire.ChatCompletion(
            id=head.id, created=head.created, model=head.model, choices=told, usage=usage
        )
        return document.model_dump_json()

    def piece(self, head: Head, piece: Piece) -> str:
        """A piece of a stream."""
        delta = chat_wire.Delta(role=None if piece.choice in self._begun else "assistant", content=piece.text)
        self._begun.add(piece.choice)
        choice = chat_wire.ChunkChoice(
            index=piece.choice,
            delta=delta,
            logprobs=self._logprobs([piece]),
            finish_reason=piece.finish,
            citations=_citation([piece]),
        )
        document = chat_wire.ChatChunk(id=head.id, created=head.created, model=head.model, choices=[choice])
        return document.model_dump_json()

    def end(self, head: Head, usage: wire.Usage) -> str:
        """The last piece of a stream."""
        document = chat_wire.ChatChunk(id=head.id, created=head.created, model=head.model, choices=[], usage=usage)
        return document.model_dump_json()

    def _logprobs(self, pieces: Sequence[Piece]) -> chat_wire.ChatLogprobs | None:
        if not self._scored:
            return None
        return chat_wire.ChatLogprobs(content=[self._scored_token(score) for score in _scores(pieces)])

    def _scored_token(self, score: TokenScore) -> chat_wire.TokenLogprob:
        assert score.log_prob is not None, "a chat tells nothing of its prompt"
        own = self._token(score.token, score.log_prob)
        top = [self._token(*one) for one in score.top]
        return chat_wire.TokenLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top)

    def _token(self, token: int, log_prob: float) -> chat_wire.TopLogprob:
        return chat_wire.TopLogprob(token=self._words.name(token), logprob=log_prob, bytes=self._words.bytes(token))


def _text(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _citation(pieces: Sequence[Piece]) -> wire.ChoiceCitation | None:
    found = pieces[-1].citation
    return None if found is None else wire.ChoiceCitation.model_validate(asdict(found))


def _scores(pieces: Sequence[Piece]) -> list[TokenScore]:
    return [score for piece in pieces for score in piece.scores]
