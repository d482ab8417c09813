"""Every error that a user can mend, each one line: the fact, the value received, what to do.

KNNLMError
├── InputError            an option or a text that cannot be used (also a ValueError)
├── ModelError            a model that cannot serve: no tokenizer, not a causal LM, NaN in a layer
│   └── LayerError        a layer that this model does not have; the message lists the names
└── DatastoreError        a datastore on disk
    ├── DatastoreExists   the output folder holds something already
    ├── DatastoreMismatch made with another model, tokenizer or layer
    └── DatastoreCorrupt  a file is missing, short or changed
"""


class KNNLMError(Exception):
    """The base of all errors of this package."""


class InputError(KNNLMError, ValueError):
    """An option or a text that cannot be used."""


class ModelError(KNNLMError):
    """A model that cannot serve as the language model."""


class LayerError(ModelError):
    """A layer name or pattern that fits no layer of the model."""


class DatastoreError(KNNLMError):
    """A datastore that cannot be written or read."""


class DatastoreExists(DatastoreError):
    """The output folder holds something already."""


class DatastoreMismatch(DatastoreError):
    """The datastore was made with something other than what it is opened with."""


class DatastoreCorrupt(DatastoreError):
    """A file of the datastore is missing, short or changed."""


def first_line(error: Exception) -> str:
    """The first line of what another library said, or the kind of its error where it said nothing."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
