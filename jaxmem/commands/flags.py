"""The names of Python arguments in the library's messages, as the flags of a command: translated here alone.

The library writes ``batch: expected at least 1, got 0`` or ``take a smaller `batch```: the name of an argument, or of a
field of a configuration, leads the message or stands in backquotes, there also with a value: ```batch=1```. It writes
of ``another folder`` where a new run has to go, which is what every command calls ``--out``.
"""

import ast
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from tyro.conf import Positional

# Arguments of the library that several flags of a command give.
_SEVERAL = {"neutral": ("reference", "neutral")}
_RENAMED = {"ignore_settings": ("ignore_setting",)}
_PARTS = {"unet"}  # of a model: a message about one begins with its name, whatever the argument is called
_CALLS = {"jaxmem.report.figures.draw": "jaxmem figures"}  # functions that are commands
_POSITIONAL = get_args(Positional[str])[1]


_CALL: ContextVar[tuple[type[Any] | None, Sequence[str]]] = ContextVar("call", default=(None, ()))


@contextmanager
def speaking_of(command: type[Any] | None, arguments: Sequence[str]) -> Iterator[None]:
    """What `in_flags` gives meanwhile is in the words of this command, which was called with these arguments."""
    token = _CALL.set((command, arguments))
    try:
        yield
    finally:
        _CALL.reset(token)


def command_line() -> tuple[str, ...]:
    """The words of the command that runs; empty outside of one."""
    command, arguments = _CALL.get()
    return () if command is None else ("jaxmem", *arguments)


def in_flags(message: str) -> str:
    """A message of the library in the words of the command that runs."""
    return as_flags(message, *_CALL.get())


def as_flags(message: str, command: type[Any] | None, arguments: Sequence[str]) -> str:
    """A message of the library in the words of a command, which was called with these arguments.

    A name that is a field of several configurations, as ``num_steps`` of two trainings, becomes the flag that was
    given, or that of the part which the message begins with. Names that are no flag of the command stay as they are.
    """
    names = {} if command is None else dict(_names(command))
    given = {argument.partition("=")[0] for argument in arguments}
    lead = re.match(r"[a-z0-9_]+(?:\.[a-z0-9_]+)*(?: \+ [a-z0-9_]+)*(?=(?:\[\d+\])?: )", message)
    part = lead[0] if lead else ""

    def flag(name: str) -> str | None:
        wanted = (_SEVERAL | _RENAMED).get(name, (name,))
        found = [shown for path, shown in names.items() for one in wanted if path == one or path.endswith(f".{one}")]
        exact = [names[one] for one in wanted if one in names]
        of_part = [shown for shown in found if shown.startswith(f"--{_dashed(part)}.")]
        for chosen in ([shown for shown in found if shown in given], exact, of_part):
            if chosen:
                return " or ".join(chosen)
        return found[0] if len(found) == 1 else None

    # A folder may be called as an argument is: then the first word is no name of an argument.
    paths = {str(Path(value)) for argument in arguments for value in (argument, argument.partition("=")[2]) if value}
    if lead and part not in paths | _PARTS:
        translated = " + ".join(flag(name) or name for name in part.split(" + "))
        message = translated + message[lead.end() :]
    message = re.sub(r"`([a-z0-9_.]+)`", lambda match: flag(match[1]) or _CALLS.get(match[1], match[1]), message)
    message = re.sub(r"`([a-z0-9_.]+)=([^`]+)`", lambda match: _with_value(flag(match[1]), *match.groups()), message)
    if names.get("out") == "--out" and "config" in {field.name for field in fields(command)}:  # type: ignore[arg-type]
        message = re.sub(r"\b(another|a new) folder\b", r"\1 --out", message)
    return message


def _names(command: type[Any], path: str = "", prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names of Python, with those of their configurations before them, and the flags that they are given by."""
    for field in fields(command):
        kind: Any = field.type
        marks: tuple[Any, ...] = ()
        if get_origin(kind) is Annotated:
            kind, *more = get_args(kind)
            marks = tuple(more)
        if is_dataclass(kind):
            hidden = any(getattr(mark, "name", None) == "" for mark in marks)  # tyro.conf.arg(name="")
            inner = "" if hidden else f"{field.name}."
            yield from _names(kind, path + inner, prefix + _dashed(inner))  # type: ignore[arg-type]
        elif _POSITIONAL in marks:
            yield path + field.name, field.name.upper()
        else:
            yield path + field.name, f"--{prefix}{_dashed(field.name)}"


def _with_value(flag: str | None, name: str, value: str) -> str:
    """A flag with the value that its argument has in Python, where there is such a flag."""
    try:
        values = ast.literal_eval(value)
    except (ValueError, SyntaxError):  # a text of the user's that looks like it
        return f"`{name}={value}`"
    if flag is None:
        return f"{name}={value}"
    texts = map(str, values if isinstance(values, list) else [values])
    return " ".join([flag, *map(shlex.quote, texts)])


def _dashed(name: str) -> str:
    return name.replace("_", "-")
