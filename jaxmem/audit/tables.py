"""Tables as CSV files for pandas and spreadsheets."""

import csv
import io
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jaxmem.prompts import quoted_cell
from jaxmem.runs.durable import write_atomically


def write_csv(table: dict[str, list[Any]], path: Path, texts: Collection[str]) -> Path:
    """Write columns of equal length, and return the path; None and NaN are empty cells, booleans 0 and 1.

    Args:
        table: columns by name.
        path: the file, which is there whole or as before.
        texts: columns that hold texts. A text that a spreadsheet would compute stands behind an apostrophe
            (`jaxmem.prompts.as_cell`).

    Raises:
        OSError: the file cannot be written.
    """

    def cell(name: str, value: Any) -> str:
        if name in texts:
            return quoted_cell(value)
        if value is None or value != value:
            return ""
        return str(int(value)) if isinstance(value, bool) else repr(value)

    header = io.StringIO(newline="")
    csv.writer(header, lineterminator="\n").writerow(table)
    rows = zip(*table.values(), strict=True)
    lines = [",".join(cell(name, value) for name, value in zip(table, row, strict=True)) + "\n" for row in rows]
    write_atomically(path, lambda stream: stream.write("".join([header.getvalue(), *lines]).encode()))
    return path
