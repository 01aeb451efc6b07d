"""Noise schedules and the parametrisations of a network's output. Samplers are in `jaxmem.samplers`.

The forward process is ``x_t = alpha_t x_0 + sigma_t eps``. Timesteps are whole numbers, indices of a schedule's tables;
of a `NoiseSchedule` from 0 on, as in diffusers.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

Prediction = Literal["eps", "v", "x0", "flow", "score"]
ScheduleKind = Literal["linear", "scaled_linear", "cosine"]

_LAST_ALPHA = 2.0**-12  # of a schedule without signal at its end: the root of diffusers' 2⁻²⁴
_MILLION = 1_000_000


class Schedule(ABC):
    """The scales of a forward process: what scores, samplers and audits ask of a schedule.

    A subclass is a frozen dataclass: its fields are what a score is compared and hashed by, and what a run is known by.
    """

    num_timesteps: int
    first: ClassVar[int] = 0  #: the smallest timestep; they go on to ``first + num_timesteps - 1``
    unit: ClassVar[str] = ""  #: what timesteps count, in words; empty for indices of a table

    @property
    @abstractmethod
    def alpha(self) -> np.ndarray:
        """Signal scales, float64; the timestep is the index."""

    @property
    @abstractmethod
    def sigma(self) -> np.ndarray:
        """Noise scales, float64; the timestep is the index."""

    def at(self, t: Any, dtype: Any = jnp.float32) -> tuple[Array, Array]:
        """``(alpha_t, sigma_t)`` as arrays of ``dtype``, shaped like ``t``; a traced t may be out of range unnoticed.

        Raises:
            ValueError: if t is no integer, or no timestep of the schedule.
        """
        self.check(t)
        return jnp.asarray(self.alpha, dtype)[t], jnp.asarray(self.sigma, dtype)[t]

    def check(self, t: Any) -> None:
        """Refuse what is not a timestep: JAX would round it, wrap it around or clamp it."""
        first, last = self.first, self.first + self.num_timesteps - 1
        if not jnp.issubdtype(jnp.result_type(t), jnp.integer):
            raise ValueError(f"t: expected an integer timestep, {first} to {last}, got {jnp.result_type(t)} {t}")
        if isinstance(t, jax.core.Tracer | jax.ShapeDtypeStruct):
            return
        outside = np.asarray(t)[(np.asarray(t) < first) | (np.asarray(t) > last)]
        if outside.size:
            unit = self.unit or "indices of the schedule's tables"
            raise ValueError(f"t: expected {first} to {last} ({unit}), got {outside[0]}")

    def add_noise(
        self, x0: Shaped[Array, "*shape"], eps: Float[Array, "*shape"], t: Int[Array, ""] | int
    ) -> Float[Array, "*shape"]:
        """``x_t = alpha_t x0 + sigma_t eps`` for one example.

        Raises:
            ValueError: if x0 is not floating point (alpha and sigma would be rounded to 0), or as `at`.
        """
        refuse_whole_numbers("x0", x0)
        alpha, sigma = self.at(t, x0.dtype)
        return alpha * x0 + sigma * eps

    def usual_timestep(self, t: int) -> float:
        """Where t lies on the usual scale of 1,000 timesteps, which audits choose their default timesteps by.

        That is the timestep of Stable Diffusion's table with the same noise-to-signal ratio ``sigma_t / alpha_t``,
        between two of them by the logarithm, and 0 or 999 beyond its ends.

        Raises:
            ValueError: as `at`.
        """
        self.check(t)
        usual = NoiseSchedule.stable_diffusion()
        ratios = np.log(usual.sigma / usual.alpha)
        return float(np.interp(np.log(self.sigma[t] / self.alpha[t]), ratios, np.arange(len(ratios))))


@dataclass(frozen=True)
class NoiseSchedule(Schedule):
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

    def usual_timestep(self, t: int) -> float:
        """Where t lies on the usual scale of 1,000 timesteps: ``1000 t / num_timesteps``.

        Raises:
            ValueError: as `at`.
        """
        self.check(t)
        return float(t) * 1000 / self.num_timesteps


@dataclass(frozen=True)
class FlowSchedule(Schedule):
    """Rectified flow (Liu et al. 2023), as in SD 3 and FLUX: ``sigma = t / 1,000,000`` and ``alpha = 1 - sigma``.

    Timesteps are millionths of sigma, t = 1 to 1,000,000, so that any sigma of a sampler is met to 5e-7. What such a
    network is given as its time is sigma, or 1,000 sigma = t / 1,000. There is no t = 0: sigma would be 0.

    At the other end alpha is at least 2⁻¹²: with 0 the last score would be ``-x`` whatever the network says. A velocity
    ``v = eps - x_0`` and the score are one another by `to_score` and `to_output` with the prediction ``"flow"``.
    """

    kind: Literal["flow"] = field(default="flow", init=False)
    num_timesteps: int = field(default=_MILLION, init=False)
    first: ClassVar[int] = 1
    unit: ClassVar[str] = "millionths of sigma"

    @cached_property
    def alpha(self) -> np.ndarray:
        """Signal scale per timestep, float64, shape (1,000,001,); entry 0, the data themselves, is no timestep."""
        return np.maximum(np.arange(_MILLION, -1, -1) / _MILLION, _LAST_ALPHA)

    @cached_property
    def sigma(self) -> np.ndarray:
        """Noise scale per timestep, float64, shape (1,000,001,)."""
        return np.arange(_MILLION + 1) / _MILLION

    def at(self, t: Any, dtype: Any = jnp.float32) -> tuple[Array, Array]:
        """``(alpha_t, sigma_t)`` as arrays of ``dtype``, shaped like ``t``; a traced t may be out of range unnoticed.

        Raises:
            ValueError: if t is no integer, or no timestep of the schedule.
        """
        self.check(t)
        # Computed, as the tables would be megabytes of a compiled program; half precision does not hold a million.
        exact = jnp.promote_types(dtype, jnp.float32)
        millionths = jnp.asarray(t).astype(exact)
        alpha = jnp.maximum((_MILLION - millionths) / _MILLION, _LAST_ALPHA)
        return alpha.astype(dtype), (millionths / _MILLION).astype(dtype)


def refuse_whole_numbers(name: str, array: Any) -> None:
    """Refuse integers, which would round what is multiplied with them."""
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


def posterior_mean(score: Any, x: Any, alpha: Any, sigma: Any) -> Any:
    """Tweedie's formula, ``E[x_0 | x_t] = (x_t + sigma² s) / alpha``."""
    return (x + sigma**2 * score) / alpha


def to_output(prediction: Prediction, score: Any, x: Any, alpha: Any, sigma: Any) -> Any:
    """The network's output behind a score: the inverse of `to_score`.

    Raises:
        ValueError: for an unknown prediction.
    """
    eps = -sigma * score
    if prediction == "eps":
        return eps
    if prediction == "v":
        return (eps - sigma * x) / alpha
    if prediction == "x0":
        return (x - sigma * eps) / alpha
    if prediction == "flow":
        return ((alpha + sigma) * eps - x) / alpha
    if prediction == "score":
        return score
    raise ValueError(f"prediction: expected one of {get_args(Prediction)}, got {prediction!r}")
