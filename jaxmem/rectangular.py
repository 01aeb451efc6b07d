"""Linear maps that are not square, such as what a condition does to a score, and the square ones made of them."""

from abc import ABC, abstractmethod
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
        return Gram(self, tall=self.shape[0] >= self.shape[1])

    def to_dense(self, chunk: int = 56) -> Float[Array, "d n"]:
        """The matrix, from as many products as its shorter side, taken ``chunk`` at a time."""
        rows, columns = self.shape
        shorter, product = (rows, self.rmv) if rows < columns else (columns, self.mv)

        def line(index: Array) -> Array:
            return product(jax.nn.one_hot(index, shorter, dtype=self.dtype))

        lines = jax.lax.map(line, jnp.arange(shorter), batch_size=min(chunk, shorter))
        return lines if rows < columns else lines.T


@jax.tree_util.register_pytree_node_class
class Gram(Operator):
    """AᵀA of a tall map, AAᵀ of a wide one; made by `Rectangular.gram`."""

    products_per_mv = 2
    is_symmetric = True

    def __init__(self, operator: Rectangular, *, tall: bool) -> None:
        self.operator, self.tall = operator, tall

    @property
    def size(self) -> int:
        return self.operator.shape[1 if self.tall else 0]

    @property
    def dtype(self) -> Any:
        return self.operator.dtype

    def check(self) -> None:
        self.operator.check()

    def mv(self, vector: Float[Array, " m"]) -> Float[Array, " m"]:
        return self.operator.rmv(self.operator.mv(vector)) if self.tall else self.operator.mv(self.operator.rmv(vector))

    rmv = mv

    def tree_flatten(self) -> tuple[tuple[Any], bool]:
        return (self.operator,), self.tall

    @classmethod
    def tree_unflatten(cls, tall: bool, children: tuple[Any]) -> "Gram":
        return cls(*children, tall=tall)
