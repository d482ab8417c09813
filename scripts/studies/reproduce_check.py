"""`knnlm reproduce` on a text at hand and a small model, against the reference implementation written once more.

    PYTHONPATH=. python scripts/studies/reproduce_check.py --model MODEL --text wikitext-valid.txt --folder FOLDER

FOLDER takes the hub's place: the model, given a window of 1,024 tokens, as `gpt2` and as the fine-tuned one; eight
tenths of the text's rows as the training split, a tenth each as validation and test. Then the command runs as a user
gives it, and its rows are computed again with FAISS and NumPy: run_clm.py's windows, `build_index`, `get_knns`,
`knns_to_log_prob` and `interpolate` of neulab/knn-transformers. Shapes: N keys, Q queries, D hidden size.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np

from knnlm.model.loading import load_model
from knnlm.store.datastore import Datastore
from knnlm.studies.reproduce.published import PUBLISHED, WIKITEXT
from knnlm.studies.reproduce.theirs import RawKeys
from tests import oracle
from tests.text.test_protocol import their_pass

BLOCK, STRIDE = 1024, 512
K, LAM, LISTS, CODE_BYTES, PROBES, TRAINING = 1024, 0.25, 4096, 64, 32, 1_000_000


def make_hub(folder: Path, model: Path, text: Path) -> dict[str, list[str]]:
    """Rows of each split, as they were written."""
    with text.open(encoding="utf-8", newline="\n") as file:
        rows = list(file)
    first, second = len(rows) * 8 // 10, len(rows) * 9 // 10
    splits = {"train": rows[:first], "validation": rows[first:second], "test": rows[second:]}
    (folder / WIKITEXT).mkdir(parents=True)
    for split, own in splits.items():
        (folder / WIKITEXT / f"{split}.txt").write_text("".join(own), encoding="utf-8")
    for name in ("gpt2", PUBLISHED["gpt2"].tuned or ""):
        shutil.copytree(model, folder / name)
        config = folder / name / "config.json"
        known = json.loads(config.read_text())
        config.write_text(json.dumps(known | {"max_position_embeddings": max(BLOCK, known["max_position_embeddings"])}))
    return splits


def command(folder: Path) -> list[dict[str, float]]:
    """Rows of the command's two stages."""
    done = [sys.executable, "-m", "knnlm", "reproduce", "wikitext103", "--hub", str(folder), "--dtype", "float32"]
    done += ["--out", str(folder / "store"), "--json"]
    told = json.loads(subprocess.run(done, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return [*told["plain"]["rows"], *told["memory"]["rows"]]


def their_index(keys: np.ndarray) -> faiss.IndexIVFPQ:
    index = faiss.IndexIVFPQ(faiss.IndexFlatL2(keys.shape[1]), keys.shape[1], LISTS, CODE_BYTES, 8)
    index.nprobe = PROBES
    np.random.seed(1)  # noqa: NPY002 - as there
    drawn = np.random.choice(np.arange(len(keys)), size=[min(TRAINING, len(keys))], replace=False)  # noqa: NPY002
    index.train(keys[drawn].astype(np.float32))
    index.add(keys.astype(np.float32))
    return index


def their_perplexities(keys: np.ndarray, values: np.ndarray, test: oracle.Pass) -> tuple[float, float]:
    """With distances of codes, and with exact ones. `keys`: [N, D], float16."""
    index, losses = their_index(keys), ([], [])
    for at in range(0, len(test.targets), 128):
        queries, targets = test.keys[at : at + 128].astype(np.float32), test.targets[at : at + 128]
        distances, found = index.search(queries, K)
        exact = ((queries[:, None] - keys[found].astype(np.float32)) ** 2).sum(-1)
        for kind, some in zip(losses, (distances, exact), strict=True):
            p = np.exp(some.min(1, keepdims=True) - some.astype(np.float64))
            p_knn = (p * (values[found] == targets[:, None])).sum(1) / p.sum(1)
            mixed = (1 - LAM) * np.exp(test.log_probs[at : at + 128]) + LAM * p_knn
            kind.extend(-np.log(mixed))
    return float(np.exp(np.mean(losses[0]))), float(np.exp(np.mean(losses[1])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "text", "folder"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    splits = make_hub(args.folder, args.model, args.text)
    told = command(args.folder)

    lm = load_model(args.folder / "gpt2", device="cpu", dtype="float32")
    module = lm.model.get_submodule(f"model.layers.{lm.model.config.num_hidden_layers - 1}.mlp")
    passes = {
        split: their_pass(lm, module, [lm.encode(row).tolist() for row in rows], BLOCK, STRIDE)
        for split, rows in splits.items()
    }
    store = Datastore.open(args.folder / "store")
    keys = RawKeys(store, *store.layers).read(0, store.count).astype(np.float16)
    assert np.array_equal(store.values, passes["train"].targets)
    off = float(np.abs(keys - passes["train"].keys).max())
    print(f"{store.count:,} keys, off by at most {off:.2g}; {len(passes['validation'].targets):,} queries")
    expected = [
        *(float(np.exp(-passes[split].log_probs.mean())) for split in ("test", "validation")),
        *their_perplexities(keys, store.values, passes["validation"]),
    ]
    for row, again in zip(told, expected, strict=False):
        print(f"{row['name']}: {row['perplexity']:.4f}, written again {again:.4f}")
    print(f"{told[-1]['name']}: {told[-1]['perplexity']:.4f}")


if __name__ == "__main__":
    main()
