"""Perplexity with keys from every block and part of a model, on one text, and which label-free score chooses best.

    .venv/bin/python scripts/studies/layer_study.py --model MODEL --text nursing.jsonl --out study/llama-nursing.json

Search is exact; k, lambda and temperature are fitted for each layer. Regret, by how much the perplexity of a choice
exceeds that of the best layer, is cross-fitted (docs/layers.md). A tenth of the text is held out: whole documents, or
sections of one long document with a gap on either side. `scripts/studies/layer_table.py` makes tables from the files.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from knnlm.config import EvalConfig, KNNConfig, LayerConfig, Settings, TextConfig
from knnlm.documents import score_from_document, to_document
from knnlm.evaluation.outcomes import LayerOutcome, evaluate_layers
from knnlm.evaluation.overlap import overlap
from knnlm.evaluation.queries import Queries, open_queries
from knnlm.evaluation.summary import regret, summarize
from knnlm.layer_names import FINAL, select_layers
from knnlm.model.loading import load_model
from knnlm.pipeline import build
from knnlm.results import SCORES, LayerScore
from knnlm.text.corpus import read_documents, tokenize_measured
from knnlm.text.held_out import take_slices
from knnlm.text.windows import window_config

SECTION_CHARACTERS = 20_000
# Dropped at both ends of a held-out section, so that its beginning does not continue a stored sentence.
GAP_CHARACTERS = 1_000


def candidate_sets(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The sets in which a score may choose."""
    upper = {name.split(".")[0] for name in select_layers("candidates", names)}
    return {
        "all": tuple(names),
        "residual": select_layers("residual", names),
        "ffn_input, all blocks": select_layers("*.ffn_input", names),
        "upper half, all parts": tuple(n for n in names if n == FINAL or n.split(".")[0] in upper),
        "upper half, normed inputs": tuple(
            n for n in names if n.split(".")[0] in upper and n.endswith(("attn_input", "ffn_input"))
        ),
        "ffn_input, upper half": select_layers("candidates", names),
    }


def split_text(paths: Sequence[Path], folder: Path) -> tuple[Path, Path]:
    """Training and evaluation files: every tenth document, or every tenth section where there are few documents."""
    texts, gap = [document.text for document in read_documents(paths)], 0
    if len(texts) < 20:
        size, gap = SECTION_CHARACTERS, GAP_CHARACTERS
        texts = [text[start : start + size] for text in texts for start in range(0, len(text), size)]
    training = [text for i, text in enumerate(texts) if i % 10 != 4]
    held_out = [text[gap : len(text) - gap] for text in texts[4::10]]
    files = folder / "train.jsonl", folder / "eval.jsonl"
    for file, part in zip(files, (training, held_out), strict=True):
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in part), encoding="utf-8")
    return files


def choices(
    scores: Sequence[LayerScore], outcomes: Sequence[LayerOutcome], queries: Queries, default: str
) -> Iterator[dict[str, object]]:
    """Who chooses what, and what it costs against the best layer."""
    by_name = {one.layer: one for one in outcomes}
    names = [score.layer for score in scores]
    rules = [
        (
            score,
            among,
            max((one for one in scores if one.layer in allowed), key=lambda one: sign * getattr(one, score)).layer,
        )
        for among, allowed in candidate_sets(names).items()
        for score, sign in ((kind.name, -1 if kind.name == "pilot" else 1) for kind in SCORES)
    ]
    last = select_layers("-1.ffn_input", names)[0]
    rules += [("always", "the last ffn_input", last), ("auto", "the default", default)]
    # Each candidate by name too, so that a rule made later can be judged without another run.
    rules += [("named", name, name) for name in select_layers("candidates", names)]
    for score, among, layer in rules:
        found = regret(outcomes, by_name[layer], queries.parts)
        against = regret([by_name[last]], by_name[layer], queries.parts)
        assert found is not None
        assert against is not None
        yield {
            "score": score,
            "among": among,
            "layer": layer,
            "regret": found.value,
            "interval": [found.interval.low, found.interval.high],
            "against_hindsight": found.against_hindsight,
            "against_last_ffn_input": against.value,
            "against_interval": [against.interval.low, against.interval.high],
        }


def main() -> None:
    """Build, evaluate every layer, and write what each score would have chosen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", nargs="+", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", default="all")
    parser.add_argument("--max-tokens", type=int, default=300_000)
    parser.add_argument("--eval-tokens", type=int, default=8_000)
    parser.add_argument("--scratch", type=Path, help="folder for the keys of all layers; the system's by default")
    args = parser.parse_args()
    start = time.perf_counter()
    lm = load_model(args.model)
    config = EvalConfig(eval_tokens=args.eval_tokens)
    settings = Settings(
        text=TextConfig(max_tokens=args.max_tokens),
        layers=LayerConfig(layers=args.layers),
        knn=KNNConfig(index="exact"),
        evaluation=config,
    )
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        training, held_out = split_text(args.text, Path(folder))
        store = build(lm, [training], Path(folder) / "store", settings=settings)
        print(f"{store.count:,} keys x {len(store.layers)} layers, {time.perf_counter() - start:.0f} s", flush=True)
        scored = score_from_document(store.manifest.scores)
        documents = take_slices(
            tokenize_measured(read_documents([held_out]), lm.encode_with_ends), config.eval_tokens, seed=0
        )
        window = window_config(settings.text, lm.name, lm.context_limit)
        with open_queries(lm, documents, window, store.layers) as queries:
            outcomes = []
            for one in evaluate_layers(store, queries, store.layers, settings.knn, exact=True):
                outcomes.append(one)
                print(f"{one.layer} {one.tuning_loss:.4f}, {time.perf_counter() - start:.0f} s", flush=True)
            result = summarize(queries, outcomes, scored)
            found = list(choices(scored.layers, outcomes, queries, scored.choice.layer))
        shared = overlap(documents, [store.values])
    document = to_document(result) | {"choices": found, "keys": store.count, "overlap": shared, "study": vars(args)}
    document["study"] = {name: str(value) for name, value in document["study"].items()}
    document["tuning_perplexity"] = {one.layer: math.exp(one.tuning_loss) for one in outcomes}
    document["study"]["seconds"] = time.perf_counter() - start
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1, default=asdict), encoding="utf-8")


if __name__ == "__main__":
    main()
