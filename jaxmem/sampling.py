"""Samples of any score with any sampler: `sample`, its steps one by one (`sample_path`), and the sampler `DDIM`.

A sampler is an object with the three members of `Sampler`; a step is of one example, `sample` batches it by `jax.vmap`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxmem.diffusion import NoiseSchedule, refuse_whole_numbers
from jaxmem.jacobian import check_score
from jaxmem.score import Score, with_guidance

Spacing = Literal["leading", "trailing", "linspace"]


@runtime_checkable
class Sampler(Protocol):
    """What `sample` needs of a sampler. It must be hashable, for instance a frozen dataclass."""

    @property
    def timesteps(self) -> np.ndarray:
        """The visited timesteps in order, integers of shape (steps,): x_t at the k-th is what step k starts from."""
        ...

    def scales(self) -> np.ndarray:
        """The numbers that each step needs, one row per step: shape (steps, any)."""
        ...

    def step(self, score: Callable[[Array, Any], Array], x: Array, t: Any, scales: Array, key: Any) -> Array:
        """The next x of one example, shaped like x.

        ``score(x, t)`` is the score of this example, which may be evaluated more than once. ``scales`` is the row of
        this step, in the data type of x; ``t`` and ``scales`` are traced. ``key`` is a random key of this example and
        step, or None where `sample` got none: a sampler that draws noise raises a ValueError then.
        """
        ...


def ddim_step(
    score: Float[Array, "*shape"],
    x: Float[Array, "*shape"],
    now: tuple[Array, Array],
    then: tuple[Array, Array],
    clip: float | None = None,
) -> Float[Array, "*shape"]:
    """One deterministic step (eta = 0) from ``(alpha, sigma) = now`` to ``then``.

    ``x0 = (x - sigma eps) / alpha``, clipped to ``[-clip, clip]`` if asked; ``x' = alpha' x0 + sigma' eps`` with the
    unclipped eps, as diffusers does.
    """
    alpha, sigma = now
    eps = -sigma * score
    x0 = (x - sigma * eps) / alpha
    if clip is not None:
        x0 = jnp.clip(x0, -clip, clip)
    return then[0] * x0 + then[1] * eps


@dataclass(frozen=True)
class DDIM:
    """The DDIM sampler (Song et al. 2021a) with diffusers' timesteps; deterministic by default.

    ``spacing`` (Lin et al. 2024, Table 2; n is ``num_steps``): "leading" visits ``steps_offset + k (T // n)`` for k
    from n - 1 down to 0; "trailing" visits ``round(T - k T/n) - 1`` for k from 0 to n - 1, "linspace" n evenly spaced
    timesteps from T - 1 to 0, both whatever ``steps_offset`` is. Each step goes from t to ``t - T // n``, as in
    diffusers, which is not always the timestep that comes next: "linspace" is off by 0.4 on average with 50 steps of
    1,000, by 11 with 10. The last step goes to (alpha, sigma) = (1, 0) if ``final_alpha_one`` (diffusers'
    ``set_alpha_to_one``, its default), else to the table's first entry (Stable Diffusion, with ``steps_offset=1``).

    ``clip`` is for few steps: the noise stays that of the unclipped image, so that every step adds what clipping took
    away, and over 1,000 steps a sample can drift off into noise.

    ``eta`` (0 to 1) is the share of fresh noise (Song et al. 2021a, Equation 16): a step from (alpha, sigma) to
    (alpha', sigma') ends with ``alpha' x0 + sqrt(sigma'² - s²) eps + s z``, where z is standard normal noise and
    ``s = eta sigma'/sigma sqrt(1 - (alpha/alpha')²)``. 1 is the ancestral sampler of DDPM (Ho et al. 2020) with the
    variance of the posterior (``fixed_small``). Above 0 `sample` needs a key.
    """

    schedule: NoiseSchedule
    num_steps: int = 50
    steps_offset: int = 0
    final_alpha_one: bool = True
    clip: float | None = None
    spacing: Spacing = "leading"
    eta: float = 0.0

    def __post_init__(self) -> None:
        size = self.schedule.num_timesteps
        if self.spacing not in get_args(Spacing):
            raise ValueError(f"spacing: expected one of {get_args(Spacing)}, got {self.spacing!r}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip: expected a positive number or None, got {self.clip}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta: expected 0 (deterministic) to 1 (ancestral), got {self.eta}")
        if not 1 <= self.num_steps <= size:
            raise ValueError(f"num_steps: expected 1 to {size} (the schedule's length), got {self.num_steps}")
        last = (self.num_steps - 1) * (size // self.num_steps) + self.steps_offset
        if self.spacing == "leading" and (self.steps_offset < 0 or last >= size):
            raise ValueError(
                f"steps_offset: the first timestep would be {last}, outside the schedule's 0 to {size - 1};"
                f" got steps_offset={self.steps_offset} with num_steps={self.num_steps}"
            )

    @cached_property
    def timesteps(self) -> np.ndarray:
        """The visited timesteps, descending, shape (num_steps,)."""
        size, steps = self.schedule.num_timesteps, self.num_steps
        if self.spacing == "trailing":
            # For some numbers of steps rounding gives diffusers one timestep more, -1, which is none.
            return np.round(np.arange(size, 0, -size / steps)[:steps]).astype(int) - 1
        if self.spacing == "linspace":
            return np.linspace(0, size - 1, steps).round().astype(int)[::-1]
        return np.arange(steps)[::-1] * (size // steps) + self.steps_offset

    def nearest(self, timesteps: Sequence[int]) -> list[int]:
        """For each timestep the nearest one this sampler visits."""
        return _nearest(self.timesteps, timesteps)

    def scales(self) -> np.ndarray:
        """Rows ``(alpha, sigma, alpha', sigma')`` of each step, shape (num_steps, 4).

        With ``eta`` above 0 rows ``(alpha, sigma, alpha', sqrt(sigma'² - s²), s)``, shape (num_steps, 5).
        """
        alpha, sigma = self.schedule.alpha, self.schedule.sigma
        previous = self.timesteps - self.schedule.num_timesteps // self.num_steps
        end = (1.0, 0.0) if self.final_alpha_one else (alpha[0], sigma[0])
        then = np.where(previous[:, None] >= 0, np.stack([alpha[previous], sigma[previous]], 1), end)
        rows = np.column_stack([alpha[self.timesteps], sigma[self.timesteps], then])
        if not self.eta:
            return rows
        # In float64: where alpha or sigma is close to 1, a float32 difference would lose three digits.
        now, next_alpha, next_sigma = rows[:, :2], rows[:, 2], rows[:, 3]
        fresh = self.eta * next_sigma / now[:, 1] * np.sqrt(np.maximum(1 - (now[:, 0] / next_alpha) ** 2, 0))
        return np.column_stack([now, next_alpha, np.sqrt(np.maximum(next_sigma**2 - fresh**2, 0)), fresh])

    def step(self, score: Callable[[Array, Any], Array], x: Array, t: Any, scales: Array, key: Any) -> Array:
        """One step of one example, see `Sampler` and `ddim_step`.

        Raises:
            ValueError: a key is missing, with ``eta`` above 0.
        """
        if self.eta and key is None:
            raise ValueError(
                f"key: DDIM with eta={self.eta} draws noise; expected a random key, for instance jax.random.key(0),"
                f" got None"
            )
        then = ddim_step(score(x, t), x, (scales[0], scales[1]), (scales[2], scales[3]), self.clip)
        return then + scales[4] * jax.random.normal(key, x.shape, x.dtype) if self.eta else then


def _nearest(visited: np.ndarray, timesteps: Sequence[int]) -> list[int]:
    return [int(visited[np.abs(visited - t).argmin()]) for t in timesteps]


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


def _check_sampler(sampler: Any) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps and scales of a sampler; see `sample_path` for what is raised."""
    missing = [name for name in ("timesteps", "scales", "step") if not hasattr(sampler, name)]
    if missing:
        raise ValueError(
            f"sampler: expected `timesteps`, `scales` and `step` (see jaxmem.sampling.Sampler), got"
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
    timesteps, scales = _check_sampler(sampler)
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
        sampler: `DDIM`, or an object of your own with the members of `Sampler`.
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

    >>> from jaxmem.oracles import GaussianMixtureScore, gaussian
    >>> schedule, data = NoiseSchedule(), gaussian(jnp.ones(2), jnp.zeros((2, 1)), 0.25)
    >>> sampler, noise = DDIM(schedule, 50), jnp.zeros((4, 2))
    >>> x0, path = sample(GaussianMixtureScore(schedule), data, noise, sampler=sampler, keep=(500,))
    >>> x0.shape, list(path)
    ((4, 2), [500])
    """
    visited, _ = _check_sampler(sampler)
    wanted = set(np.asarray([*keep]).tolist())
    strangers = sorted(wanted - set(visited.tolist()))
    if strangers:
        raise ValueError(
            f"keep: expected timesteps that the sampler visits, {len(visited)} from {visited[0]} to {visited[-1]}, got"
            f" {strangers}; the nearest are {_nearest(visited, strangers)}"
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
