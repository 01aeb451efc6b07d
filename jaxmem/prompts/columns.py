"""A prompt from the columns of a table or the keys of an object: which they are, and the words of labels."""

import math
import re
from typing import Any

from jaxmem.prompts.prompt import Prompt, refuse_no_text

COLUMNS = {
    "text": ("prompt", "prompts", "caption", "captions", "text"),
    "label": ("label", "memorized"),
    "category": ("category", "type"),
}
NAMES = "prompt or caption or text"  # of the column of texts, in messages
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


def choose(names: list[str], expected: str) -> dict[str, str]:
    """Which of the columns hold text, label and category; a name earlier in the list of names wins."""
    lower = {name.strip().lower(): name for name in reversed(names)}
    chosen = {
        part: lower[next(n for n in wanted if n in lower)]
        for part, wanted in COLUMNS.items()
        if any(n in lower for n in wanted)
    }
    if "text" not in chosen:
        raise ValueError(f"{expected} {', '.join(map(repr, names))}; name one of them so")
    return chosen


def prompt_of(where: str, values: dict[str, Any]) -> Prompt:
    """The prompt of one row: its cells by text, label and category."""
    text = values["text"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: expected a prompt, got {text!r:.60}; delete the line")
    refuse_no_text(text, where)
    label, category = _label(values.get("label"), where), values.get("category")
    category = "" if category is None else str(category).strip()
    if not category and _word(values.get("label")) in [kind.lower().replace(" ", "") for kind in _KINDS]:
        category = str(values["label"]).strip()
    return Prompt(text.strip(), label, category or None)


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
