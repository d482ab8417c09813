"""lm-eval's own command line, which then knows the model `knnlm`."""

from __future__ import annotations

import typer

AS_IT_IS = {
    "allow_extra_args": True,
    "allow_interspersed_args": False,
    "ignore_unknown_options": True,
    "help_option_names": [],
}
"""Every word of the command line is lm-eval's, `--help` too."""


def lm_eval(context: typer.Context) -> None:
    """lm-eval, unchanged, where --model knnlm is known too; all options are its own.

    Example: knnlm lm-eval --model knnlm --model_args store=nursing.knn --tasks arc_easy
    """
    from knnlm.inference.harness import main

    main(context.args)
