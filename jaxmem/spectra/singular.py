"""Singular values of a rectangular map: the largest few, to a tolerance, with what they are known to."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmem.krylov import Status
from jaxmem.rectangular import Rectangular
from jaxmem.runs.progress import Progress, silent
from jaxmem.spectra.extreme import extreme_pairs
from jaxmem.spectra.measure import check_operator
from jaxmem.spectra.methods import Extreme


class SingularValues(NamedTuple):
    """The k largest singular values of a map A, descending, with their vectors as rows."""

    values: np.ndarray  #: (k,), float64
    left: np.ndarray  #: (k, d), unit vectors u
    right: np.ndarray  #: (k, n), unit vectors v
    residuals: np.ndarray  #: (k,) ``(‖A v - σ u‖² + ‖Aᵀ u - σ v‖²)^½``: a singular value is that near
    num_products: int  #: with A or Aᵀ
    status: Status  #: of the search: whether there is room for one that is larger and was not seen


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

    By thick-restart Lanczos of AᵀA or AAᵀ, the smaller one (`Rectangular.gram`): from one start vector that builds the
    spaces of Golub-Kahan bidiagonalisation, with the same products, and restarts, multiple values, folders and stopping
    are those of `jaxmem.Extreme`. Squares halve the digits of small values, so they are not taken from there: A is
    projected on the vectors that were found, for k products more, and its singular values computed in float64. Their
    residuals are measured, for k further ones.

    Args:
        operator: A, of shape (d, n), such as `condition_jacobian` makes.
        k: how many, at most the shorter side.
        max_products: most products with A or Aᵀ, all included; two for each step.
        key: random key of the start vector.
        rtol: the search ends where the squares are known to ``rtol σ₁²``, so the k-th value to about
            ``½ rtol σ₁²/σ_k``.
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
    gram = operator.gram
    check_operator(gram, "singular_values")
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    if not 1 <= k <= gram.size:
        raise ValueError(f"k: expected 1 to {gram.size} (the shorter side of {operator.shape}), got {k}")
    least = 2 * k + 8 * gram.products_per_mv
    if max_products < least:
        raise ValueError(f"max_products: expected at least {least} for {k} singular values, got {max_products}")
    method = Extreme(k, "largest", max_products=max_products - 2 * k, rtol=rtol)
    method.check_size(gram.size)
    found = extreme_pairs(gram, method, key=key, vectors=True, folder=folder, progress=progress)
    assert found.vectors is not None
    forward = operator.shape[0] >= operator.shape[1]  # the vectors are those of the shorter side
    basis = np.linalg.qr(np.asarray(found.vectors, np.float64).T)[0].T
    images = _products(operator, jnp.asarray(basis, operator.dtype), forward, chunk)
    # images = basis Aᵀ (rows), so A ≈ imagesᵀ basis on what was found.
    turn, values, others = np.linalg.svd(images, full_matrices=False)
    ours, others = turn.T @ basis, others
    back = _products(operator, jnp.asarray(others, operator.dtype), not forward, chunk)
    forth = turn.T @ images - values[:, None] * others
    residuals = np.sqrt(np.square(forth).sum(1) + np.square(back - values[:, None] * ours).sum(1))
    left, right = (others, ours) if forward else (ours, others)
    return SingularValues(values, left, right, residuals, found.num_products + 2 * len(values), found.status)


def _products(operator: Rectangular, rows: Float[Array, "k m"], forward: bool, chunk: int) -> np.ndarray:
    """``A v``, or ``Aᵀ v``, of each row, float64."""
    found = np.asarray(_mapped(operator, rows, forward, min(chunk, len(rows))), np.float64)
    if not np.isfinite(found).all():
        raise ValueError("operator: a product holds NaN or infinity; check the parameters, the point and the timestep")
    return found


@partial(jax.jit, static_argnames=("forward", "chunk"))
def _mapped(operator: Rectangular, rows: Array, forward: bool, chunk: int) -> Array:
    return jax.lax.map(operator.mv if forward else operator.rmv, rows, batch_size=chunk)
