"""The diagonal of an operator: exact, or an estimate with errors from a few products."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxmem.operators import Operator, SymmetricPart
from jaxmem.spectra.measure import check_operator
from jaxmem.spectra.traces import LARGEST_EXACT

PROBES = 64  #: of an estimate by default
FEWEST = 8  #: probes from which a spread says something


class Diagonal(NamedTuple):
    """The diagonal entries of an operator, what they are known to, and what they took."""

    values: np.ndarray  #: (d,) float64
    standard_errors: np.ndarray  #: (d,) from the spread of the probes: 0 where they agreed, or where all d were taken
    num_products: int


def diagonal(operator: Operator, *, max_products: int | None = None, key: Any = None, chunk: int = 56) -> Diagonal:
    """The diagonal of an operator, exact or by Rademacher probes (Bekas, Kokiopoulou and Saad 2007).

    Exact: the d entries ``e_iᵀ A e_i``, from d applications of A. Estimated from m < d applications: the mean of
    ``w ∘ A w`` over probes w of entries ±1, whose expectation is the diagonal and whose variance in entry i is the sum
    of the squares of the other entries of row i, over m.

    A difference of two operators costs two products at each application. An entry with one other in its row has probes
    that may all agree by chance, 1 time in 2^(m-1), and then an error of 0 that is wrong. Memory of an estimate beside
    the products: about 5 m d numbers of four bytes.

    Args:
        operator: A; it need not be symmetric, for the diagonal of its symmetric part is the same.
        max_products: products that may be spent; by default for all up to dimension 4,096, and for 64 probes above.
        key: random key; needed for an estimate.
        chunk: products taken together.

    Raises:
        ValueError: too few products for an estimate, no key, half precision, or a product that is NaN or infinite.
    """
    check_operator(operator, "diagonal")
    if jnp.dtype(operator.dtype).itemsize < 4:
        raise ValueError(f"operator: expected float32 or float64, got {operator.dtype}")
    if isinstance(operator, SymmetricPart):
        operator = operator.operator  # of the same diagonal, for half of the products
    size, each = operator.size, operator.products_per_mv
    if max_products is None:
        max_products = size * each if size <= LARGEST_EXACT else PROBES * each
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    number = min(max_products // each, size)
    if number < min(FEWEST, size):
        raise ValueError(f"max_products: expected at least {min(FEWEST, size) * each}, got {max_products}")
    exact = number == size
    if key is None and not exact:
        raise ValueError("key: expected a random key for an estimate, got none; give jax.random.key(0)")
    if exact:
        values = np.asarray(_entries(operator, jnp.arange(size), min(chunk, size)), np.float64)
        errors = np.zeros(size)
    else:
        probes = np.asarray(_probes(operator, jax.random.split(key, number), min(chunk, number)), np.float64)
        values, errors = probes.mean(0), probes.std(0, ddof=1) / np.sqrt(number)
    if not np.isfinite(values).all():
        raise ValueError("operator: a product holds NaN or infinity; check the parameters, the point and the timestep")
    return Diagonal(values, errors, number * each)


@partial(jax.jit, static_argnames="chunk")
def _entries(operator: Operator, index: Array, chunk: int) -> Array:
    def one(i: Array) -> Array:
        return operator.mv(jax.nn.one_hot(i, operator.size, dtype=operator.dtype))[i]

    return jax.lax.map(one, index, batch_size=chunk)


@partial(jax.jit, static_argnames="chunk")
def _probes(operator: Operator, keys: Array, chunk: int) -> Array:
    def one(key: Array) -> Array:
        w = jax.random.rademacher(key, (operator.size,), operator.dtype)
        return w * operator.mv(w)

    return jax.lax.map(one, keys, batch_size=chunk)
