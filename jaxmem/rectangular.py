"""Linear maps that are not square, such as what a condition does to a score, and the square ones made of them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmem.operators import Operator


class Rectangular(ABC):
    """A linear map of ``shape`` (d, n), a pytree; a subclass gives ``shape``, ``dtype``, ``mv`` and ``rmv``."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(d, n): lengths of a product, and of what is multiplied."""

    @property
    @abstractmethod
    def dtype(self) -> Any:
        """Data type of vectors and products."""

    @abstractmethod
    def mv(self, vector: Float[Array, " n"]) -> Float[Array, " d"]:
        """``A v``."""

    @abstractmethod
    def rmv(self, vector: Float[Array, " d"]) -> Float[Array, " n"]:
        """``Aᵀ v``."""

    def check(self) -> None:  # noqa: B027  (most have nothing that could be wrong)
        """Raise a ValueError if nothing that is computed of this map can be right."""

    @property
    def gram(self) -> Operator:
        """AᵀA or AAᵀ, the smaller one: symmetric, with the squares of the singular values. Two products each time.

        Its trace is ``‖A‖²`` (Frobenius): ``jaxmem.trace(A.gram)``.
        """
        return Gram(self)

    def to_dense(self, chunk: int = 56) -> Float[Array, "d n"]:
        """The matrix, from as many products as its shorter side, taken ``chunk`` at a time."""
        rows, columns = self.shape
        shorter, product = (rows, self.rmv) if rows < columns else (columns, self.mv)

        def line(index: Array) -> Array:
            return product(jax.nn.one_hot(index, shorter, dtype=self.dtype))

        lines = jax.lax.map(line, jnp.arange(shorter), batch_size=min(chunk, shorter))
        return lines if rows < columns else lines.T


class Symmetric(Operator):
    """A symmetric operator made of a rectangular one: a product takes one with A and one with Aᵀ."""

    operator: Rectangular
    products_per_mv = 2
    is_symmetric = True

    @property
    def dtype(self) -> Any:
        return self.operator.dtype

    def check(self) -> None:
        self.operator.check()

    def rmv(self, vector: Float[Array, " m"]) -> Float[Array, " m"]:
        return self.mv(vector)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gram(Symmetric):
    """AᵀA of a tall map, AAᵀ of a wide one; made by `Rectangular.gram`."""

    operator: Rectangular

    @property
    def size(self) -> int:
        return min(self.operator.shape)

    def mv(self, vector: Float[Array, " m"]) -> Float[Array, " m"]:
        A = self.operator
        return A.rmv(A.mv(vector)) if A.shape[0] >= A.shape[1] else A.mv(A.rmv(vector))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Augmented(Symmetric):
    """``[[0, A], [Aᵀ, 0]]``, of size d + n: symmetric, with the eigenvalues ±σ of A's singular values, and zeros.

    Its eigenvectors are ``(u, ±v)/√2``. Lanczos from ``(0, v)`` is Golub-Kahan bidiagonalisation.
    """

    operator: Rectangular

    @property
    def size(self) -> int:
        return sum(self.operator.shape)

    def mv(self, vector: Float[Array, " m"]) -> Float[Array, " m"]:
        rows = self.operator.shape[0]
        return jnp.concatenate([self.operator.mv(vector[rows:]), self.operator.rmv(vector[:rows])])
