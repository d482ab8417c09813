"""Scores and pilots of the sample that `knnlm run` would take, for cases that are evaluated already.

    .venv/bin/python scripts/studies/layer_sample.py --model MODEL study/smol.*
    .venv/bin/python scripts/studies/layer_rules.py study/smol.*

`layer_pilots.py` draws its sample from all tokens that it stores; `run` scores slices of text that are 8,192 tokens in
all. Writes a folder `sample` into each case's.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from knnlm.config import TextConfig
from knnlm.evaluation.piloting import pilots_of
from knnlm.extraction.collect import collect
from knnlm.model.lm import LanguageModel
from knnlm.model.loading import load_model
from knnlm.pipeline.steps import SAMPLE_TOKENS
from knnlm.scores.layer_scorer import FOR_CHOICE, LayerScorer
from knnlm.text.clusters import CLUSTER_TOKENS
from knnlm.text.corpus import read_documents, tokenize_measured
from knnlm.text.held_out import take_sample
from knnlm.text.windows import window_config


def write_scored(scorer: LayerScorer, lm: LanguageModel, out: Path) -> None:
    """Write scores and pilots of all layers to `scores.json` and `pilots.npz`."""
    scores = scorer.scores(measure_pilot=pilots_of(lm, scorer.head, seed=scorer.seed), only=FOR_CHOICE)
    pilots = {one.layer: scorer.pilot_of(one.layer) for one in scores}
    losses = {name: pilot.losses_Q for name, pilot in pilots.items()}
    np.savez(out / "pilots.npz", cluster=next(iter(pilots.values())).cluster_Q, **losses)
    (out / "scores.json").write_text(json.dumps([asdict(one) for one in scores]), encoding="utf-8")


def score_sample(lm: LanguageModel, folder: Path) -> None:
    """Score the sample that `run` would take of the case's training text."""
    documents = tokenize_measured(read_documents([folder / "train.jsonl"]), lm.encode_with_ends)
    sample = take_sample(documents, SAMPLE_TOKENS, run=CLUSTER_TOKENS, seed=0)
    scorer = LayerScorer(dict(lm.dims), head=lm.dims["final_norm"])
    collect(lm, sample, window_config(TextConfig(), lm.name, lm.context_limit), lm.layer_names, scorer=scorer)
    (folder / "sample").mkdir(exist_ok=True)
    write_scored(scorer, lm, folder / "sample")


def main() -> None:
    """Read the options, and score the samples that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("folders", nargs="+", type=Path)
    args = parser.parse_args()
    lm = load_model(args.model)
    for folder in args.folders:
        if not (folder / "sample" / "scores.json").exists():
            score_sample(lm, folder)


if __name__ == "__main__":
    main()
