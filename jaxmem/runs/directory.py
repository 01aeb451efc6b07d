"""The run directory: experiments and audits write it and resume from it, and reports read nothing else.

``manifest.json`` comes first and fixes the run; ``arrays/<key>.npz`` (named arrays) and one line of
``results-<process>.jsonl`` per finished unit of work follow; ``costs-<process>.jsonl`` keeps seconds and bytes, which
no comparison looks at;
``environments-<process>.jsonl`` says when a run was continued under other versions or devices;
``spectra.npz`` and, last, ``metrics.json`` finish it. Files appear whole or not at all: each is written beside its
place, fsynced and renamed; a line that a crash tore is cut when the run continues.
"""

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jaxmem.runs import manifest as manifests
from jaxmem.runs.durable import (
    TEMPORARY,
    append_line,
    arrays_writer,
    as_json,
    clear_os_errors,
    cut_torn_line,
    json_writer,
    read_arrays,
    read_json,
    read_lines,
    write_atomically,
)
from jaxmem.runs.identity import differences
from jaxmem.runs.origin import Origin

# A unit is done when its row is there: without its arrays it has to be undone.
_AGAIN = "delete the line of its unit in results-*.jsonl, and metrics.json, and start the run again"
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,149}")


class Run:
    """One run directory, opened by ``Run.open`` to write or by ``Run.read`` to look at."""

    def __init__(self, directory: Path, manifest: dict[str, Any], process: int) -> None:
        self.directory = directory
        self.manifest = manifest
        self.process = process
        self._rows = _read_rows(directory)

    @classmethod
    def open(
        cls,
        directory: str | Path,
        config: dict[str, Any],
        *,
        process: int | None = None,
        origin: Origin | None = None,
        **provenance: Any,
    ):
        """Begin a run, or continue the run of the same config in this directory; many processes may do so at once.

        Args:
            directory: new, empty, or holding a run of the same config and provenance.
            config: everything that decides the results, JSON values only (no absolute paths).
            process: index of this process among those that share the run, ``jax.process_index()`` by default.
            origin: where the run comes from, which a new manifest says with the time; it is not compared.
            provenance: further values that must be the same to continue, such as ``dtype`` and ``data`` (hashes).

        Raises:
            ValueError: the directory holds other files, a run of another version of jaxmem, a run that differs (the
                fields are named), or a manifest that cannot be read.
            OSError: the directory cannot be written.
        """
        directory = Path(directory)
        if directory.exists() and not directory.is_dir():
            raise ValueError(f"{directory}: expected a directory for the run, got a file; choose another folder")
        wanted = manifests.describe(config, provenance)
        here = manifests.environment()
        path = directory / "manifest.json"
        process = _process_index() if process is None else process
        first = wanted | here | ({"origin": origin.described()} if origin else {})
        created = not path.exists() and manifests.create(path, first, process)
        manifest = first if created else read_json(path, "move the directory away, or choose another folder")
        if not created:
            manifests.refuse_other_format(directory, manifest)
            manifests.refuse_other_work(directory, manifest, wanted)
        with clear_os_errors(directory):
            (directory / "arrays").mkdir(exist_ok=True)
            for left_over in directory.glob(f"**/{TEMPORARY}{process}-*"):
                left_over.unlink(missing_ok=True)
            for name in ("results", "costs", "environments"):
                cut_torn_line(directory / f"{name}-{process}.jsonl")
        run = cls(directory, manifest, process)
        changed = {name: here[name] for name in here if manifest.get(name) != here[name]}
        if changed and not created:
            before = {name: manifest[name] for name in changed if name in manifest}
            warnings.warn(
                f"{directory}: continued under another environment ({differences(before, changed)}); "
                "the rest may differ from the first part by rounding",
                stacklevel=2,
            )
            append_line(directory / f"environments-{process}.jsonl", changed)
        return run

    @classmethod
    def read(cls, directory: str | Path) -> "Run":
        """Look at a run without its config: the manifest, the rows and, once finished, metrics and spectra.

        Raises:
            ValueError: there is no run here, its manifest cannot be read, or another version of jaxmem made it.
        """
        directory = Path(directory)
        path = directory / "manifest.json"
        if not path.is_file():
            raise ValueError(
                f"{directory}: expected a run directory, got no manifest.json in it; give the folder that "
                "a run was written to"
            )
        manifest = read_json(path, "restore it, or run the experiment again elsewhere")
        manifests.refuse_other_format(directory, manifest)
        return cls(directory, manifest, 0)

    @property
    def finished(self) -> bool:
        """Whether ``finalise`` has been through."""
        return (self.directory / "metrics.json").is_file()

    def refresh(self) -> None:
        """Read the rows again: other processes that share the run append to files of their own."""
        self._rows = _read_rows(self.directory)

    def done(self, key: str) -> bool:
        """Whether a row of this key is recorded. A unit saves its arrays first and appends its row last."""
        return key in self._rows

    def save(self, key: str, /, **arrays: Shaped[np.ndarray, "..."]) -> None:
        """Write the named arrays of one unit to ``arrays/<key>.npz``; a second call replaces them.

        Raises:
            ValueError: the key is no file name, there is no array, or one holds Python objects.
            OSError: it cannot be written; what was there before is still there.
        """
        if not arrays:
            raise ValueError(f"arrays: expected at least one for {key!r}, got none; record a unit without by its row")
        self._write_arrays(self._array(key), arrays)

    def load(self, key: str, *names: str) -> dict[str, Shaped[np.ndarray, "..."]]:
        """The arrays of one key, by name: all, or those named, which are read alone.

        Raises:
            ValueError: the file or a named array is not there, or the file is damaged.
        """
        path = self._array(key)
        if not path.is_file():
            raise ValueError(f"{path}: expected saved arrays, got no such file; {_AGAIN}")
        return read_arrays(path, "a whole .npz file", _AGAIN, names)

    def _write_arrays(self, path: Path, arrays: dict[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            _refuse_objects(name, np.asarray(array))
        write_atomically(path, arrays_writer(arrays), self.process)

    def append(self, row: dict[str, Any]) -> None:
        """Record one finished unit as a line of ``results-<process>.jsonl``, on disk when this returns.

        NumPy values become plain numbers and lists, numbers that are not finite become null.

        Raises:
            ValueError: the row has no usable "key", or the key is already recorded.
            OSError: it cannot be written; the file is as before.
        """
        row = as_json(row, "row")
        key = row.get("key")
        if not isinstance(key, str):
            raise ValueError(f'row: expected a text under "key", got {key!r}; add the key of the unit of work')
        self._array(key)
        if key in self._rows:
            raise ValueError(f"row: expected a new key, got {key!r} a second time; ask run.done(key) before the work")
        append_line(self.directory / f"results-{self.process}.jsonl", row)
        self._rows[key] = row

    def rows(self) -> list[dict[str, Any]]:
        """All rows, by process and then in the order they were finished."""
        return list(self._rows.values())

    def cost(self, row: dict[str, Any]) -> None:
        """Record seconds, bytes or products in ``costs-<process>.jsonl``; keys may repeat."""
        append_line(self.directory / f"costs-{self.process}.jsonl", as_json(row, "cost"))

    def costs(self) -> list[dict[str, Any]]:
        """All cost rows, by process and then in order."""
        paths = _by_process(self.directory, "costs")
        return [row for path in paths for row in read_lines(path)]

    def finalise(self, metrics: dict[str, Any], spectra: dict[str, Shaped[np.ndarray, "..."]]) -> None:
        """Write ``spectra.npz``, then ``metrics.json``: with the second one in place the run is finished."""
        self._write_arrays(self.directory / "spectra.npz", spectra)
        write_atomically(self.directory / "metrics.json", json_writer(as_json(metrics, "metrics")), self.process)

    def metrics(self) -> dict[str, Any]:
        """The metrics of a finished run.

        Raises:
            ValueError: the run is not finished, or the file is damaged.
        """
        self._expect_finished()
        return read_json(self.directory / "metrics.json", "delete it and start the run again")

    def spectra(self) -> dict[str, Shaped[np.ndarray, "..."]]:
        """The arrays of ``spectra.npz`` of a finished run.

        Raises:
            ValueError: the run is not finished, or the file is damaged.
        """
        self._expect_finished()
        remedy = "delete metrics.json and start the run again"
        return read_arrays(self.directory / "spectra.npz", "a whole .npz file", remedy)

    def _expect_finished(self) -> None:
        if not self.finished:
            raise ValueError(
                f"{self.directory}: expected a finished run, got one without metrics.json; start the run again "
                "to continue it"
            )

    def _array(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(
                f"key: expected letters, digits and . _ = + - (at most 150, no folder), got {key!r}; rename the unit"
            )
        return self.directory / "arrays" / f"{key}.npz"


def holds_something(path: Path) -> bool:
    """Whether a file, or a folder that is not empty, is there."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def _process_index() -> int:
    import jax

    return jax.process_index()


def _refuse_objects(name: str, array: np.ndarray) -> None:
    if array.dtype.hasobject:
        raise ValueError(f"{name}: expected an array of numbers or texts, got dtype {array.dtype}; convert it")


def _by_process(directory: Path, name: str) -> list[Path]:
    paths = [path for path in directory.glob(f"{name}-*.jsonl") if path.stem.removeprefix(f"{name}-").isdigit()]
    return sorted(paths, key=lambda path: int(path.stem.removeprefix(f"{name}-")))


def _read_rows(directory: Path) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for path in _by_process(directory, "results"):
        for row in read_lines(path):
            key = row.get("key") if isinstance(row, dict) else None
            if not isinstance(key, str):
                raise ValueError(f'{path}: expected a "key" in each line, got {str(row)[:60]}; delete that line')
            if rows.setdefault(key, row) != row:
                raise ValueError(f"{path}: expected one row per key, got two different ones of {key!r}; delete one")
    return rows
