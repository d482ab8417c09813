"""The programs of docs/own-vectors.md, as they stand there: an export, and a datastore written from it."""

from __future__ import annotations

import re

import numpy as np

import knnlm
from knnlm.config import EvalConfig, KNNConfig, LayerConfig, Settings, TextConfig
from tests.evaluation.test_evaluate_oracle import texts
from tests.source_files import ROOT


def test_the_programs_of_the_page_make_the_same_datastore(gpt2_folder, tmp_path, monkeypatch):
    export, write = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own-vectors.md").read_text(), re.DOTALL)
    (tmp_path / "my-model").symlink_to(gpt2_folder)
    (tmp_path / "text.txt").write_text("\n\n".join(texts(0, 6)))
    (tmp_path / "held-out.txt").write_text("\n\n".join(texts(1, 4)))
    monkeypatch.chdir(tmp_path)
    exec(export, {})
    exec(write, {})
    written = knnlm.open_datastore("written.knn")
    assert written.verify() == () and written.layers == ("1.block_output",)
    assert written.manifest.indexes and written.manifest.fitted["1.block_output"]["k"] > 0
    settings = Settings(
        text=TextConfig(context=128, stride=64),
        layers=LayerConfig(layers="1.block_output"),
        knn=KNNConfig(index="exact", max_k=16),
        evaluation=EvalConfig(eval_tokens=200, examples=1),
    )
    given = knnlm.build_from_vectors(knnlm.load_model("my-model"), "states", "own.knn", settings=settings)
    assert np.array_equal(written.values, given.values) and written.count > 300
    assert written.documents[:, [0, 1]].tolist() == given.documents[:, [0, 1]].tolist()
    ours, theirs = (one.keys("1.block_output") for one in (written, given))
    # The centre is the mean of the first append, here a document, there a batch; keys are rounded to float16 from it.
    rows = [one.read(0, written.count) + one.centre for one in (ours, theirs)]
    np.testing.assert_allclose(*rows, atol=2e-3)
    assert written.sources == given.sources
    given.check_model(written.manifest.fingerprint)
