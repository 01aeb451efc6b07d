"""Noise schedules, the parametrisations of a network's output, and deterministic DDIM sampling.

The forward process is ``x_t = alpha_t x_0 + sigma_t eps``. Timesteps are 0-based indices into the schedule's tables,
as in diffusers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

Prediction = Literal["eps", "v", "x0", "flow", "score"]
ScheduleKind = Literal["linear", "scaled_linear", "cosine"]
Spacing = Literal["leading", "trailing", "linspace"]

_LAST_ALPHA = 2.0**-12  # of a schedule without signal at its end: the root of diffusers' 2⁻²⁴


@dataclass(frozen=True)
class NoiseSchedule:
    """The signal and noise scales alpha_t, sigma_t with alpha_t² + sigma_t² = 1 (variance preserving).

    The tables follow from the betas: ``alpha_t² = prod_{s<=t} (1 - beta_s)``. ``linear`` spaces beta evenly (Ho et al.
    2020: 1e-4 to 0.02), ``scaled_linear`` spaces sqrt(beta) evenly (Stable Diffusion: 0.00085 to 0.012), ``cosine``
    takes them from cos² (Nichol and Dhariwal 2021, offset 0.008, beta at most 0.999) and ignores the two bounds.
    ``trained_betas``, one per timestep, replace all of that.

    ``zero_terminal_snr`` (Lin et al. 2024, Algorithm 1) shifts and scales alpha so that the first stays and the last is
    0. With 0 itself the last score would be ``-x`` whatever the network says, and no step could be made from it, so the
    last alpha is 2⁻¹², as in diffusers' Euler, DPM-Solver and UniPC.
    """

    kind: ScheduleKind = "linear"
    num_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    trained_betas: tuple[float, ...] = ()
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScheduleKind):
            raise ValueError(f"schedule kind: expected one of {get_args(ScheduleKind)}, got {self.kind!r}")
        if self.num_timesteps < 1:
            raise ValueError(f"num_timesteps: expected at least 1, got {self.num_timesteps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"betas: expected 0 < beta_start <= beta_end < 1, got {self.beta_start} and {self.beta_end}"
            )
        if self.trained_betas and len(self.trained_betas) != self.num_timesteps:
            raise ValueError(
                f"trained_betas: expected {self.num_timesteps} numbers (num_timesteps), got {len(self.trained_betas)}"
            )
        if not all(0 < beta < 1 for beta in self.trained_betas):
            raise ValueError(
                f"trained_betas: expected numbers between 0 and 1, got {min(self.trained_betas)} to"
                f" {max(self.trained_betas)}"
            )
        if self.zero_terminal_snr and self.num_timesteps < 2:
            raise ValueError("zero_terminal_snr: expected at least 2 timesteps, got 1")

    @classmethod
    def stable_diffusion(cls) -> "NoiseSchedule":
        """The table of Stable Diffusion 1.x and 2.x (its ``scheduler_config.json``)."""
        return cls("scaled_linear", 1000, 0.00085, 0.012)

    @cached_property
    def _betas(self) -> np.ndarray:
        if self.trained_betas:
            return np.asarray(self.trained_betas, np.float64)
        if self.kind == "linear":
            return np.linspace(self.beta_start, self.beta_end, self.num_timesteps)
        if self.kind == "scaled_linear":
            return np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_timesteps) ** 2
        knots = np.cos((np.arange(self.num_timesteps + 1) / self.num_timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - knots[1:] / knots[:-1], 0.999)

    @cached_property
    def betas(self) -> np.ndarray:
        """Noise added per timestep, ``1 - alpha_t² / alpha_{t-1}²``, float64, shape (num_timesteps,)."""
        if not self.zero_terminal_snr:
            return self._betas
        return -np.expm1(np.diff(self._log_alpha_squared, prepend=0.0))

    @cached_property
    def _log_alpha_squared(self) -> np.ndarray:
        # Sums of log1p keep sigma accurate where alpha² is within rounding of 1 (a float32 product loses 3 digits).
        table = np.cumsum(np.log1p(-self._betas))
        if self.zero_terminal_snr:
            alpha = np.exp(0.5 * table)
            shifted = (alpha[:-1] - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
            table = 2 * np.log(np.append(shifted, _LAST_ALPHA))
        return table

    @cached_property
    def alpha(self) -> np.ndarray:
        """Signal scale per timestep, float64, shape (num_timesteps,)."""
        return np.exp(0.5 * self._log_alpha_squared)

    @cached_property
    def sigma(self) -> np.ndarray:
        """Noise scale per timestep, float64, shape (num_timesteps,)."""
        return np.sqrt(-np.expm1(self._log_alpha_squared))

    def at(self, t: Any, dtype: Any = jnp.float32) -> tuple[Array, Array]:
        """``(alpha_t, sigma_t)`` as arrays of ``dtype``, shaped like ``t``; a traced t may be out of range unnoticed.

        Raises:
            ValueError: if t is no integer, or outside 0 to num_timesteps - 1.
        """
        self.check(t)
        return jnp.asarray(self.alpha, dtype)[t], jnp.asarray(self.sigma, dtype)[t]

    def check(self, t: Any) -> None:
        """Refuse what is not a timestep: JAX would round it, wrap it around or clamp it."""
        last = self.num_timesteps - 1
        if not jnp.issubdtype(jnp.result_type(t), jnp.integer):
            raise ValueError(f"t: expected an integer timestep, 0 to {last}, got {jnp.result_type(t)} {t}")
        if isinstance(t, jax.core.Tracer):
            return
        outside = np.asarray(t)[(np.asarray(t) < 0) | (np.asarray(t) > last)]
        if outside.size:
            raise ValueError(f"t: expected 0 to {last} (indices of the schedule's tables), got {outside[0]}")

    def add_noise(
        self, x0: Shaped[Array, "*shape"], eps: Float[Array, "*shape"], t: Int[Array, ""] | int
    ) -> Float[Array, "*shape"]:
        """``x_t = alpha_t x0 + sigma_t eps`` for one example.

        Raises:
            ValueError: if x0 is not floating point (alpha and sigma would be rounded to 0), or as `at`.
        """
        _refuse_whole_numbers("x0", x0)
        alpha, sigma = self.at(t, x0.dtype)
        return alpha * x0 + sigma * eps


def _refuse_whole_numbers(name: str, array: Any) -> None:
    if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
        raise ValueError(f"{name}: expected floating point, got {jnp.result_type(array)}; convert and scale it first")


def to_eps(prediction: Prediction, output: Any, x: Any, alpha: Any, sigma: Any) -> Any:
    """The noise estimate behind a network's output; ``prediction`` is one of `Prediction`.

    ``eps``: itself; ``v``: ``alpha v + sigma x``; ``x0``: ``(x - alpha x0) / sigma``; ``flow`` (the velocity of
    rectified flow, ``v = eps - x0``, on any schedule): ``(x + alpha v) / (alpha + sigma)``; ``score``: ``-sigma s``.

    Raises:
        ValueError: for an unknown prediction.
    """
    if prediction == "eps":
        return output
    if prediction == "v":
        return alpha * output + sigma * x
    if prediction == "x0":
        return (x - alpha * output) / sigma
    if prediction == "flow":
        return (x + alpha * output) / (alpha + sigma)
    if prediction == "score":
        return -sigma * output
    raise ValueError(f"prediction: expected one of {get_args(Prediction)}, got {prediction!r}")


def to_score(prediction: Prediction, output: Any, x: Any, alpha: Any, sigma: Any) -> Any:
    """The score ``s = -eps / sigma`` behind a network's output (see `to_eps`)."""
    if prediction == "score":
        return output
    return -to_eps(prediction, output, x, alpha, sigma) / sigma


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
    """The deterministic DDIM sampler (Song et al. 2021a) with diffusers' timesteps.

    ``spacing`` (Lin et al. 2024, Table 2; n is ``num_steps``): "leading" visits ``steps_offset + k (T // n)`` for k
    from n - 1 down to 0; "trailing" visits ``round(T - k T/n) - 1`` for k from 0 to n - 1, "linspace" n evenly spaced
    timesteps from T - 1 to 0, both whatever ``steps_offset`` is. Each step goes from t to ``t - T // n``, as in
    diffusers, which is not always the timestep that comes next: "linspace" is off by 0.4 on average with 50 steps of
    1,000, by 11 with 10. The last step goes to (alpha, sigma) = (1, 0) if ``final_alpha_one`` (diffusers'
    ``set_alpha_to_one``, its default), else to the table's first entry (Stable Diffusion, with ``steps_offset=1``).

    ``clip`` is for few steps: the noise stays that of the unclipped image, so that every step adds what clipping took
    away, and over 1,000 steps a sample can drift off into noise.
    """

    schedule: NoiseSchedule
    num_steps: int = 50
    steps_offset: int = 0
    final_alpha_one: bool = True
    clip: float | None = None
    spacing: Spacing = "leading"

    def __post_init__(self) -> None:
        size = self.schedule.num_timesteps
        if self.spacing not in get_args(Spacing):
            raise ValueError(f"spacing: expected one of {get_args(Spacing)}, got {self.spacing!r}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip: expected a positive number or None, got {self.clip}")
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
        return [int(self.timesteps[np.abs(self.timesteps - t).argmin()]) for t in timesteps]

    def scales(self) -> np.ndarray:
        """Rows ``(alpha, sigma, alpha', sigma')`` of each step, shape (num_steps, 4)."""
        alpha, sigma = self.schedule.alpha, self.schedule.sigma
        previous = self.timesteps - self.schedule.num_timesteps // self.num_steps
        end = (1.0, 0.0) if self.final_alpha_one else (alpha[0], sigma[0])
        then = np.where(previous[:, None] >= 0, np.stack([alpha[previous], sigma[previous]], 1), end)
        return np.column_stack([alpha[self.timesteps], sigma[self.timesteps], then])


@partial(jax.jit, static_argnames=("score", "clip"))
def _batched_step(score: Any, state: Any, x: Array, t: Array, cond: Any, scales: Array, clip: float | None) -> Array:
    def one(x: Array, cond: Any) -> Array:
        return ddim_step(score(state, x, t, cond), x, (scales[0], scales[1]), (scales[2], scales[3]), clip)

    return jax.vmap(one)(x, cond)


def ddim_path(
    sampler: DDIM, score: Any, state: Any, noise: Shaped[Array, " n *shape"], cond: Any = None, *, first: int = 0
) -> Iterator[tuple[int, Float[Array, " n *shape"]]]:
    """Yield ``(t, x_t)`` before each step and ``(-1, x_0)`` at the end, for a batch of starting noises.

    ``cond`` is any pytree whose leaves have the batch as leading axis, or None. The loop runs in Python, so the caller
    keeps what it wants and can show progress; one compiled step serves every timestep. With ``first`` steps already
    done, ``noise`` is the x_t they ended at.
    """
    _refuse_whole_numbers("noise", noise)
    x = noise
    for t, scales in zip(sampler.timesteps[first:], sampler.scales()[first:], strict=True):
        yield int(t), x
        x = _batched_step(score, state, x, jnp.asarray(t, jnp.int32), cond, jnp.asarray(scales, x.dtype), sampler.clip)
    yield -1, x


def sample_ddim(
    sampler: DDIM,
    score: Any,
    state: Any,
    noise: Shaped[Array, " n *shape"],
    cond: Any = None,
    keep: Sequence[int] = (),
) -> tuple[Float[Array, " n *shape"], dict[int, Float[Array, " n *shape"]]]:
    """Sample a batch and return ``(x_0, {t: x_t for t in keep})``.

    Raises:
        ValueError: if ``keep`` names a timestep that the sampler does not visit.
    """
    strangers = sorted(set(keep) - set(sampler.timesteps.tolist()))
    if strangers:
        raise ValueError(
            f"keep: {strangers} are not among the {sampler.num_steps} timesteps of this sampler"
            f" ({sampler.timesteps[0]} down to {sampler.timesteps[-1]}); use sampler.nearest(...) to snap to them"
        )
    kept, x = {}, noise
    for t, x in ddim_path(sampler, score, state, noise, cond):
        if t in keep:
            kept[t] = x
    return x, kept
