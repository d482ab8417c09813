"""Label-free scores for choosing layers, finding hard text and ranking checkpoints: the figures of docs/findings.md.

    F="scripts/studies/findings.py"
    .venv/bin/python $F layers study/*.json --out findings/layers.json
    .venv/bin/python $F segments MODEL... --text rust-book.jsonl sherlock-holmes.jsonl --out findings/segments.json
    .venv/bin/python $F checkpoints step-* final --text rust-book.jsonl nursing.jsonl --out findings/checkpoints.json

`layers` reads the files of `scripts/studies/layer_study.py`, takes their perplexities, and scores the text again for
scores that they lack. Finished cases are kept, so that a run can be stopped and resumed.
`scripts/studies/findings_table.py` makes tables and pictures from the files.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from layer_study import split_text
from torch import Tensor

from knnlm.config import TextConfig
from knnlm.extraction.collect import collect
from knnlm.extraction.segment_values import measure_segments
from knnlm.extraction.sinks import TargetScorer
from knnlm.files import write_json
from knnlm.layer_names import select_layers
from knnlm.model.lm import LanguageModel
from knnlm.model.loading import load_model
from knnlm.results import SCORES
from knnlm.scores.layer_scorer import SEGMENT_FUNCTIONS, LayerScorer
from knnlm.text.clusters import text_clusters
from knnlm.text.corpus import read_documents, tokenize
from knnlm.text.held_out import take_slices
from knnlm.text.segments import cut_segments, sample_segments
from knnlm.text.windows import TokenDocument, WindowConfig, window_config

KEYS = ("-1.ffn_input", "final_norm")
NAMES = tuple(kind.name for kind in SCORES)
Record = dict[str, Any]
Case = tuple[str, Callable[[], Record]]


def layers(files: Sequence[str], tokens: int) -> Iterator[Case]:
    """Each case of the layer study: perplexity of every layer as measured there, and all scores."""
    for file in map(Path, files):
        yield file.stem, lambda file=file: layers_case(json.loads(file.read_text(encoding="utf-8")), tokens)


def layers_case(found: Record, tokens: int) -> Record:
    lm, study = load_model(found["study"]["model"]), found["study"]
    scorer = LayerScorer({row["layer"]: lm.dims[row["layer"]] for row in found["layers"]})
    with tempfile.TemporaryDirectory() as folder:
        training, _ = split_text([Path(name) for name in re.findall(r"'([^']+)'", study["text"])], Path(folder))
        stream = tokenize(read_documents([training]), lm.encode, max_tokens=int(study["max_tokens"]))
        documents = take_slices(stream, tokens, seed=0)
    collect(lm, documents, windows_of(lm), [row["layer"] for row in found["layers"]], scorer=scorer)
    measured = ("layer", "perplexity", "versus_best", "versus_best_interval")
    rows = []
    for row, score in zip(found["layers"], scorer.scores(), strict=True):
        here = {name: getattr(score, name) for name in NAMES}
        rows.append({name: row[name] for name in measured} | {name: row.get(name, here[name]) for name in NAMES})
        rows[-1]["again"] = here
    return {"model": study["model"], "lm": found["lm"]["perplexity"], "tokens": scorer.tokens, "layers": rows}


def segments(models: Sequence[str], texts: Sequence[Path], count: int) -> Iterator[Case]:
    """Each model on each text: the loss of every segment, and its scores at the last layers."""
    for model in models:
        for text in texts:
            name = f"{Path(model).name}.{text.stem}"
            yield name, lambda model=model, text=text: segments_case(load_model(model), text, count)


def segments_case(lm: LanguageModel, text: Path, count: int) -> Record:
    found = sample_segments(cut_segments(tokenize(read_documents([text]), lm.encode), 512), count, seed=0)
    names = [select_layers(key, lm.layer_names)[0] for key in KEYS]
    scores: Record = {layer: {name: [0.0] * len(found) for name in SEGMENT_FUNCTIONS} for layer in names}
    distinct = [len(np.unique(segment.tokens_T)) for segment in found]

    def look(layer: str, vectors_BTD: Tensor, first: int) -> None:
        for number, vectors_TD in enumerate(vectors_BTD.float().numpy(), first):
            for name, function in SEGMENT_FUNCTIONS.items():
                scores[layer][name][number] = function(vectors_TD)

    values = measure_segments(lm, found, names, look=look)
    return {
        "model": lm.name,
        "text": text.stem,
        "loss": values.loss_S.tolist(),
        "clusters": text_clusters(found).tolist(),
        "distinct_tokens": distinct,
        "layers": scores,
    }


def checkpoints(models: Sequence[str], texts: Sequence[Path], tokens: int) -> Iterator[Case]:
    """Each model on each text: perplexity, and the scores of the last layers on those very tokens."""
    for model in models:
        for text in texts:
            name = f"{Path(model).name}.{text.stem}"
            yield name, lambda model=model, text=text: checkpoint_case(load_model(model), text, tokens)


def checkpoint_case(lm: LanguageModel, text: Path, tokens: int) -> Record:
    names = [select_layers(key, lm.layer_names)[0] for key in KEYS]
    documents: list[TokenDocument] = take_slices(tokenize(read_documents([text]), lm.encode), tokens, seed=0)
    scorer = LayerScorer({name: lm.dims[name] for name in names})
    targets = TargetScorer(lm)
    found = collect(lm, documents, windows_of(lm), names, scorer=scorer, targets=targets)
    loss = -float(np.mean(targets.targets().log_probs_N))
    rows = {key: asdict(score) for key, score in zip(KEYS, scorer.scores(), strict=True)}
    return {"model": lm.name, "text": text.stem, "perplexity": math.exp(loss), "tokens": found.tokens, "layers": rows}


def windows_of(lm: LanguageModel) -> WindowConfig:
    return window_config(TextConfig(), lm.name, lm.context_limit)


def measure(cases: Iterator[Case], out: Path) -> None:
    """Add what is not in the file yet, case by case."""
    out.parent.mkdir(parents=True, exist_ok=True)
    found: Record = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    for name, case in cases:
        if name not in found:
            found[name] = case()
            write_json(out, found)
            print(name, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("layers", "segments", "checkpoints"))
    parser.add_argument("given", nargs="+", help="files of the layer study, or models")
    parser.add_argument("--text", nargs="+", type=Path, default=[])
    parser.add_argument("--limit", type=int, help="tokens of a case, or segments")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.what == "layers":
        measure(layers(args.given, args.limit or 20_000), args.out)
    elif args.what == "segments":
        measure(segments(args.given, args.text, args.limit or 100), args.out)
    elif args.what == "checkpoints":
        measure(checkpoints(args.given, args.text, args.limit or 8_000), args.out)


if __name__ == "__main__":
    main()
