"""Queries of the evaluation text from one forward pass: a small temporary datastore of float32 vectors, with targets.

Legend: Q query tokens, D dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from knnlm.config import BATCH_TOKENS
from knnlm.errors import InputError
from knnlm.evaluation.parts import Parts, split_parts
from knnlm.extraction.collect import collect
from knnlm.extraction.sinks import TargetScorer
from knnlm.files import temporary_folder
from knnlm.model.lm import LanguageModel
from knnlm.progress import Progress, Silent
from knnlm.store.datastore import Datastore
from knnlm.store.writer import DatastoreWriter
from knnlm.text.sizes import Sizes
from knnlm.text.windows import TokenDocument, WindowConfig, count_targets, target_sizes

Floats = NDArray[np.float64]
# In each of the two parts; fewer cannot determine k, temperature and lambda.
LEAST_TOKENS = 32


@dataclass(frozen=True, eq=False)
class Queries:
    """Queries, targets and LM log-probabilities of the evaluation text, from one forward pass."""

    store: Datastore
    parts: Parts
    targets_Q: NDArray[np.int32]
    """The token that each query has to predict."""
    lm_Q: Floats
    """The plain LM's log-probability of each target."""
    documents_Q: NDArray[np.int64]
    """The running number of each target's document."""
    sizes: Sizes | None = None
    """Bytes and words of the targets, if the documents were measured."""

    def vectors(self, layer: str) -> NDArray[np.float32]:
        """The layer's raw vectors, [Q, D]."""
        keys = self.store.keys(layer)
        vectors_QD = keys.read(0, len(keys))
        vectors_QD += keys.centre
        keys.release()
        return vectors_QD


@contextmanager
def open_queries(
    lm: LanguageModel,
    documents: Sequence[TokenDocument],
    config: WindowConfig,
    layers: Sequence[str],
    *,
    batch_tokens: int = BATCH_TOKENS,
    fitted: bool = True,
    progress: Progress | None = None,
) -> Iterator[Queries]:
    """Run the model over the evaluation text; its queries are on disk for the duration of the block."""
    progress = progress or Silent()
    total, scorer = count_targets(documents), TargetScorer(lm)
    with temporary_folder("knnlm-queries-") as folder:
        dims = {name: lm.dims[name] for name in layers}
        writer = DatastoreWriter(
            folder,
            dims,
            fingerprint=lm.fingerprint,
            context=config.context,
            stride=config.stride,
            key_dtype="float32",
            named_by="TMPDIR",
        )
        with writer, progress.stage("evaluation text through the model", "tokens") as advance:
            collect(
                lm,
                documents,
                config,
                layers,
                batch_tokens=batch_tokens,
                writer=writer,
                targets=scorer,
                advance=lambda done, _: advance(done, total),
            )
            writer.finish()
        targets, sizes = scorer.targets(), target_sizes(documents)
        parts = split_parts(targets.documents_N, fitted=fitted)
        yield Queries(Datastore.open(folder), parts, targets.targets_N, targets.log_probs_N, targets.documents_N, sizes)


def check_evaluation(documents: Sequence[TokenDocument]) -> None:
    """:raises InputError: too few tokens to tune on one part and report on the other."""
    lengths = [count_targets([document]) for document in documents]
    parts = split_parts(np.repeat(np.arange(len(lengths)), lengths)) if any(lengths) else None
    smaller = int(min(parts.tuning_Q.sum(), parts.fitting_Q.sum())) if parts else 0
    if smaller < LEAST_TOKENS:
        raise InputError(
            f"the evaluation text gives {sum(lengths):,} tokens to predict, {smaller} of them in the smaller of its "
            f"two parts, but at least {LEAST_TOKENS} are needed in each; give more"
        )
