"""Sampling steps of an audit, by any sampler, from the scores that its detectors see."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxmem.detectors.published import eps_difference
from jaxmem.samplers import Sampler
from jaxmem.sampling import check_sampler
from jaxmem.score import ScorePair


class Step(NamedTuple):
    """One step of a batch."""

    x: Array  #: the next x_t
    eps_difference: Array  #: ‖eps_c − eps_u‖ per point
    difference: Array  #: s_c − s_u


@partial(jax.jit, static_argnames=("sampler", "guidance"))
def guided_step(
    sampler: Sampler, cond: Array, uncond: Array, x: Array, t: Array, scales: Array, sigma: Array, guidance: float
) -> Step:
    """One step of a batch under guidance, from the two scores at x."""

    def one(cond: Array, uncond: Array, x: Array) -> Step:
        pair = ScorePair(cond, uncond)
        then = step_from(sampler, pair.guided(guidance), x, t, scales)
        return Step(then, eps_difference(pair, sigma), pair.difference)

    return jax.vmap(one)(cond, uncond, x)


@partial(jax.jit, static_argnames="sampler")
def unguided_step(sampler: Sampler, scores: Array, x: Array, t: Array, scales: Array) -> Array:
    """One step of a batch with one score for each point, without guidance."""
    return jax.vmap(lambda score, x: step_from(sampler, score, x, t, scales))(scores, x)


def step_from(sampler: Sampler, score: Array, x: Array, t: Array, scales: Array) -> Array:
    """A step of one example whose score is there already.

    Raises:
        ValueError: the step asks for more than the score at its own x and t, or for a random key.
    """
    calls = 0

    def given(where: Array, when: Any) -> Array:
        nonlocal calls
        calls += 1
        if calls > 1 or where is not x or when is not t:
            raise ValueError("a step evaluates the score twice, or at another x or t than its own")
        return score

    return sampler.step(given, x, t, scales, None)


def require_steps(sampler: Sampler, shape: tuple[int, ...]) -> Sampler:
    """Refuse, before any work, a sampler whose steps `step_from` cannot make.

    Raises:
        ValueError: as `step_from`, or the sampler is none.
    """
    _, scales = check_sampler(sampler)
    x = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    t, row = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct(scales.shape[1:], jnp.float32)
    try:
        found = jax.eval_shape(partial(step_from, sampler), x, x, t, row)
    except ValueError as error:
        raise ValueError(
            f"sampler: expected one evaluation of the score in each step, at the x and t of this step, and no noise, as"
            f" an audit keeps just these scores, got {type(sampler).__name__}: {error}; give the model another"
        ) from error
    if (found.shape, found.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"sampler: expected a step to return an array like x, shape {x.shape} of {x.dtype}, got shape {found.shape}"
            f" of {found.dtype}"
        )
    return sampler
