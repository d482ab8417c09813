"""A saved index whose files are mapped but not yet loaded: it can be checked, and survives their removal."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index.errors import CorruptIndex
from index.manifest import CENTRE_FILE, MANIFEST, IndexManifest, manifest_from
from index.mapped import Bytes, OpenFolder
from index.metric import Metric
from index.source import VectorSource
from index.typed import Misfit

# Keys hashed to distinguish sources of the same size, such as two layers of the same text.
FINGERPRINT_ROWS = 64


@dataclass(frozen=True)
class SavedIndex:
    """The manifest of an index, and the bytes of its files."""

    folder: Path
    manifest: IndexManifest
    files: Mapping[str, Bytes]

    @classmethod
    def open(cls, folder: str | Path, *, with_files: bool = True) -> SavedIndex:
        """Open all files of an index; sizes are checked, bytes not yet read.

        :raises CorruptIndex: a file is missing, unreadable or of another size; names it.
        """
        folder = Path(folder)
        try:
            with OpenFolder(folder) as opened:
                manifest = _manifest_in(opened)
                names = manifest.files if with_files else ()
                return cls(folder, manifest, {name: _bytes_of(opened, name, manifest) for name in names})
        except (FileNotFoundError, NotADirectoryError):
            raise _no_index(folder) from None

    def check_files(self) -> None:
        """Read every byte and compare the checksums.

        :raises CorruptIndex: names the file that was changed.
        """
        for name, data in self.files.items():
            if hashlib.sha256(data.data).hexdigest() != self.manifest.files[name].sha256:
                raise CorruptIndex(
                    f"{self.folder / name} was changed after it was written: it does not give the checksum in "
                    f"{MANIFEST}; build the index again"
                )

    def check_source(self, source: VectorSource, metric: Metric | None = None) -> None:
        """Check that the index was built over these keys.

        :raises CorruptIndex: it was not; names what differs.
        """
        folder, manifest = self.folder, self.manifest
        self.compare(folder, "metric", manifest.metric, str(metric or manifest.metric))
        self.compare(folder, "dimension", manifest.dim, source.dim)
        self.compare(folder, "number of keys", manifest.count, len(source))
        self.compare(folder, "fingerprint of keys", manifest.keys[:16], fingerprint(source)[:16])

    def centre(self) -> NDArray[np.float32]:
        """Return the vector subtracted from the keys, float32 [D]; not for an exact index."""
        path, data = self.folder / CENTRE_FILE, self.files[CENTRE_FILE]
        header = len(data) - 4 * self.manifest.dim
        self.compare(path, "kind of file", data[:6].tobytes(), b"\x93NUMPY")
        self.compare(path, "end of the header", data[max(0, header) - 1 : max(0, header)].tobytes(), b"\n")
        return data[header:].view("<f4").astype(np.float32)

    @staticmethod
    def compare(path: Path, what: str, found: object, expected: object) -> None:
        """Raise CorruptIndex unless the found value is the expected one."""
        if found != expected:
            raise CorruptIndex(f"{path}: its {what} is {found}, but {expected} is wanted; build the index again")


def fingerprint(source: VectorSource) -> str:
    """Return the SHA-256 of up to 64 keys spread evenly over the source, as float32."""
    rows = min(len(source), FINGERPRINT_ROWS)
    ids = np.arange(rows, dtype=np.int64) * (max(0, len(source) - 1)) // max(1, rows - 1)
    return hashlib.sha256(source.take(ids).astype("<f4").tobytes()).hexdigest()


def _manifest_in(opened: OpenFolder) -> IndexManifest:
    path = opened.path / MANIFEST
    with _unreadable(path):
        text = opened.map(MANIFEST).data.tobytes()
    try:
        return manifest_from(text)
    except Misfit as error:
        raise CorruptIndex(f"{path} cannot be read ({error}); build the index again") from None


def _bytes_of(opened: OpenFolder, name: str, manifest: IndexManifest) -> Bytes:
    path = opened.path / name
    try:
        with _unreadable(path):
            data = opened.map(name).data
    except FileNotFoundError:
        raise CorruptIndex(f"{path} is missing; build the index again") from None
    SavedIndex.compare(path, "size in bytes", len(data), manifest.files[name].bytes)
    return data


@contextmanager
def _unreadable(path: Path) -> Iterator[None]:
    """What is not there at all is for others to say."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CorruptIndex(f"{path} cannot be read ({error.strerror}); build the index again") from None


def _no_index(folder: Path) -> CorruptIndex:
    return CorruptIndex(f"{folder} holds no {MANIFEST}, so it is no index or was never finished; build it")
