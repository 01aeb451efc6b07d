"""Lists of prompts from text, CSV and JSON lines; a label (memorized or not) and a category where they are known."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_COLUMNS = {
    "text": ("prompt", "caption", "text"),
    "label": ("label", "memorized"),
    "category": ("category", "type"),
}
_SEPARATORS = (",", ";", "\t", "|")
_LABELS = {"1": True, "true": True, "yes": True, "memorized": True} | {
    name: False for name in ("0", "false", "no", "not memorized", "unmemorized", "none")
}


class Prompt(NamedTuple):
    """A prompt; ``label`` is True if it is known to be memorized, False if it is known not to be."""

    text: str
    label: bool | None = None
    category: str | None = None


NO_PROMPT = Prompt("", None, "no prompt")  #: the unconditional density, as one more prompt of an audit


def read_prompts(path: str | Path, limit: int | None = None, *, merge_duplicates: bool = False) -> list[Prompt]:
    """The prompts of a file, in its order, or the first ``limit`` of them.

    ``.txt``: one per line, empty lines are skipped. ``.csv`` and ``.tsv``: separated by whichever of comma, semicolon,
    tab and bar splits the header best; ``.jsonl``: one object per line. Columns, or keys, in any case: prompt, caption
    or text; optionally label or memorized (1/0, true/false, yes/no), category or type.

    Args:
        path: the file, UTF-8, with or without a byte order mark.
        limit: how many prompts to return; the whole file is checked all the same.
        merge_duplicates: take a prompt that comes several times once, if its labels and categories agree.

    Raises:
        ValueError: the file is not there, empty, of another kind, not UTF-8, damaged, or names a prompt twice; the line
            is named.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1 prompt, got {limit}")
    readers: dict[str, Callable[[Path, str], Iterator[tuple[int, Prompt]]]] = {
        ".txt": _lines,
        ".csv": _table,
        ".tsv": _table,
        ".jsonl": _objects,
    }
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: expected a file of prompts named .txt, .csv, .tsv or .jsonl, got {path.suffix!r}")
    text = _decode(path)
    found = [(f"line {line}", prompt) for line, prompt in readers[path.suffix.lower()](path, text)]
    if not found:
        raise ValueError(f"{path}: expected at least one prompt, got an empty file")
    return merge(found, str(path), merge_duplicates=merge_duplicates)[:limit]


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
            + "; delete them, or merge them with --merge-duplicates"
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
        ValueError: as `read_prompts`, or a prompt is in two files.
    """
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
            f" without categories there is jaxmem audit"
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


def _decode(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of prompts, got no such file")
    content = path.read_bytes()
    if b"\0" in content:
        raise ValueError(f"{path}: expected text in UTF-8, got zero bytes, as UTF-16 has them; save the file as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Positions are counted after a byte order mark that the codec took away.
        start = error.start + (3 if content.startswith(b"\xef\xbb\xbf") else 0)
        line = content.count(b"\n", 0, start) + 1
        raise ValueError(
            f"{path}, line {line}: expected text in UTF-8, got byte 0x{content[start]:02x} at position {start};"
            f" save the file as UTF-8"
        ) from None


def _lines(_: Path, text: str) -> Iterator[tuple[int, Prompt]]:
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if line.strip():
            yield number, Prompt(line.strip())


def _table(path: Path, text: str) -> Iterator[tuple[int, Prompt]]:
    if not text.strip():
        return
    header = text.lstrip("\r\n").splitlines()[0]
    separator = max(_SEPARATORS, key=lambda sep: len(next(csv.reader([header], delimiter=sep))))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        names = next(row for row in reader if row)
        chosen = _choose(names, f"{path}: expected a column named {' or '.join(_COLUMNS['text'])}, got the columns")
        line = reader.line_num + 1  # where the next row begins
        for row in reader:
            number, line = line, reader.line_num + 1
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(names):
                raise ValueError(
                    f"{path}, line {number}: expected {len(names)} columns as in the header, got {len(row)}; quote"
                    f" prompts that hold the separator {separator!r}"
                )
            yield number, _prompt(path, number, {name: row[names.index(column)] for name, column in chosen.items()})
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: expected CSV, got a damaged row ({error})") from None


def _objects(path: Path, text: str) -> Iterator[tuple[int, Prompt]]:
    for number, line in enumerate(io.StringIO(text), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:40]!r} ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
        chosen = _choose(
            list(row), f"{path}, line {number}: expected a key named {' or '.join(_COLUMNS['text'])}, got the keys"
        )
        yield number, _prompt(path, number, {name: row[key] for name, key in chosen.items()})


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


def _prompt(path: Path, line: int, values: dict[str, Any]) -> Prompt:
    text = values["text"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{path}, line {line}: expected a prompt, got {text!r}; delete the line")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can escape half of a pair
        raise ValueError(f"{path}, line {line}: expected text, got half a surrogate pair in {text!r:.60}") from None
    label, category = values.get("label"), values.get("category")
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    name = str("" if label is None else int(label) if isinstance(label, bool) else label).strip().lower()
    if name in ("1.0", "0.0"):  # pandas writes a column of whole numbers with gaps so
        name = name[0]
    if name and name not in _LABELS:
        raise ValueError(
            f"{path}, line {line}: expected a label 1 or 0, true or false, yes or no, memorized or unmemorized, or"
            f" nothing, got {label!r}"
        )
    category = "" if category is None else str(category).strip()
    return Prompt(text.strip(), _LABELS[name] if name else None, category or None)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:59] + "…")
