"""Prompts of files, folders and standard input, by the kind of each."""

import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from jaxmem.prompts.columns import COLUMNS
from jaxmem.prompts.objects import read_json, read_json_lines, read_parquet
from jaxmem.prompts.prompt import Found, Prompt, merge
from jaxmem.prompts.tables import read_table

_TEXT_KINDS = (".txt", ".csv", ".tsv", ".json", ".jsonl")
STANDARD_INPUT = Path("-")


def read_prompts(path: str | Path, limit: int | None = None, *, merge_duplicates: bool = False) -> list[Prompt]:
    """The prompts of a file or a folder, in its order, or the first ``limit`` of them.

    ``.txt``: one per line, empty lines are skipped. ``.csv`` and ``.tsv``: separated by whichever of comma, semicolon,
    tab and bar splits the header best. ``.jsonl``: one object, or one text, per line. ``.json``: a list of texts or of
    objects, or an object of columns. ``.parquet``: through pandas. Each text file may be compressed (``.csv.gz``).
    Columns, or keys, in any case: prompt, caption or text; optionally label or memorized, category or type.

    A folder holds one caption per ``.txt`` file, as training scripts want them beside the images. ``-`` is standard
    input: a table if its first line names a column of prompts, JSON if its first line is, else one prompt per line.

    Labels are words such as 1, true, yes, memorized; 0, false, no, unmemorized, none; nothing where it is not known.
    A kind of memorization (matching, template, ...) is a label and becomes the category where there is none.

    In a table a cell in quotes may go over several lines. Where cells are separated by tabs, quotes are often part of
    the text: a line whose quotes do not close in it is then read as it stands, if it has as many cells as the header.

    Args:
        path: the file, UTF-8 or, with a byte order mark, UTF-16; the folder; or ``-``.
        limit: how many prompts to return; the whole file is checked all the same.
        merge_duplicates: take a prompt that comes several times once, if its labels and categories agree.

    Raises:
        ValueError: the file is not there, empty, of another kind, in another encoding, damaged, has quotes that can be
            read in two ways, or names a prompt twice; the line is named.
        ImportError: pandas or what it reads Parquet with is missing.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1 prompt, got {limit}")
    name = "standard input" if path == STANDARD_INPUT else str(path)
    found = list(_read(path, name))
    if not found:
        what = "a folder of empty captions" if path.is_dir() else "an empty file"
        raise ValueError(f"{name}: expected at least one prompt, got {what}")
    return merge(found, name, merge_duplicates=merge_duplicates)[:limit]


def gather(
    files: Iterable[tuple[Sequence[str | Path], bool | None]],
    limit: int | None = None,
    *,
    merge_duplicates: bool = False,
) -> list[Prompt]:
    """The prompts of several files, each with a label for those of its prompts that have none.

    Raises:
        ValueError: as `read_prompts`, or a prompt is in two files, or standard input is named twice.
    """
    files = list(files)
    if sum(Path(path) == STANDARD_INPUT for paths, _ in files for path in paths) > 1:
        raise ValueError("prompts: expected standard input (-) once, got it several times; save it as a file")
    found = []
    for paths, label in files:
        for path in paths:
            for number, prompt in enumerate(read_prompts(path, limit, merge_duplicates=merge_duplicates), 1):
                known = prompt._replace(label=label) if prompt.label is None else prompt
                found.append((f"prompt {number} of {path}", known))
    return merge(found, "prompts", merge_duplicates=merge_duplicates)


def _read(path: Path, name: str) -> Found:
    if path == STANDARD_INPUT:
        text = decode(name, sys.stdin.buffer.read())
        return _readers()[_kind_of(text)](name, text)
    if path.is_dir():
        return _folder(path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = suffixes[-1 - packed] if len(suffixes) > packed else ""
    if kind not in (*_TEXT_KINDS, ".parquet") or (packed and kind == ".parquet"):
        raise ValueError(
            f"{path}: expected a folder of captions or a file of prompts named {', '.join(_TEXT_KINDS)} (or one of"
            f" these with .gz) or .parquet, got {''.join(path.suffixes[-2:] if packed else path.suffixes[-1:])!r}"
        )
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of prompts, got no such file")
    if kind == ".parquet":
        return read_parquet(path)
    return _readers()[kind](name, decode(name, _unpacked(path) if packed else path.read_bytes()))


def _readers() -> dict[str, Callable[[str, str], Found]]:
    return {".txt": _lines, ".csv": read_table, ".tsv": read_table, ".json": read_json, ".jsonl": read_json_lines}


def _kind_of(text: str) -> str:
    """What standard input holds, by its first line."""
    first = next((line for line in io.StringIO(text, newline=None) if line.strip()), "")
    if text.lstrip()[:1] in ("{", "["):
        for kind, part in ((".jsonl", first), (".json", text)):
            try:
                value = json.loads(part)
                columns = isinstance(value, dict) and any(isinstance(cell, list | dict) for cell in value.values())
                if isinstance(value, dict | list) if kind == ".json" else isinstance(value, dict) and not columns:
                    return kind
            except (ValueError, RecursionError):
                pass
    names = re.split(r"[,;\t|]", first.strip())
    # "a poster, text" is a caption: what follows a space names no column
    return ".csv" if any(name.strip('"').lower() in COLUMNS["text"] for name in names) else ".txt"


def _unpacked(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a file compressed by gzip, got a damaged one ({error})") from None


def decode(name: str, content: bytes) -> str:
    """The text of a file: UTF-8 with or without a byte order mark, or UTF-16 with one."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) and not content.startswith(b"\xff\xfe\0\0"):
        try:
            return content.decode("utf-16")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: expected text in UTF-16, as its first bytes say, got {error}") from None
    if b"\0" in content:
        raise ValueError(
            f"{name}: expected text in UTF-8, got zero bytes, as UTF-16 and files that are no text have them; save the"
            f" file as UTF-8"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Positions are counted after a byte order mark that the codec took away.
        start = error.start + (3 if content.startswith(b"\xef\xbb\xbf") else 0)
        line = content.count(b"\n", 0, start) + 1
        raise ValueError(
            f"{name}, line {line}: expected text in UTF-8, got byte 0x{content[start]:02x} at position {start};"
            f" save the file as UTF-8"
        ) from None


def _lines(_: str, text: str) -> Found:
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if line.strip():
            yield f"line {number}", Prompt(line.strip())


def _folder(path: Path) -> Found:
    files = sorted(p for p in path.iterdir() if p.suffix.lower() == ".txt" and not p.name.startswith("."))
    if not files:
        raise ValueError(
            f"{path}: expected a folder with one caption per .txt file, got none of these in it; give the folder that"
            f" holds them, or the file of prompts itself (such as metadata.jsonl)"
        )
    for file in files:
        captions = [prompt for _, prompt in _lines(str(file), decode(str(file), file.read_bytes()))]
        if len(captions) > 1:
            raise ValueError(
                f"{file}: expected one caption per file of a folder, got {len(captions)} lines; write it in one line,"
                f" or give the file itself if each line is a prompt"
            )
        yield from ((file.name, prompt) for prompt in captions)
