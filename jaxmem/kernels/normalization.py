"""Normalisation over groups of features, in two passes and without a batch axis."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def normalise(
    x: Float[Array, "rows columns features"], groups: int, epsilon: float = 1e-5
) -> Float[Array, "rows columns features"]:
    """Zero mean and unit variance over (rows, columns, features of a group); the default epsilon is PyTorch's.

    The variance takes two passes: E[x²] − E[x]² loses digits in float32, and its derivatives more of them. Means are
    taken over pixels first and over a group's features after: XLA's CPU code for one reduction of a 4-D view is slower.
    """

    def mean(values: Float[Array, "rows columns features"]) -> Float[Array, "1 1 features"]:
        by_group = values.mean((0, 1)).reshape(groups, -1)
        means = jnp.broadcast_to(by_group.mean(1, keepdims=True), by_group.shape)
        return means.reshape(1, 1, -1)

    centred = x - mean(x)
    return centred * jax.lax.rsqrt(mean(centred * centred) + epsilon)
