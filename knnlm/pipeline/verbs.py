"""The verbs: score, build, evaluate, run. The command line is a thin skin over these.

    lm = load_model("my-model")
    store = build(lm, ["nursing.jsonl"], "nursing.knn")
    result = evaluate(lm, store, ["held-out.jsonl"])
    print(result.lm.perplexity, [(one.layer, one.perplexity) for one in result.layers])

Each takes one `Settings`; what is not said there has a default, and `None` means fitted or found out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from knnlm.config import Settings, TextConfig, check_stride
from knnlm.documents import score_from_document
from knnlm.evaluation.queries import check_evaluation
from knnlm.files import new_folder
from knnlm.knn.indexing import try_index
from knnlm.knn.searcher import is_exact, searched_layers
from knnlm.layer_names import select_layers
from knnlm.model.lm import LanguageModel
from knnlm.pipeline.job import Clock, Job, Paths
from knnlm.pipeline.plan import check_choice, check_query_room, estimate_tokens, make_plan
from knnlm.pipeline.steps import evaluate_store, extract, pass_over_text, score_result
from knnlm.progress import Progress, Silent
from knnlm.results import EvalResult, LayerResult, ScoreResult
from knnlm.scores.choose import SCORES_THAT_CHOOSE, candidate_layers
from knnlm.scores.layer_scorer import LayerScorer, Settled
from knnlm.store.datastore import Datastore, as_datastore
from knnlm.text.held_out import hold_out
from knnlm.text.windows import TokenDocument, count_targets

# Tokens on which `build` chooses before the one pass that stores the chosen layer.
SAMPLE_TOKENS = 200_000


def score(
    lm: LanguageModel,
    text: Paths,
    *,
    settings: Settings | None = None,
    stop_early: bool = False,
    share: float = 1,
    progress: Progress | None = None,
) -> ScoreResult:
    """Dispersion and the other label-free scores of every layer asked for, and the choice; writes nothing.

    :param stop_early: stop when it is settled which candidate dispersion takes.
    :param share: look at this share of the text only, taken evenly from all of it.
    """
    settings = settings or Settings()
    job = Job(lm, settings, progress or Silent())
    layers = select_layers(settings.layers.layers or "all", lm.layer_names)
    check_choice(lm, layers, settings)
    total = estimate_tokens(lm, text, settings.text)
    scorer = LayerScorer({name: lm.dims[name] for name in layers}, seed=settings.seed)
    settled = Settled(candidate_layers(settings.layers, layers, lm.layer_names))
    stop = settled if stop_early else None
    collected = pass_over_text(
        job, "scoring layers", job.documents(text, share), layers, total, scorer=scorer, stop=stop
    )
    return score_result(job, scorer, collected, stopped_early=settled.met)


def build(
    lm: LanguageModel,
    text: Paths,
    out: str | Path,
    *,
    settings: Settings | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Datastore:
    """Choose a layer on a bounded sample (or take `settings.layers.layers`), store its keys, index them.

    Where the index cannot be built, the datastore is searched exactly, and a note says so.
    :raises DatastoreExists: `out` holds something already; nothing was done.
    """
    settings = settings or Settings()
    job = Job(lm, settings, progress or Silent())
    with new_folder(Path(out), overwrite=overwrite) as folder:
        check_choice(lm, select_layers(settings.layers.layers or "all", lm.layer_names), settings)
        total = estimate_tokens(lm, text, settings.text)
        sampled = _choose_on_sample(job, text, total)
        layers = (sampled.choice.layer,) if sampled else _named_layers(job)
        scored = extract(job, job.documents(text), layers, folder, total=total, sampled=sampled)
    store = Datastore.open(Path(out))
    _, warnings = try_index(store, scored.choice.layer, settings, job.progress)
    for warning in warnings:
        job.progress.note(warning)
    return store


def _named_layers(job: Job) -> tuple[str, ...]:
    layers = job.settings.layers
    return select_layers(layers.layers or layers.select, job.lm.layer_names)


def _choose_on_sample(job: Job, text: Paths, total: int | None) -> ScoreResult | None:
    """The scores of all layers on a sample that ends when the choice is clear; None where layers are named.

    Of all, not of the candidates alone, so that the probe can tell of a better layer elsewhere.

    :param total: about how many tokens the text has; the sample is spread over them.
    """
    settings, layers = job.settings, job.settings.layers
    if layers.layers is not None or layers.select not in SCORES_THAT_CHOOSE:
        return None
    tokens = min(SAMPLE_TOKENS, settings.text.max_tokens or SAMPLE_TOKENS)
    # By documents, whatever the protocol of the datastore is: knn-transformers knows no part of a text.
    sample = replace(settings, text=replace(settings.text, max_tokens=tokens, protocol="documents"))
    stop_early, share = layers.select == "dispersion", min(1.0, tokens / max(1, total or tokens))
    sampled = score(job.lm, text, settings=sample, stop_early=stop_early, share=share, progress=job.progress)
    job.progress.note(f"{sampled.choice.reason}, on {sampled.tokens:,} tokens")
    if sampled.choice.disagreement:
        job.progress.note(sampled.choice.disagreement)
    return sampled


def evaluate(
    lm: LanguageModel,
    store: str | Path | Datastore,
    eval_text: Paths,
    *,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Perplexity of the plain LM and of the kNN-LM for every layer that the datastore holds.

    A layer with an index is searched through it, unless `settings.knn.index` is `exact`. The settings that `build` or
    `run` took serve here too.

    :param store: opened, or its folder.
    :raises InputError: settings that do not fit the datastore, such as another index or metric (`searched_layers`).
    :raises DatastoreMismatch: the datastore was made with another model or tokenizer; says which differs.
    """
    store, settings = as_datastore(store), settings or Settings()
    store.check_model(lm.fingerprint)
    layers = searched_layers(store, settings)
    job = Job(lm, replace(settings, text=_windows_like(store, settings.text)), progress or Silent())
    documents = job.evaluation_documents(eval_text)
    check_evaluation(documents)
    check_query_room(lm, layers, count_targets(documents))
    scores = store.manifest.scores  # null where Python code wrote the datastore without any
    scored = None if scores is None else score_from_document(scores)
    return evaluate_store(job, store, documents, layers, scored, exact=is_exact(settings.knn.index))


def _windows_like(store: Datastore, text: TextConfig) -> TextConfig:
    """The datastore's windows where nothing else is asked for; its stride never exceeds a context that is.

    :raises InputError: a stride is asked for that exceeds the datastore's context.
    """
    context = text.context or store.manifest.context
    stride = text.stride or min(store.manifest.stride, context)
    check_stride(stride, context, ", which the datastore was made with")
    return replace(text, context=context, stride=stride)


def run(
    lm: LanguageModel,
    text: Paths,
    out: str | Path,
    *,
    eval_text: Paths | None = None,
    settings: Settings | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> EvalResult:
    """The whole way: keys of every layer in one pass, scores, the choice, perplexity per layer, the index.

    Without `eval_text`, a tenth of the documents is held out. The folder `out` becomes a datastore. Layers are
    compared under exact search; the chosen one is then indexed, and its perplexity measured again with the index.
    Where the index cannot be built, a warning says so, and all else stands.
    :raises DatastoreExists: `out` holds something already; nothing was done.
    """
    job, clock = Job(lm, settings or Settings(), progress or Silent()), Clock()
    with clock.time("extract and score"), new_folder(Path(out), overwrite=overwrite) as folder:
        scored, documents = _extract_beside_evaluation(job, text, eval_text, folder)
    store = Datastore.open(Path(out))
    with clock.time("evaluate and index"):
        result = evaluate_store(job, store, documents, store.layers, scored, exact=True, index=True)
    store.update_manifest(fitted={one.layer: _setting(one) for one in result.layers})
    return replace(result, seconds=clock.seconds)


def _extract_beside_evaluation(
    job: Job, text: Paths, eval_text: Paths | None, folder: Path
) -> tuple[ScoreResult, Sequence[TokenDocument]]:
    """The scores of the stored layers, and the documents to evaluate on: given, or held out of the text."""
    given = job.evaluation_documents(eval_text) if eval_text else None
    if given is not None:
        check_evaluation(given)
    plan = make_plan(job.lm, text, folder, job.settings, given)
    job.progress.note(plan.sentence)
    documents = job.documents(text)
    if given is not None:
        return extract(job, documents, plan.layers, folder, total=plan.tokens), given
    held_out = hold_out(documents, max_tokens=job.settings.evaluation.eval_tokens, seed=job.settings.seed)
    scored = extract(job, held_out.training, plan.layers, folder, total=plan.tokens)
    check_evaluation(held_out.evaluation)
    return scored, held_out.evaluation


def _setting(one: LayerResult) -> dict[str, object]:
    moved = one.by_query
    gate = moved and {"offset": moved.offset, "distance": moved.distance, "different": moved.different}
    return {"k": one.k, "lambda": one.lam, "temperature": one.temperature, "gate": gate}
