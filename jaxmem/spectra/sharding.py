"""The matrix of one operator, its columns shared by many devices: for a point whose matrix one device cannot hold."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmem.operators import Operator


@partial(jax.jit, static_argnames=("mesh", "chunk"))
def _columns(operator: Operator, mesh: Any, chunk: int) -> Array:
    def share(operator: Operator, indices: Array) -> Array:
        def column(index: Array) -> Array:
            return operator.mv(jax.nn.one_hot(index, operator.size, dtype=operator.dtype))

        return jax.lax.map(column, indices, batch_size=min(chunk, indices.shape[0])).T

    spread = mesh.axis_names
    # Unchecked, because our primitives have no rules for the check; nothing is exchanged here.
    each = jax.shard_map(
        share, mesh=mesh, in_specs=(jax.P(), jax.P(spread)), out_specs=jax.P(None, spread), check_vma=False
    )
    return each(operator, jnp.arange(operator.size))


def sharded_columns(operator: Operator, mesh: jax.sharding.Mesh, *, chunk: int = 56) -> Float[Array, "d d"]:
    """The matrix A of an operator with d/n whole columns on each of the mesh's n devices, from d products.

    Devices compute their own columns at the same time, ``chunk`` of them together, and exchange nothing. Memory on
    each: the operator, twice its d²/n numbers (once when done), and ``chunk`` times what one product holds. The mesh
    may span processes: each passes the same operator, and holds the columns of its own devices.

    `MatrixOperator` of the result is an operator like any other, and its products are shared by the devices too
    (vectors of length d are exchanged, never the matrix): ``spectrum(MatrixOperator(columns), "lanczos", ...)``.

    Raises:
        ValueError: if ``chunk`` is below 1, or d is no multiple of the number of devices.
    """
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    if operator.size % mesh.size:
        raise ValueError(
            f"mesh: expected a number of devices that divides the operator's size {operator.size}, got {mesh.size}"
        )
    # XLA, not the types of arrays, places what later products with the matrix do, whatever the caller's mesh asks for.
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, (jax.sharding.AxisType.Auto,) * len(mesh.axis_names))
    return _columns(jax.device_put(operator, jax.NamedSharding(mesh, jax.P())), mesh, chunk)
