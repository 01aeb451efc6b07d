"""State of a long computation in one file: whole or not at all, taken up only for the same call and operator."""

import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmem.runs import durable


def save(path: Path, arrays: dict[str, Any], options: dict[str, Any]) -> None:
    """Write arrays and the options of the call; ``product`` among the arrays is how the operator is recognised.

    Raises:
        OSError: the file cannot be written; what was there before is kept.
    """
    contents = arrays | {"options": np.asarray(json.dumps(options))}
    with durable.clear_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    durable.write_atomically(path, lambda stream: np.savez(stream, **contents))


def load(
    path: Path, names: Sequence[str], product: np.ndarray, rounding: float, options: dict[str, Any]
) -> dict[str, np.ndarray]:
    """The named arrays, if the options are the same, and the product is, up to ``rounding``.

    Raises:
        ValueError: if the file is damaged, or of other options or of another operator.
    """
    try:
        with open(path, "rb") as stream, np.load(stream) as file:  # np.load alone leaves a damaged file open
            arrays = {name: file[name] for name in (*names, "product")}
            saved = json.loads(str(file["options"]))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: expected the state of this computation, got a damaged file ({type(error).__name__}: {error});"
            f" delete it to begin anew"
        ) from None
    for name, array in arrays.items():
        if array.dtype.kind == "V":  # NumPy's files do not know bfloat16
            arrays[name] = array.view(jnp.dtype(saved["dtype"]))
    differences = [
        f"{name}: there {saved.get(name)}, now {now}" for name, now in options.items() if saved.get(name) != now
    ]
    if differences:
        raise ValueError(
            f"{path}: expected the state of the same call, got another one ({'; '.join(differences)}); choose another"
            f" folder, or the same options"
        )
    gap = np.linalg.norm(arrays["product"].astype(np.float64) - product)
    if not gap <= rounding:
        raise ValueError(
            f"{path}: expected the state of the same operator, got one whose product differs by {gap:.1e}, where"
            f" rounding explains {rounding:.1e}; choose another folder"
        )
    return arrays
