"""Checkpoints of a training: its newest states, each in one file of `jaxmem.runs.resume`."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmem.runs import resume
from jaxmem.runs.durable import TEMPORARY

_KEEP = 2  # one to resume from, and the one before in case the disk damages it


def save_checkpoint(directory: Path, step: int, tree: Any, recipe: dict[str, Any]) -> None:
    """Write ``tree`` as the checkpoint ``step-<step>.npz`` and delete all but the newest two.

    Args:
        directory: of all checkpoints of the training.
        step: number of finished steps.
        tree: a pytree of arrays; those of several devices are gathered.
        recipe: what the training was asked for, JSON values; only the same recipe may resume.

    Raises:
        ValueError: an array is spread over several processes.
        OSError: the folder cannot be written; the checkpoints before are kept.
    """
    for left_over in directory.glob(f"{TEMPORARY}{jax.process_index()}-*"):
        left_over.unlink()
    leaves = _leaves(tree)
    resume.save(directory / f"step-{step:08d}.npz", leaves | {"step": step}, _identity(leaves, recipe))
    for old in sorted(directory.glob("step-*.npz"))[:-_KEEP]:
        old.unlink(missing_ok=True)  # another process may have been first


def restore_checkpoint(directory: Path, like: Any, recipe: dict[str, Any]) -> tuple[int, Any] | None:
    """The newest checkpoint as ``(step, tree)``; None where there is none.

    Args:
        directory: as for `save_checkpoint`.
        like: a tree with the structure, shapes, data types and devices of the one that was saved.
        recipe: as for `save_checkpoint`.

    Raises:
        ValueError: the newest checkpoint is damaged, of another version of jaxmem, of another recipe or of another
            model; nothing of it is used.
    """
    leaves = _leaves(like)
    if old := sorted(directory.glob("step-*/checkpoint.json")):
        raise ValueError(
            f"{directory}: expected checkpoints in files, got the folder {old[-1].parent.name}, which jaxmem 0.1 wrote;"
            f" finish the training with that version, or delete the folder {directory.name} to train anew"
        )
    found = sorted(directory.glob("step-*.npz"))
    if not found:
        return None
    start = f"from {found[-2].name}" if len(found) > 1 else "from the beginning"
    names = [*leaves, "step"]
    arrays = resume.read(found[-1], names, _identity(leaves, recipe), f"delete it to train on {start}")
    placed = [_like(leaf, arrays[name]) for name, leaf in leaves.items()]
    return int(arrays["step"]), jax.tree.unflatten(jax.tree.structure(like), placed)


def _leaves(tree: Any) -> dict[str, Any]:
    """Arrays of a tree by their paths in it."""
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for name, leaf in leaves.items():
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            raise ValueError(
                f"state{name}: expected an array that each process holds whole, got one that is spread over several"
                f" processes ({leaf.sharding}); replicate it, or train without a folder of checkpoints"
            )
    return leaves


def _identity(leaves: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    return recipe | {"model": {name: f"{leaf.dtype} {np.shape(leaf)}" for name, leaf in leaves.items()}}


def _like(leaf: Any, array: np.ndarray) -> jax.Array:
    """The array on the devices of ``leaf``, in memory of its own: the step of a training donates it."""
    committed = isinstance(leaf, jax.Array) and leaf.committed
    return jax.device_put(array, leaf.sharding if committed else None, may_alias=False)
