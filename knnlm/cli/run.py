"""`knnlm run`.

`knnlm.pipeline` is imported after the model is loaded: what takes seconds to import is imported while loading is shown.
"""

from __future__ import annotations

from knnlm.cli import options
from knnlm.cli.screen import Screen
from knnlm.cli.shared import check_show, load, settings_from, show_evaluation


def run(
    model: options.Model,
    text: options.Text,
    out: options.Out,
    eval_text: options.MaybeEvalText = None,
    layers: options.Layers = None,
    candidates: options.Candidates = "candidates",
    select: options.Select = "dispersion",
    k: options.K = None,
    temperature: options.Temperature = None,
    lam: options.Lambda = None,
    metric: options.Metric = "l2",
    index: options.Index = "auto",
    context: options.Context = None,
    stride: options.Stride = None,
    max_tokens: options.MaxTokens = None,
    eval_tokens: options.EvalTokens = 20_000,
    text_field: options.TextField = "text",
    protocol: options.Protocol = "documents",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    batch_size: options.BatchSize = "auto",
    key_dtype: options.KeyDtype = "float16",
    disk_budget: options.DiskBudget = None,
    seed: options.Seed = 0,
    show: options.Show = None,
    json: options.Json = False,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.Trust = False,
) -> None:
    """The whole way: build, score, choose, evaluate every layer, index the chosen one.

    Example: knnlm run --model gpt2 --text nursing.jsonl --out nursing.knn
    """
    settings = settings_from(locals())
    from knnlm.files import check_new_folder
    from knnlm.text.corpus import check_paths

    check_show(show)
    check_new_folder(out, overwrite=overwrite)
    check_paths([*text, *(eval_text or ())])
    screen = Screen(json)
    lm = load(model, dtype, device, trust_remote_code, screen)
    from knnlm.pipeline import run as run_pipeline

    result = run_pipeline(lm, text, out, eval_text=eval_text, settings=settings, overwrite=overwrite, progress=screen)
    show_evaluation(result, screen, out, show)
