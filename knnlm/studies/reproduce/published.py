"""What was published, and where the models and the text are: on the hub, or in a folder laid out like it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from knnlm.errors import InputError

WIKITEXT = "wikitext-103-raw-v1"
# Rounding of the published figures, other releases of libraries, other processors.
TOLERANCE = 0.02


@dataclass(frozen=True, kw_only=True)
class Published:
    """Perplexities that were published for one size of GPT-2; None where there is none."""

    plain: float | None = None
    """As released, on the test split (README of LUMIA-Group/MemoryDecoder)."""
    tuned: str | None = None
    """The model fine-tuned on the training split, by neulab/knn-transformers."""
    tuned_plain: float | None = None
    """The fine-tuned model on the validation split (README of neulab/knn-transformers)."""
    memory: float | None = None
    """The same with a datastore of the training split."""
    memory_of_users: float | None = None
    """What that project's users got instead (its issues 17 and 18)."""


PUBLISHED: Mapping[str, Published] = {
    "distilgpt2": Published(tuned="neulab/distilgpt2-finetuned-wikitext103", tuned_plain=18.25, memory=15.03),
    "gpt2": Published(
        plain=24.89,
        tuned="neulab/gpt2-finetuned-wikitext103",
        tuned_plain=14.84,
        memory=12.57,
        memory_of_users=17.34,
    ),
    "gpt2-medium": Published(
        plain=18.29, tuned="neulab/gpt2-medium-finetuned-wikitext103", tuned_plain=11.55, memory=10.59
    ),
    "gpt2-large": Published(plain=15.80),
    "gpt2-xl": Published(plain=14.39),
}


@dataclass(frozen=True)
class Hub:
    """Hugging Face's hub, or a folder in its place."""

    folder: Path | None = None

    def model(self, name: str) -> str:
        """Return what to load a model by: its id, or its path in the folder."""
        return name if self.folder is None else str(self.folder / name)

    def text(self, split: str) -> str:
        """Return the place of a split of WikiText-103, one row for each row of the hub's set.

        :raises InputError: the folder does not have it, or in two formats.
        """
        if self.folder is None:
            return f"hf:Salesforce/wikitext/{WIKITEXT}:{split}"
        found = sorted((self.folder / WIKITEXT).glob(f"{split}.*"))
        if len(found) != 1:
            raise InputError(
                f"{self.folder / WIKITEXT} has {len(found)} files {split}.*, but one is needed: {split}.txt, .jsonl or "
                ".parquet"
            )
        return str(found[0])


def published(model: str) -> Published:
    """Return what was published for a model.

    :raises InputError: nothing was.
    """
    if model not in PUBLISHED:
        raise InputError(f"nothing was published for `model={model!r}`; take one of {', '.join(PUBLISHED)}")
    return PUBLISHED[model]
