"""Cells of tables that no spreadsheet takes for formulas."""

import re

# The beginning of what a spreadsheet takes for a formula. Full-width signs are ones in some languages.
_FORMULA = re.compile(r"'*\s*?[=+\-@＝＋－＠\t\r\n]")
RESULTS_COLUMNS = ("prompt", "label", "category", "truncated")  #: first ones of an audit's results.csv
STANDING_COLUMNS = ("place", "number", "p", "verdict", "reasons")  #: the next ones, in files since 0.3


def as_cell(text: str) -> str:
    """A text as the cell of a table that no spreadsheet takes for a formula: behind an apostrophe where it would.

    Quotes do not help: ``"=1+1"`` is computed by LibreOffice 7.4 as ``=1+1`` is, and Excel reads cells alike.
    """
    return "'" + text if _FORMULA.match(text) else text


def quoted_cell(text: str | None) -> str:
    """A text as `as_cell`, in quotes; a missing one is empty."""
    # Always: a spreadsheet that splits at semicolons or tabs, too, would find formulas in the parts.
    return '"' + as_cell(text or "").replace('"', '""') + '"'


def from_cell(cell: str) -> str:
    """The text of a cell that `as_cell` made."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell[1:]) else cell
