"""A prompt, and lists of them: from texts, without duplicates, by category."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Prompt(NamedTuple):
    """A prompt; ``label`` is True if it is known to be memorized, False if it is known not to be."""

    text: str
    label: bool | None = None
    category: str | None = None


NO_PROMPT = Prompt("", None, "no prompt")  #: the unconditional density, as one more prompt of an audit
Found = Iterator[tuple[str, Prompt]]  # where it was found, such as "line 3"


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
                f" {prompt[1:]} in {line} for {short(prompt.text)}; keep one of the two"
            )
        twice.append((before, line, prompt.text))
    if twice and not merge_duplicates:
        before, line, text = twice[0]
        raise ValueError(
            f"{where}: expected each prompt once, got {line} equal to {before} ({short(text)})"
            + (f" and {len(twice) - 1} more duplicates" if len(twice) > 1 else "")
            + "; delete them, or merge them with `merge_duplicates`"
        )
    return [prompt for _, prompt in first.values()]


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
                f"prompts: expected a category of each memorized prompt, got none of {short(prompt.text)}; name one,"
                f" such as 'matching verbatim'"
            )
        kind = prompt.category or "none"
        kinds.setdefault(kind, []).append(prompt._replace(category=kind))
    return [prompt for kind in kinds.values() for prompt in kind[:number]]


def refuse_no_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can escape half of a pair
        raise ValueError(f"{where}: expected text, got half a surrogate pair in {text!r:.60}") from None
    if "\0" in text:
        raise ValueError(f"{where}: expected text, got a zero character in {text!r:.60}; delete it")


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
    refuse_no_text(prompt.text, where)
    return prompt


def short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:59] + "…")
