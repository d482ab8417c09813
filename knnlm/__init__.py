"""kNN-LM on any causal language model: choose the key layer by its dispersion, build, evaluate.

    import knnlm

    lm = knnlm.load_model("my-model")
    store = knnlm.build(lm, ["domain.txt"], "domain.knn")
    result = knnlm.evaluate(lm, store, ["held-out.txt"])
    print(result.lm.perplexity, [(one.layer, one.perplexity) for one in result.layers])

Names are loaded lazily, on first use, so that `import knnlm` is fast. `help(knnlm.NAME)` documents each.

models    load_model, random_model, LanguageModel
verbs     run, score, build, build_from_vectors, evaluate, rank_models, score_vectors
store     open_datastore, open_datastores, open_cluster, Datastore, JointStore, DatastoreWriter, index_layer
          add, remove, compact, merge, push
use       KNNLM for generate(), register_lm_eval for lm-evaluation-harness
settings  Settings, TextConfig, LayerConfig, KNNConfig, EvalConfig
results   EvalResult, LayerResult, Perplexity, ByQuery, Choice, Regret, Correlation, IndexReport, Interval
          ScoreResult, VectorScores, LayerScore, ScoreKind, TokenExample, NeighborText
studies   study_correlation, CorrelateConfig, Study, measure_slices, SliceConfig, SlicesResult
          Ranking, ModelGap, TokenSource of rank_models
training  train, TrainConfig, PushAway, PushAwayTrainer, TrainResult, TrainPoint, Validation
losses    mean_distance, distance_between, different_token_distance, uniformity
errors    KNNLMError, InputError, ModelError, LayerError
          DatastoreError, DatastoreCorrupt, DatastoreExists, DatastoreMismatch
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from knnlm.version import __version__ as __version__

if TYPE_CHECKING:
    from knnlm.cluster.core import open_cluster
    from knnlm.config import EvalConfig, KNNConfig, LayerConfig, Settings, TextConfig
    from knnlm.errors import (
        DatastoreCorrupt,
        DatastoreError,
        DatastoreExists,
        DatastoreMismatch,
        InputError,
        KNNLMError,
        LayerError,
        ModelError,
    )
    from knnlm.inference.model import KNNLM
    from knnlm.inference.register import register_lm_eval
    from knnlm.knn.indexing import index_layer
    from knnlm.model.lm import LanguageModel
    from knnlm.model.loading import load_model, random_model
    from knnlm.pipeline import add, build, build_from_vectors, compact, evaluate, merge, remove, run, score
    from knnlm.results import (
        ByQuery,
        Choice,
        Correlation,
        EvalResult,
        IndexReport,
        Interval,
        LayerResult,
        LayerScore,
        NeighborText,
        Perplexity,
        Regret,
        ScoreKind,
        ScoreResult,
        TokenExample,
        VectorScores,
    )
    from knnlm.scores.vectors import score_vectors
    from knnlm.sharing.push import push
    from knnlm.store.datastore import Datastore, open_datastore
    from knnlm.store.joint import JointStore, open_datastores
    from knnlm.store.writer import DatastoreWriter
    from knnlm.studies.correlate.study import CorrelateConfig, Study, study_correlation
    from knnlm.studies.rank_models.ranking import ModelGap, Ranking, rank_models
    from knnlm.studies.rank_models.token_sets import TokenSource
    from knnlm.studies.slices.measure import SliceConfig, SlicesResult, measure_slices
    from knnlm.studies.train.config import PushAway, TrainConfig
    from knnlm.studies.train.push_away import different_token_distance, distance_between, mean_distance, uniformity
    from knnlm.studies.train.result import TrainPoint, TrainResult, Validation
    from knnlm.studies.train.train import train
    from knnlm.studies.train.trainer import PushAwayTrainer

    # For type checkers only: at run time `help` would load every name and print all inherited members.
    __all__ = [  # noqa: RUF022 - in plain order, not with KNNLM first as if it were a constant
        "ByQuery",
        "Choice",
        "CorrelateConfig",
        "Correlation",
        "Datastore",
        "DatastoreCorrupt",
        "DatastoreError",
        "DatastoreExists",
        "DatastoreMismatch",
        "DatastoreWriter",
        "EvalConfig",
        "EvalResult",
        "IndexReport",
        "InputError",
        "Interval",
        "JointStore",
        "KNNConfig",
        "KNNLM",
        "KNNLMError",
        "LanguageModel",
        "LayerConfig",
        "LayerError",
        "LayerResult",
        "LayerScore",
        "ModelError",
        "ModelGap",
        "NeighborText",
        "Perplexity",
        "PushAway",
        "PushAwayTrainer",
        "Ranking",
        "Regret",
        "ScoreKind",
        "ScoreResult",
        "Settings",
        "SliceConfig",
        "SlicesResult",
        "Study",
        "TextConfig",
        "TokenExample",
        "TokenSource",
        "TrainConfig",
        "TrainPoint",
        "TrainResult",
        "Validation",
        "VectorScores",
        "__version__",
        "add",
        "build",
        "build_from_vectors",
        "compact",
        "different_token_distance",
        "distance_between",
        "evaluate",
        "index_layer",
        "load_model",
        "mean_distance",
        "measure_slices",
        "merge",
        "open_cluster",
        "open_datastore",
        "open_datastores",
        "push",
        "random_model",
        "rank_models",
        "register_lm_eval",
        "remove",
        "run",
        "score",
        "score_vectors",
        "study_correlation",
        "train",
        "uniformity",
    ]

# The same names for run time; tests/test_public_names.py keeps the two lists equal.
# A public name must not also be a module's name: importing the module would replace the function.
_NAMES = {
    "cluster.core": ("open_cluster",),
    "config": (
        "EvalConfig",
        "KNNConfig",
        "LayerConfig",
        "Settings",
        "TextConfig",
    ),
    "errors": (
        "DatastoreCorrupt",
        "DatastoreError",
        "DatastoreExists",
        "DatastoreMismatch",
        "InputError",
        "KNNLMError",
        "LayerError",
        "ModelError",
    ),
    "inference.model": ("KNNLM",),
    "inference.register": ("register_lm_eval",),
    "knn.indexing": ("index_layer",),
    "model.lm": ("LanguageModel",),
    "model.loading": (
        "load_model",
        "random_model",
    ),
    "pipeline": (
        "add",
        "build",
        "build_from_vectors",
        "compact",
        "evaluate",
        "merge",
        "remove",
        "run",
        "score",
    ),
    "results": (
        "ByQuery",
        "Choice",
        "Correlation",
        "EvalResult",
        "IndexReport",
        "Interval",
        "LayerResult",
        "LayerScore",
        "NeighborText",
        "Perplexity",
        "Regret",
        "ScoreKind",
        "ScoreResult",
        "TokenExample",
        "VectorScores",
    ),
    "scores.vectors": ("score_vectors",),
    "sharing.push": ("push",),
    "store.datastore": (
        "Datastore",
        "open_datastore",
    ),
    "store.joint": (
        "JointStore",
        "open_datastores",
    ),
    "store.writer": ("DatastoreWriter",),
    "studies.correlate.study": (
        "CorrelateConfig",
        "Study",
        "study_correlation",
    ),
    "studies.rank_models.ranking": (
        "ModelGap",
        "Ranking",
        "rank_models",
    ),
    "studies.rank_models.token_sets": ("TokenSource",),
    "studies.slices.measure": (
        "SliceConfig",
        "SlicesResult",
        "measure_slices",
    ),
    "studies.train.config": (
        "PushAway",
        "TrainConfig",
    ),
    "studies.train.push_away": (
        "different_token_distance",
        "distance_between",
        "mean_distance",
        "uniformity",
    ),
    "studies.train.result": (
        "TrainPoint",
        "TrainResult",
        "Validation",
    ),
    "studies.train.train": ("train",),
    "studies.train.trainer": ("PushAwayTrainer",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}


def __dir__() -> list[str]:
    return sorted((*_MODULE_OF, "__version__"))


if not TYPE_CHECKING:  # a type checker would otherwise accept every misspelt name

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'knnlm' has no attribute {name!r}")
        value = getattr(import_module(f"knnlm.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
