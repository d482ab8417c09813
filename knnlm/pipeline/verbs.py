"""The verbs score, build, evaluate and run. The command line is a thin layer over them.

    lm = load_model("my-model")
    store = build(lm, ["nursing.jsonl"], "nursing.knn")
    result = evaluate(lm, store, ["held-out.jsonl"])
    print(result.lm.perplexity, [(one.layer, one.perplexity) for one in result.layers])

Each takes one `Settings`. Its fields have defaults; `None` means that a value is fitted or read from the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from knnlm.cluster.core import Cluster
from knnlm.config import Settings
from knnlm.documents import score_from_document
from knnlm.errors import InputError
from knnlm.evaluation.queries import check_evaluation
from knnlm.files import new_folder
from knnlm.knn.searcher import is_exact, searched_layers
from knnlm.layer_names import select_layers
from knnlm.model.lm import LanguageModel
from knnlm.pipeline.begun import Begun, begin, mark_whole, read_begun
from knnlm.pipeline.expected import build_stages, evaluate_stages, run_stages, score_stages
from knnlm.pipeline.job import Clock, Job, Paths
from knnlm.pipeline.kept_back import fit_of_several, index_and_fit, keep_fit, split_off
from knnlm.pipeline.needs import check_build_memory, check_evaluation_memory
from knnlm.pipeline.plan import check_choice, check_query_room, estimate_tokens, make_plan, query_count
from knnlm.pipeline.steps import (
    SAMPLE_TOKENS,
    choose_on_sample,
    compare_layers,
    extract,
    fitted_settings,
    index_chosen,
    score_layers,
    score_sample,
    split_text,
    windows_like,
)
from knnlm.places import as_list, work_of
from knnlm.progress import Progress, Silent
from knnlm.results import EvalResult, ScoreResult
from knnlm.scores.choose import SCORES_THAT_CHOOSE, layers_to_score
from knnlm.store.datastore import Datastore, as_datastore
from knnlm.store.joint import AnyStore, GivenStores, JointStore, as_store
from knnlm.store.tokens import check_tokens
from knnlm.text.windows import TokenDocument, count_targets


def score(
    lm: LanguageModel,
    text: Paths,
    *,
    settings: Settings | None = None,
    stop_early: bool = False,
    share: float = 1,
    progress: Progress | None = None,
) -> ScoreResult:
    """Dispersion and the other label-free scores of every requested layer, and the choice; writes nothing.

    :param stop_early: stop once it is settled which candidate dispersion chooses.
    :param share: read only this share of the text (0 to 1), spread evenly over it.
    """
    job = Job(lm, settings or Settings(), progress or Silent())
    layers = select_layers(job.settings.layers.layers or "all", lm.layer_names)
    job.tell_what_is_taken(text)
    job.progress.plan(score_stages(lm, layers, estimate_tokens(lm, text, job.settings.text)))
    return score_layers(job, text, stop_early=stop_early, share=share)


def build(
    lm: LanguageModel,
    text: Paths,
    out: str | Path,
    *,
    eval_text: Paths | None = None,
    settings: Settings | None = None,
    overwrite: bool = False,
    frame: str | Path | Datastore | None = None,
    cluster: Cluster | None = None,
    progress: Progress | None = None,
) -> Datastore:
    """Choose a layer on a bounded sample (or take `settings.layers.layers`), store its keys, index and fit them.

    k, lambda, T and the gate are fitted on `eval_text`; without it about 1 % of the text is kept back for that (2,000
    to 20,000 tokens, at most a tenth) and not stored. Notes say what was kept back, and what the memory is worth on it.
    If the index cannot be built, the datastore is searched exactly, and a note says so. The same call goes on after a
    kill, unless `overwrite` is given.

    :param frame: a datastore whose layers, centres, windows and type of keys are taken, so that both can be merged.
    :param cluster: where the keys are made (docs/scale.md); their bytes are the same. Layers that are named are then
        scored on a sample too, and not on all keys.
    :raises DatastoreMismatch: it was made with another model.
    :raises DatastoreExists: `out` exists and must not be replaced; nothing was done.
    """
    settings, like = settings or Settings(), None if frame is None else as_datastore(frame)
    work = work_of("build", lm.name, text, eval_text, settings, like and str(like.folder))
    settings = settings if like is None else _like(lm, settings, like)
    job, inputs = Job(lm, settings, progress or Silent(), cluster), (lm.name, *as_list(text), *as_list(eval_text))
    with new_folder(out, overwrite=overwrite, inputs=inputs, work=work) as folder:
        total = estimate_tokens(lm, text, settings.text)
        check_build_memory(job, total)
        split = split_off(job, text, eval_text, total)
        begun = read_begun(folder)
        if begun is None or (begun.scored is None and cluster is not None):
            begun = _begin_build(job, text, eval_text, total, folder, work)
        job.progress.plan(build_stages(lm, begun.layers, total, scored=begun.scored is not None, queries=split.queries))
        scored = extract(job, split.documents, begun.layers, folder, total=total, sampled=begun.scored, frame=like)
        mark_whole(folder, work, begun, scored)
        index_and_fit(job, Datastore.open(folder), scored.choice.layer, split.kept_back())
    return Datastore.open(Path(out))


def _like(lm: LanguageModel, settings: Settings, frame: Datastore) -> Settings:
    """The settings with what a frame determines."""
    frame.check_model(lm.fingerprint)
    layers = ",".join(frame.layers)
    return replace(
        settings,
        text=windows_like(frame, settings.text),
        layers=replace(settings.layers, layers=layers, candidates=layers),
        key_dtype=frame.manifest.layers[frame.layers[0]].dtype,
    )


def _begin_build(job: Job, text: Paths, eval_text: Paths | None, total: int | None, folder: Path, work: str) -> Begun:
    """Choose what is stored, and write that down."""
    lm, wanted = job.lm, job.settings.layers
    job.tell_what_is_taken(text)
    check_choice(lm, select_layers(wanted.layers or "all", lm.layer_names), job.settings)
    # An evaluation text that is given is not read a second time.
    stored = job.documents(text) if eval_text else split_off(job, text, None, total).documents
    if wanted.layers is not None or wanted.select not in SCORES_THAT_CHOOSE:
        named = select_layers(wanted.layers or wanted.select, lm.layer_names)
        return begin(folder, work, named, None if job.cluster is None else score_sample(job, stored, named))
    scored = layers_to_score(wanted, lm.layer_names)
    sample = score_stages(lm, scored, min(SAMPLE_TOKENS, total or SAMPLE_TOKENS))
    job.progress.plan([*sample, *build_stages(lm, lm.layer_names, total, scored=True, queries=0)])
    sampled, layers = choose_on_sample(job, stored, scored, most=1)
    return begin(folder, work, layers, sampled)


def evaluate(
    lm: LanguageModel,
    store: GivenStores,
    eval_text: Paths,
    *,
    settings: Settings | None = None,
    fit_weights: bool = False,
    dry_run: bool = False,
    cluster: Cluster | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Perplexity of the plain LM and of the kNN-LM for every layer that the datastore holds.

    What it fits is stored in the datastore, for generation, unless k, lambda, T or another search than the datastore's
    own was given.

    A layer with an index is searched through it, unless `settings.knn.index` is `exact`. The settings given to `build`
    or `run` can be passed here too.

    :param store: a datastore or its folder, or several, whose neighbours are merged; what is fitted for several is not
        stored.
    :param fit_weights: also fit what the neighbours from each of several datastores count for.
    :param dry_run: store nothing.
    :param cluster: where the datastore is searched (docs/scale.md); what is found is the same.
    :raises InputError: settings that do not fit the datastore, such as another index or metric (`searched_layers`); or
        weights to fit that are given, or for one datastore.
    :raises DatastoreMismatch: the datastore was made with another model or tokenizer; the message says which.
    :raises DatastoreCorrupt: a file that is read is missing, short or changed.
    """
    store, settings = as_store(store), settings or Settings()
    if fit_weights:
        _check_weights_to_fit(store)
    store.first.check_model(lm.fingerprint)
    check_tokens(store, lm.vocabulary)
    layers = searched_layers(store, settings)
    job = Job(lm, replace(settings, text=windows_like(store.first, settings.text)), progress or Silent(), cluster)
    documents = job.evaluation_documents(eval_text)
    check_evaluation(documents)
    check_query_room(lm, layers, count_targets(documents))
    check_evaluation_memory(job, store, count_targets(documents))
    k = min(settings.knn.search_k, store.count)
    job.progress.plan(evaluate_stages(lm, layers, store.count, count_targets(documents), k))
    scores = store.first.manifest.scores  # null where Python code wrote the datastore without any
    scored = None if scores is None else score_from_document(scores)
    exact = is_exact(settings.knn.index)
    with compare_layers(job, store, documents, layers, scored, exact=exact, fit_weights=fit_weights) as compared:
        result = compared.result
    if isinstance(store, JointStore):
        job.progress.note(fit_of_several(store, result))
    elif not dry_run:
        keep_fit(job, store, result)
    return result


def _check_weights_to_fit(store: AnyStore) -> None:
    if not isinstance(store, JointStore):
        raise InputError(f"`fit_weights` weighs several datastores, but only {store.folder} is given; name another")
    if set(store.weights) != {1.0}:
        raise InputError("`fit_weights` fits the `weights`, but some are given; leave one of the two out")


def run(
    lm: LanguageModel,
    text: Paths,
    out: str | Path,
    *,
    eval_text: Paths | None = None,
    settings: Settings | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    report: Callable[[EvalResult, Path], None] | None = None,
) -> EvalResult:
    """Do everything: scores and the choice, keys of the layers that can matter, their perplexity, the index.

    The choice is made on a sample of the text to store: one pass gives every layer its scores and its pilot, a small
    kNN-LM inside the sample. With `settings.layers.layers`, the layers that it names are all stored and evaluated.

    Without `eval_text`, a tenth of the documents is held out. The folder `out` becomes a datastore. Layers are
    compared under exact search; the chosen one is then indexed, and its perplexity measured again with the index.
    If the index cannot be built, the result has a warning.

    `out` appears only once it is complete. If a run fails or is stopped after the keys are stored, and nothing was at
    `out`, the datastore is kept there without the rest. The same call goes on with what is finished, unless `overwrite`
    is given.

    :param report: called with the result and the folder that becomes `out`, to write further files into it.
    :raises DatastoreExists: `out` exists and must not be replaced; nothing was done.
    """
    settings = settings or Settings()
    job, clock = Job(lm, settings, progress or Silent()), Clock()
    inputs, work = (lm.name, *as_list(text), *as_list(eval_text)), work_of("run", lm.name, text, eval_text, settings)
    with new_folder(out, overwrite=overwrite, inputs=inputs, work=work) as folder:
        total = estimate_tokens(lm, text, settings.text)
        check_build_memory(job, total)
        with clock.time("extract and score"):
            given = job.evaluation_documents(eval_text) if eval_text else None
            if given is not None:
                check_evaluation(given)
            begun = read_begun(folder) or _begin_run(job, text, given, folder, work)
            training, evaluation = split_text(job, text, given)
            queries, is_scored = query_count(settings, total, given), begun.scored is not None
            job.progress.plan(run_stages(lm, begun.layers, total, queries, settings.knn.search_k, scored=is_scored))
            scored = extract(job, training, begun.layers, folder, total=total, sampled=begun.scored)
            documents = evaluation()
        mark_whole(folder, work, begun, scored)
        store = Datastore.open(folder)
        with (
            clock.time("evaluate and index"),
            compare_layers(job, store, documents, store.layers, scored, exact=True) as compared,
        ):
            result = index_chosen(job, store, compared)
        store.update_manifest(fitted=fitted_settings(result))
        result = replace(result, seconds=clock.seconds)
        if report is not None:
            report(result, folder)
    return result


def _begin_run(job: Job, text: Paths, given: list[TokenDocument] | None, folder: Path, work: str) -> Begun:
    """Plan or choose what is stored, and write that down."""
    lm, settings = job.lm, job.settings
    plan = make_plan(lm, text, folder, settings, given)
    job.progress.note(plan.sentence)
    job.tell_what_is_taken(text)
    if settings.layers.layers is not None:
        return begin(folder, work, plan.layers)
    queries, stored = query_count(settings, plan.tokens, given), plan.layers[: plan.most]
    sample = score_stages(lm, plan.layers, min(SAMPLE_TOKENS, plan.tokens or SAMPLE_TOKENS))
    rest = run_stages(lm, stored, plan.tokens, queries, settings.knn.search_k, scored=True)
    job.progress.plan([*sample, *rest])
    training, evaluation = split_text(job, text, given)
    sampled, layers = choose_on_sample(job, training, plan.layers, most=plan.most)
    evaluation()  # too short a text is an error before the second pass
    return begin(folder, work, layers, sampled)
