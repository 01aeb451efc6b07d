"""Prompts of CSV tables, with quotes and separators as people write them."""

import csv
import io
import re
from collections.abc import Iterator

from jaxmem.prompts.cells import RESULTS_COLUMNS, from_cell
from jaxmem.prompts.columns import NAMES, choose, prompt_of
from jaxmem.prompts.prompt import Found

_SEPARATORS = (",", ";", "\t", "|")


def read_table(name: str, text: str) -> Found:
    names, rows = columns_and_rows(name, text)
    if not names:
        return
    chosen = choose(names, f"{name}: expected a column named {NAMES}, got the columns")
    results = names[: len(RESULTS_COLUMNS)] == list(RESULTS_COLUMNS)
    for number, row in rows:
        values = {part: row[names.index(column)] for part, column in chosen.items()}
        if results:
            values = {part: from_cell(cell) for part, cell in values.items()}
        yield f"line {number}", prompt_of(f"{name}, line {number}", values)


def columns_and_rows(name: str, text: str) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The names of a table's columns and its rows, as long as these, with their line numbers; nothing of no text."""
    lines = list(io.StringIO(text, newline=""))  # ends as they are: a cell in quotes keeps its line breaks
    head = next((number for number, line in enumerate(lines) if line.strip()), None)
    if head is None:
        return [], iter(())
    separator = max(_SEPARATORS, key=lambda sep: len(next(csv.reader([lines[head]], delimiter=sep))))
    if name.lower().removesuffix(".gz").endswith(".tsv") and separator not in lines[head]:
        separator = "\t"  # of one column
    (_, names), *rows = _rows(name, lines, head, separator)
    return names, _as_long(name, names, rows, separator)


def _as_long(
    name: str, names: list[str], rows: list[tuple[int, list[str]]], separator: str
) -> Iterator[tuple[int, list[str]]]:
    for number, row in rows:
        if len(row) != len(names):
            raise ValueError(
                f"{name}, line {number}: expected {len(names)} columns as in the header, got {len(row)}; quote"
                f" prompts that hold the separator {separator!r}"
            )
        yield number, row


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
