"""State of a long computation in one file: named arrays, and the identity of the work that they belong to.

Counts, extreme pairs, Krylov runs and trainings (`jaxmem.runs.checkpoints`) all write this file. It is there whole or
not at all, each array has a checksum (the CRC-32 of the zip format, which NumPy checks while it reads), and it is
taken up only by the same call on the same operator.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.runs.durable import arrays_writer, as_json, clear_os_errors, read_arrays, write_atomically
from jaxmem.runs.identity import differences

_FORMAT = 2  # 1 was that of jaxmem 0.1, which wrote no number
_RECORD = "record"  # the array that says what the others are
_REMEDY = "delete it to begin anew"


def save(path: Path, arrays: dict[str, Any], identity: dict[str, Any]) -> None:
    """Write a state in place of the one before.

    Args:
        path: the file; its folder is made.
        arrays: NumPy or JAX arrays or numbers; ``product``, one product with the operator, tells operators apart.
        identity: what the state depends on, such as options and seeds: JSON values.

    Raises:
        OSError: the file cannot be written; what was there before is kept.
    """
    values = {name: np.asarray(array) for name, array in jax.device_get(arrays).items()}
    # NumPy writes bfloat16 as two bytes without a meaning.
    dtypes = {name: array.dtype.name for name, array in values.items() if array.dtype.kind == "V"}
    record = {"format": _FORMAT, "identity": identity, "arrays": sorted(values), "dtypes": dtypes}
    values[_RECORD] = np.asarray(json.dumps(as_json(record, "state")))
    with clear_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, arrays_writer(values), jax.process_index())


def read(path: Path, names: Sequence[str], identity: dict[str, Any], remedy: str = _REMEDY) -> dict[str, np.ndarray]:
    """The arrays of a state, if it is of the same work.

    Args:
        path: the file.
        names: of all arrays that are expected.
        identity: as for `save`.
        remedy: what to do about a damaged file, for the error message.

    Raises:
        ValueError: if the file is damaged, was written by another version, or is of other work: the fields that differ
            are named.
    """
    arrays = read_arrays(path, "the state of this computation", remedy)
    record = json.loads(str(arrays.get(_RECORD, "{}")))
    if record.get("format") != _FORMAT:
        raise ValueError(f"{path}: expected a state of this version of jaxmem, got one of another version; {remedy}")
    there, now = record["identity"] | {"arrays": record["arrays"]}, identity | {"arrays": sorted(names)}
    if differing := differences(there, as_json(now, "identity")):
        raise ValueError(
            f"{path}: expected the state of the same call, got another one ({differing}); choose another folder, or the"
            f" same options"
        )
    dtypes = record["dtypes"]
    return {name: arrays[name].view(jnp.dtype(dtypes[name])) if name in dtypes else arrays[name] for name in names}


def load(
    path: Path, names: Sequence[str], product: np.ndarray, rounding: float, identity: dict[str, Any]
) -> dict[str, np.ndarray]:
    """The arrays of a state, and ``product``, if the work and the operator are the same.

    Args:
        path: the file.
        names: of the arrays that are expected beside ``product``.
        product: of the operator, with the vector of the saved one.
        rounding: norm of the difference that two products of one operator may have.
        identity: as for `save`.

    Raises:
        ValueError: as `read`, or if the products differ by more.
    """
    arrays = read(path, [*names, "product"], identity)
    gap = np.linalg.norm(arrays["product"].astype(np.float64) - product)
    if not gap <= rounding:
        raise ValueError(
            f"{path}: expected the state of the same operator, got one whose product differs by {gap:.1e}, where"
            f" rounding explains {rounding:.1e}; choose another folder"
        )
    return arrays
