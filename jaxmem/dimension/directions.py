"""Dimension from the directions of scores around a point."""

from typing import Any

import numpy as np

from jaxmem.diffusion import Schedule
from jaxmem.dimension.result import Dimension, scaled, scores_around
from jaxmem.memorization.sharpness import Gap, values_before_gap
from jaxmem.runs import memory
from jaxmem.score import Score

SCORES_PER_DIMENSION = 4  #: of the normal bundle, as published and as released


def normal_bundle(
    score: Score,
    state: Any,
    x: Any,
    t: Any,
    cond: Any = None,
    *,
    schedule: Schedule,
    key: Any = None,
    num_scores: int | None = None,
    centred: bool = True,
    gap: Gap = "difference",
    batch: int = 64,
) -> Dimension:
    """The normal bundle: D minus the number of singular values of scores around x that lie before the largest gap.

    Scores at small noise point back to the manifold, so K of them around one point, ``s(αx + σ ε_k)``, span the normal
    space: of their singular values ``D - k`` are large. The dimension is a whole number from 1 to D - 1: a point of
    dimension 0 has no gap that says so.

    As published (Stanczuk et al., "Your diffusion model secretly knows the dimension of the data manifold"), K = 4 D,
    the scores are centred and the gap is the largest difference. Another released code
    (`dgm_geometry`) does not centre and scales x as here; the first adds noise to an unscaled x.

    Args:
        score: the score function.
        state: its parameters.
        x: the clean point, of any shape.
        t: the timestep, small.
        cond: its condition.
        schedule: of the score.
        key: random key of the noises.
        num_scores: K, more than D; by default 4 D.
        centred: whether the mean of the scores is taken off.
        gap: largest difference of neighbouring singular values, or of their logarithms.
        batch: scores evaluated together.

    Raises:
        ValueError: as `jaxmem.score_jacobian`, no key, one dimension, too few scores, or too little memory.
    """
    centre, _, sigma = scaled(score, schedule, x, t)
    size = centre.size
    number = SCORES_PER_DIMENSION * size if num_scores is None else num_scores
    if size < 2 or number <= size:
        raise ValueError(
            f"x, num_scores: expected at least 2 values, and more scores than values, got {size} and {number}"
        )
    # As they come, in float64, centred, and a copy that LAPACK makes.
    memory.require(28 * number * size, f"{number:,} scores of {size:,} values", "take fewer `num_scores`", of_host=True)
    _, scores = scores_around(score, state, centre, sigma, t, cond, key, number, batch)
    if centred:
        scores = scores - scores.mean(0)
    value = float(size - values_before_gap(np.linalg.svd(scores, compute_uv=False), gap))
    return Dimension(value, 0.0, (value, value), 0, number)
