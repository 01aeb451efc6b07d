"""Griffe extension: a ``#:`` comment beside an attribute is its docstring, as in Sphinx."""

import re
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    """Read the comments of the fields of named tuples and dataclasses."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Give an attribute without a docstring the comment of its line."""
        if attr.docstring is not None or attr.lineno is None or isinstance(attr.filepath, list):
            return
        line = attr.lines_collection[attr.filepath][(attr.endlineno or attr.lineno) - 1]
        if found := re.search(r"#:\s*(.+)$", line):
            text = found[1][:1].upper() + found[1][1:]
            attr.docstring = griffe.Docstring(text, lineno=attr.lineno, endlineno=attr.lineno, parent=attr)
