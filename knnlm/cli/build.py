"""`knnlm build`."""

from __future__ import annotations

from knnlm.cli import options
from knnlm.cli.screen import Screen
from knnlm.cli.shared import load, settings_from
from knnlm.cli.store import show_store


def build(
    model: options.Model,
    text: options.Text,
    out: options.Out,
    layers: options.Layers = None,
    candidates: options.Candidates = "candidates",
    select: options.Select = "dispersion",
    k: options.K = None,
    metric: options.Metric = "l2",
    index: options.Index = "auto",
    context: options.Context = None,
    stride: options.Stride = None,
    max_tokens: options.MaxTokens = None,
    text_field: options.TextField = "text",
    protocol: options.Protocol = "documents",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    batch_size: options.BatchSize = "auto",
    key_dtype: options.KeyDtype = "float16",
    seed: options.Seed = 0,
    json: options.Json = False,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.Trust = False,
) -> None:
    """Choose a layer on a sample (or take --layers), write the datastore and its index.

    Example: knnlm build --model gpt2 --text nursing.jsonl --out nursing.knn
    """
    settings = settings_from(locals())
    from knnlm.files import check_new_folder
    from knnlm.text.corpus import check_paths

    check_new_folder(out, overwrite=overwrite)
    check_paths(text)
    screen = Screen(json)
    lm = load(model, dtype, device, trust_remote_code, screen)
    from knnlm.pipeline import build as build_pipeline

    store = build_pipeline(lm, text, out, settings=settings, overwrite=overwrite, progress=screen)
    show_store(store.describe(), screen)
