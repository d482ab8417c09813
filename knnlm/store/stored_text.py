"""What the rows of a datastore stand for: the token that followed a key, its document, and the text around it.

Legend: N keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray


class StoredText(ABC):
    """Values and the documents that they are of."""

    @property
    @abstractmethod
    def count(self) -> int:
        """N, the number of keys of each layer and of values."""

    def __len__(self) -> int:
        return self.count

    @property
    @abstractmethod
    def values(self) -> NDArray[np.int32]:
        """The next token of each key, int32 [N], read-only."""

    @property
    @abstractmethod
    def documents(self) -> NDArray[np.int64]:
        """int64 [documents, 4]: first row, first token, place in `sources`, number in the source."""

    @property
    @abstractmethod
    def sources(self) -> tuple[str, ...]:
        """Names of the texts; the third column of `documents` counts in them."""

    def document_of(self, row: int) -> tuple[str, int]:
        """Return the name of the source of a row's document, and the document's number in it."""
        _, _, source, number = self.documents[self._document(row)].tolist()
        return self.sources[source], number

    def context(self, row: int, width: int) -> NDArray[np.int32]:
        """Return the `width` tokens before the value of a row, or all that its document has."""
        first, first_token = self.documents[self._document(row), :2].tolist()
        start = max(first, row - width)
        tokens = self.values[start:row]
        if row - start < width:
            return np.concatenate([np.array([first_token], np.int32), tokens])
        return tokens

    def continuation(self, row: int, width: int) -> NDArray[np.int32]:
        """Return the `width` tokens after the value of a row, or all that its document has."""
        next_document = self._document(row) + 1
        ends = self.documents[next_document : next_document + 1, 0].tolist() or [self.count]
        return self.values[row + 1 : min(row + 1 + width, ends[0])]

    def _document(self, row: int) -> int:
        """The number of the row's document, from 0; documents without values do not own a row."""
        if not 0 <= row < self.count:
            raise IndexError(f"row {row} of {self.count} keys")
        return int(np.searchsorted(self.documents[:, 0], row, side="right")) - 1
