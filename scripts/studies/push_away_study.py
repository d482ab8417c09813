"""Effect of a push-away loss on a small GPT-2 and its kNN-LM: a series of trainings that can be stopped and resumed.

    .venv/bin/python scripts/studies/push_away_study.py --out study --list
    .venv/bin/python scripts/studies/push_away_study.py --out study --text corpora --run "[sct]*" "weight-*"

Each run writes OUT/NAME.json, and is skipped where that is; `push_away_table.py` makes tables and the picture.
`--text` is a folder with the texts named in RUNS. GPT-2 shape, 4 blocks x 128, the demo model's tokenizer, windows of
128 tokens, 4 in a step, constant learning rate, three seeds: each gives other weights, another order of windows and
another held-out tenth. docs/train.md has the results.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from knnlm.config import EvalConfig, KNNConfig, LayerConfig, Settings, TextConfig
from knnlm.files import write_json
from knnlm.model.loading import load_model
from knnlm.pipeline import run, score
from knnlm.progress import Advance
from knnlm.studies.train.config import PushAway, TrainConfig
from knnlm.studies.train.train import train, train_document

DEMO = Path(__file__).parents[1] / "demo_data" / "model"
SEEDS = range(3)
KEY_LAYER = "-1.ffn_input"
SHORT, LONG, TUNED = 1000, 2000, 300
SINGLE, CODE, NURSING = "wikitext-valid.txt", "rust-book.jsonl", "nursing.jsonl"


NONE = PushAway()


@dataclass(frozen=True)
class Run:
    """One training, and what is measured of its model."""

    push_away: PushAway = NONE
    text: str = SINGLE
    other_text: str | None = None
    steps: int = SHORT
    learning_rate: float = 5e-4
    lora: int | None = None
    from_scratch: bool = True


# arXiv 2506.24106: single domain at 5e-4 with λ = 0.1, two domains at 7e-4 with λ = 0.01, steps 500 and 1000.
KINDS = {
    "single-none": Run(steps=LONG),
    "single-push": Run(PushAway(weight=0.1), steps=LONG),
    "cross-none": Run(other_text=CODE, learning_rate=7e-4),
    "cross-push": Run(PushAway(weight=0.01), other_text=CODE, learning_rate=7e-4),
    # The warm-up is a twentieth of the steps: what trains for 1,000 is compared with what trains for 1,000.
    "short-none": Run(),
    "single-uniformity": Run(PushAway(weight=0.1, regularizer="uniformity")),
    "single-different": Run(PushAway(weight=0.1, regularizer="different-tokens")),
    "single-key": Run(PushAway(weight=0.1, layer=KEY_LAYER)),
    "tuned-lora": Run(text=NURSING, from_scratch=False, lora=8, steps=TUNED, learning_rate=1e-3),
    "tuned-full": Run(text=NURSING, from_scratch=False, steps=TUNED, learning_rate=3e-4),
    # Asked after the first results: does the gain of uniformity last, and does it outlive a better learning rate?
    "fast-none": Run(learning_rate=2e-3),
    "fast-uniformity": Run(PushAway(weight=0.1, regularizer="uniformity"), learning_rate=2e-3),
    "long-uniformity": Run(PushAway(weight=0.1, regularizer="uniformity"), steps=LONG),
}
RUNS = {f"{kind}-{seed}": (one, seed) for seed in SEEDS for kind, one in KINDS.items()}
# One seed: how much the weight matters.
for _kind, _name, _weight in (
    ("push", "push-away", 1.0),
    ("uniformity", "uniformity", 0.01),
    ("uniformity", "uniformity", 1.0),
):
    RUNS[f"weight-{_kind}-{_weight:g}-0"] = (Run(PushAway(weight=_weight, regularizer=_name)), 0)


class Snapshot:
    """A Progress that copies the checkpoint of one step before the next takes its place."""

    def __init__(self, step: int, checkpoints: Path, to: Path) -> None:
        self._step, self._from, self._to = step, checkpoints / f"checkpoint-{step}", to

    @contextmanager
    def stage(self, name: str, unit: str) -> Iterator[Advance]:
        begun = time.perf_counter()

        def advance(done: int, total: int | None) -> None:
            if done % 100 == 0:
                print(f"{name} {done} of {total} {unit}, {time.perf_counter() - begun:.0f} s", flush=True)
            if done == self._step + 1:
                shutil.copytree(self._from, self._to, ignore=shutil.ignore_patterns("*.pt", "*.pth", "*.bin"))

        yield advance

    def note(self, line: str) -> None:
        print(line, flush=True)


def shape(folder: Path) -> Path:
    """A GPT-2 of 4 blocks x 128 without weights, for --from-scratch."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    sizes = {"n_layer": 4, "n_embd": 128, "n_head": 4, "n_positions": 128, "vocab_size": len(tokenizer)}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    AutoConfig.for_model("gpt2", **sizes, **dropout, **ends).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measure(name: str, texts: Path, folder: Path) -> dict[str, Any]:
    """Train, then measure the model of the last step, or of SHORT steps where the training is longer."""
    one, seed = RUNS[name]
    out, snapshot = folder / "models" / name, folder / "models" / f"{name}-{SHORT}"
    for old in (out, snapshot, out.with_name(f"{name}.checkpoints")):
        shutil.rmtree(old, ignore_errors=True)
    config = TrainConfig(
        push_away=one.push_away,
        steps=one.steps,
        batch_size=4,
        context=128,
        learning_rate=one.learning_rate,
        schedule="constant",
        from_scratch=one.from_scratch,
        lora=one.lora,
        evaluations=max(one.steps // 250, 3),
        dtype="bfloat16",
        seed=seed,
    )
    result = train(
        shape(folder / "shape") if one.from_scratch else DEMO,
        [texts / one.text],
        out,
        other_text=[texts / one.other_text] if one.other_text else None,
        config=config,
        progress=Snapshot(SHORT, out.with_name(f"{name}.checkpoints"), snapshot),
    )
    document = train_document(result)
    if snapshot.exists():
        shutil.copy(out / "tokenizer.json", snapshot)
        shutil.copy(out / "tokenizer_config.json", snapshot)
    measured = snapshot if snapshot.exists() else out
    if one.other_text is None and one.from_scratch:
        document["knn"] = knn(measured, texts / one.text, folder / "stores" / name, seed)
    document["dispersion"] = dispersions(measured, texts / one.text)
    if not one.from_scratch:
        document["dispersion_before"] = dispersions(DEMO, texts / one.text)
    return document


def knn(model: Path, text: Path, store: Path, seed: int) -> dict[str, Any]:
    """Perplexity of the LM and of the kNN-LM on text that neither has read, keys from the layer KEY_LAYER."""
    settings = Settings(
        text=TextConfig(context=127, stride=64, max_tokens=100_000),  # the last position of a window is not trained
        layers=LayerConfig(layers=KEY_LAYER, select=KEY_LAYER),
        knn=KNNConfig(index="exact"),
        evaluation=EvalConfig(eval_tokens=8_000, examples=0),
        seed=seed,
    )
    shutil.rmtree(store, ignore_errors=True)
    result = run(load_model(model), [text], store, settings=settings)
    shutil.rmtree(store)
    return {"lm": asdict(result.lm), "layer": asdict(result.layers[0]), "keys": result.keys}


def dispersions(model: Path, text: Path) -> dict[str, Any]:
    """Pooled and within windows, of the last layers, on the first 20,000 tokens."""
    layers = LayerConfig(layers=f"final_norm,{KEY_LAYER},-1.attn_input,-1.block_output")
    settings = Settings(text=TextConfig(context=127, max_tokens=20_000), layers=layers)
    return {one.layer: asdict(one) for one in score(load_model(model), [text], settings=settings).layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="folder with the texts")
    parser.add_argument("--list", action="store_true", help="print the names of runs that are not done")
    parser.add_argument("--run", nargs="+", default=[], metavar="NAME", help="names of runs, or patterns of them")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    left = [name for name in RUNS if not (args.out / f"{name}.json").exists()]
    if args.list:
        print(*left, sep="\n")
    for name in left:
        if any(fnmatchcase(name, pattern) for pattern in args.run):
            begun = time.process_time()
            document = measure(name, args.text, args.out) | {"cpu_seconds": time.process_time() - begun}
            write_json(args.out / f"{name}.json", document)
            print(f"{name}: {document['cpu_seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
