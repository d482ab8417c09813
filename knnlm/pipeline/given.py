"""A datastore of vectors that come from elsewhere; the model reads only what settings are fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from knnlm.config import Settings
from knnlm.errors import InputError
from knnlm.evaluation.queries import check_evaluation
from knnlm.extraction.hidden_states import HiddenStates
from knnlm.files import new_folder
from knnlm.layer_names import select_layers
from knnlm.model.lm import LanguageModel
from knnlm.pipeline.begun import begin, mark_whole, read_begun
from knnlm.pipeline.job import Job, Paths
from knnlm.pipeline.kept_back import index_and_fit
from knnlm.pipeline.needs import check_build_memory
from knnlm.pipeline.plan import check_choice
from knnlm.pipeline.steps import extract
from knnlm.places import as_list, work_of
from knnlm.progress import Progress, Silent
from knnlm.store.datastore import Datastore
from knnlm.text.windows import TokenDocument


def build_from_vectors(
    lm: LanguageModel,
    hidden_states: str | Path,
    out: str | Path,
    *,
    eval_text: Paths | None = None,
    settings: Settings | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Datastore:
    """As `build`, from vectors of the model's layers that another program has exported (docs/own-vectors.md).

    All given layers are stored, or those of `settings.layers.layers`, and one of them is chosen by scores of all keys
    and indexed. The model is used for its fingerprint, its tokenizer, and on `eval_text`, on which k, lambda, T and the
    gate are fitted; without that text nothing is.

    :param hidden_states: folder with a .npz or .safetensors file for each document: `token_ids` [T], and for each layer
        an array of its name, [T, D].
    :raises InputError: a file does not fit; names it, and the place in it.
    :raises LayerError: `settings` name a layer that is not given.
    :raises DatastoreExists: `out` exists and must not be replaced; nothing was done.
    """
    settings, inputs = settings or Settings(), (lm.name, hidden_states, *as_list(eval_text))
    if settings.text.max_tokens:
        raise InputError("`max_tokens` takes a part of a text; vectors that are given are stored whole: leave it out")
    work = work_of("build from vectors", lm.name, hidden_states, eval_text, settings)
    with new_folder(out, overwrite=overwrite, inputs=inputs, work=work) as folder:
        given = HiddenStates(hidden_states, lm)
        layers = select_layers(settings.layers.layers or ",".join(given.layers), given.layers)
        named = replace(settings, layers=replace(settings.layers, layers=",".join(layers)))
        check_choice(lm, layers, named)
        job = Job(lm, named, progress or Silent())
        check_build_memory(job, given.targets)
        documents = _to_fit_on(job, eval_text)
        begun = read_begun(folder) or begin(folder, work, layers)
        scored = extract(job, given.documents(), begun.layers, folder, total=given.targets, given=given)
        mark_whole(folder, work, begun, scored)
        index_and_fit(job, Datastore.open(folder), scored.choice.layer, documents)
    return Datastore.open(Path(out))


def _to_fit_on(job: Job, eval_text: Paths | None) -> Sequence[TokenDocument]:
    if not eval_text:
        job.progress.note("k, λ and T are not fitted: give `eval_text`, or fit them with `knnlm.evaluate`")
        return []
    documents = job.evaluation_documents(eval_text)
    check_evaluation(documents)
    return documents
