"""Request models and response documents of the explorer's API.

Types are strict, and unknown fields are refused. Long lists of numbers are sent as little-endian float32 in base64,
which is half as long as digits and lossless.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from knnlm.files import path_tails
from knnlm.inference.explain import SHOWN_NEIGHBORS, Explainer
from knnlm.knn.evidence import LIKELIEST, Evidence
from knnlm.knn.mixing import NEAREST
from knnlm.knn.trust import FIRST, SILENT, SWITCH
from knnlm.server.wire import Request

MAX_TOKENS = 1024
"""Tokens of a text; a shorter context of the model is a limit as well."""
MAX_CHARACTERS = 20_000
MAX_NEW_TOKENS = 200
MAX_SOURCES = 100
LARGEST_SEED = (1 << 53) - 1
"""Largest integer that JavaScript represents exactly."""

# pydantic checks texts of bounded length for lone surrogates, which JSON can hold, and refuses them.
Text = Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1, max_length=MAX_TOKENS)]
Row = Annotated[int, Field(ge=0)]


class OfGeneration(Request):
    """A request that goes on from an explanation: rows and documents are those of its `generation`."""

    generation: str | None = None


class ExplainRequest(OfGeneration):
    """A text or its tokens, and the layer whose keys are searched."""

    text: Text | None = None
    tokens: Tokens | None = None
    layer: str | None = None


class ContinueRequest(OfGeneration):
    """Tokens to continue under a setting; a `temperature_lm` of 0 takes the likeliest token each time."""

    tokens: Tokens
    layer: str | None = None
    k: Annotated[int, Field(ge=1)]
    temperature: Annotated[float, Field(gt=0)]
    lam: Annotated[float, Field(alias="lambda", ge=0, le=1)]
    gated: bool = False
    """Whether λ varies from token to token, by the layer's gate and the text so far."""
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] = 40
    temperature_lm: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] = 0


class SourcesRequest(OfGeneration):
    """Rows of the datastore whose text is requested."""

    rows: Annotated[list[Row], Field(max_length=MAX_SOURCES)]


class OverlapsRequest(OfGeneration):
    """Tokens of a text whose longest runs in the documents are requested."""

    tokens: Tokens


def generation(explainer: Explainer) -> str:
    """Name of the generation: under another one, rows and documents may have other numbers."""
    return "+".join(f"{one.manifest.generation}-{one.manifest.content}" for one in explainer.store.stores)


def store_document(explainer: Explainer) -> dict[str, Any]:
    """Model, datastore, its layers with their settings, and the page's limits."""
    store = explainer.store
    return {
        "model": path_tails(explainer.lm.name)[-2:][0],
        "store": store.name,
        "keys": store.count,
        "documents": len(store.documents),
        "layers": [_layer(explainer, layer) for layer in store.layers],
        "max_tokens": max_tokens(explainer),
        "max_characters": MAX_CHARACTERS,
        "max_new_tokens": MAX_NEW_TOKENS,
        "likeliest": LIKELIEST,
        "neighbors": SHOWN_NEIGHBORS,
        "nearest": NEAREST,
        "trust": {"first": FIRST, "switch": SWITCH, "silent": SILENT},
    }


def max_tokens(explainer: Explainer) -> int:
    """Maximum number of tokens in a text."""
    limit = explainer.lm.context_limit
    return MAX_TOKENS if limit is None else min(limit, MAX_TOKENS)


def _layer(explainer: Explainer, layer: str) -> dict[str, Any]:
    setting = explainer.retrieval(layer).setting
    return {
        "name": layer,
        "first": layer == explainer.first,
        "fitted": explainer.is_fitted(layer),
        "k": setting.k,
        "temperature": setting.temperature,
        "lambda": setting.lam,
        "gate": setting.gate and asdict(setting.gate),
        "by_text": setting.by_text,
        "depth": explainer.depth(layer),
    }


def texts_document(
    explainer: Explainer, tokens: Sequence[int], pieces: Sequence[str], evidence: Sequence[Evidence | None]
) -> dict[str, Any]:
    """Tokens of a text with their evidence, and the text of every token in the evidence."""
    named = {int(token) for one in evidence if one is not None for token in one.tokens_M}
    known = explainer.memory.documents
    documents = [None if one is None else known.of(one.found.rows_K) for one in evidence]
    cited = {int(document) for one in documents if one is not None for document in one}
    return {
        "tokens": [token_document(*one) for one in zip(tokens, pieces, evidence, documents, strict=True)],
        "documents": {str(document): known.name(document) for document in sorted(cited)},
        "texts": {str(token): explainer.token_text(token) for token in sorted(named)},
    }


def token_document(
    token: int, piece: str, evidence: Evidence | None, documents_K: NDArray[np.int64] | None
) -> dict[str, Any]:
    """A token with its evidence: distances, rows, documents and votes (places among the M tokens) of K neighbours."""
    if evidence is None or documents_K is None:
        return {"token": token, "text": piece, "evidence": None}
    found = evidence.found
    votes_K = np.searchsorted(evidence.tokens_M, found.values_K)
    told = {
        "tokens": evidence.tokens_M.tolist(),
        "lm": _floats(evidence.lm_M),
        "distances": _floats(found.distances_K),
        "votes": votes_K.tolist(),
        "rows": found.rows_K.tolist(),
        "documents": documents_K.tolist(),
    }
    return {"token": token, "text": piece, "evidence": told}


def sources_document(explainer: Explainer, rows: Iterable[int]) -> dict[str, Any]:
    """The text around each of the rows."""
    return {"sources": [asdict(explainer.source(row)) for row in rows]}


def overlaps_document(explainer: Explainer, tokens: Sequence[int]) -> dict[str, Any]:
    """For each document with one of the tokens, the length of the longest run of them that stands in it."""
    runs = explainer.memory.text.longest_runs(tokens)
    return {"overlaps": {str(document): run.tokens for document, run in runs.items()}}


def _floats(values: NDArray[Any]) -> str:
    return b64encode(values.astype("<f4").tobytes()).decode("ascii")
