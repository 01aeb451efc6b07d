"""Statistics of one spectrum: how many directions are free, and how sharp the peak is.

All take eigenvalues with the spectrum as last axis and return one number per spectrum.
"""

from typing import Any, Literal

import numpy as np

Gap = Literal["difference", "log"]
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


def spectral_gap(eigenvalues: Any, *, gap: Gap = "difference") -> int:
    """The number of directions behind the largest gap in the spectrum of a Hessian, those along which it is flat.

    On data of dimension k, ``D - k`` eigenvalues at a small noise are near ``-1/σ²`` and k near 0; the largest gap of
    ``|λ|`` in descending order divides them (Ventura et al., "Manifolds, random matrices and spectral gaps", 2024, who
    take singular values of the Jacobian and have released no code). 1 to D - 1, as `normal_bundle`.

    Args:
        eigenvalues: all of one spectrum, at least two.
        gap: largest difference of neighbouring values, or of their logarithms.

    Raises:
        ValueError: fewer than two eigenvalues, or NaN among them.
    """
    sizes = np.abs(np.asarray(eigenvalues))
    if sizes.ndim != 1 or len(sizes) < 2 or not np.isfinite(sizes).all():
        bad = f"shape {sizes.shape}" if np.isfinite(sizes).all() else "NaN or infinity among them"
        raise ValueError(f"eigenvalues: expected all of one spectrum, two or more numbers, got {bad}")
    sizes = np.sort(sizes)[::-1]
    return len(sizes) - values_before_gap(sizes, gap)


def values_before_gap(descending: np.ndarray, gap: str) -> int:
    """How many of these values are before the largest gap; the smallest number a float has stands for zeros."""
    if gap not in ("difference", "log"):
        raise ValueError(f"gap: expected difference or log, got {gap!r}")
    values = np.log(np.maximum(descending, np.finfo(np.float64).tiny)) if gap == "log" else descending
    return int(np.argmax(values[:-1] - values[1:])) + 1
