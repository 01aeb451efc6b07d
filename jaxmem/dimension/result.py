"""What an estimator of local dimension returns, and what the estimators share."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmem.diffusion import Schedule
from jaxmem.jacobian import check_score
from jaxmem.score import Score


class Dimension(NamedTuple):
    """A local intrinsic dimension, what it is known to, and what it took."""

    value: float
    standard_error: float  #: of the estimate beside the estimator's own limit: 0 where nothing is drawn at random
    interval: tuple[float, float]  #: 95 %, of what ``standard_error`` is of
    num_products: int  #: with the Jacobian of the score
    num_evaluations: int  #: of the score


def scales(schedule: Schedule, t: Any) -> tuple[float, float]:
    """``(alpha_t, sigma_t)`` of one timestep.

    Raises:
        ValueError: no timestep of the schedule.
    """
    schedule.check(t)
    return float(schedule.alpha[int(t)]), float(schedule.sigma[int(t)])


def scores_around(
    score: Score, state: Any, centre: Any, sigma: float, t: Any, cond: Any, key: Any, number: int, batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Standard normal noises, (number, d), and the scores at ``centre + sigma noise``, (number, d).

    Raises:
        ValueError: a score that does not fit the point, or is NaN or infinite; no key, or no batch.
    """
    if key is None:
        raise ValueError("key: expected a random key, got none; give jax.random.key(0)")
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    centre = jnp.asarray(centre)
    t = jnp.asarray(t, jnp.int32)
    check_score(score, state, centre, t, cond)
    keys = jax.random.split(key, number)
    noise, scores = _scores(score, state, centre, jnp.asarray(sigma, centre.dtype), t, cond, keys, min(batch, number))
    if not np.isfinite(scores).all():
        raise ValueError("score: a score holds NaN or infinity; check the parameters, the point and the timestep")
    return np.asarray(noise, np.float64), np.asarray(scores, np.float64)


@partial(jax.jit, static_argnames=("score", "batch"))
def _scores(
    score: Score, state: Any, centre: Array, sigma: Array, t: Array, cond: Any, keys: Array, batch: int
) -> tuple[Float[Array, "k d"], Float[Array, "k d"]]:
    def one(key: Array) -> tuple[Array, Array]:
        noise = jax.random.normal(key, centre.shape, centre.dtype)
        with jax.default_matmul_precision("highest"):
            found = score(state, centre + sigma * noise, t, cond)
        return noise.reshape(-1), found.reshape(-1)

    return jax.lax.map(one, keys, batch_size=batch)
