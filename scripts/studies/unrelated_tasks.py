"""Tasks of lm-eval that have nothing to do with a datastore, without and with its memory: the rows of docs/mixing.md.

    python scripts/studies/unrelated_tasks.py --store rust-book.knn --text nursing.jsonl economics.jsonl

Two tasks are made of each text, after the form of well-known ones: `next_passage` (which of four passages of the text
comes next, as in HellaSwag) and `last_word` (the last word of a passage, as in LAMBADA). lm-eval runs them twice, with
λ = 0, which is the plain LM, and as the datastore was fitted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from lm_eval.tasks import TaskManager

import knnlm
from knnlm.text.corpus import read_documents

# Words of the context, and of a passage that may follow it.
CONTEXT, NEXT, CHOICES = 60, 20, 4

TASKS: Mapping[str, Mapping[str, Any]] = {
    "next_passage": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": " {{word}}",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    },
}


def items(path: Path, count: int, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Items of both tasks, at places drawn at random; the wrong passages are from other places."""
    rng = np.random.default_rng(seed)
    documents = [words for one in read_documents([path]) if len(words := one.text.split()) > CONTEXT + NEXT]
    weights = np.array([len(words) for words in documents], float)

    def drawn() -> tuple[str, str]:
        words = documents[rng.choice(len(documents), p=weights / weights.sum())]
        start = rng.integers(len(words) - CONTEXT - NEXT + 1)
        context, following = words[start : start + CONTEXT], words[start + CONTEXT : start + CONTEXT + NEXT]
        return " ".join(context), " ".join(following)

    for _ in range(count):
        (context, right), wrong = drawn(), [drawn()[1] for _ in range(CHOICES - 1)]
        answer = int(rng.integers(CHOICES))
        choices = [*wrong[:answer], right, *wrong[answer:]]
        yield "next_passage", {"context": context, "choices": choices, "answer": answer}
        yield "last_word", {"context": context, "word": right.split()[0]}


def write_tasks(folder: Path, texts: Sequence[Path], count: int) -> list[str]:
    """Names of the tasks."""
    names = []
    for text in texts:
        made = list(items(text, count, seed=0))
        for kind, task in TASKS.items():
            name = f"{kind}.{text.stem}"
            data = folder / f"{name}.jsonl"
            data.write_text("".join(json.dumps(one) + "\n" for own, one in made if own == kind))
            source = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
            whole = {**task, "task": name, "dataset_path": "json", "dataset_kwargs": source, "test_split": "test"}
            (folder / f"{name}.yaml").write_text(json.dumps(whole))  # JSON is YAML too
            names.append(name)
    return names


def figures(folder: Path, names: Sequence[str], store: Path, more: str) -> Mapping[str, Mapping[str, float]]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    done = lm_eval.simple_evaluate(
        model="knnlm",
        model_args=f"store={store}{more}",
        tasks=list(names),
        task_manager=manager,
        batch_size=4,
        bootstrap_iters=1000,
    )
    found: Mapping[str, Mapping[str, float]] = done["results"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--text", nargs="+", type=Path, required=True)
    parser.add_argument("--items", type=int, default=100)
    args = parser.parse_args()
    knnlm.register_lm_eval()
    with tempfile.TemporaryDirectory() as folder:
        names = write_tasks(Path(folder), args.text, args.items)
        plain, mixed = (figures(Path(folder), names, args.store, more) for more in (",lambda=0", ""))
    print("| task | metric | plain LM, standard error | with the memory |\n| --- | --- | --- | --- |")
    for name in names:
        for metric in ("acc", "perplexity"):
            if f"{metric},none" in plain[name]:
                value, error = plain[name][f"{metric},none"], plain[name][f"{metric}_stderr,none"]
                print(f"| {name} | {metric} | {value:.4g} ± {error:.2g} | {mixed[name][f'{metric},none']:.4g} |")


if __name__ == "__main__":
    main()
