"""Statistics of one spectrum: how many directions are free, and how sharp the peak is.

All take eigenvalues with the spectrum as last axis and return one number per spectrum.
"""

from typing import Any

import numpy as np

PAPER_THRESHOLD = 1e-15  #: the paper, section 5.3: smaller eigenvalues are not counted as positive


def positive_count(eigenvalues: Any, threshold: Any = PAPER_THRESHOLD) -> Any:
    """``#{lambda > threshold}``, the paper's metric.

    At the paper's threshold, rounding in float32 can count zeros as positive; with ``threshold`` a spectrum's
    ``noise`` only certified ones are counted.
    """
    return (np.asarray(eigenvalues).real > np.asarray(threshold)[..., None]).sum(-1)


def tangent_count(eigenvalues: Any, sigma: Any) -> Any:
    """``#{lambda > -1/(2 sigma²)}``: directions in which the posterior of x_0 is wider than half the noise.

    On a linear manifold it counts the directions of variance v with ``alpha² v > sigma²``; on a memorized point it is
    0. Unlike the positive count it sees a general sample of a Gaussian, whose Hessian is negative definite.
    """
    return positive_count(eigenvalues, -0.5 / np.asarray(sigma, np.float64) ** 2)


def sum_of_largest(eigenvalues: Any, k: int) -> Any:
    """Sum of the k largest eigenvalues; NaN where fewer than k are there (not NaN)."""
    values = np.asarray(eigenvalues).real
    if not 1 <= k <= values.shape[-1]:
        raise ValueError(f"k: expected 1 to {values.shape[-1]} (the number of eigenvalues), got {k}")
    there = ~np.isnan(values)
    largest = np.sort(np.where(there, values, -np.inf), axis=-1)[..., -k:]
    return np.where(there.sum(-1) >= k, largest.sum(-1), np.nan)


def below_bound(eigenvalues: Any, sigma: Any, noise: Any = 0.0) -> Any:
    """Share of the eigenvalues below ``-1/sigma²`` by more than ``noise``: no true one is, the model is wrong there.

    ``Cov[x_0 | x_t] = (sigma²/alpha²)(I + sigma² H)`` is positive semi-definite. ``noise`` is a spectrum's.
    """
    values = np.asarray(eigenvalues).real
    bound = -1 / np.asarray(sigma, np.float64) ** 2 - np.asarray(noise)
    return (values < bound[..., None]).mean(-1)


def negative_trace_of_cube(eigenvalues: Any) -> Any:
    """``-tr H³ = -Σ lambda_i³``, which for a Gaussian is the mean of ``‖H s‖²`` (Jeon et al. 2025)."""
    return -(np.asarray(eigenvalues).real ** 3).sum(-1)
