"""Matrices, operators and scores that several test files take."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float

from jaxmem.function_operators import MatrixOperator
from jaxmem.operators import Operator
from jaxmem.rectangular import Rectangular


def rotated(eigenvalues, seed=0):
    """A dense symmetric float32 matrix with these eigenvalues."""
    rotation = scipy.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues),) * 2))[0]
    matrix = (rotation * eigenvalues) @ rotation.T
    return ((matrix + matrix.T) / 2).astype(np.float32)


def skewed(d, seed=0):
    """A float32 matrix that is nearly symmetric, as a learned Jacobian is."""
    a, b = np.random.default_rng(seed).normal(size=(2, d, d))
    return ((a + a.T) / 2 + 0.05 * (b - b.T)).astype(np.float32)


PRODUCTS: list = []  #: one entry for each product of a `Counted`


@jax.tree_util.register_pytree_node_class
class Counted(MatrixOperator):
    """A matrix that counts its products where they run."""

    def mv(self, vector):
        jax.debug.callback(lambda _: PRODUCTS.append(None), vector[0])
        return super().mv(vector)

    def rmv(self, vector):
        jax.debug.callback(lambda _: PRODUCTS.append(None), vector[0])
        return super().rmv(vector)


class Unregistered(Operator):
    """An operator that is no pytree."""

    size = 3
    dtype = jnp.dtype(jnp.float32)

    def mv(self, vector):
        return vector

    rmv = mv


def nan_score(state, x, t, cond):
    """A score that is NaN where x is above 5."""
    return jnp.where(x > 5, jnp.nan, -x)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RectangularMatrix(Rectangular):
    """A matrix that is there already, shape (d, n), floating point."""

    matrix: Any

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.matrix.shape
        return rows, columns

    @property
    def dtype(self) -> Any:
        return self.matrix.dtype

    def mv(self, vector: Float[Array, " n"]) -> Float[Array, " d"]:
        return jnp.matmul(self.matrix, vector, precision="highest")

    def rmv(self, vector: Float[Array, " d"]) -> Float[Array, " n"]:
        return jnp.matmul(vector, self.matrix, precision="highest")
