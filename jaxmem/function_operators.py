"""Operators of a matrix, of a function that JAX traces (`from_matvec`), and of one on the host (`from_scipy`)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array, Float

from jaxmem.operators import Operator


@jax.tree_util.register_pytree_node_class
class MatrixOperator(Operator):
    """A matrix that is there already.

    Args:
        matrix: shape (d, d), floating point.
        symmetric: declare it symmetric, so that a product is counted once; not checked.

    Raises:
        ValueError: if the matrix is not square and floating point.
    """

    def __init__(self, matrix: Any, *, symmetric: bool = False) -> None:
        matrix = jnp.asarray(matrix)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not jnp.issubdtype(matrix.dtype, jnp.floating):
            raise ValueError(
                f"matrix: expected a square floating-point array, got shape {matrix.shape} of {matrix.dtype}"
            )
        self.matrix, self.is_symmetric = matrix, symmetric

    @property
    def size(self) -> int:
        return self.matrix.shape[0]

    @property
    def dtype(self) -> Any:
        return self.matrix.dtype

    def mv(self, vector: Float[Array, " d"]) -> Float[Array, " d"]:
        return jnp.matmul(self.matrix, vector, precision="highest")

    def rmv(self, vector: Float[Array, " d"]) -> Float[Array, " d"]:
        return jnp.matmul(vector, self.matrix, precision="highest")

    def tree_flatten(self) -> tuple[tuple[Any], bool]:
        return (self.matrix,), self.is_symmetric

    @classmethod
    def tree_unflatten(cls, is_symmetric: bool, children: tuple[Any]) -> "MatrixOperator":
        operator = object.__new__(cls)  # transformations pass placeholders: no checks here
        operator.matrix, operator.is_symmetric = children[0], is_symmetric
        return operator


@jax.tree_util.register_pytree_node_class
class FunctionOperator(Operator):
    """A function v ↦ A v as an operator; made by `from_matvec` and `from_scipy`."""

    size, dtype = 0, jnp.dtype(jnp.float32)  # of each object: in place of the properties

    def __init__(self, forward: Any, transposed: Any, size: int, dtype: Any, symmetric: bool) -> None:
        self.forward = forward  #: `jax.tree_util.Partial` of the function: its arrays are leaves
        self.transposed = transposed  #: the same of v ↦ Aᵀ v; None where A is symmetric
        self.size, self.dtype, self.is_symmetric = size, dtype, symmetric

    def mv(self, vector: Float[Array, " d"]) -> Float[Array, " d"]:
        return self.forward(vector)

    def rmv(self, vector: Float[Array, " d"]) -> Float[Array, " d"]:
        return self.forward(vector) if self.is_symmetric else self.transposed(vector)

    def tree_flatten(self) -> tuple[tuple[Any, Any], tuple[int, Any, bool]]:
        return (self.forward, self.transposed), (self.size, self.dtype, self.is_symmetric)

    @classmethod
    def tree_unflatten(cls, static: tuple[int, Any, bool], children: tuple[Any, Any]) -> "FunctionOperator":
        return cls(*children, *static)


def from_matvec(
    fn: Callable[[Array], Array],
    size: int,
    *,
    symmetric: bool = False,
    transposed: Callable[[Array], Array] | None = None,
    dtype: Any = jnp.float32,
) -> Operator:
    """An operator of a linear function: ``from_matvec(lambda v: A @ v, size=500, symmetric=True)``.

    Args:
        fn: v ↦ A v for arrays of shape (size,), traceable by JAX and linear; neither is more than traced here. Arrays
            that it closes over become arguments of the compiled programs.
        size: the dimension d.
        symmetric: declare A symmetric, such as the Hessian of an energy: its products count once. Not checked;
            ``asymmetry`` of its spectra is then zero by declaration. A learned score's Jacobian is not symmetric.
        transposed: v ↦ Aᵀ v; by default JAX transposes ``fn``. Not used where A is symmetric.
        dtype: floating-point type of vectors and products.

    Raises:
        ValueError: if the size or the dtype is out of range, a result is not shaped like v, or JAX cannot transpose.
    """
    dtype = jnp.dtype(dtype)
    if size < 1 or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"size, dtype: expected at least 1 and a floating-point type, got {size} and {dtype}")
    vector = jax.ShapeDtypeStruct((size,), jax.dtypes.canonicalize_dtype(dtype))
    forward = _with_arrays(fn, vector, "fn")
    if symmetric:
        back = None
    elif transposed is not None:
        back = _with_arrays(transposed, vector, "transposed")
    else:
        back = jax.tree_util.Partial(_transpose, forward)
        try:
            jax.eval_shape(back, vector)
        except Exception as error:
            raise ValueError(
                f"transposed: expected v ↦ Aᵀ v, because JAX cannot transpose `fn` ({type(error).__name__}: {error});"
                f" or `symmetric=True`, if A is"
            ) from error
    return FunctionOperator(forward, back, size, vector.dtype, symmetric)


def _with_arrays(fn: Callable[[Array], Array], vector: Any, name: str) -> jax.tree_util.Partial:
    """The function with the arrays that it closes over as leaves of a pytree, after a check of its result."""
    closed = jax.make_jaxpr(fn)(vector)
    found = [(result.shape, result.dtype.name) for result in closed.out_avals]
    if found != [(vector.shape, vector.dtype.name)]:
        raise ValueError(f"{name}: expected a result of shape {vector.shape} and {vector.dtype}, got {found}")
    return jax.tree_util.Partial(_Program(closed.jaxpr), closed.consts)


@dataclass(frozen=True, eq=False)
class _Program:
    """A traced function of its arrays and a vector; compared by identity."""

    jaxpr: Any

    def __call__(self, consts: Any, vector: Array) -> Array:
        (result,) = jaxpr_as_fun(ClosedJaxpr(self.jaxpr, consts))(vector)
        return result


def _transpose(forward: Callable[[Array], Array], vector: Array) -> Array:
    (result,) = jax.linear_transpose(forward, vector)(vector)
    return result


def from_scipy(linear_operator: Any, *, symmetric: bool = False) -> Operator:
    """An operator of a `scipy.sparse.linalg.LinearOperator`, or of what SciPy makes one of (matrices, sparse ones).

    Products run on the host, one vector after another. Without double precision vectors and products are float32; it
    must be a setting of the process (``jax.config.update("jax_enable_x64", True)``): the host's threads see no context.

    Args:
        linear_operator: real and square.
        symmetric: declare it symmetric, as for `from_matvec`; otherwise it must have ``rmatvec``.

    Raises:
        ValueError: if it is not real and square, or has no ``rmatvec`` and is not declared symmetric.
    """
    operator = scipy.sparse.linalg.aslinearoperator(linear_operator)
    rows, columns = operator.shape
    if rows != columns or np.issubdtype(operator.dtype, np.complexfloating):
        raise ValueError(f"linear_operator: expected a real square one, got shape {operator.shape} of {operator.dtype}")
    dtype = jax.dtypes.canonicalize_dtype(jnp.promote_types(operator.dtype, jnp.float32))
    if not symmetric:
        try:
            operator.rmatvec(np.zeros(rows, operator.dtype))
        except NotImplementedError as error:
            raise ValueError(
                "linear_operator: expected one with `rmatvec`, got one without; or declare it symmetric, if it is"
            ) from error

    def on_host(product: Callable[[np.ndarray], Any]) -> jax.tree_util.Partial:
        def call(vector: Array) -> np.ndarray:
            return np.asarray(product(np.asarray(vector)), dtype).reshape(rows)

        result = jax.ShapeDtypeStruct((rows,), dtype)
        return jax.tree_util.Partial(lambda v: jax.pure_callback(call, result, v, vmap_method="sequential"))

    back = None if symmetric else on_host(operator.rmatvec)
    return FunctionOperator(on_host(operator.matvec), back, rows, dtype, symmetric)
