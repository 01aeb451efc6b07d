"""Fail where the pages of the API and the public names of `jaxmem` are not the same, or a name has no docstring.

python scripts/documented.py
"""

import re
import sys
from collections import Counter
from pathlib import Path

import jaxmem

PAGES = Path(__file__).resolve().parent.parent / "docs" / "api"
NO_ENTRY = {"__version__"}  # a string


def entries(pages: Path = PAGES) -> Counter[str]:
    """The names below `jaxmem` that the pages of the API show, and how often."""
    found: Counter[str] = Counter()
    for page in sorted(pages.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        found.update(re.findall(r"^::: jaxmem\.(\w+)$", text, re.MULTILINE))
        for members in re.findall(r"^::: jaxmem\n(?:    .*\n)*?      members: \[(.*)\]$", text, re.MULTILINE):
            found.update(members.split(", "))
    return found


def faults(names: list[str], shown: Counter[str]) -> list[str]:
    """What is wrong: names without entry or docstring, with two entries, and entries of names that are not public."""
    public = set(names) - NO_ENTRY
    return [
        *(f"{name}: public, but in no page of docs/api" for name in sorted(public - set(shown))),
        *(f"{name}: in docs/api, but not public" for name in sorted(set(shown) - public)),
        *(f"{name}: in docs/api {count} times" for name, count in sorted(shown.items()) if count > 1),
        *(f"{name}: no docstring" for name in sorted(public) if not has_docstring(name)),
    ]


def has_docstring(name: str) -> bool:
    """Whether somebody wrote one: Python gives named tuples and dataclasses their signature."""
    text = (getattr(jaxmem, name).__doc__ or "").strip()
    return bool(text) and not text.startswith(f"{name}(")


if __name__ == "__main__":
    found = faults(jaxmem.__all__, entries())
    print("\n".join(found), file=sys.stderr)
    sys.exit(bool(found))
