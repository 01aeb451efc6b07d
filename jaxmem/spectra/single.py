"""The spectrum of one operator."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmem.jacobian import ScoreJacobian, require_finite
from jaxmem.krylov import Factorization, Status, arnoldi, lanczos, scaled_norm
from jaxmem.operators import Operator
from jaxmem.spectra.result import Method, Spectrum, check_method, order_descending, rounding_noise
from jaxmem.spectra.ritz import Ritz, ritz_pairs, ritz_vectors


class Probe(NamedTuple):
    """What a few products with one random vector tell about an operator."""

    noise: Array  #: ‖A v - A(3 v)/3‖ for unit v, two roundings of one product; at least eps ‖A v‖
    asymmetry: Array  #: ‖A v - Aᵀ v‖ / ‖A v‖
    norm: Array  #: ‖A v‖


def rounding(product: Array, again: Array) -> Array:
    """How far two evaluations of one product are apart, at least one rounding of it: they may agree by chance."""
    return jnp.maximum(scaled_norm(product - again), jnp.finfo(product.dtype).eps * scaled_norm(product))


def probe(operator: Operator, vector: Float[Array, " d"]) -> Probe:
    """Measure rounding and asymmetry with three products (two where the operator is declared symmetric)."""
    return probe_and_product(operator, vector)[0]


def probe_and_product(operator: Operator, vector: Float[Array, " d"]) -> tuple[Probe, Array]:
    """The same, and the product with the unit vector, by which an operator can be recognised."""
    vector = vector / scaled_norm(vector)
    product = operator.mv(vector)
    again = operator.mv(3 * vector) / 3  # 3 is no power of two: every rounding differs
    norm = scaled_norm(product)
    gap = jnp.zeros_like(norm) if operator.is_symmetric else scaled_norm(product - operator.rmv(vector))
    return Probe(rounding(product, again), gap / jnp.where(norm > 0, norm, 1), norm), product


def dense_products(operator: Operator) -> int:
    """Products that a dense spectrum spends: the matrix and one more application, to measure rounding."""
    return operator.products_per_dense + operator.products_per_mv


def probe_products(operator: Operator) -> int:
    """Products that `probe` spends."""
    return (2 if operator.is_symmetric else 3) * operator.products_per_mv


@partial(jax.jit, static_argnames=("num_steps", "symmetric", "tolerance"))
def run_krylov(
    operator: Operator, start: Float[Array, " d"], num_steps: int, *, symmetric: bool, tolerance: float | None = None
) -> tuple[Factorization, Probe]:
    """Arnoldi on A, or Lanczos on its symmetric part, with the probe of A; pure, may be vmapped."""
    if symmetric:
        factorization = lanczos(operator.symmetric.mv, start, num_steps, tolerance=tolerance)
    else:
        factorization = arnoldi(operator.mv, start, num_steps, tolerance=tolerance)
    return factorization, probe(operator, start)


def krylov_noise(factorization: Factorization, pairs: Ritz, measured: Probe) -> float:
    """The rounding bound of one factorisation's Ritz values."""
    steps = len(pairs.values)
    return float(rounding_noise(measured.noise, steps, factorization.scale, pairs.orthogonality_loss))


@partial(jax.jit, static_argnames="chunk")
def dense_and_noise(operator: Operator, chunk: int) -> tuple[Array, Array]:
    """The matrix, and the error of one product with a unit vector; pure, may be vmapped.

    The product is taken through the matrix and through the operator: two independent roundings, two programs. The
    vector is Gaussian: sums of equal entries ±1 can be exact, and hide what rounding does to any other.
    """
    matrix = operator.to_dense(chunk)
    vector = jax.random.normal(jax.random.key(0), (operator.size,), operator.dtype)
    vector = vector / jnp.linalg.norm(vector)
    return matrix, rounding(jnp.matmul(matrix, vector, precision="highest"), operator.mv(vector))


def check_operator(operator: Operator, caller: str) -> None:
    """Refuse what is no pytree, is traced, or was made of a score that is NaN or infinite at its point."""
    if any(leaf is operator for leaf in jax.tree.leaves(operator)):
        raise ValueError(
            f"operator: expected a pytree, got {type(operator).__name__} that JAX does not know; register it, for"
            f" instance as a dataclass with jax.tree_util.register_dataclass"
        )
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(operator)):
        raise ValueError(
            f"operator: {caller} solves on the host and cannot be traced; for many points use batch_spectra, inside"
            f" jit or vmap use jaxmem.krylov"
        )
    # Also within a difference. The Jacobian of such a score may be finite.
    for part in jax.tree.leaves(operator, is_leaf=lambda part: isinstance(part, ScoreJacobian)):
        if isinstance(part, ScoreJacobian):
            require_finite(part.value, "at this point")


def spectrum(
    operator: Operator,
    method: Method = "eigh",
    *,
    num_steps: int | None = None,
    key: Any = None,
    start: Any = None,
    tolerance: float | None = None,
    vectors: bool = False,
    chunk: int = 56,
) -> Spectrum:
    """Eigenvalues of an operator A, here mostly of the Hessian of log p_t(x | c).

    Args:
        operator: made by `score_jacobian`, `MatrixOperator`, or anything with their interface.
        method: ``"eigh"``: all eigenvalues of ½(A + Aᵀ), dense, d products. ``"eig"``: all of A, complex.
            ``"lanczos"``: ``num_steps`` Ritz values of ½(A + Aᵀ), two products a step. ``"arnoldi"``: of A, one
            product a step (the paper's Algorithm 1). A learned Jacobian is not exactly symmetric: the two kinds
            differ by as much as ``asymmetry`` says.
        num_steps: Krylov steps, 1 to d.
        key: random key of the start vector (Gaussian), for Krylov methods.
        start: a start vector of length d instead of ``key``.
        tolerance: when a Krylov space counts as closed (see `jaxmem.krylov.extend`); 0 goes on to ``num_steps``.
        vectors: also return eigenvectors or Ritz vectors, as rows.
        chunk: products taken together by the dense methods (see `Operator.to_dense`).

    The dense solver and the small Krylov eigenproblem run on the host in float64. Dense methods hold the d × d matrix
    three times over and refuse d > 4,096.

    Raises:
        ValueError: on an unknown method, a size or step number out of range, no key, a start vector that is zero or of
            the wrong shape, or a score or product that is NaN or infinite.
    """
    size = operator.size
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    check_operator(operator, "spectrum")
    check_method(method, size, num_steps)
    if method in ("eigh", "eig"):
        return _dense_spectrum(operator, method, vectors, chunk)
    assert num_steps is not None  # checked above; for the type checker
    start_vector, seed = _start_vector(operator, key, start)
    symmetric = method == "lanczos"
    factorization, measured = jax.device_get(
        run_krylov(operator, start_vector, num_steps, symmetric=symmetric, tolerance=tolerance)
    )
    if factorization.status == Status.NONFINITE:
        raise ValueError(
            f"operator: product {int(factorization.num_steps) + 1} was NaN or infinite; check the parameters, the point"
            f" and the timestep"
        )
    pairs = ritz_pairs(factorization, symmetric=symmetric)
    noise = krylov_noise(factorization, pairs, measured)
    per_step = operator.symmetric.products_per_mv if symmetric else operator.products_per_mv
    return Spectrum(
        eigenvalues=pairs.values,
        residuals=np.maximum(pairs.residuals, noise),
        vectors=ritz_vectors(factorization, pairs) if vectors else None,
        num_products=np.asarray(len(pairs.values) * per_step + probe_products(operator)),
        status=np.asarray(factorization.status),
        asymmetry=np.asarray(measured.asymmetry),
        noise=np.asarray(noise),
        dtype=operator.dtype,
        method=method,
        seed=seed,
    )


def _dense_spectrum(operator: Operator, method: Method, vectors: bool, chunk: int) -> Spectrum:
    matrix, product_noise = (np.asarray(part, np.float64) for part in dense_and_noise(operator, chunk))
    if not np.isfinite(matrix).all():
        raise ValueError("operator: its matrix holds NaN or infinity; check the parameters, the point and the timestep")
    norm = np.linalg.norm(matrix)
    asymmetry = np.linalg.norm(matrix - matrix.T) / norm if norm > 0 else np.zeros(())
    if method == "eigh":
        values, columns = (
            np.linalg.eigh((matrix + matrix.T) / 2) if vectors else (np.linalg.eigvalsh((matrix + matrix.T) / 2), None)
        )
    else:
        values, columns = np.linalg.eig(matrix) if vectors else (np.linalg.eigvals(matrix), None)
        values = values.astype(np.complex128)
    order = order_descending(values)
    # LAPACK's backward error is a small multiple of eps ‖A‖, here of float64; d eps is above it.
    noise = rounding_noise(product_noise, operator.size, norm, operator.size * np.finfo(np.float64).eps)
    return Spectrum(
        eigenvalues=values[order],
        residuals=np.full(len(values), noise),
        vectors=None if columns is None else columns.T[order],
        num_products=np.asarray(dense_products(operator)),
        status=np.asarray(int(Status.CONVERGED)),
        asymmetry=np.asarray(asymmetry),
        noise=np.asarray(noise),
        dtype=operator.dtype,
        method=method,
        seed=None,
    )


def _start_vector(operator: Operator, key: Any, start: Any) -> tuple[Array, np.ndarray | None]:
    if start is None:
        if key is None:
            raise ValueError("key: Krylov methods need a random key (jax.random.key(0)) or a start vector")
        return jax.random.normal(key, (operator.size,), operator.dtype), np.asarray(jax.random.key_data(key))
    start = np.asarray(start, np.float64)
    if start.shape != (operator.size,):
        raise ValueError(f"start: expected shape ({operator.size},), got {start.shape}")
    if not np.isfinite(start).all():
        raise ValueError("start: the start vector holds NaN or infinity")
    if not np.any(start):
        raise ValueError("start: the start vector is zero, and spans no Krylov space; pass a key for a random one")
    # Its length is nothing that counts, and in float64 none under- or overflows.
    start = start / np.abs(start).max()
    return jnp.asarray(start / np.linalg.norm(start), operator.dtype), None
