"""The four main verbs: run, score, build, evaluate."""

from knnlm.pipeline.verbs import build as build
from knnlm.pipeline.verbs import evaluate as evaluate
from knnlm.pipeline.verbs import run as run
from knnlm.pipeline.verbs import score as score
