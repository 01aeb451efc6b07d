"""The trace of an operator: exact from all diagonal entries, or an estimate with an interval from a few products."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array, Float

from jaxmem.operators import Operator, SymmetricPart
from jaxmem.spectra.measure import check_operator

LARGEST_EXACT = 4096  #: dimension up to which a trace is exact by default
PRODUCTS = 300  #: of an estimate by default
#: Products from which there is an interval: a third are probes, and of ten Student's interval is too short for the few
#: eigenvalues that the basis misses: it covered 88 % there, and 92 to 98 % from 60 on (`tests/test_traces.py`).
FEWEST = 60


class Trace(NamedTuple):
    """A trace, what it is known to, and what it took."""

    value: float
    standard_error: float  #: 0 where it is exact
    interval: tuple[float, float]  #: 95 %, Student's, from the spread of the probes
    num_products: int


def trace(operator: Operator, *, max_products: int | None = None, key: Any = None, chunk: int = 56) -> Trace:
    """The trace of an operator, exact or by Hutch++ (Meyer, Musco, Musco and Woodruff, SOSA 2021).

    Exact: the d diagonal entries ``e_iᵀ A e_i``, from d products. Estimated from m < d products: with Q an orthonormal
    basis of A S, for m/3 Gaussian columns S, ``tr QᵀAQ`` holds what the leading directions have, exactly, and what is
    left is a mean over m/3 Rademacher probes, ``gᵀ(I - QQᵀ) A (I - QQᵀ) g``, each with that as expectation. Their
    spread is that of the estimate, whatever Q is. The error falls with the part of A that Q has not, so an operator of
    low rank is nearly exact; shift a Hessian's bulk to 0 before (`jaxmem.operators.Shifted`).

    Args:
        operator: A; it need not be symmetric, for the trace of its symmetric part is the same.
        max_products: products that may be spent; by default exact up to dimension 4,096, and 300 above.
        key: random key; needed for an estimate.
        chunk: products taken together.

    Raises:
        ValueError: fewer than 60 applications of the operator for an estimate, no key, half precision, or a product
            that is NaN or infinite.
    """
    check_operator(operator, "trace")
    if jnp.dtype(operator.dtype).itemsize < 4:
        raise ValueError(f"operator: expected float32 or float64, of which a sum can be exact, got {operator.dtype}")
    if isinstance(operator, SymmetricPart):
        operator = operator.operator  # of the same trace, for half of the products
    size, each = operator.size, operator.products_per_mv
    if max_products is None:
        max_products = size * each if size <= LARGEST_EXACT else max(PRODUCTS, FEWEST * each)
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    number = max_products // each
    if number >= size:
        entries = _quadratic_forms(operator, None, jnp.arange(size), chunk)
        total = float(np.sum(_finite(entries)))
        return Trace(total, 0.0, (total, total), size * each)
    if number < FEWEST:
        raise ValueError(f"max_products: expected at least {FEWEST * each} (or {size * each}), got {max_products}")
    if key is None:
        raise ValueError("key: expected a random key for an estimate, got none; give jax.random.key(0)")
    third = number // 3
    sketch_key, probe_key = jax.random.split(key)
    basis = _range(operator, jax.random.normal(sketch_key, (third, size), operator.dtype), chunk)
    probes = jax.random.rademacher(probe_key, (number - 2 * third, size), operator.dtype)
    probes = probes - jnp.matmul(jnp.matmul(probes, basis.T, precision="highest"), basis, precision="highest")
    leading = float(np.sum(_finite(_quadratic_forms(operator, basis, jnp.arange(third), chunk))))
    rest = _finite(_quadratic_forms(operator, probes, jnp.arange(len(probes)), chunk))
    error = float(rest.std(ddof=1) / np.sqrt(len(rest)))
    half = float(scipy.stats.t.ppf(0.975, len(rest) - 1)) * error
    value = leading + float(rest.mean())
    return Trace(value, error, (value - half, value + half), number * each)


def _quadratic_forms(operator: Operator, rows: Any, index: Array, chunk: int) -> np.ndarray:
    """``vᵀ A v`` of some rows, or of unit vectors."""
    return np.asarray(_forms(operator, rows, index, min(chunk, len(index))), np.float64)


@partial(jax.jit, static_argnames="chunk")
def _forms(operator: Operator, rows: Any, index: Array, chunk: int) -> Array:
    def one(i: Array) -> Array:
        vector = jax.nn.one_hot(i, operator.size, dtype=operator.dtype) if rows is None else rows[i]
        return jnp.vdot(vector, operator.mv(vector), precision="highest")

    return jax.lax.map(one, index, batch_size=chunk)


@partial(jax.jit, static_argnames="chunk")
def _range(operator: Operator, rows: Float[Array, "k d"], chunk: int) -> Float[Array, "k d"]:
    """An orthonormal basis, as rows, of what the operator makes of these rows."""
    images = jax.lax.map(operator.mv, rows, batch_size=min(chunk, len(rows)))
    return jnp.linalg.qr(images.T)[0].T


def _finite(forms: np.ndarray) -> np.ndarray:
    if not np.isfinite(forms).all():
        raise ValueError("operator: a product holds NaN or infinity; check the parameters, the point and the timestep")
    return forms
