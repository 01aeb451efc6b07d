"""Dimension from how fast the density grows as noise is taken away: FLIPD and FPRegress.

Of data on a manifold of dimension k in D, the density of the data with noise of deviation δ grows as ``δ^(k - D)`` at a
point of it, so ``k = D + d log ρ(x, δ) / d log δ``. The Fokker-Planck equation gives that slope from the score at one
noise level (Kamkari et al., NeurIPS 2024): with ``δ = σ/α``, ``d log ρ / d log δ = σ² (tr H(αx) + ‖s(αx)‖²)``.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.diffusion import Schedule
from jaxmem.dimension.result import Dimension, scaled
from jaxmem.jacobian import score_jacobian
from jaxmem.operators import Shifted
from jaxmem.score import Score
from jaxmem.spectra.traces import trace


def flipd(
    score: Score,
    state: Any,
    x: Any,
    t: Any,
    cond: Any = None,
    *,
    schedule: Schedule,
    max_products: int | None = None,
    key: Any = None,
    chunk: int = 56,
) -> Dimension:
    """FLIPD: ``D + σ² (tr H(αx) + ‖s(αx)‖²)``, at the clean point x, scaled and not noised.

    It is computed as ``tr (I + σ² H) + σ² ‖s‖²``, whose trace is about the dimension itself, so that an estimate errs
    by a part of that and not of D. It is off while σ/α is not small beside the curvature of the manifold, and of a
    network it can be anything, also negative: what stands for a derivative of its density is only that of its score.

    The released code takes a timestep of 1e-4 on a time axis that ends at 1, Gaussian probes above dimension 3,500, and
    for Stable Diffusion a linear schedule of betas, which that model does not have.

    Args:
        score: the score function (see `jaxmem.score`).
        state: its parameters.
        x: the clean point, of any shape.
        t: the timestep: small, but not below what the network resolves.
        cond: its condition.
        schedule: of the score.
        max_products: products of the trace (`jaxmem.trace`): exact by default up to dimension 4,096.
        key: random key, for an estimated trace.
        chunk: products taken together.

    Raises:
        ValueError: as `jaxmem.score_jacobian` and `jaxmem.trace`, or no timestep of the schedule.
    """
    point, _, sigma = scaled(score, schedule, x, t)
    jacobian = score_jacobian(score, state, point, t, cond)
    operator = Shifted(sigma**2 * jacobian, jnp.ones((), jacobian.dtype))
    found = trace(operator, max_products=max_products, key=key, chunk=chunk)
    norm = sigma**2 * float(np.sum(np.square(np.asarray(jacobian.value, np.float64))))
    low, high = found.interval
    return Dimension(found.value + norm, found.standard_error, (low + norm, high + norm), found.num_products, 1)


def fpregress(
    score: Score,
    state: Any,
    x: Any,
    timesteps: Sequence[int],
    cond: Any = None,
    *,
    schedule: Schedule,
    max_products: int | None = None,
    key: Any = None,
    chunk: int = 56,
) -> Dimension:
    """FPRegress: D plus the slope of ``log ρ(x, δ)`` against ``log δ``, by least squares over several noise levels.

    ``log ρ`` comes from Euler steps of its slope, ``flipd - D`` at each timestep but the last, from the smallest noise
    on, as published; the paper takes eight levels δ = σ/α from 0.01 to 0.1. Of two levels it is FLIPD at the first.

    Args:
        score: the score function.
        state: its parameters.
        x: the clean point, of any shape.
        timesteps: two or more, in any order.
        cond: its condition.
        schedule: of the score.
        max_products: products of the trace at each timestep.
        key: random key, for estimated traces.
        chunk: products taken together.

    Raises:
        ValueError: as `flipd`, or fewer than two different timesteps.
    """
    for t in timesteps:
        schedule.check(t)
    ratio = {int(t): float(schedule.sigma[int(t)] / schedule.alpha[int(t)]) for t in timesteps}
    steps = sorted(ratio, key=lambda t: ratio[t])
    if len(steps) < 2:
        raise ValueError(f"timesteps: expected two or more that differ, got {list(timesteps)}")
    keys = [None] * len(steps) if key is None else list(jax.random.split(key, len(steps)))
    options: dict[str, Any] = dict(schedule=schedule, max_products=max_products, chunk=chunk)
    # The slope at the last level would lead beyond it.
    found = [flipd(score, state, x, t, cond, key=k, **options) for t, k in zip(steps[:-1], keys, strict=False)]
    weights = _weights(np.log([ratio[t] for t in steps]))
    size = jnp.size(x)
    value = size + float(weights @ np.array([one.value - size for one in found]))
    error, half = (
        float(np.linalg.norm(weights * parts))
        for parts in ([one.standard_error for one in found], [one.interval[1] - one.value for one in found])
    )
    products, evaluations = sum(one.num_products for one in found), sum(one.num_evaluations for one in found)
    return Dimension(value, error, (value - half, value + half), products, evaluations)


def _weights(levels: np.ndarray) -> np.ndarray:
    """The weight of the slope at each level but the last: Euler's sums and least squares are linear."""
    steps = np.diff(levels)
    # log ρ at level k is the sum of slope_j · step_j for j < k, from 0 at the first.
    sums = np.tril(np.ones((len(levels), len(levels) - 1)), -1) * steps
    centred = levels - levels.mean()
    return np.asarray(centred @ sums / (centred @ centred))
