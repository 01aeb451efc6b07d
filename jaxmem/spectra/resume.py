"""The state of `jaxmem.spectra.extreme` in one file: whole or not at all, only for the same options and operator."""

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem import durable
from jaxmem.spectra.restarted import KrylovState


class Course(NamedTuple):
    """What the host remembers between segments."""

    steps: int  #: products with the operator applied, those before restarts included
    checks: np.ndarray  #: (n, 2): steps, and the worst wanted residual relative to what it should be
    last: np.ndarray  #: the wanted values at the last check
    before: np.ndarray  #: the wanted values when the space closed last; empty before
    closed_at: int  #: steps at that time


def save(path: Path, state: KrylovState, course: Course, product: np.ndarray, options: dict[str, Any]) -> None:
    """Write the rows in use, what the host remembers, and the product by which the operator is recognised.

    Raises:
        OSError: the file cannot be written; what was there before is kept.
    """
    arrays = jax.device_get(state)._asdict() | course._asdict() | {"product": product}
    arrays["basis"] = arrays["basis"][: int(state.num_steps) + options["block"]]
    arrays["options"] = np.asarray(json.dumps(options))
    with durable.clear_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    durable.write_atomically(path, lambda stream: np.savez(stream, **arrays))


def load(path: Path, product: np.ndarray, rounding: float, options: dict[str, Any]) -> tuple[KrylovState, Course]:
    """What `save` wrote, if the options are the same, and the product is, up to ``rounding``.

    Raises:
        ValueError: if the file is damaged, or of other options or of another operator.
    """
    try:
        with open(path, "rb") as stream, np.load(stream) as file:  # np.load alone leaves a damaged file open
            arrays = {name: file[name] for name in (*KrylovState._fields, *Course._fields, "product")}
            saved = json.loads(str(file["options"]))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: expected the state of extreme_pairs, got a damaged file ({type(error).__name__}: {error});"
            f" delete it to begin anew"
        ) from None
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
    basis = np.zeros((options["subspace"] + options["block"], options["size"]), arrays["basis"].dtype)
    basis[: len(arrays["basis"])] = arrays["basis"]
    arrays["basis"] = basis
    state = KrylovState(*(jnp.asarray(arrays[name]) for name in KrylovState._fields))
    checks, last, before = (arrays[name] for name in ("checks", "last", "before"))
    return state, Course(int(arrays["steps"]), checks, last, before, int(arrays["closed_at"]))
