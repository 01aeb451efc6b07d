"""Parameters of large models: kept in fewer bits than is computed with, or spread over devices."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

# What moves numbers and makes no others: the kernels of convolutions are turned so before they are used.
_REARRANGING = (jax.lax.transpose_p, jax.lax.reshape_p, jax.lax.squeeze_p, jax.lax.rev_p)


def widened(state: Any, dtype: Any) -> Any:
    """Parameters as a score computes with them: floating-point leaves of fewer bits than ``dtype`` become ``dtype``.

    Other leaves stay the same objects.
    """
    return jax.tree.map(lambda leaf: widen(leaf, dtype), state)


def widen(leaf: Any, dtype: Any) -> Any:
    """One leaf of `widened`."""
    return jnp.asarray(leaf, dtype) if _is_narrow(leaf, dtype) else leaf


def widened_shapes(state: Any, dtype: Any) -> Any:
    """What `widened` gives, by shapes alone where it would be a copy."""

    def shape(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, dtype) if _is_narrow(leaf, dtype) else leaf

    return jax.tree.map(shape, state)


def _is_narrow(leaf: Any, dtype: Any) -> bool:
    own = getattr(leaf, "dtype", None)
    return own is not None and jnp.issubdtype(own, jnp.floating) and own.itemsize < jnp.dtype(dtype).itemsize


class Origin(NamedTuple):
    """That a value of a program is one of its arguments, rearranged (static, compared)."""

    argument: int  #: its place among them
    steps: tuple[tuple[Any, tuple[tuple[str, Any], ...]], ...]  #: primitives and their parameters, in order

    def restored(self, leaves: Sequence[Any], dtype: Any) -> Any:
        """The value, of arguments that may have fewer bits than ``dtype``."""
        leaf = leaves[self.argument]
        for primitive, options in self.steps:
            leaf = primitive.bind(leaf, **dict(options))
        return widen(leaf, dtype)


def origins(jaxpr: Any, count: int) -> list[Origin | None]:
    """For each result of a program, of which of its first ``count`` arguments it is a rearrangement; None for none."""
    positions = {variable: index for index, variable in enumerate(jaxpr.invars[:count])}
    made_by = {variable: equation for equation in jaxpr.eqns for variable in equation.outvars}

    def origin(variable: Any) -> Origin | None:
        if isinstance(variable, Literal):
            return None
        if variable in positions:
            return Origin(positions[variable], ())
        equation = made_by.get(variable)
        if equation is None or equation.primitive not in _REARRANGING:
            return None
        found = origin(equation.invars[0])
        return found and Origin(found.argument, (*found.steps, (equation.primitive, tuple(equation.params.items()))))

    return [origin(variable) for variable in jaxpr.outvars]


def sharded(state: Any, devices: Sequence[jax.Device] | None = None) -> Any:
    """Parameters spread over devices, for a model that fits none of them alone: of each leaf every device has a part.

    A leaf is cut along its largest axis of a length that the number of devices divides, so that each device has that
    share of it. Leaves without such an axis are whole on every device. Programs that take the result, such as products
    with `score_jacobian`, run on all these devices and exchange what they need of each other; the numbers are those of
    one device up to rounding.

    Args:
        state: the parameters, a pytree of arrays: on the host (NumPy), no device ever has a whole large leaf.
        devices: by default all of this process.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    # Automatic: XLA's partitioner decides what is exchanged, of a score that says nothing about devices.
    mesh = jax.make_mesh((len(devices),), ("parameters",), (jax.sharding.AxisType.Auto,), devices=devices)

    def place(leaf: Any) -> jax.Array:
        shape = jnp.shape(leaf)
        axes = [axis for axis, length in enumerate(shape) if length and length % len(devices) == 0]
        cut = max(axes, key=lambda axis: shape[axis], default=None)
        spec = jax.P(*("parameters" if axis == cut else None for axis in range(len(shape))))
        return jax.device_put(leaf, jax.NamedSharding(mesh, spec))

    return jax.tree.map(place, state)
