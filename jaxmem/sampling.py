"""Samples of any score with any sampler (`jaxmem.samplers`): `sample`, and its steps one by one (`sample_path`)."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxmem.diffusion import refuse_whole_numbers
from jaxmem.jacobian import check_score
from jaxmem.samplers import Sampler, nearest
from jaxmem.score import Score, with_guidance


@partial(jax.jit, static_argnames=("score", "sampler"))
def _batched_step(
    score: Score, sampler: Sampler, state: Any, x: Array, t: Array, cond: Any, scales: Array, keys: Any
) -> Array:
    def one(x: Array, cond: Any, key: Any) -> Array:
        check_score(score, state, x, t, cond)
        then = sampler.step(lambda x, t: score(state, x, t, cond), x, t, scales, key)
        if then.shape != x.shape or then.dtype != x.dtype:
            raise ValueError(
                f"sampler: expected a step to return an array like x, shape {x.shape} of {x.dtype}, got shape"
                f" {then.shape} of {then.dtype}"
            )
        return then

    return jax.vmap(one)(x, cond, keys)


def check_sampler(sampler: Any) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps and scales of a sampler; see `sample_path` for what is raised."""
    missing = [name for name in ("timesteps", "scales", "step") if not hasattr(sampler, name)]
    if missing:
        raise ValueError(
            f"sampler: expected `timesteps`, `scales` and `step` (see jaxmem.samplers.Sampler), got"
            f" {type(sampler).__name__} without {', '.join(missing)}"
        )
    try:
        hash(sampler)
    except TypeError as error:
        raise ValueError(f"sampler: expected a hashable object, for instance a frozen dataclass; {error}") from error
    timesteps, scales = np.asarray(sampler.timesteps), np.asarray(sampler.scales())
    whole = timesteps.ndim == 1 and timesteps.size and np.issubdtype(timesteps.dtype, np.integer)
    if not whole or len(np.unique(timesteps)) < len(timesteps):
        raise ValueError(f"sampler: expected distinct whole numbers as timesteps, one per step, got {timesteps}")
    if scales.ndim != 2 or len(scales) != len(timesteps):
        raise ValueError(
            f"sampler: expected scales of shape ({len(timesteps)}, any), one row per timestep, got {scales.shape}"
        )
    return timesteps, scales


def sample_path(
    score: Score,
    state: Any,
    noise: Shaped[Array, " n *shape"],
    cond: Any = None,
    *,
    sampler: Sampler,
    key: Any = None,
    first: int = 0,
) -> Iterator[tuple[int, Float[Array, " n *shape"]]]:
    """Yield ``(t, x_t)`` before each step and ``(-1, x_0)`` at the end, for a batch of starting noises.

    The loop runs in Python, so the caller keeps what it wants and can show progress; one compiled step serves every
    timestep. With ``first`` steps already done, ``noise`` is the x_t they ended at. The other arguments are those of
    `sample`, without guidance: for that see `jaxmem.score.with_guidance`.

    Raises:
        ValueError: as `sample`, when the first step is asked for.
    """
    refuse_whole_numbers("noise", noise)
    timesteps, scales = check_sampler(sampler)
    rows = [jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(cond)]
    if any(leading != noise.shape[:1] for leading in rows):
        raise ValueError(f"cond: expected leaves with {len(noise)} rows, one per noise, got leading axes {rows}")
    x = noise
    for step in range(first, len(timesteps)):
        yield int(timesteps[step]), x
        t, row = jnp.asarray(timesteps[step], jnp.int32), jnp.asarray(scales[step], x.dtype)
        x = _batched_step(score, sampler, state, x, t, cond, row, _keys(key, step, len(x)))
    yield -1, x


def _keys(key: Any, step: int, count: int) -> Any:
    """A key for each example of a step: what an example draws depends neither on the others nor on where one resumes.

    None without a key.
    """
    if key is None:
        return None
    return jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, step)))(jnp.arange(count))


def sample(
    score: Score,
    state: Any,
    noise: Shaped[Array, " n *shape"],
    cond: Any = None,
    *,
    sampler: Sampler,
    guidance: float | None = None,
    uncond: Any = None,
    key: Any = None,
    keep: Iterable[int] = (),
) -> tuple[Float[Array, " n *shape"], dict[int, Float[Array, " n *shape"]]]:
    """Sample a batch and return ``(x_0, {t: x_t for t in keep})``.

    Args:
        score: the score function ``score(state, x, t, cond)`` of one example.
        state: its parameters.
        noise: starting points, usually standard normal, shape (n, ...).
        cond: None, or a pytree whose leaves have n as leading axis.
        sampler: `DDIM`, `FlowEuler`, or an object of your own with the members of `jaxmem.samplers.Sampler`.
        guidance: scale of classifier-free guidance, ``s(x, ∅) + guidance (s(x, c) - s(x, ∅))``; None for none. Memory
            is that of 2 n evaluations at once.
        uncond: with guidance, the condition ∅: a pytree like that of one example.
        key: random key of samplers that draw noise. The noise of an example depends on the key, the step, and its place
            in the batch alone.
        keep: timesteps of the sampler at which x_t is kept.

    Raises:
        ValueError: ``keep`` names a timestep that the sampler does not visit; noise of whole numbers; conditions that
            do not fit; ``uncond`` without guidance; a sampler that is none, or that needs a key and has none; a score
            whose output is not like x.

    >>> from jaxmem import DDIM, NoiseSchedule
    >>> from jaxmem.oracles import GaussianMixtureScore, gaussian
    >>> schedule, data = NoiseSchedule(), gaussian(jnp.ones(2), jnp.zeros((2, 1)), 0.25)
    >>> sampler, noise = DDIM(schedule, 50), jnp.zeros((4, 2))
    >>> x0, path = sample(GaussianMixtureScore(schedule), data, noise, sampler=sampler, keep=(500,))
    >>> x0.shape, list(path)
    ((4, 2), [500])
    """
    visited, _ = check_sampler(sampler)
    wanted = set(np.asarray([*keep]).tolist())
    strangers = sorted(wanted - set(visited.tolist()))
    if strangers:
        raise ValueError(
            f"keep: expected timesteps that the sampler visits, {len(visited)} from {visited[0]} to {visited[-1]}, got"
            f" {strangers}; the nearest are {nearest(visited, strangers)}"
        )
    if guidance is not None:
        score, cond = with_guidance(score, cond, guidance, uncond)
    elif uncond is not None:
        raise ValueError("uncond: expected None without guidance; give `guidance` as well, or leave `uncond` out")
    kept, x = {}, noise
    for t, x in sample_path(score, state, noise, cond, sampler=sampler, key=key):
        if t in wanted:
            kept[t] = x
    return x, kept
