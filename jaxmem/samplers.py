"""Samplers: `DDIM` of a `NoiseSchedule`, and `FlowEuler` of rectified flow. `jaxmem.sampling` runs them.

A sampler is an object with the three members of `Sampler`; a step is of one example, `jaxmem.sample` batches it by
`jax.vmap`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmem.diffusion import FlowSchedule, NoiseSchedule, to_output

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
        if not isinstance(self.schedule, NoiseSchedule):
            raise ValueError(
                f"schedule: expected a NoiseSchedule, got {type(self.schedule).__name__}; of a FlowSchedule take the"
                f" sampler FlowEuler"
            )
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
        return nearest(self.timesteps, timesteps)

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


@dataclass(frozen=True)
class FlowEuler:
    """Euler's method along rectified flow, as diffusers' ``FlowMatchEulerDiscreteScheduler``; deterministic.

    A step from sigma to sigma' is ``x' = x + (sigma' - sigma) v``, where v is the velocity behind the score at the
    nearest timestep of `FlowSchedule`, at most 5e-7 away; the last step goes to 0.

    ``sigmas`` are those that the steps start from, descending: of diffusers, ``scheduler.sigmas[:-1].tolist()`` after
    ``set_timesteps``, whatever shift they were made with. `spaced` makes the usual ones.

    Where alpha is its floor, 2⁻¹², the velocity is known to 2⁻¹² of x in float32, as the score hardly depends on it:
    the step is still exact to ``(sigma - sigma') 2⁻¹²``.
    """

    sigmas: Sequence[float]

    def __post_init__(self) -> None:
        sigmas = tuple(float(sigma) for sigma in self.sigmas)
        object.__setattr__(self, "sigmas", sigmas)
        inside = bool(sigmas) and all(0 < sigma <= 1 for sigma in sigmas)
        if not inside or self.timesteps[-1] < 1 or (np.diff(self.timesteps) >= 0).any():
            raise ValueError(
                f"sigmas: expected descending numbers, at most 1 and above 0, that differ in millionths, got"
                f" {_shortened(sigmas)}; the step to 0 is the last one by itself, so leave a trailing 0 out"
            )

    @classmethod
    def spaced(cls, num_steps: int, shift: float = 1.0, last: float | None = None) -> "FlowEuler":
        """Sigmas evenly spaced from 1 to ``last``, then shifted: ``shift sigma / (1 + (shift - 1) sigma)``.

        The shift is that of Esser et al. 2024, Equation 23; more than 1 spends more steps where there is more noise.
        ``last`` is before the shift. By default it is ``1 / num_steps``, as in diffusers' pipelines of FLUX, whose
        dynamic shift ``mu`` is ``shift = exp(mu)``. SD 3's has ``shift=3``, and ``last`` the shifted 1/1000, 3/1002.

        Raises:
            ValueError: fewer than one step, a shift that is not positive, or sigmas that are too close.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps: expected at least 1, got {num_steps}")
        if not 0 < shift < np.inf:
            raise ValueError(f"shift: expected a positive number, 1 for none, got {shift}")
        even = np.linspace(1, 1 / num_steps if last is None else last, num_steps)
        return cls((shift * even / (1 + (shift - 1) * even)).tolist())

    @cached_property
    def timesteps(self) -> np.ndarray:
        """The visited timesteps of `FlowSchedule`, millionths of sigma, descending, shape (steps,)."""
        return np.round(1e6 * np.asarray(self.sigmas, np.float64)).astype(int)

    def nearest(self, timesteps: Sequence[int]) -> list[int]:
        """For each timestep the nearest one this sampler visits."""
        return nearest(self.timesteps, timesteps)

    def scales(self) -> np.ndarray:
        """Rows ``(alpha, sigma, sigma' - sigma)`` of each step, the first two the schedule's; shape (steps, 3)."""
        sigmas = np.asarray(self.sigmas, np.float64)
        return np.column_stack([_FLOW.alpha[self.timesteps], _FLOW.sigma[self.timesteps], np.diff(sigmas, append=0.0)])

    def step(self, score: Callable[[Array, Any], Array], x: Array, t: Any, scales: Array, key: Any) -> Array:  # noqa: ARG002
        """One step of one example, see `Sampler`."""
        alpha, sigma, change = scales
        return x + change * to_output("flow", score(x, t), x, alpha, sigma)


_FLOW = FlowSchedule()  # its tables, made once


def nearest(visited: np.ndarray, timesteps: Sequence[int]) -> list[int]:
    """For each timestep the nearest of those that are visited."""
    return [int(visited[np.abs(visited - t).argmin()]) for t in timesteps]


def _shortened(numbers: tuple[float, ...]) -> str:
    shown = ", ".join(f"{number:g}" for number in (numbers if len(numbers) <= 6 else (*numbers[:3], *numbers[-3:])))
    return f"{len(numbers)} of them, {shown}" if len(numbers) > 6 else f"({shown})"
