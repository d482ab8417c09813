"""The command line: a thin skin over `knnlm.pipeline.verbs`. Nothing heavy is imported before a command needs it.

A verb is a function in a file of its own here, with options from `options.py`, and a line in the table in `entry.py`.
"""

from knnlm.cli.entry import main

__all__ = ["main"]
