"""What a few products tell about an operator: their rounding, its asymmetry; and whether it can be used at all."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmem.krylov import Factorization, arnoldi, lanczos, scaled_norm
from jaxmem.operators import Operator
from jaxmem.rectangular import Rectangular
from jaxmem.spectra.result import rounding_noise
from jaxmem.spectra.ritz import Ritz


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


def dense_products(operator: Operator) -> int:
    """Products that a dense spectrum spends: the matrix and one more application, to measure rounding."""
    return operator.products_per_dense + operator.products_per_mv


def check_operator(operator: Operator, caller: str) -> None:
    """Refuse an operator that is no pytree, is traced, or does not pass its own `Operator.check`."""
    if not callable(getattr(operator, "mv", None)):
        raise ValueError(
            f"operator: expected an operator, got {type(operator).__name__}; make one with score_jacobian,"
            f" from_matvec(lambda v: A @ v, size), or from_scipy(A), which takes a matrix, too"
        )
    if isinstance(operator, Rectangular):
        raise ValueError(
            f"operator: expected a square one for {caller}, got a {type(operator).__name__} of shape {operator.shape};"
            f" take its `gram`, or jaxmem.singular_values"
        )
    strange = [leaf for leaf in jax.tree.leaves(operator) if callable(getattr(leaf, "mv", None))]
    if strange:
        raise ValueError(
            f"operator: expected a pytree, got {type(strange[0]).__name__} that JAX does not know; register it, for"
            f" instance as a dataclass with jax.tree_util.register_dataclass, or take jaxmem.from_matvec"
        )
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(operator)):
        raise ValueError(
            f"operator: {caller} solves on the host and cannot be traced; for many points use batch_spectra, inside"
            f" jit or vmap use jaxmem.krylov"
        )
    operator.check()
