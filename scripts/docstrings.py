"""Griffe extension: read docstrings and comments as this package writes them.

- A ``#:`` comment beside an attribute is its docstring, as in Sphinx.
- Doctests and the indented blocks after ``::`` are code.
"""

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"^( *)>>> .*(?:\n\1\S.*)*", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Prepare docstrings for Markdown."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Give an attribute without a docstring the comment of its line."""
        if attr.docstring is not None or attr.lineno is None or isinstance(attr.filepath, list):
            return
        line = attr.lines_collection[attr.filepath][(attr.endlineno or attr.lineno) - 1]
        if found := re.search(r"#:\s*(.+)$", line):
            text = found[1][:1].upper() + found[1][1:]
            attr.docstring = griffe.Docstring(text, lineno=attr.lineno, endlineno=attr.lineno, parent=attr)

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Fence doctests, and let one colon introduce a block."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A docstring with fenced doctests, and blocks that one colon introduces."""
    fenced = _DOCTEST.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", text)
    return re.sub(r"::(?=\n\n +)", ":", fenced)
