"""Public function that registers the lm-eval model; lm-eval is imported only when it is called."""

from __future__ import annotations


def register_lm_eval() -> None:
    """Register the model `knnlm` with lm-eval in this process; a second call changes nothing.

    Afterwards `lm_eval.simple_evaluate(model="knnlm", model_args="store=FOLDER")` works.
    :raises InputError: lm-eval is not installed.
    """
    from knnlm.inference import harness  # noqa: F401 - its import registers the model, once
