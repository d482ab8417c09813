"""Memory that a verb takes besides the model and its searches, reckoned before any work."""

from __future__ import annotations

from knnlm.layer_names import FINAL, select_layers
from knnlm.memory import check_room, pass_bytes
from knnlm.pipeline.job import Job
from knnlm.scores.layer_scorer import SAMPLE_BYTES, SAMPLE_CAPACITY
from knnlm.store.joint import AnyStore
from knnlm.store.writer import PENDING_BYTES

# Bytes of each neighbour of an evaluation: distance, hit, and copies while k, lambda and T are fitted.
_NEIGHBOUR = 20
# Bytes of each neighbour in one of several datastores, before they are merged: distance and hit.
_UNMERGED = 5


def check_build_memory(job: Job, tokens: int | None) -> None:
    """Check that `settings.memory` can be kept by a verb that stores keys.

    :param tokens: about how many; None: not known.
    :raises InputError: it cannot; the message says what is needed.
    """
    lm, settings = job.lm, job.settings
    if settings.memory is None:
        return
    layers = select_layers(settings.layers.layers or "all", lm.layer_names)
    sample = min(SAMPLE_BYTES, 4 * SAMPLE_CAPACITY * sum(lm.dims[name] for name in layers))
    fitted = _fitting(job, settings.evaluation.eval_tokens or 0)
    check_room(settings.memory, _pass(job) + max(sample + PENDING_BYTES, fitted) + 4 * (tokens or 0))


def check_evaluation_memory(job: Job, store: AnyStore, queries: int) -> None:
    """As `check_build_memory`, for `evaluate` with so many queries."""
    stores, fitting = len(store.stores), _fitting(job, queries)
    unmerged = _UNMERGED * stores * queries * job.settings.knn.search_k if stores > 1 else 0
    check_room(job.settings.memory, _pass(job) + max(PENDING_BYTES, fitting + unmerged) + store.loaded_bytes)


def _pass(job: Job) -> float:
    return pass_bytes(job.lm.dims[FINAL], job.batch_tokens)


def _fitting(job: Job, queries: int) -> float:
    return _NEIGHBOUR * queries * job.settings.knn.search_k
