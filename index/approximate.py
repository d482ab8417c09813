"""A FAISS index over a source: FAISS proposes more candidates than wanted, which are re-ranked by exact distances.

Legend: N keys, Q queries, C candidates, D dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index.base import VectorIndex
from index.faiss_index import Effort, FaissIndex
from index.manifest import CENTRE_FILE, INDEX_FILE, LISTS_FILE
from index.metric import Metric
from index.source import VectorSource, centred_queries

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


class ApproximateIndex(VectorIndex):
    """Any FAISS index with exact distances on top."""

    def __init__(
        self,
        source: VectorSource,
        metric: Metric,
        *,
        spec: str,
        native: FaissIndex,
        centre_D: Floats,
        overfetch: float = 1.0,
    ) -> None:
        super().__init__(source, metric)
        self.native, self.centre_D = native, centre_D
        self.overfetch = overfetch
        """Candidates per neighbour wanted: compressed codes order keys only roughly."""
        self._spec = spec

    @property
    def spec(self) -> str:
        """The FAISS factory string."""
        return self._spec

    @property
    def size_bytes(self) -> int:
        """Bytes of the FAISS index."""
        return self.native.size_bytes

    @property
    def indexed(self) -> int:
        """Keys that FAISS has."""
        return len(self.native)

    @property
    def effort(self) -> Effort | None:
        """`nprobe` or `efSearch`; None if every search scans all keys."""
        return self.native.effort

    def set_effort(self, value: int) -> None:
        """Set the parameter that `effort` names."""
        if (effort := self.effort) is not None:
            self.native.set_effort(effort.name, value)

    @property
    def parameters(self) -> Mapping[str, float]:
        """`nprobe` or `efSearch`, and `overfetch`."""
        effort = self.effort
        return {"overfetch": self.overfetch} | ({effort.name: effort.value} if effort else {})

    def save(self, folder: Path) -> tuple[str, ...]:
        """Write the FAISS index, its lists and the centre, and return the names of the files."""
        with (folder / INDEX_FILE).open("xb") as file:
            self.native.write(file.write)
        with (folder / CENTRE_FILE).open("xb") as file:
            np.save(file, self.centre_D, allow_pickle=False)
        if self.native.lists is None:
            return INDEX_FILE, CENTRE_FILE
        with (folder / LISTS_FILE).open("xb") as file:
            file.write(self.native.lists.data)
        return INDEX_FILE, CENTRE_FILE, LISTS_FILE

    def _candidates_for(self, k: int) -> int:
        return math.ceil(super()._candidates_for(k) * self.overfetch)

    def _propose(self, queries_QD: Floats, count: int) -> Ids:
        return self.native.propose(centred_queries(queries_QD, self.centre_D, self.metric), count)
