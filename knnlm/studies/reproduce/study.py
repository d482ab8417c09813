"""Published perplexities on WikiText-103, measured again: the plain LM, and the kNN-LM in three ways.

Windows and targets are those of neulab/knn-transformers (`protocol='knn-transformers'`): blocks of 1,024 tokens, 512
of them new, of groups of 1,000 rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from knnlm.config import LayerConfig, Settings, TextConfig
from knnlm.evaluation.outcomes import evaluate_layers, perplexity
from knnlm.evaluation.queries import Queries, open_queries
from knnlm.extraction.collect import collect
from knnlm.extraction.sinks import TargetScorer
from knnlm.model.lm import LanguageModel
from knnlm.pipeline import build
from knnlm.pipeline.job import Job
from knnlm.places import DATASTORE
from knnlm.progress import Progress, Silent
from knnlm.store.datastore import Datastore
from knnlm.studies.reproduce.published import TOLERANCE
from knnlm.studies.reproduce.theirs import RawKeys, TheirSettings, build_their_index, their_losses

# That project's `last_ffn_input`.
LAYER = "-1.ffn_input"
SETTINGS = Settings(
    text=TextConfig(context=1024, stride=512, protocol="knn-transformers"), layers=LayerConfig(layers=LAYER)
)


@dataclass(frozen=True)
class Reproduced:
    """A perplexity, over all targets, and what was published."""

    name: str
    perplexity: float
    published: float | None = None
    k: int | None = None
    """Of the kNN-LM, as are `lam` and `temperature`."""
    lam: float | None = None
    temperature: float | None = None

    @property
    def agrees(self) -> bool | None:
        """Whether it is the published figure; None if there is none."""
        return None if self.published is None else abs(self.perplexity - self.published) <= TOLERANCE


@dataclass(frozen=True)
class Reproduction:
    """Perplexities over the same targets."""

    tokens: int
    """Targets."""
    rows: tuple[Reproduced, ...]
    keys: int | None = None
    """Of the datastore; None where there is none."""


def reproduce_plain(
    lm: LanguageModel,
    text: str,
    *,
    published: float | None = None,
    settings: Settings = SETTINGS,
    progress: Progress | None = None,
) -> Reproduction:
    """Return the plain LM's perplexity over all targets of a text.

    :raises InputError: the model sees fewer tokens than a window has, or no text.
    """
    job, scorer = Job(lm, settings, progress or Silent()), TargetScorer(lm)
    with job.progress.stage("text through the model", "tokens") as advance:
        collect(
            lm, job.documents([text]), job.window, (), batch_tokens=job.batch_tokens, targets=scorer, advance=advance
        )
    losses_N = -scorer.targets().log_probs_N
    return Reproduction(len(losses_N), (Reproduced(f"{lm.name}, plain", perplexity(losses_N), published),))


def reproduce_memory(
    lm: LanguageModel,
    text: str,
    eval_text: str,
    out: str | Path,
    *,
    published: tuple[float | None, float | None] = (None, None),
    theirs: TheirSettings | None = None,
    settings: Settings = SETTINGS,
    progress: Progress | None = None,
) -> Reproduction:
    """Return the perplexity of the plain LM and of three kNN-LMs, whose keys are those of a text.

    They are that project's (its index, distances from codes, k, lambda and T as given), the same with exact distances
    of the neighbours that its index finds, and ours (our index, k, lambda and T fitted on one half of the evaluation
    text and reported on the other, both ways).

    :param out: the datastore; a finished one is used again.
    :param published: the plain LM's perplexity and the kNN-LM's.
    :raises index.errors.VectorIndexError: too few keys for their index.
    :raises DatastoreMismatch: the datastore that is there was made with another model.
    """
    job, theirs = Job(lm, settings, progress or Silent()), theirs or TheirSettings()
    store = _open_or_build(job, text, Path(out))
    documents = list(job.documents([eval_text]))
    with open_queries(
        lm, documents, job.window, store.layers, batch_tokens=job.batch_tokens, progress=job.progress
    ) as queries:
        plain = Reproduced(f"{lm.name}, plain", perplexity(-queries.lm_Q), published[0])
        rows = (plain, *_their_rows(job, store, queries, theirs, published[1]), _our_row(job, store, queries))
    return Reproduction(len(queries.targets_Q), rows, store.count)


def _open_or_build(job: Job, text: str, out: Path) -> Datastore:
    if not (out / DATASTORE).is_file():
        return build(job.lm, [text], out, settings=job.settings, progress=job.progress)
    store = Datastore.open(out)
    store.check_model(job.lm.fingerprint)
    return store


def _their_rows(
    job: Job, store: Datastore, queries: Queries, theirs: TheirSettings, published: float | None
) -> tuple[Reproduced, Reproduced]:
    (layer,) = store.layers
    with job.progress.stage("building the index of knn-transformers", "keys") as advance:
        index = build_their_index(RawKeys(store, layer), theirs, advance)
    with job.progress.stage("searching in it", "queries") as advance:
        losses = their_losses(
            index, store.values, queries.vectors(layer), queries.targets_Q, queries.lm_Q, theirs, advance
        )
    given = (published, theirs.k, theirs.lam, theirs.temperature)
    return (
        Reproduced("knn-transformers, distances from codes", perplexity(losses.by_codes_Q), *given),
        Reproduced("the same neighbours, exact distances", perplexity(losses.exact_Q), *given),
    )


def _our_row(job: Job, store: Datastore, queries: Queries) -> Reproduced:
    (one,) = evaluate_layers(store, queries, store.layers, job.settings.knn, progress=job.progress)
    mix = one.mix
    return Reproduced("knnlm, fitted", perplexity(one.losses_Q), None, mix.k, mix.lam, mix.temperature)
