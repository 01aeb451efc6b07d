"""What an estimator of local dimension returns, and what the estimators share."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmem.diffusion import Schedule, refuse_whole_numbers
from jaxmem.jacobian import check_score
from jaxmem.parameters import widened
from jaxmem.score import Score


class Dimension(NamedTuple):
    """A local intrinsic dimension, what it is known to, and what it took."""

    value: float
    standard_error: float  #: of the estimate beside the estimator's own limit: 0 where nothing is drawn at random
    interval: tuple[float, float]  #: 95 %, of what ``standard_error`` is of
    num_products: int  #: with the Jacobian of the score
    num_evaluations: int  #: of the score


def scaled(score: Score, schedule: Schedule, x: Any, t: Any) -> tuple[Array, float, float]:
    """``αx``, and ``(alpha_t, sigma_t)`` of one timestep.

    Raises:
        ValueError: no timestep of the schedule, a schedule that is not the score's, or x of whole numbers.
    """
    own = getattr(score, "schedule", schedule)
    if own != schedule:
        raise ValueError(f"schedule: expected that of the score, {own}, got {schedule}")
    schedule.check(t)
    x = jnp.asarray(x)
    refuse_whole_numbers("x", x)
    alpha, sigma = float(schedule.alpha[int(t)]), float(schedule.sigma[int(t)])
    return alpha * x, alpha, sigma


def scores_around(
    score: Score, state: Any, centre: Array, sigma: float, t: Any, cond: Any, key: Any, number: int, batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Points ``centre + sigma noise`` as the score got them, and the scores there; float64, (number, d) each.

    Raises:
        ValueError: a score that does not fit the point, or is NaN or infinite; no key, or no batch.
    """
    if key is None:
        raise ValueError("key: expected a random key, got none; give jax.random.key(0)")
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    t = jnp.asarray(t, jnp.int32)
    check_score(score, state, centre, t, cond)
    keys = jax.random.split(key, number)
    found = _scores(score, state, centre, jnp.asarray(sigma, centre.dtype), t, cond, keys, min(batch, number))
    points, scores = (np.asarray(array, np.float64) for array in found)
    if not np.isfinite(scores).all():
        raise ValueError("score: a score holds NaN or infinity; check the parameters, the point and the timestep")
    return points, scores


@partial(jax.jit, static_argnames=("score", "batch"))
def _scores(
    score: Score, state: Any, centre: Array, sigma: Array, t: Array, cond: Any, keys: Array, batch: int
) -> tuple[Float[Array, "k d"], Float[Array, "k d"]]:
    state = widened(state, centre.dtype)

    def one(key: Array) -> tuple[Array, Array]:
        point = centre + sigma * jax.random.normal(key, centre.shape, centre.dtype)
        with jax.default_matmul_precision("highest"):
            found = score(state, point, t, cond)
        return point.reshape(-1), found.reshape(-1)

    return jax.lax.map(one, keys, batch_size=batch)
