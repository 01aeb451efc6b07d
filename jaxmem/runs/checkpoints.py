"""Checkpoints of a training: written whole or not at all by orbax, checked byte for byte before they are read."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

_INDEX = "checkpoint.json"
_KEEP = 2  # one to resume from, and the one before in case the disk damages it


def _leaves(tree: Any) -> list[list[Any]]:
    """Name, shape and type of each leaf, to tell a checkpoint of another model."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [[jax.tree_util.keystr(path), list(np.shape(leaf)), str(leaf.dtype)] for path, leaf in paths]


def _digests(folder: Path) -> dict[str, list[Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _INDEX)
    return {
        path.relative_to(folder).as_posix(): [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
        for path in files
    }


def save_checkpoint(directory: Path, step: int, tree: Any, recipe: dict[str, Any] | None = None) -> None:
    """Write ``tree`` (a pytree of arrays) as the checkpoint of ``step`` and drop all but the newest two.

    The folder gets its name by a rename after everything in it, checksums included, is written. ``recipe`` (plain
    values) is what the training was asked for; only the same one may resume.
    """
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    final, partial = directory / f"step-{step:08d}", directory / f"partial-{step:08d}"
    for left_over in directory.glob("partial-*"):
        shutil.rmtree(left_over)
    arrays = {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(partial / "arrays", arrays)
        checkpointer.wait_until_finished()
    index = {"step": step, "recipe": recipe or {}, "leaves": _leaves(tree), "files": _digests(partial)}
    (partial / _INDEX).write_text(json.dumps(index))
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    for old in sorted(directory.glob("step-*"))[:-_KEEP]:
        shutil.rmtree(old)


def restore_checkpoint(directory: Path, like: Any, recipe: dict[str, Any] | None = None) -> tuple[int, Any] | None:
    """The newest checkpoint as ``(step, tree)`` with the structure of ``like``; None where there is none.

    Raises:
        ValueError: if a file of it is missing, truncated or altered, or it belongs to another model; it is named, and
            nothing of it is used.
    """
    directory = directory.absolute()
    found = sorted(directory.glob("step-*"))
    if not found:
        return None
    newest = found[-1]
    before = f" (then {found[-2].name} is used)" if len(found) > 1 else " (then training starts again)"
    remedy = f"delete {newest.parent.name}/{newest.name} to go on without it{before}"
    try:
        index = json.loads((newest / _INDEX).read_text())
        recorded, leaves, step, saved = index["files"], index["leaves"], index["step"], index["recipe"]
        if not (isinstance(recorded, dict) and isinstance(saved, dict) and isinstance(step, int)):
            raise ValueError("its fields are of other types")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {newest.name}: {_INDEX} is missing or damaged ({error}); {remedy}") from error
    actual = _digests(newest)
    if extra := sorted(actual.keys() - recorded.keys()):
        raise ValueError(f"checkpoint {newest.name}: {extra[0]} is not in its {_INDEX}; {remedy}")
    for name, (size, digest) in recorded.items():
        if name not in actual:
            raise ValueError(f"checkpoint {newest.name}: {name} is missing; {remedy}")
        if actual[name] != [size, digest]:
            raise ValueError(
                f"checkpoint {newest.name}: {name} is damaged: expected {size} bytes with SHA-256 {digest[:12]}…, got"
                f" {actual[name][0]} bytes with {actual[name][1][:12]}…; {remedy}"
            )
    if leaves != _leaves(like):
        raise ValueError(
            f"checkpoint {newest.name}: it holds another model or optimiser ({len(leaves)} arrays, expected"
            f" {len(jax.tree.leaves(like))}, or other names or shapes); choose another folder"
        )
    wanted = json.loads(json.dumps(recipe or {}))
    if other := [
        f"{name} {saved.get(name)!r} there, {wanted.get(name)!r} here"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]:
        raise ValueError(
            f"checkpoint {newest.name}: it is of a training with another configuration ({', '.join(other)}); choose"
            f" another folder, or ask for the same training"
        )
    abstract = {
        f"{i:05d}": jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype) for i, leaf in enumerate(jax.tree.leaves(like))
    }
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(newest / "arrays", abstract)
    ordered = [arrays[name] for name in sorted(arrays)]
    return step, jax.tree.unflatten(jax.tree.structure(like), ordered)
