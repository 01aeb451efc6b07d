"""Columns of one large matrix in a file that grows chunk by chunk and survives a kill.

A stream, not a state (`jaxmem.runs.resume`): a chunk is appended, and what is there is never written again.
"""

import hashlib
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from jaxmem.runs.durable import TEMPORARY, clear_os_errors, json_writer, read_json, write_atomically
from jaxmem.runs.identity import differences

ESTIMATE = "count.npz"  #: state of an estimate of `jaxmem.spectra.count_positive`, which may be in the same folder

_DAMAGED = "delete the folder and start again"


class ColumnStore:
    """Columns in ``jacobian.npy``, and in ``jacobian.json`` their identity and the checksums of the whole chunks."""

    def __init__(self, folder: Path, size: int, dtype: np.dtype, chunk: int, product: str) -> None:
        """Look at the folder and refuse columns of another matrix; nothing is written.

        Args:
            folder: new, empty, or with columns of the same matrix.
            size: number of rows and of columns.
            dtype: data type of the entries.
            chunk: columns that are appended together.
            product: `checksum` of one product, which tells operators apart.

        Raises:
            ValueError: if the folder holds columns of another matrix, a damaged file or other files.
        """
        self.folder, self.size, self.dtype, self.chunk = folder, size, dtype, chunk
        self.path, self.record = folder / "jacobian.npy", folder / "jacobian.json"
        self.header = header(size, dtype)
        wanted = {"format": 1, "size": self.size, "dtype": self.dtype.name, "chunk": chunk, "product": product}
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder}: expected a folder for the columns, got a file; choose another one")
        self.entries: dict[str, Any] = wanted | {"starts": 0, "sums": []}
        if self.record.exists():
            self.entries = read_json(self.record, _DAMAGED)
            self._check(wanted)
        elif strangers := [
            path.name for path in folder.glob("*") if not path.name.startswith(TEMPORARY) and path.name != ESTIMATE
        ]:
            raise ValueError(
                f"{folder}: expected a new or empty folder, or one with jacobian.json, got"
                f" {', '.join(sorted(strangers)[:3])}; choose another one"
            )

    def _check(self, wanted: dict[str, Any]) -> None:
        found, sums, starts = self.entries, self.entries.get("sums"), self.entries.get("starts")
        differing = differences({name: found[name] for name in wanted if name in found}, wanted)
        if differing and sums == []:  # nothing is lost
            self.entries = wanted | {"starts": 0, "sums": []}
            return
        if differing:
            raise ValueError(
                f"{self.folder}: expected columns of this operator, got others ({differing}; product is"
                f" a checksum of one, which another machine or version may round otherwise); choose another folder"
            )
        if not isinstance(sums, list) or not isinstance(starts, int) or len(sums) > -(-self.size // self.chunk):
            raise ValueError(f"{self.record}: expected checksums of whole chunks, got a damaged file; {_DAMAGED}")
        if not sums:
            return
        whole = self.path.is_file() and self.path.stat().st_size >= self._offset(self.done)
        if not whole or self._bytes(0, len(self.header)) != self.header:
            raise ValueError(f"{self.path}: expected {self.done} whole columns, got a damaged file; {_DAMAGED}")
        for i, wanted_sum in enumerate(sums):
            first, last = i * self.chunk, min((i + 1) * self.chunk, self.size)
            if checksum(self._bytes(self._offset(first), self._offset(last))) != wanted_sum:
                raise ValueError(
                    f"{self.path}: columns {first} to {last - 1} are not those that were written; {_DAMAGED}"
                )

    @property
    def done(self) -> int:
        """Number of whole columns."""
        return min(len(self.entries["sums"]) * self.chunk, self.size)

    @property
    def starts(self) -> int:
        return self.entries["starts"]

    @property
    def missing_bytes(self) -> int:
        return self._offset(self.size) - (self._offset(self.done) if self.done else 0)

    def _offset(self, column: int) -> int:
        return len(self.header) + column * self.size * self.dtype.itemsize

    def _bytes(self, first: int, last: int) -> bytes:
        with open(self.path, "rb") as stream:
            stream.seek(first)
            return stream.read(last - first)

    def begin(self) -> None:
        """Count this start, and write the record before the first column."""
        with clear_os_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_over in self.folder.glob(f"{TEMPORARY}*"):
                left_over.unlink()
        self.entries["starts"] += 1
        write_atomically(self.record, json_writer(self.entries))
        if not self.done:
            write_atomically(self.path, lambda stream: stream.write(self.header))

    def append(self, columns: np.ndarray) -> None:
        """Write the next chunk, columns as rows, over what a kill left behind the whole chunks."""
        content = np.ascontiguousarray(columns).tobytes()
        with clear_os_errors(self.path), open(self.path, "r+b") as stream:
            stream.seek(self._offset(self.done))
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        self.entries["sums"].append(checksum(content))
        write_atomically(self.record, json_writer(self.entries))

    def read(self, columns: slice) -> np.ndarray:
        """Columns as rows of an array that is mapped: only what is read takes memory."""
        shape = (columns.stop - columns.start, self.size)
        return np.memmap(self.path, self.dtype, "r", self._offset(columns.start), shape)


def header(size: int, dtype: np.dtype) -> bytes:
    """Header of a NumPy file of this matrix, columns one after another (Fortran order)."""
    stream = BytesIO()
    layout = {"descr": dtype.str, "fortran_order": True, "shape": (size, size)}
    np.lib.format.write_array_header_1_0(stream, layout)
    return stream.getvalue()


def checksum(content: bytes) -> str:
    """First sixteen hexadecimal digits of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]
