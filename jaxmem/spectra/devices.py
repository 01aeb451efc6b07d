"""Points shared by the devices of a mesh, which exchange nothing."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax


def on_devices(share: Callable[..., Any], mesh: Any, state: Any, *points: Any) -> Any:
    """``share(state, *points)``, each device of the mesh working on its own share of the points."""
    if mesh is None:
        return share(state, *points)
    # Not left to XLA's partitioner: it gathers what a loop runs over, and attention folds points into such an axis.
    # Unchecked, because `jax.linearize` and our primitives have no rules for the check; nothing is exchanged here.
    spread, whole = jax.P(mesh.axis_names), jax.P()
    specs = (whole, *[spread] * len(points))
    return jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=spread, check_vma=False)(state, *points)


def each_point(one: Callable[..., Any], mesh: Any, state: Any, *points: Any) -> Any:
    """``one(state, *point)`` of every point, each device of the mesh working on its own share of them."""
    return on_devices(lambda state, *points: jax.vmap(partial(one, state))(*points), mesh, state, *points)


def require_local(mesh: jax.sharding.Mesh) -> None:
    """Raise a ValueError if a mesh has devices of other processes."""
    if mesh.is_multi_process:
        raise ValueError(
            f"mesh: expected devices of this process, got {mesh.size} of several; take jax.local_devices(), and let"
            f" processes share a `folder`"
        )
