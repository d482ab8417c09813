"""Negative control for slices and their statistics: right answers assigned at random.

    .venv/bin/python scripts/studies/slice_control.py --model MODEL --questions questions.jsonl

Prompts are real, answers are random, a quarter of them right. Of 200 such draws, how many does each interval call a
finding? A sound one does in 5 %.
"""

from __future__ import annotations

import argparse

import numpy as np

from knnlm.extraction.prompts import read_prompts
from knnlm.layer_names import FINAL
from knnlm.model.loading import load_model
from knnlm.results import Interval
from knnlm.scores.dispersion import unit_rows
from knnlm.studies.slices.questions import read_questions
from knnlm.studies.slices.statistics import draw_slices, right_minus_wrong, tail_auc
from knnlm.text.windows import unscored_window

SHARE, SIZE, DRAWS, REPEATS = 0.25, 100, 10, 200


def excludes(interval: Interval, value: float) -> bool:
    return not interval.low <= value <= interval.high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--questions", required=True)
    given = parser.parse_args()
    lm, questions = load_model(given.model), read_questions(given.questions)
    prompts = [lm.encode(question.prompt)[-(lm.context_limit or 0) :] for question in questions]
    windows = [unscored_window(tokens, start=0, source="", number=number) for number, tokens in enumerate(prompts)]
    vectors = read_prompts(lm, windows, [FINAL])[FINAL]
    units_QD, clusters_Q = unit_rows(vectors.last_QD), np.arange(len(prompts))
    found, spearman = {"slices": 0, "right minus wrong": 0, "tail AUC": 0}, []
    for seed in range(REPEATS):
        correct_Q = np.random.default_rng(seed).permutation(len(prompts)) < SHARE * len(prompts)
        along = draw_slices(units_QD, correct_Q, SIZE, draws=DRAWS, seed=seed).correlation
        spearman.append(abs(along.spearman))
        found["slices"] += excludes(along.spearman_interval, 0)
        found["right minus wrong"] += excludes(right_minus_wrong(units_QD, correct_Q, clusters_Q).interval, 0)
        found["tail AUC"] += excludes(tail_auc(vectors.within_Q, ~correct_Q, clusters_Q).interval, 0.5)
    for name, count in found.items():
        print(f"{name}: a finding in {count / REPEATS:.1%} of {REPEATS} draws")
    print(f"|Spearman| over slices: median {np.median(spearman):.2f}, highest tenth {np.quantile(spearman, 0.9):.2f}")


if __name__ == "__main__":
    main()
