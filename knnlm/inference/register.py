"""The public door to the model of lm-eval, which needs no lm-eval until it is called."""

from __future__ import annotations


def register_lm_eval() -> None:
    """Make the model `knnlm` known to lm-eval in this process; a second call changes nothing.

    After it, `lm_eval.simple_evaluate(model="knnlm", model_args="store=FOLDER")` works.
    :raises InputError: lm-eval is not installed.
    """
    from knnlm.inference import harness  # noqa: F401 - whose import registers it, once
