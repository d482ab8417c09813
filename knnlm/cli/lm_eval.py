"""lm-eval's own command line, with the model `knnlm` registered."""

from __future__ import annotations

import typer

AS_IT_IS = {
    "allow_extra_args": True,
    "allow_interspersed_args": False,
    "ignore_unknown_options": True,
    "help_option_names": [],
}
"""All arguments are passed on to lm-eval, `--help` too."""


def lm_eval(context: typer.Context) -> None:
    """Run lm-eval with the additional model knnlm; all options are lm-eval's.

    Example: knnlm lm-eval --model knnlm --model_args store=nursing.knn --tasks arc_easy

    For several datastores: --model_args 'store=["wards.knn","pharmacy.knn"]'.
    """
    from knnlm.inference.harness import main

    main(context.args)
