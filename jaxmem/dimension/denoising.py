"""Dimension from the error of denoising: what a denoiser cannot take away is the noise along the manifold."""

from typing import Any

import numpy as np
import scipy.stats

from jaxmem.diffusion import Schedule, posterior_mean
from jaxmem.dimension.result import Dimension, scaled, scores_around
from jaxmem.score import Score

DRAWS = 256  #: noises by default; with 64 the interval of a dimension of 1 covers 92 %, a χ² being skewed


def denoising_dimension(
    score: Score,
    state: Any,
    x: Any,
    t: Any,
    cond: Any = None,
    *,
    schedule: Schedule,
    key: Any = None,
    draws: int = DRAWS,
    batch: int = 64,
) -> Dimension:
    """``(α/σ)² E ‖E[x_0 | αx + σε] - x‖²``, by forward passes alone.

    Of data on a manifold of dimension k the denoised point is off by the part of the noise along the manifold,
    ``(σ/α) P ε``, whose square has mean ``k (σ/α)²`` as σ → 0: the dimension of Wu and Verdú's minimum mean squared
    error, here around one point. While σ/α is not small it is too low where the data
    ends, and off where it curves.

    Args:
        score: the score function.
        state: its parameters.
        x: the clean point, of any shape.
        t: the timestep, small.
        cond: its condition.
        schedule: of the score.
        key: random key of the noises.
        draws: noises, two or more; the interval is Student's, from their spread.
        batch: scores evaluated together.

    Raises:
        ValueError: as `jaxmem.score_jacobian`, no key, or fewer than two draws.
    """
    if draws < 2:
        raise ValueError(f"draws: expected at least 2, got {draws}")
    centre, alpha, sigma = scaled(score, schedule, x, t)
    points, scores = scores_around(score, state, centre, sigma, t, cond, key, draws, batch)
    off = posterior_mean(scores, points, alpha, sigma) - np.asarray(centre, np.float64).reshape(-1) / alpha
    squares = (alpha / sigma) ** 2 * np.square(off).sum(1)
    value, error = float(squares.mean()), float(squares.std(ddof=1) / np.sqrt(draws))
    half = float(scipy.stats.t.ppf(0.975, draws - 1)) * error
    return Dimension(value, error, (value - half, value + half), 0, draws)
