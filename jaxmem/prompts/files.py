"""Lists of prompts from text, tables, JSON, Parquet and folders; a label (memorized or not) and a category if known."""

import csv
import gzip
import io
import json
import math
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_COLUMNS = {
    "text": ("prompt", "prompts", "caption", "captions", "text"),
    "label": ("label", "memorized"),
    "category": ("category", "type"),
}
_NAMES = "prompt or caption or text"  # of the column of texts, in messages
_SEPARATORS = (",", ";", "\t", "|")
# Words of a label. Those of the third row say which kind of memorization it is, too: it is kept as the category.
_TRUE = ("1", "true", "yes", "y", "memorized", "memorised", "mem")
_FALSE = (
    *("0", "false", "no", "n", "not memorized", "unmemorized", "nonmemorized", "not memorised", "unmemorised"),
    *("nonmemorised", "not mem", "unmem", "nonmem", "general", "none"),
)
_KINDS = ("matching", "matching verbatim", "MV", "verbatim", "VM", "template", "template verbatim", "TV", "TM")
_UNKNOWN = ("", "nan", "na", "n/a", "<na>", "null", "unknown", "?")
_LABELS = {
    word.lower().replace(" ", ""): label
    for words, label in ((_TRUE, True), (_KINDS, True), (_FALSE, False), (_UNKNOWN, None))
    for word in words
}
_TEXT_KINDS = (".txt", ".csv", ".tsv", ".json", ".jsonl")
STANDARD_INPUT = Path("-")


class Prompt(NamedTuple):
    """A prompt; ``label`` is True if it is known to be memorized, False if it is known not to be."""

    text: str
    label: bool | None = None
    category: str | None = None


NO_PROMPT = Prompt("", None, "no prompt")  #: the unconditional density, as one more prompt of an audit
_Found = Iterator[tuple[str, Prompt]]  # where it was found, such as "line 3"


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


def as_prompts(items: Any, what: str = "prompts") -> list[Prompt]:
    """Texts and `Prompt` objects as `Prompt` objects.

    Raises:
        ValueError: a single text instead of a list of them, or something else than a text or a `Prompt` in the list.
    """
    if isinstance(items, str | bytes | Path) or not isinstance(items, Iterable):
        raise ValueError(
            f"{what}: expected a list of texts or of Prompt objects, got {items!r:.60}; write [{items!r:.60}], or read"
            f" a file with jaxmem.prompts.read_prompts"
        )
    return [_as_prompt(item, f"{what}[{number}]") for number, item in enumerate(items)]


def merge(found: Sequence[tuple[str, Prompt]], where: str, *, merge_duplicates: bool = False) -> list[Prompt]:
    """Prompts with where each was found, and no text twice.

    Raises:
        ValueError: a text comes twice, with other words around it than ``merge_duplicates`` allows.
    """
    first: dict[str, tuple[str, Prompt]] = {}
    twice = []
    for line, prompt in found:
        if prompt.text not in first:
            first[prompt.text] = (line, prompt)
            continue
        before, known = first[prompt.text]
        if known[1:] != prompt[1:]:
            raise ValueError(
                f"{where}: expected one label and category per prompt, got {known[1:]} in {before} and"
                f" {prompt[1:]} in {line} for {_short(prompt.text)}; keep one of the two"
            )
        twice.append((before, line, prompt.text))
    if twice and not merge_duplicates:
        before, line, text = twice[0]
        raise ValueError(
            f"{where}: expected each prompt once, got {line} equal to {before} ({_short(text)})"
            + (f" and {len(twice) - 1} more duplicates" if len(twice) > 1 else "")
            + "; delete them, or merge them with `merge_duplicates`"
        )
    return [prompt for _, prompt in first.values()]


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


def first_of_each(prompts: Sequence[Prompt], number: int) -> list[Prompt]:
    """The first ``number`` prompts of each category, category by category; ``"none"`` where nothing says memorized.

    Raises:
        ValueError: no prompt has a category, or one that is labelled memorized has none, or a number below 1.
    """
    if number < 1:
        raise ValueError(f"per_category: expected at least 1 prompt of each, got {number}")
    if all(prompt.category is None for prompt in prompts):
        raise ValueError(
            f"prompts: expected a category of each, such as a column 'category', got none in {len(prompts)} prompts;"
            f" an audit needs none"
        )
    kinds: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        if prompt.label is True and prompt.category is None:
            raise ValueError(
                f"prompts: expected a category of each memorized prompt, got none of {_short(prompt.text)}; name one,"
                f" such as 'matching verbatim'"
            )
        kind = prompt.category or "none"
        kinds.setdefault(kind, []).append(prompt._replace(category=kind))
    return [prompt for kind in kinds.values() for prompt in kind[:number]]


def _read(path: Path, name: str) -> _Found:
    if path == STANDARD_INPUT:
        text = _decode(name, sys.stdin.buffer.read())
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
        return _parquet(path)
    return _readers()[kind](name, _decode(name, _unpacked(path) if packed else path.read_bytes()))


def _readers() -> dict[str, Callable[[str, str], _Found]]:
    return {".txt": _lines, ".csv": _table, ".tsv": _table, ".json": _json, ".jsonl": _objects}


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
    return ".csv" if any(name.strip('"').lower() in _COLUMNS["text"] for name in names) else ".txt"


def _unpacked(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a file compressed by gzip, got a damaged one ({error})") from None


def _decode(name: str, content: bytes) -> str:
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


def _lines(_: str, text: str) -> _Found:
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if line.strip():
            yield f"line {number}", Prompt(line.strip())


def _folder(path: Path) -> _Found:
    files = sorted(p for p in path.iterdir() if p.suffix.lower() == ".txt" and not p.name.startswith("."))
    if not files:
        raise ValueError(
            f"{path}: expected a folder with one caption per .txt file, got none of these in it; give the folder that"
            f" holds them, or the file of prompts itself (such as metadata.jsonl)"
        )
    for file in files:
        captions = [prompt for _, prompt in _lines(str(file), _decode(str(file), file.read_bytes()))]
        if len(captions) > 1:
            raise ValueError(
                f"{file}: expected one caption per file of a folder, got {len(captions)} lines; write it in one line,"
                f" or give the file itself if each line is a prompt"
            )
        yield from ((file.name, prompt) for prompt in captions)


# --- Tables -----------------------------------------------------------------------------------------------------------


def _table(name: str, text: str) -> _Found:
    lines = list(io.StringIO(text, newline=""))  # ends as they are: a cell in quotes keeps its line breaks
    head = next((number for number, line in enumerate(lines) if line.strip()), None)
    if head is None:
        return
    separator = max(_SEPARATORS, key=lambda sep: len(next(csv.reader([lines[head]], delimiter=sep))))
    if name.lower().removesuffix(".gz").endswith(".tsv") and separator not in lines[head]:
        separator = "\t"  # of one column
    (number, names), *rows = _rows(name, lines, head, separator)
    chosen = _choose(names, f"{name}: expected a column named {_NAMES}, got the columns")
    results = names[: len(RESULTS_COLUMNS)] == list(RESULTS_COLUMNS)
    for number, row in rows:
        if len(row) != len(names):
            raise ValueError(
                f"{name}, line {number}: expected {len(names)} columns as in the header, got {len(row)}; quote"
                f" prompts that hold the separator {separator!r}"
            )
        values = {part: row[names.index(column)] for part, column in chosen.items()}
        if results:
            values = {part: from_cell(cell) for part, cell in values.items()}
        yield f"line {number}", _prompt(f"{name}, line {number}", values)


def _rows(name: str, lines: list[str], first: int, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table with their line numbers, the header first; empty ones are left out.

    A row is one line, or several where a cell in quotes goes over them. A stray quote looks like the beginning of such
    a cell, and would swallow the rows up to the next stray quote. Of a cell over several lines at most one line has as
    many separators as the header, unless its text has separators, too. Where more lines have, they are rows: between
    tabs, which no text has, they are read so; else that can be meant in two ways and is refused.
    """
    cell = rf'(?:"(?:[^"]|"")*+"|(?!")[^{re.escape(separator)}\r\n]*+)'
    whole = re.compile(rf"{cell}(?:{re.escape(separator)}{cell})*+(?:\r\n|\r|\n)?")
    unclosed = re.compile(rf'(?:{cell}{re.escape(separator)})*+"(?:[^"]|"")*+')
    tabs, width = separator == "\t", 0

    def literal(line: str) -> list[str]:
        return line.rstrip("\r\n").split(separator)

    def stands(line: str) -> bool:
        """Whether a line taken as it is may be a row; after a comma prose goes on with a space, a cell does not."""
        cells = literal(line)
        return len(cells) == width and (tabs or not any(part.startswith(" ") for part in cells[1:]))

    number = first
    while number < len(lines):
        start, text = number, lines[number]
        number += 1
        if not text.strip():
            continue
        where = f"{name}, line {start + 1}: expected CSV, got"
        while not whole.fullmatch(text) and unclosed.fullmatch(text) and number < len(lines):
            # only a line with a quote can close the cell
            to = next((n for n in range(number, len(lines)) if '"' in lines[n]), len(lines) - 1) + 1
            text += "".join(lines[number:to])
            number = to
        standing = sum(map(stands, lines[start:number])) if width else 0
        several = number - start > 1
        if whole.fullmatch(text) and not (tabs and width > 1 and several and standing == number - start):
            if several and standing > 1 and (width > 1 or tabs) and 2 * standing > number - start:
                raise ValueError(
                    f"{where} a quote that opens in this line and closes in line {number}, though {standing} of these"
                    f" lines are rows by themselves; delete the two quotes, or the line breaks if it is one prompt"
                )
            try:
                row = next(csv.reader(lines[start:number], delimiter=separator, strict=True))
            except csv.Error as error:  # a cell of more than 131,072 characters
                raise ValueError(f"{where} a damaged row ({error})") from None
        elif tabs and width and stands(lines[start]):
            row, number = literal(lines[start]), start + 1
        elif unclosed.fullmatch(text):
            raise ValueError(f"{where} a quote that is never closed; close it, or write it twice in a quoted cell")
        else:
            ends = f" of line {number}" if number > start + 1 else ""
            raise ValueError(
                f"{where} a damaged row (a quote closes before the end of its cell{ends}); write a quote that is part"
                f" of the text twice, in a quoted cell"
            )
        width = width or len(row)
        if any(part.strip() for part in row):
            yield start + 1, row


# The beginning of what a spreadsheet takes for a formula. Full-width signs are ones in some languages.
_FORMULA = re.compile(r"'*\s*?[=+\-@＝＋－＠\t\r\n]")
RESULTS_COLUMNS = ("prompt", "label", "category", "truncated")  #: first ones of an audit's results.csv


def as_cell(text: str) -> str:
    """A text as the cell of a table that no spreadsheet takes for a formula: behind an apostrophe where it would.

    Quotes do not help: ``"=1+1"`` is computed by LibreOffice 7.4 as ``=1+1`` is, and Excel reads cells alike.
    """
    return "'" + text if _FORMULA.match(text) else text


def from_cell(cell: str) -> str:
    """The text of a cell that `as_cell` made."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell[1:]) else cell


# --- JSON and Parquet -------------------------------------------------------------------------------------------------


def _objects(name: str, text: str) -> _Found:
    for number, line in enumerate(io.StringIO(text), 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: expected a JSON object, got {line[:40]!r} ({error})") from None
        yield f"line {number}", _row(where, row)


def _json(name: str, text: str) -> _Found:
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{name}: expected JSON, a list of prompts, got {text.lstrip()[:40]!r} ({error}); name a file with one"
            f" object per line .jsonl"
        ) from None
    if isinstance(value, dict):
        chosen = _choose(list(value), f"{name}: expected a list, or a key named {_NAMES}, got the keys")
        columns = {part: _column(name, key, value[key], value[chosen["text"]]) for part, key in chosen.items()}
        if len({len(column) for column in columns.values()}) > 1:
            lengths = ", ".join(f"{len(columns[part])} of {key!r}" for part, key in chosen.items())
            raise ValueError(f"{name}: expected columns of one length, got {lengths}")
        names = [_COLUMNS[part][0] for part in columns]
        value = [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list of prompts, got {type(value).__name__}")
    for number, row in enumerate(value, 1):
        yield f"prompt {number}", _row(f"{name}, prompt {number}", row)


def _column(name: str, key: str, values: Any, texts: Any) -> list[Any]:
    if isinstance(values, dict) and isinstance(texts, dict):  # by its index, as pandas writes columns
        if values.keys() != texts.keys():
            odd = ", ".join(sorted(map(repr, values.keys() ^ texts.keys()))[:3])
            raise ValueError(f"{name}: expected one index of all columns, got {odd} not in {key!r} or only there")
        return [values[index] for index in texts]
    if not isinstance(values, list):
        raise ValueError(f"{name}: expected a list under the key {key!r}, got {values!r:.40}")
    return values


def _row(where: str, row: Any) -> Prompt:
    if isinstance(row, str):
        return _prompt(where, {"text": row})
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    chosen = _choose(list(row), f"{where}: expected a key named {_NAMES}, got the keys")
    return _prompt(where, {name: row[key] for name, key in chosen.items()})


def _parquet(path: Path) -> _Found:
    missing = f"{path}: expected pandas with pyarrow, which read .parquet files, got none;"
    missing += " pip install 'jaxmem[all]'"
    try:
        import pandas
    except ImportError:
        raise ImportError(missing) from None
    try:
        frame = pandas.read_parquet(path)
    except ImportError:
        raise ImportError(missing) from None
    except Exception as error:  # each engine has its own
        raise ValueError(f"{path}: expected a Parquet file, got one that pandas cannot read ({error})") from None
    chosen = _choose(list(map(str, frame.columns)), f"{path}: expected a column named {_NAMES}, got the columns")
    frame.columns = frame.columns.map(str)
    columns = [frame[column].astype(object).where(frame[column].notna(), None).tolist() for column in chosen.values()]
    for number, values in enumerate(zip(*columns, strict=True), 1):
        yield f"row {number}", _prompt(f"{path}, row {number}", dict(zip(chosen, values, strict=True)))


# --- One prompt -------------------------------------------------------------------------------------------------------


def _choose(names: list[str], expected: str) -> dict[str, str]:
    """Which of the columns hold text, label and category; a name earlier in the list of names wins."""
    lower = {name.strip().lower(): name for name in reversed(names)}
    chosen = {
        part: lower[next(n for n in wanted if n in lower)]
        for part, wanted in _COLUMNS.items()
        if any(n in lower for n in wanted)
    }
    if "text" not in chosen:
        raise ValueError(f"{expected} {', '.join(map(repr, names))}; name one of them so")
    return chosen


def _prompt(where: str, values: dict[str, Any]) -> Prompt:
    text = values["text"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: expected a prompt, got {text!r:.60}; delete the line")
    _refuse_no_text(text, where)
    label, category = _label(values.get("label"), where), values.get("category")
    category = "" if category is None else str(category).strip()
    if not category and _word(values.get("label")) in [kind.lower().replace(" ", "") for kind in _KINDS]:
        category = str(values["label"]).strip()
    return Prompt(text.strip(), label, category or None)


def _refuse_no_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can escape half of a pair
        raise ValueError(f"{where}: expected text, got half a surrogate pair in {text!r:.60}") from None
    if "\0" in text:
        raise ValueError(f"{where}: expected text, got a zero character in {text!r:.60}; delete it")


def _word(label: Any) -> str:
    """A label as it stands in the list of words: words without what is between them, numbers without decimals."""
    if isinstance(label, bool):
        return str(int(label))
    if isinstance(label, float):
        return "" if math.isnan(label) else f"{label:g}"
    word = re.sub(r"(?<=[a-z])[\s_-]+(?=[a-z])", "", str("" if label is None else label).strip().lower())
    return word[0] if word in ("1.0", "0.0") else word


def _label(label: Any, where: str) -> bool | None:
    word = _word(label)
    if word not in _LABELS:
        raise ValueError(
            f"{where}: expected a label 1 or 0, or a word for memorized ({', '.join((*_TRUE[1:], *_KINDS))}), for not"
            f" memorized ({', '.join(_FALSE[1:])}) or for not known (unknown, n/a or nothing), got {label!r:.40}"
        )
    return _LABELS[word]


def _as_prompt(item: Any, where: str) -> Prompt:
    prompt = Prompt(item) if isinstance(item, str) else item
    if not (
        isinstance(prompt, Prompt)
        and isinstance(prompt.text, str)
        and (prompt.label is None or isinstance(prompt.label, bool))
        and (prompt.category is None or isinstance(prompt.category, str))
    ):
        raise ValueError(
            f"{where}: expected a text, or Prompt(text, label, category) with a label True, False or None, got"
            f" {item!r:.80}"
        )
    _refuse_no_text(prompt.text, where)
    return prompt


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:59] + "…")
