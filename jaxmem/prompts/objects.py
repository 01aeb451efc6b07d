"""Prompts of JSON, JSON lines and Parquet: rows with keys, or columns."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxmem.prompts.columns import COLUMNS, NAMES, choose, prompt_of
from jaxmem.prompts.prompt import Found, Prompt


def read_json_lines(name: str, text: str) -> Found:
    for number, row in json_lines(name, text):
        yield f"line {number}", _row(f"{name}, line {number}", row)


def json_lines(name: str, text: str) -> Iterator[tuple[int, Any]]:
    """The value of each line that is not empty, with the line's number."""
    for number, line in enumerate(io.StringIO(text), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            where = f"{name}, line {number}"
            raise ValueError(f"{where}: expected a JSON object, got {line[:40]!r} ({error})") from None


def json_value(name: str, text: str, what: str) -> Any:
    """The value of a whole file, which should hold ``what``."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{name}: expected JSON, {what}, got {text.lstrip()[:40]!r} ({error}); name a file with one object per line"
            f" .jsonl"
        ) from None


def read_json(name: str, text: str) -> Found:
    if not text.strip():
        return
    value = json_value(name, text, "a list of prompts")
    if isinstance(value, dict):
        chosen = choose(list(value), f"{name}: expected a list, or a key named {NAMES}, got the keys")
        columns = {part: _column(name, key, value[key], value[chosen["text"]]) for part, key in chosen.items()}
        if len({len(column) for column in columns.values()}) > 1:
            lengths = ", ".join(f"{len(columns[part])} of {key!r}" for part, key in chosen.items())
            raise ValueError(f"{name}: expected columns of one length, got {lengths}")
        names = [COLUMNS[part][0] for part in columns]
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
        return prompt_of(where, {"text": row})
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    chosen = choose(list(row), f"{where}: expected a key named {NAMES}, got the keys")
    return prompt_of(where, {name: row[key] for name, key in chosen.items()})


def read_parquet(path: Path) -> Found:
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
    chosen = choose(list(map(str, frame.columns)), f"{path}: expected a column named {NAMES}, got the columns")
    frame.columns = frame.columns.map(str)
    columns = [frame[column].astype(object).where(frame[column].notna(), None).tolist() for column in chosen.values()]
    for number, values in enumerate(zip(*columns, strict=True), 1):
        yield f"row {number}", prompt_of(f"{path}, row {number}", dict(zip(chosen, values, strict=True)))
