"""The run directory: what every experiment writes, resumes from, and all that a report reads.

``manifest.json`` comes first and fixes the run; ``arrays/<key>.npz`` (named arrays) and one line of
``results-<process>.jsonl`` per finished unit of work follow; ``costs-<process>.jsonl`` keeps seconds and bytes, which
no comparison looks at;
``environments-<process>.jsonl`` says when a run was continued under other versions or devices;
``spectra.npz`` and, last, ``metrics.json`` finish it. Files appear whole or not at all: each is written beside its
place, fsynced and renamed; a line that a crash tore is cut when the run continues.
"""

import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jaxmem.runs.durable import (
    TEMPORARY,
    append_line,
    as_json,
    clear_os_errors,
    cut_torn_line,
    json_writer,
    read_json,
    read_lines,
    write_atomically,
    write_once,
)

FORMAT = 2  #: of the folder; 1 (to version 0.1) had one array per ``.npy`` file
PACKAGES = ("jaxmem", "jax", "jaxlib", "flax", "optax", "numpy")
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
    def open(cls, directory: str | Path, config: dict[str, Any], *, process: int | None = None, **provenance: Any):
        """Begin a run, or continue the run of the same config in this directory; many processes may do so at once.

        Args:
            directory: new, empty, or holding a run of the same config and provenance.
            config: everything that decides the results, JSON values only (no absolute paths).
            process: index of this process among those that share the run, ``jax.process_index()`` by default.
            provenance: what else must be the same to continue, such as ``dtype``, ``seeds``, ``data`` (hashes).

        Raises:
            ValueError: the directory holds something else, a run that differs (the fields are named), or a manifest
                that cannot be read.
            OSError: the directory cannot be written.
        """
        directory = Path(directory)
        if directory.exists() and not directory.is_dir():
            raise ValueError(f"{directory}: expected a directory for the run, got a file; choose another folder")
        wanted = as_json({"format": FORMAT, "config": config, **provenance}, "manifest")
        _refuse_absolute_paths(wanted)
        here = _environment()
        path = directory / "manifest.json"
        process = _process_index() if process is None else process
        created = not path.exists() and _create_manifest(path, wanted | here, process)
        manifest = wanted | here if created else read_json(path, "move the directory away, or choose another folder")
        if not created:
            _refuse_other_format(directory, manifest)
            _refuse_differences(directory, wanted, manifest)
        with clear_os_errors(directory):
            (directory / "arrays").mkdir(exist_ok=True)
            for left_over in directory.glob(f"**/{TEMPORARY}{process}-*"):
                left_over.unlink(missing_ok=True)
            for name in ("results", "costs", "environments"):
                cut_torn_line(directory / f"{name}-{process}.jsonl")
        run = cls(directory, manifest, process)
        changed = {name: here[name] for name in here if manifest.get(name) != here[name]}
        if changed and not created:
            warnings.warn(
                f"{directory}: continued under another environment ({_list_differences(here, manifest, here)}); "
                "the rest may differ from the first part by rounding",
                stacklevel=2,
            )
            append_line(directory / f"environments-{process}.jsonl", changed)
        return run

    @classmethod
    def read(cls, directory: str | Path) -> "Run":
        """Look at a run without its config: the manifest, the rows and, once finished, metrics and spectra.

        Raises:
            ValueError: there is no run here, or its manifest cannot be read.
        """
        directory = Path(directory)
        path = directory / "manifest.json"
        if not path.is_file():
            raise ValueError(
                f"{directory}: expected a run directory, got no manifest.json in it; give the folder that "
                "a run was written to"
            )
        manifest = read_json(path, "restore it, or run the experiment again elsewhere")
        _refuse_other_format(directory, manifest)
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
        return _read_arrays(path, _AGAIN, names)

    def _write_arrays(self, path: Path, arrays: dict[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            _refuse_objects(name, np.asarray(array))
        # not np.savez_compressed: eigenvalues hardly compress, and equal arrays give equal bytes either way
        write_atomically(path, lambda stream: np.savez(stream, **arrays), self.process)  # type: ignore[arg-type]

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
        return _read_arrays(self.directory / "spectra.npz", "delete metrics.json and start the run again")

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


def _read_arrays(path: Path, remedy: str, names: Sequence[str] = ()) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            missing = [name for name in names if name not in arrays.files]
            found = {name: arrays[name] for name in names or arrays.files if name not in missing}
    except Exception as error:  # zipfile, zlib and numpy each have their own for a damaged file
        raise ValueError(
            f"{path}: expected a whole .npz file, got a damaged one ({type(error).__name__}: {error}); {remedy}"
        ) from None
    if missing:
        raise ValueError(f"{path}: expected an array {missing[0]!r}, got {', '.join(found) or 'others'}; {remedy}")
    return found


def fingerprint(array: Shaped[np.ndarray, "..."]) -> str:
    """SHA-256 of an array's dtype, shape and values, for the data hashes of a manifest."""
    head = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def _environment() -> dict[str, Any]:
    import jax

    devices = jax.devices()
    versions = {name: version(name) if name != "jaxmem" else _own_version() for name in PACKAGES}
    versions["python"] = ".".join(map(str, sys.version_info[:3]))
    return {"versions": versions, "device": {"kind": devices[0].device_kind, "count": len(devices)}}


def _own_version() -> str:
    from jaxmem import __version__

    return __version__


def _process_index() -> int:
    import jax

    return jax.process_index()


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


def _refuse_absolute_paths(manifest: dict[str, Any]) -> None:
    for name, value in _flat(manifest):
        # A prompt may say "/imagine"; it is no path, whatever it begins with.
        if isinstance(value, str) and os.path.isabs(value) and not name.endswith("prompt"):
            raise ValueError(f"{name}: expected no absolute path in a manifest, got {value}; record a hash of the data")


def _list_differences(names: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> str:
    before, after = ({name: manifest[name] for name in names if name in manifest} for manifest in (old, new))
    return "; ".join(_difference(*field) for field in _differing(before, after))


def _differing(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The fields that differ, as name, old and new value; a section that only one of them has is one field."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            yield from _differing(old.get(key, _absent), new.get(key, _absent), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new


def _difference(name: str, old: Any, new: Any) -> str:
    """What a field was and is; of long lists the first items that differ."""
    if isinstance(old, list) and isinstance(new, list) and max(map(len, map(json.dumps, (old, new)))) > _LONGEST_SHOWN:
        pairs = enumerate(zip_longest(old, new, fillvalue=_absent))
        number, (old, new) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        name = f"{name}[{number}]"
    return f"{name}: there {_shown(old)}, now {_shown(new)}"


_absent = object()
_LONGEST_SHOWN = 100


def _shown(value: Any) -> str:
    if value is _absent:
        return "nothing"
    text = json.dumps(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}… ({len(text):,} characters)"


def _refuse_differences(directory: Path, wanted: dict[str, Any], manifest: dict[str, Any]) -> None:
    names = dict.fromkeys((*wanted, *(name for name in manifest if name not in ("versions", "device"))))
    differences = _list_differences(names, manifest, wanted)
    if differences:
        raise ValueError(
            f"{directory}: expected a run of the same config, got another one ({differences}); give the same values to "
            "continue it (where one has a field that the other lacks, with the version of jaxmem that made it), "
            "or choose another folder"
        )


def _refuse_other_format(directory: Path, manifest: dict[str, Any]) -> None:
    if manifest.get("format") != FORMAT:
        made = (manifest.get("versions") or {}).get("jaxmem", "unknown")
        raise ValueError(
            f"{directory}: expected a run of format {FORMAT}, got format {manifest.get('format')} of jaxmem {made};"
            f" read it with that version, or run the experiment again in a new folder"
        )


def _create_manifest(path: Path, manifest: dict[str, Any], process: int) -> bool:
    """Write the manifest into a new or empty directory, unless another process does so first."""
    directory = path.parent
    names = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
    foreign = [name for name in names if not name.startswith(TEMPORARY)]
    # A manifest comes before all else of a run: where it is by now, what is there is its run's.
    if foreign and not path.exists():
        raise ValueError(
            f"{directory}: expected a new or empty directory or a run, got {len(foreign)} other entries "
            f"({', '.join(foreign[:3])}{', …' if len(foreign) > 3 else ''}); choose another folder"
        )
    with clear_os_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    return write_once(path, json_writer(manifest), process)


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
