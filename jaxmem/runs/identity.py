"""Identity of a piece of work: fingerprints of its arrays, and the fields in which two descriptions differ."""

import hashlib
import json
from collections.abc import Iterator
from itertools import islice, zip_longest
from typing import Any

import numpy as np
from jaxtyping import Shaped

_LONGEST_SHOWN = 100  # characters of a value
_MOST_SHOWN = 8  # fields
_absent = object()


def fingerprint(array: Shaped[np.ndarray, "..."]) -> str:
    """SHA-256 of an array's dtype, shape and values, as 64 hexadecimal digits."""
    head = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def differences(there: dict[str, Any], now: dict[str, Any]) -> str:
    """The fields in which two descriptions differ, as ``seed: there 1, now 2; …``; empty where they are equal.

    Args:
        there: what a file says of the work that it belongs to; JSON values.
        now: the same of the work that is asked for.
    """
    fields = _differing(there, now)
    shown = [_difference(*field) for field in islice(fields, _MOST_SHOWN)]
    more = sum(1 for _ in fields)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def _differing(there: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The fields that differ, as name and both values; a section that only one of them has is one field."""
    if isinstance(there, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*now, *there)):
            yield from _differing(there.get(key, _absent), now.get(key, _absent), f"{name}.{key}" if name else key)
    elif there != now:
        yield name, there, now


def _difference(name: str, there: Any, now: Any) -> str:
    """Both values of a field; of long lists the first items that differ."""
    both = (there, now)
    lists = all(isinstance(value, list) for value in both)
    if lists and any(len(json.dumps(value)) > _LONGEST_SHOWN for value in both):
        pairs = enumerate(zip_longest(there, now, fillvalue=_absent))
        number, both = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        name = f"{name}[{number}]"
    there, now = map(_shown, both)
    return f"{name}: there {there}, now {now}"


def _shown(value: Any) -> str:
    if value is _absent:
        return "nothing"
    text = json.dumps(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}… ({len(text):,} characters)"
