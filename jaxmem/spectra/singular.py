"""Singular values of a rectangular map: the largest few, to a tolerance, with what they are known to."""

from functools import partial
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmem.krylov import Status
from jaxmem.rectangular import Augmented, Rectangular
from jaxmem.runs.progress import Progress, silent
from jaxmem.spectra.extreme import extreme_pairs
from jaxmem.spectra.measure import check_operator
from jaxmem.spectra.methods import Extreme


class SingularValues(NamedTuple):
    """The k largest singular values of a map A, descending, with their vectors as rows."""

    values: np.ndarray  #: (k,), float64
    left: np.ndarray  #: (k, d), unit vectors u
    right: np.ndarray  #: (k, n), unit vectors v
    residuals: np.ndarray  #: (k,) ``(‖A v - σ u‖² + ‖Aᵀ u - σ v‖²)^½``, measured: a singular value is that near
    num_products: int  #: with A or Aᵀ
    status: Status  #: of the search, as for `Extreme`; ROUNDING where a residual is above ``rtol σ₁`` after all


def singular_values(
    operator: Rectangular,
    k: int,
    *,
    max_products: int,
    key: Any,
    rtol: float = 1e-4,
    chunk: int = 56,
    folder: str | Path | None = None,
    progress: Progress = silent,
) -> SingularValues:
    """The k largest singular values and vectors of a map such as ∂s/∂c.

    By thick-restart Lanczos of ``[[0, A], [Aᵀ, 0]]`` (`jaxmem.rectangular.Augmented`), whose largest eigenvalues they
    are: nothing is squared, and restarts, multiple values, folders and stopping are those of `jaxmem.Extreme`. The
    start vector has both halves, so this takes twice the products of Golub-Kahan bidiagonalisation, where one is zero.

    A is then projected on the vectors that were found, for k products more, and its singular values there are computed
    in float64; 2 k further products measure the residuals.

    Args:
        operator: A, of shape (d, n), such as `condition_jacobian` makes.
        k: how many, at most the shorter side.
        max_products: most products with A or Aᵀ, all included; two for each step.
        key: random key of the start vector.
        rtol: of the largest value: what residuals are asked to come down to. A value that small or smaller may be
            wrong in every digit, whatever the status: ask for less.
        chunk: products taken together at the end.
        folder: where the search is kept after every segment; the same call goes on from there.
        progress: called with the products spent.

    Raises:
        ValueError: as `jaxmem.spectrum` with `Extreme`, or too few products for vectors and residuals.
        OSError: the folder cannot be written.
    """
    if not isinstance(operator, Rectangular):
        raise ValueError(
            f"operator: expected one that is rectangular, as of condition_jacobian, got {type(operator).__name__};"
            f" for a square operator take jaxmem.spectrum"
        )
    k = index(k)
    augmented, shorter = Augmented(operator), min(operator.shape)
    check_operator(augmented, "singular_values")
    if jnp.dtype(operator.dtype).itemsize < 4:
        raise ValueError(f"operator: expected float32 or float64, got {operator.dtype}, whose rounding hides residuals")
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    if not 1 <= k <= shorter:
        raise ValueError(f"k: expected 1 to {shorter} (the shorter side of {operator.shape}), got {k}")
    least = 5 * k + augmented.products_per_mv  # k steps of two, one that measures rounding, three for each vector
    if max_products < least:
        raise ValueError(f"max_products: expected at least {least} for {k} singular values, got {max_products}")
    method = Extreme(k, "largest", max_products=max_products - 3 * k, rtol=rtol / 2)  # of (u, v)/√2
    found = extreme_pairs(augmented, method, key=key, vectors=True, folder=folder, progress=progress)
    rows, tall = operator.shape[0], operator.shape[0] >= operator.shape[1]
    halves = np.asarray(found.vectors, np.float64)
    # Of the shorter side, which has room for k vectors that are orthogonal, also where values are zero.
    basis = np.linalg.qr((halves[:, rows:] if tall else halves[:, :rows]).T)[0].T
    turn, values, others = np.linalg.svd(_products(operator, basis, tall, chunk), full_matrices=False)
    ours = turn.T @ basis
    forth = _products(operator, ours, tall, chunk) - values[:, None] * others
    back = _products(operator, others, not tall, chunk) - values[:, None] * ours
    residuals = np.sqrt(np.square(forth).sum(1) + np.square(back).sum(1))
    status = found.status
    if status in (Status.CONVERGED, Status.INVARIANT) and (residuals > rtol * values[0]).any():
        status = Status.ROUNDING
    left, right = (others, ours) if tall else (ours, others)
    return SingularValues(values, left, right, residuals, found.num_products + 3 * len(values), status)


def _products(operator: Rectangular, rows: np.ndarray, forward: bool, chunk: int) -> np.ndarray:
    """``A v``, or ``Aᵀ v``, of each row, float64."""
    vectors = jnp.asarray(rows, operator.dtype)
    found = np.asarray(_mapped(operator, vectors, forward, min(chunk, len(rows))), np.float64)
    if not np.isfinite(found).all():
        raise ValueError("operator: a product holds NaN or infinity; check the parameters, the point and the timestep")
    return found


@partial(jax.jit, static_argnames=("forward", "chunk"))
def _mapped(operator: Rectangular, rows: Float[Array, "k m"], forward: bool, chunk: int) -> Array:
    return jax.lax.map(operator.mv if forward else operator.rmv, rows, batch_size=chunk)
