"""The main verbs: run, score, build (also from given vectors), evaluate; add, remove, compact, merge."""

from knnlm.pipeline.changing import add as add
from knnlm.pipeline.changing import compact as compact
from knnlm.pipeline.changing import merge as merge
from knnlm.pipeline.changing import remove as remove
from knnlm.pipeline.given import build_from_vectors as build_from_vectors
from knnlm.pipeline.verbs import build as build
from knnlm.pipeline.verbs import evaluate as evaluate
from knnlm.pipeline.verbs import run as run
from knnlm.pipeline.verbs import score as score
