"""Identity of a function: its name, and the values that it carries with it in its closure and its defaults."""

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from types import ModuleType
from typing import Any

import jax
import numpy as np

from jaxmem.runs.identity import fingerprint


def name_of(function: Any) -> str:
    """A function's name, the same in every process: of an object without a written-out form that of its class."""
    if hasattr(function, "__qualname__"):
        return f"{function.__module__}.{function.__qualname__}"
    shown = repr(function)
    return shown if " at 0x" not in shown else f"{type(function).__module__}.{type(function).__qualname__}"


def captured(function: Callable[..., Any]) -> str:
    """SHA-256 of what a function carries with it: in cells of its closure, in defaults, in arguments of a `partial`.

    Arrays, numbers and texts count by their values, also inside dataclasses and pytrees; functions by their names and
    by what they carry in turn; modules, classes and other objects by their names. Code and globals do not count.
    """
    return hashlib.sha256("\n".join(_carried(function, "", {})).encode()).hexdigest()


def _carried(function: Any, path: str, seen: dict[int, Any]) -> Iterator[str]:
    """One line for each value that a function carries; ``seen`` has the objects that were described, by their id."""
    if isinstance(function, functools.partial):
        yield from _described(function.func, f"{path}.func", seen)
        yield from _described((function.args, function.keywords), f"{path}.arguments", seen)
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    for name, cell in zip(names, getattr(function, "__closure__", None) or (), strict=False):
        try:
            value = cell.cell_contents
        except ValueError:  # a name that has no value yet
            continue
        yield from _described(value, f"{path}.{name}", seen)
    for name in ("__defaults__", "__kwdefaults__", "__wrapped__"):  # `jax.jit` keeps what it compiles in the last
        if (value := getattr(function, name, None)) is not None:
            yield from _described(value, f"{path}.{name}", seen)


def _described(value: Any, path: str, seen: dict[int, Any]) -> Iterator[str]:
    """One line for a value, or for each of its parts."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        yield f"{path}: {value!r}"
    elif isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        yield f"{path}: {fingerprint(np.asarray(jax.random.key_data(value)))}"
    elif isinstance(value, np.ndarray | np.generic | jax.Array):
        yield f"{path}: {fingerprint(np.asarray(value))}"
    elif isinstance(value, ModuleType):
        yield f"{path}: {value.__name__}"
    elif id(value) in seen:  # a function may hold itself
        yield f"{path}: again"
    elif is_dataclass(value) and not isinstance(value, type):
        seen[id(value)] = value
        yield f"{path}: {type(value).__qualname__}"
        for field in fields(value):
            yield from _described(getattr(value, field.name, None), f"{path}.{field.name}", seen)
    elif hasattr(value, "__qualname__") or isinstance(value, functools.partial):
        seen[id(value)] = value
        yield f"{path}: {name_of(value)}"
        yield from _carried(value, path, seen)
    else:
        seen[id(value)] = value
        leaves = jax.tree_util.tree_flatten_with_path(value)[0]
        if len(leaves) == 1 and leaves[0][1] is value:  # no container
            yield f"{path}: {name_of(value)}"
            return
        yield f"{path}: {type(value).__qualname__} of {len(leaves)}"
        for where, leaf in leaves:
            yield from _described(leaf, f"{path}{jax.tree_util.keystr(where)}", seen)
