"""Writing and reading of files that survive a kill, a full disk and a power cut: JSON, lines of JSON and arrays.

A file is written under a temporary name beside its place, flushed to the disk (fsync) and renamed. So it is there whole
or not at all. A line is appended in one write and flushed; the reader leaves out a last line without its newline.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

TEMPORARY = ".tmp-"  #: beginning of the name of a file that is being written


def as_json(value: Any, where: str) -> Any:
    """Convert a value to what JSON gives back: arrays and tuples to lists, keys to texts, NaN and infinities to None.

    Args:
        value: numbers, texts, arrays, and lists, tuples and dictionaries of them.
        where: name of the value, for the error message.

    Raises:
        ValueError: a value is of another type.
    """
    if isinstance(value, dict):
        return {str(key): as_json(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if hasattr(value, "__array__"):  # arrays and scalars of NumPy and JAX
        return as_json(np.asarray(value).tolist(), where)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    raise ValueError(
        f"{where}: expected numbers, texts, lists and dictionaries, got {type(value).__name__}; convert it"
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of lines; a last line without its newline is still being written, or was torn.

    Raises:
        ValueError: a whole line is no JSON; it is named.
    """
    lines = path.read_bytes().split(b"\n")[:-1]
    rows = []
    for i, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise ValueError(
                f"{path}, line {i + 1}: expected a JSON object, got {line[:60]!r}; the file was changed or damaged, "
                "delete that line and start the run again"
            ) from None
    return rows


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        ValueError: the file is damaged, or has no object at the top; the message ends with ``remedy``.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # also of a text that is not UTF-8, and of brackets without end
        raise ValueError(f"{path}: expected JSON, got a damaged file ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected JSON with an object at the top, got {type(value).__name__}; {remedy}")
    return value


@contextmanager
def clear_os_errors(path: Path) -> Iterator[None]:
    """Let an OSError within say which path cannot be written, and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path}: cannot write: {error.strerror or error}; make room or make it writable and start the "
            "run again (what is finished is kept), or choose another folder"
        ) from error


def json_writer(value: dict[str, Any]) -> Callable[[BinaryIO], Any]:
    """Writer of a JSON file for `write_atomically`."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    return lambda stream: stream.write(text.encode())


def arrays_writer(arrays: dict[str, np.ndarray]) -> Callable[[BinaryIO], Any]:
    """Writer of an ``.npz`` file for `write_atomically`; equal arrays give equal bytes.

    It does not compress: floating-point numbers hardly shrink.
    """
    return lambda stream: np.savez(stream, **arrays)  # type: ignore[arg-type]  # any name


def read_arrays(path: Path, expected: str, remedy: str, names: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file, all or those named, each checked by its CRC-32.

    Raises:
        ValueError: the file is damaged, "path: expected …, got a damaged file (…); remedy", or has no such array.
    """
    try:
        with open(path, "rb") as stream, np.load(stream) as arrays:  # np.load alone leaves a damaged file open
            missing = [name for name in names if name not in arrays.files]
            found = {name: arrays[name] for name in names or arrays.files if name not in missing}
    except Exception as error:  # zipfile, zlib and numpy each have their own for a damaged file
        raise ValueError(
            f"{path}: expected {expected}, got a damaged file ({type(error).__name__}: {error}); {remedy}"
        ) from None
    if missing:
        raise ValueError(f"{path}: expected an array {missing[0]!r}, got {', '.join(found) or 'others'}; {remedy}")
    return found


def _replace(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)


def write_atomically(
    path: Path,
    write: Callable[[BinaryIO], Any],
    process: int = 0,
    place: Callable[[Path, Path], None] = _replace,
) -> None:
    """Write a file whole or not at all.

    Args:
        path: place of the file; what is there is replaced.
        write: called with the open temporary file.
        process: index of this process, so that no two processes share a temporary file.
        place: moves the temporary file to its place.

    Raises:
        OSError: the file cannot be written; what was there before is still there.
    """
    temporary = path.with_name(f"{TEMPORARY}{process}-{path.name}")
    with clear_os_errors(path):
        try:
            with open(temporary, "wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            place(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _fsync_directory(path.parent)


def write_once(path: Path, write: Callable[[BinaryIO], Any], process: int = 0) -> bool:
    """Write a file that is not there yet; return False, and leave the file as it is, if another process was first."""
    first = True

    def place(temporary: Path, path: Path) -> None:
        nonlocal first
        try:
            os.link(temporary, path)  # unlike a rename it replaces nothing
        except FileExistsError:
            first = False
        except OSError:  # without hard links the last of several simultaneous writers wins
            _replace(temporary, path)
            return
        temporary.unlink()

    write_atomically(path, write, process, place)
    return first


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Append an object as one line of JSON, on the disk when this returns.

    Raises:
        OSError: the line cannot be written; the file is as before.
    """
    line = json.dumps(row, allow_nan=False, ensure_ascii=False).encode() + b"\n"
    new = not path.exists()
    with clear_os_errors(path), open(path, "ab", buffering=0) as stream:
        before = stream.tell()
        try:
            if stream.write(line) != len(line):  # a full disk may take a part of it
                raise OSError("the disk is full")
            os.fsync(stream.fileno())
        except BaseException:
            stream.truncate(before)
            raise
    if new:
        _fsync_directory(path.parent)


def cut_torn_line(path: Path) -> None:
    """Remove a last line that a kill left without its newline."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with open(path, "r+b") as stream:
            stream.truncate(whole)
            os.fsync(stream.fileno())


def _fsync_directory(path: Path) -> None:
    if os.name == "nt":  # Windows cannot open a directory
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
