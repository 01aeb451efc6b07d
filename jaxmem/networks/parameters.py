"""Parameters of a network in one file, by their names."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmem.runs.durable import arrays_writer, read_arrays, write_atomically


def save_parameters(path: Path, state: Any) -> None:
    """Write a pytree of arrays as an .npz file: whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    write_atomically(path, arrays_writer({name: np.asarray(leaf) for name, leaf in _named(state)}))


def load_parameters(path: Path, like: Any) -> Any:
    """The parameters of a file, as a tree like ``like``, of whose leaves only shapes and data types matter.

    Raises:
        ValueError: there is no such file, it is damaged, or it holds the parameters of another network.
    """
    if not path.is_file():
        raise ValueError(f"{path}: expected the parameters of a network, got no such file")
    arrays = read_arrays(path, "the parameters of a network", "restore it, or train again in a new folder")
    wanted = {name: (leaf.shape, leaf.dtype) for name, leaf in _named(like)}
    found = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    if wanted != found:
        name = next(n for n in [*wanted, *found] if wanted.get(n) != found.get(n))
        raise ValueError(
            f"{path}: expected the parameters of the network in the run's manifest, got others ({name}: expected"
            f" {wanted.get(name)}, got {found.get(name)})"
        )
    leaves = [jax.numpy.asarray(arrays[name]) for name, _ in _named(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]
