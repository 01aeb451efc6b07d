"""Linear operators on flat vectors: the one interface that every spectral method takes.

An operator has ``size``, ``dtype``, ``mv`` (A v), ``rmv`` (Aᵀ v), ``symmetric`` (an operator for ½(A + Aᵀ)),
``to_dense`` and ``products_per_mv``, the number of products with A or Aᵀ that one ``mv`` costs. Operators are pytrees:
they cross `jax.jit` boundaries as arguments. ``A @ v``, ``A.T``, ``A + B``, ``A - B``, ``c * A`` and ``-A`` are what
they say; `jaxmem.function_operators` makes operators of functions.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg
from jaxtyping import Array, Float


class Operator(ABC):
    """What all operators share; a subclass gives ``size``, ``dtype``, ``mv`` and ``rmv``."""

    products_per_mv = 1
    is_symmetric = False  #: by construction or declaration: a product then counts once, and ``asymmetry`` is zero
    __array_ufunc__ = None  # a NumPy number times an operator is ours to compute

    @property
    @abstractmethod
    def size(self) -> int:
        """The dimension d."""

    @property
    @abstractmethod
    def dtype(self) -> Any:
        """Data type of vectors and products."""

    @abstractmethod
    def mv(self, vector: Float[Array, " d"]) -> Float[Array, " d"]:
        """``A v``."""

    @abstractmethod
    def rmv(self, vector: Float[Array, " d"]) -> Float[Array, " d"]:
        """``Aᵀ v``."""

    @property
    def products_per_dense(self) -> int:
        """Products that ``to_dense`` takes."""
        return self.size * self.products_per_mv

    @property
    def symmetric(self) -> "Operator":
        """The symmetric part ½(A + Aᵀ); A itself where A is declared symmetric."""
        return self if self.is_symmetric else SymmetricPart(self)

    @property
    def T(self) -> "Operator":
        """The transpose Aᵀ; A itself where A is declared symmetric."""
        return self if self.is_symmetric else Transpose(self)

    def check(self) -> None:  # noqa: B027  (most have nothing that could be wrong)
        """Raise a ValueError if no spectrum of this operator can be right; called before any product."""

    def to_dense(self, chunk: int = 56) -> Float[Array, "d d"]:
        """The matrix, from ``size`` products taken ``chunk`` at a time.

        Memory beyond the matrix itself is ``chunk`` times what one product holds. The default was the fastest for the
        28×28 U-Net on two CPU cores (`benchmarks/exact_jacobian.py`); accelerators take larger ones.
        """

        def column(index: Array) -> Array:
            return self.mv(jax.nn.one_hot(index, self.size, dtype=self.dtype))

        return jax.lax.map(column, jnp.arange(self.size), batch_size=min(chunk, self.size)).T

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """The operator for SciPy, which multiplies NumPy vectors; for instance for `scipy.sparse.linalg.eigsh`."""
        dtype = np.dtype(jnp.promote_types(self.dtype, jnp.float32))  # NumPy does not know bfloat16

        def on_numpy(product: Any) -> Any:
            return lambda v: np.asarray(product(self, jnp.asarray(v.reshape(-1), self.dtype)), dtype)

        shape, forward, transposed = (self.size,) * 2, on_numpy(_mv), on_numpy(_rmv)
        return scipy.sparse.linalg.LinearOperator(shape, matvec=forward, rmatvec=transposed, dtype=dtype)

    def __matmul__(self, vector: Any) -> Array:
        if np.iscomplexobj(vector):
            raise ValueError(f"operator: expected a real vector, got {vector.dtype}; multiply its two parts apart")
        vector = jnp.asarray(vector, self.dtype)
        if vector.ndim not in (1, 2) or len(vector) != self.size:
            raise ValueError(
                f"operator: expected a vector of length {self.size}, or a matrix with as many rows, got shape"
                f" {vector.shape}"
            )
        if any(isinstance(leaf, Operator) for leaf in jax.tree.leaves(self)):  # of a class that JAX does not know
            return self.mv(vector) if vector.ndim == 1 else jax.vmap(self.mv, 1, 1)(vector)
        return _mv(self, vector) if vector.ndim == 1 else _mm(self, vector)

    def __add__(self, other: "Operator") -> "Operator":
        return _sum(self, other) if isinstance(other, Operator) else NotImplemented

    def __radd__(self, other: Any) -> "Operator":
        return self if isinstance(other, int) and other == 0 else NotImplemented  # where `sum` begins

    def __sub__(self, other: "Operator") -> "Operator":
        return _sum(self, -other) if isinstance(other, Operator) else NotImplemented

    def __neg__(self) -> "Operator":
        return -1 * self

    def __mul__(self, factor: Any) -> "Operator":
        if isinstance(factor, Operator):
            return NotImplemented
        if jnp.ndim(factor) or not jnp.isrealobj(factor) or isinstance(factor, str):
            got = f"shape {jnp.shape(factor)}" if jnp.ndim(factor) else repr(factor)
            raise ValueError(f"factor: expected a number, got {got}")
        return Scaled(self, jnp.asarray(factor, self.dtype))

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> "Operator":
        return NotImplemented if isinstance(divisor, Operator) else self * (1 / divisor)


def _sum(first: Operator, second: Operator) -> "Sum":
    ours, theirs = ((part.size, jnp.dtype(part.dtype).name) for part in (first, second))
    if ours != theirs:
        raise ValueError(f"operator: expected two of one size and dtype for a sum, got {ours} and {theirs}")
    return Sum(first, second)


@jax.jit
def _mv(operator: Operator, vector: Array) -> Array:
    return operator.mv(vector)


@jax.jit
def _mm(operator: Operator, matrix: Array) -> Array:
    return jax.vmap(operator.mv, 1, 1)(matrix)


@jax.jit
def _rmv(operator: Operator, vector: Array) -> Array:
    return operator.rmv(vector)


class Derived(Operator):
    """An operator made of another one, of its size and dtype; a product is one of that unless it says otherwise."""

    operator: Operator

    @property
    def products_per_mv(self) -> int:  # type: ignore[override]
        return self.operator.products_per_mv

    @property
    def size(self) -> int:
        return self.operator.size

    @property
    def dtype(self) -> Any:
        return self.operator.dtype

    def check(self) -> None:
        self.operator.check()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SymmetricPart(Derived):
    """½(A + Aᵀ) of an operator: one application of A and one of Aᵀ each time."""

    operator: Operator
    is_symmetric = True

    @property
    def products_per_mv(self) -> int:  # type: ignore[override]
        return 2 * self.operator.products_per_mv

    def mv(self, vector: Float[Array, " d"]) -> Float[Array, " d"]:
        return 0.5 * (self.operator.mv(vector) + self.operator.rmv(vector))

    rmv = mv

    @property
    def products_per_dense(self) -> int:
        return self.operator.products_per_dense

    def to_dense(self, chunk: int = 56) -> Float[Array, "d d"]:
        dense = self.operator.to_dense(chunk)
        return 0.5 * (dense + dense.T)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Transpose(Derived):
    """Aᵀ."""

    operator: Operator

    def mv(self, vector: Float[Array, " d"]) -> Float[Array, " d"]:
        return self.operator.rmv(vector)

    def rmv(self, vector: Float[Array, " d"]) -> Float[Array, " d"]:
        return self.operator.mv(vector)

    @property
    def T(self) -> Operator:
        return self.operator


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scaled(Derived):
    """``c A``; made by ``c * A``, which checks c. Stacked for `jax.vmap`, ``factor`` has the same leading axis."""

    operator: Operator
    factor: Any  #: c, of the operator's dtype; an argument of compiled programs, which serve all

    @property
    def is_symmetric(self) -> bool:  # type: ignore[override]
        return self.operator.is_symmetric

    def mv(self, vector: Float[Array, " d"]) -> Float[Array, " d"]:
        return self.factor * self.operator.mv(vector)

    def rmv(self, vector: Float[Array, " d"]) -> Float[Array, " d"]:
        return self.factor * self.operator.rmv(vector)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shifted(Derived):
    """``A + c I``: every eigenvalue moved by c."""

    operator: Operator
    shift: Any  #: c, of the operator's dtype; an argument of compiled programs, which serve all

    @property
    def is_symmetric(self) -> bool:  # type: ignore[override]
        return self.operator.is_symmetric

    def mv(self, vector: Float[Array, " d"]) -> Float[Array, " d"]:
        return self.operator.mv(vector) + self.shift * vector

    def rmv(self, vector: Float[Array, " d"]) -> Float[Array, " d"]:
        return self.operator.rmv(vector) + self.shift * vector


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sum(Operator):
    """A + B: one product with each. ``A - B`` is the sum with -B, such as the conditional minus the unconditional.

    Made by ``A + B``, which checks that they fit: transformations put what they like into its fields.
    """

    first: Operator
    second: Operator

    @property
    def products_per_mv(self) -> int:  # type: ignore[override]
        return self.first.products_per_mv + self.second.products_per_mv

    @property
    def is_symmetric(self) -> bool:  # type: ignore[override]
        return self.first.is_symmetric and self.second.is_symmetric

    @property
    def size(self) -> int:
        return self.first.size

    @property
    def dtype(self) -> Any:
        return self.first.dtype

    def check(self) -> None:
        self.first.check()
        self.second.check()

    def mv(self, vector: Float[Array, " d"]) -> Float[Array, " d"]:
        return self.first.mv(vector) + self.second.mv(vector)

    def rmv(self, vector: Float[Array, " d"]) -> Float[Array, " d"]:
        return self.first.rmv(vector) + self.second.rmv(vector)
