"""Where a run came from: when it was begun, by which command line, with which files.

It is evidence for whoever reads the run later, and decides nothing: a run continues on another day and by another
command line, as long as the work is the same.
"""

import hashlib
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple


class SourceFile(NamedTuple):
    """A file that a run was given."""

    role: str  #: what it was given as, such as ``"memorized"``
    name: str  #: without its folder
    sha256: str | None  #: of its bytes, of a folder those of its text files; None of standard input, which is gone


class Origin(NamedTuple):
    """What a manifest says of a run's beginning, beside the work itself."""

    command: tuple[str, ...] = ()  #: words of the command line, without folders; empty where Python began the run
    files: tuple[SourceFile, ...] = ()

    def described(self) -> dict[str, Any]:
        """The section ``origin`` of a manifest that is written now."""
        files = [file._asdict() for file in self.files]
        return {"begun": now(), "command": list(self.command) or None, "files": files}


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def source_files(given: Iterable[tuple[str, Sequence[str | Path]]]) -> tuple[SourceFile, ...]:
    """Hashes of files by their role; of a folder of captions that of the names and hashes of its text files.

    Raises:
        OSError: a file cannot be read.
    """
    return tuple(_source_file(role, Path(path)) for role, paths in given for path in paths)


def without_folders(words: Iterable[str], whole: str = "") -> tuple[str, ...]:
    """The words of a command line with paths reduced to their last part, also after ``=``.

    Args:
        words: of the command line.
        whole: a word that stays as it is: a name with a slash that is no path, such as a hub id.
    """
    return tuple(word if word == whole else "=".join(map(_last_part, word.split("="))) for word in words)


def _last_part(text: str) -> str:
    if not ("/" in text or "\\" in text):
        return text
    # of either system: a path of one is no path of the other, and its folders would stay
    return PureWindowsPath(PurePosixPath(text).name).name or "."


def _source_file(role: str, path: Path) -> SourceFile:
    if path == Path("-"):
        return SourceFile(role, "standard input", None)
    if not path.is_dir():
        return SourceFile(role, path.name, _sha256(path))
    inside = sorted(file for file in path.iterdir() if file.suffix.lower() == ".txt" and file.is_file())
    lines = "".join(f"{_sha256(file)}  {file.name}\n" for file in inside)  # as sha256sum prints them
    return SourceFile(role, path.resolve().name, hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest())


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
