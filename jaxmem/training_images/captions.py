"""Captions of training images: from a file beside each, from tables with a column of paths, from JSON.

A text is UTF-8, with or without a byte order mark, or UTF-16 with one. Other bytes are read as Windows-1252, the usual
encoding of old Windows in western Europe, where they look like it: no more than three of them in a row, as accents and
quotation marks stand. Words of other alphabets are longer, and are refused rather than misread.
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxmem.prompts.columns import COLUMNS
from jaxmem.prompts.files import decode
from jaxmem.prompts.objects import json_lines, json_value
from jaxmem.prompts.prompt import refuse_no_text
from jaxmem.prompts.tables import columns_and_rows

#: Names of the column, or key, with the paths of images, in any case; the first one found is taken.
PATH_COLUMNS = ("file_name", "filename", "file_path", "filepath", "image_path", "path", "file", "image", "img")
LISTINGS = (".json", ".jsonl", ".csv", ".tsv")
CAPTION_FILES = (".txt", ".caption")  #: the first one beside an image is its captions
_WITHOUT_MEANING = re.compile(rb"[\x80-\xff]{4}|[\x81\x8d\x8f\x90\x9d]")
_TAGS_AFTER = ","  # kohya's default of --caption_separator


class Listed(NamedTuple):
    """One image of a listing, as it is written there."""

    where: str  # such as "metadata.csv, line 3"
    path: str
    captions: tuple[str, ...]


def read_text(path: Path, name: str) -> str:
    """The text of a file.

    Raises:
        ValueError: it is in none of the encodings above, or cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{name}: expected a file that can be read, got {error.strerror}") from None
    try:
        return decode(name, content)
    except ValueError:
        marked = content.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf"))
        if marked or b"\0" in content or _WITHOUT_MEANING.search(content):
            raise
        return content.decode("cp1252")


def variants(path: Path, name: str) -> tuple[str, ...]:
    """The captions of a file that stands beside an image: one a line, empty lines left out."""
    lines = io.StringIO(read_text(path, name), newline=None)
    return tuple(checked(line.strip(), name) for line in lines if line.strip())


def read_listing(path: Path, name: str) -> Iterator[Listed]:
    """The images and captions of a table or a JSON file.

    ``.csv`` and ``.tsv``: a column of paths and one of captions, as `jaxmem.prompts.read_prompts` reads tables.
    ``.jsonl``, or a list in ``.json``: the same as keys of objects; a caption may be a list of variants. An object in
    ``.json``: captions by path, each a text, a list of texts, or kohya's ``{"caption": ..., "tags": ...}``.

    Raises:
        ValueError: the file is damaged, or has no column of paths; the line is named.
    """
    text, kind = read_text(path, name), path.suffix.lower()
    if kind in (".csv", ".tsv"):
        names, rows = columns_and_rows(name, text)
        for number, row in rows:
            yield _of_row(f"{name}, line {number}", {column: row[names.index(column)] for column in names})
    elif kind == ".jsonl":
        for number, value in json_lines(name, text):
            yield _of_row(f"{name}, line {number}", value)
    else:
        value = json_value(name, text, "captions by the paths of images")
        if isinstance(value, dict):
            for key, captions in value.items():
                where = f"{name}, key {key!r:.60}"
                yield Listed(where, checked(key, where), _captions(captions, where))
        elif isinstance(value, list):
            for number, row in enumerate(value, 1):
                yield _of_row(f"{name}, entry {number}", row)
        else:
            raise ValueError(f"{name}: expected captions by the paths of images, got {type(value).__name__}")


def _of_row(where: str, row: Any) -> Listed:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with a path and a caption, got {type(row).__name__}")
    lower = {str(key).strip().lower(): value for key, value in reversed(row.items())}
    path = next((lower[name] for name in PATH_COLUMNS if name in lower), None)
    if not isinstance(path, str) or not path.strip():
        got = f"{path!r:.60} in it" if any(name in lower for name in PATH_COLUMNS) else ", ".join(map(repr, row))
        raise ValueError(f"{where}: expected a path in a column named {' or '.join(PATH_COLUMNS)}, got {got}")
    caption = next((lower[name] for name in (*COLUMNS["text"], "tags") if name in lower), None)
    return Listed(where, checked(path.strip(), where), _captions(caption, where))


def _captions(value: Any, where: str) -> tuple[str, ...]:
    """The variants that a cell or a value of JSON means."""
    if isinstance(value, dict):
        parts = [value.get("caption"), value.get("tags")]
        if any(not isinstance(part, str | None) for part in parts):
            raise ValueError(f"{where}: expected texts under the keys 'caption' and 'tags', got {value!r:.60}")
        value = _TAGS_AFTER.join(part for part in parts if part)
    texts = [value] if isinstance(value, str) else value
    if texts is None:
        return ()
    if not isinstance(texts, list) or any(not isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: expected a caption, or a list of captions, got {value!r:.60}")
    return tuple(checked(text.strip(), where) for text in texts if text.strip())


def checked(text: str, where: str) -> str:
    refuse_no_text(text, where)
    return text
