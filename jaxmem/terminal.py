"""Text of others on a terminal: what it shows, and nothing that it does."""

import unicodedata


def visible(text: str, *, keep: str = "") -> str:
    r"""Text in which each character that a terminal obeys, instead of showing it, is written as Python writes it.

    Control characters (``\x1b`` begins commands that move the cursor, set the title or paste), the signs that turn the
    direction of writing, and invisible ones. A space of any kind becomes a space; what is in ``keep`` stays.

    >>> visible("a\x1b[31mred\u202e cat")
    'a\\x1b[31mred\\u202e cat'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _written(c) for c in text)


def _written(character: str) -> str:
    if unicodedata.category(character) == "Zs":
        return " "
    return character.encode("unicode_escape").decode()
