"""All errors that a user can fix. Each message is one line: the fact, the value received, what to do.

KNNLMError
├── InputError            an option or a text that cannot be used (also a ValueError)
├── ModelError            a model that cannot be used: no tokenizer, not a causal LM, NaN in a layer
│   └── LayerError        a layer that this model does not have; the message lists the names
└── DatastoreError        a datastore on disk
    ├── DatastoreExists   the output path is occupied
    ├── DatastoreMismatch made with another model, tokenizer or layer
    └── DatastoreCorrupt  a file is missing, short or changed
"""


class KNNLMError(Exception):
    """The base of all errors of this package."""


class InputError(KNNLMError, ValueError):
    """An option or a text that cannot be used."""


class ModelError(KNNLMError):
    """A model that cannot be used as the language model."""


class LayerError(ModelError):
    """A layer name or pattern that matches no layer of the model."""


class DatastoreError(KNNLMError):
    """A datastore that cannot be written or read."""


class DatastoreExists(DatastoreError):
    """The output path is occupied: by other files, by an input, or by another run."""


class DatastoreMismatch(DatastoreError):
    """The datastore was made with another model or tokenizer, or lacks the layer."""


class DatastoreCorrupt(DatastoreError):
    """A file of the datastore is missing, short or changed."""


def not_installed(what: str, library: str, extra: str) -> str:
    """Return the message of an error for a library that comes with an extra."""
    return f"{what} needs {library}, which is not installed; pip install '.[{extra}]'"


def missing_library(error: ModuleNotFoundError) -> str:
    """Return the package that an import looked for."""
    return (error.name or str(error)).partition(".")[0]


def first_line(error: Exception) -> str:
    """Return the first line of another library's error message, or the error's type if there is none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
