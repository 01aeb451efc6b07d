"""Ritz values, residuals and vectors of a Krylov factorisation.

The small eigenproblem runs on the host in float64, whatever the device and the precision of the products: it is cheap,
accelerators have no non-symmetric eigensolver, and its own rounding then never matters.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmem.krylov import Factorization
from jaxmem.spectra.result import order_descending, rounding_noise


class Ritz(NamedTuple):
    """Ritz pairs of one factorisation, descending; k of them after k steps."""

    values: np.ndarray  #: (k,)
    residuals: np.ndarray  #: (k,), |h_{k+1,k}| |e_kᵀ y|
    coordinates: np.ndarray  #: (k, k), unit rows: the Ritz vectors in the Krylov basis
    orthogonality_loss: float  #: ‖Q Qᵀ - I‖₂


def ritz_pairs(factorization: Factorization, *, symmetric: bool) -> Ritz:
    """Solve the projected eigenproblem of one (unbatched) factorisation."""
    steps = int(factorization.num_steps)
    projected = np.asarray(factorization.hessenberg, np.float64)
    square = projected[:steps, :steps]
    if symmetric:
        values, coordinates = np.linalg.eigh((square + square.T) / 2)
    else:
        values, coordinates = np.linalg.eig(square)
        values, coordinates = values.astype(np.complex128), coordinates.astype(np.complex128)
    coupling = abs(projected[steps, steps - 1]) if steps else 0.0
    residuals = coupling * np.abs(coordinates[-1]) if steps else np.zeros(0)
    order = order_descending(values)
    basis = np.asarray(factorization.basis[:steps], np.float64)
    defect = np.linalg.norm(basis @ basis.T - np.eye(steps), 2) if steps else 0.0
    return Ritz(values[order], residuals[order], coordinates.T[order], float(defect))


def ritz_vectors(factorization: Factorization, pairs: Ritz) -> np.ndarray:
    """Unit Ritz vectors as rows, shape (k, d)."""
    basis = np.asarray(factorization.basis)[: len(pairs.values)]
    return pairs.coordinates.astype(np.result_type(basis.dtype, pairs.coordinates.dtype)) @ basis


class RitzTable(NamedTuple):
    """Ritz values of n factorisations, as arrays of m columns: NaN where a space closed before m steps."""

    values: np.ndarray  #: (n, m), descending
    residuals: np.ndarray  #: (n, m), at least ``noise``
    noise: np.ndarray  #: (n,), what rounding can have moved them by (see `rounding_noise`)


def ritz_table(factorizations: Factorization, product_noise: Any, *, symmetric: bool) -> RitzTable:
    """The Ritz values of n factorisations (the leading axis), given the measured noise (n,) of their products."""
    count, _, room = factorizations.hessenberg.shape
    values = np.full((count, room), np.nan, np.float64 if symmetric else np.complex128)
    residuals, noise = np.full((count, room), np.nan), np.zeros(count)
    for i, one in enumerate(unstacked(factorizations)):
        pairs = ritz_pairs(one, symmetric=symmetric)
        steps = len(pairs.values)
        noise[i] = float(rounding_noise(product_noise[i], steps, one.scale, pairs.orthogonality_loss))
        values[i, :steps] = pairs.values
        residuals[i, :steps] = np.maximum(pairs.residuals, noise[i])
    return RitzTable(values, residuals, noise)


def unstacked(factorizations: Factorization) -> Sequence[Factorization]:
    """N factorisations one by one, on the host."""
    factorizations = jax.device_get(factorizations)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], factorizations) for i in range(len(factorizations.num_steps))]
