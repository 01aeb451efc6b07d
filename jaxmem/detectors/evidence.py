"""Kinds of evidence that a detector can ask for: what its score is computed from, what that costs, when it is there.

A detector names one kind. An audit collects each kind once for all detectors, and calls each score with
the evidence of one point (a prompt from one starting noise), or of one prompt for `Images`.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from jaxmem.config.checks import at_least, whole_in_range

AuditMethod = Literal["eigh", "lanczos", "none"]
UNPAIRED = "a score without the prompt, which this model does not have"
MOST_PAIRS = 10  #: steps of `ScorePairs`: those that an audit records as one unit of work


class Setting(NamedTuple):
    """Shape of an audit: what it can give to its detectors."""

    timesteps: tuple[int, ...]  #: visited sampling steps, descending
    sampler_timesteps: tuple[int, ...] = ()  #: all steps of the sampler, also those that are not run
    spectral_timesteps: tuple[int, ...] = ()  #: some of ``timesteps``: where spectra or counts are taken
    method: AuditMethod = "none"  #: all eigenvalues, Ritz values, or no spectra
    num_eigenvalues: int = 0  #: of one spectrum
    spectrum_products: int = 0  #: Jacobian products of one spectrum
    count_products: int | None = None  #: Jacobian products of one count; None where no counts are taken
    estimates_counts: bool = False  #: whether these counts are estimates
    noises: int = 1  #: starting noises of each prompt
    has_pairs: bool = True  #: whether there is a score without the prompt beside the one with it
    with_images: bool = False  #: whether sampling goes to the end, where images are decoded
    image_sides: tuple[int, int] | None = None  #: height and width, None before the first image
    prediction: str = "eps"  #: what the network predicts
    at_images: bool = False  #: whether the points are noised images that are known, not those of a sampler
    image_pairs: bool = False  #: whether these are denoised without their captions, too

    @property
    def scores_per_step(self) -> int:
        """Evaluations of the network at one sampling step of one point."""
        return 2 if self.has_pairs else 1


class Cost(NamedTuple):
    """Work for one point, and the stage of the audit that does it."""

    sampling: int  #: evaluations of the network on the sampling trajectory
    evaluations: int = 0  #: other evaluations
    products: int = 0  #: products with a Jacobian
    stage: str = ""


@dataclass(frozen=True)
class Evidence:
    """A kind of evidence: what is missing of it in an audit, and what it costs there."""

    on_trajectory: ClassVar[bool] = True  #: whether a sampler visits all of its points anyway
    per_timestep: ClassVar[bool] = False  #: whether there is one at each timestep of spectra

    def at(self, setting: Setting) -> "Evidence":  # noqa: ARG002
        """The same with what the setting decides."""
        return self

    def missing(self, setting: Setting) -> str:
        """What it needs, and what an audit of this shape gives instead; empty where it is there."""
        raise NotImplementedError

    def cost(self, setting: Setting) -> Cost:
        """Work for one point."""
        raise NotImplementedError


@dataclass(frozen=True)
class EpsDifferences(Evidence):
    """``‖ε_c − ε_u‖₂`` at the first ``steps`` sampling steps, None for all: the score gets float64, (steps,)."""

    steps: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None:
            at_least("steps", self.steps, 1)

    def at(self, setting: Setting) -> "EpsDifferences":
        return replace(self, steps=self.steps or len(setting.timesteps))

    def missing(self, setting: Setting) -> str:
        return _missing_pairs(self.steps or 1, setting)

    def cost(self, setting: Setting) -> Cost:
        return Cost(2 * (self.steps or len(setting.timesteps)))

    def __str__(self) -> str:
        return f"norms of the score difference at {_steps(self.steps)}"


@dataclass(frozen=True)
class ScorePairs(Evidence):
    """Both scores at the first ``steps`` sampling steps, at most `MOST_PAIRS`: the score gets `Pairs`.

    The score is a JAX function of one point; the audit compiles and maps it, and keeps only the number.
    """

    steps: int = 1

    def __post_init__(self) -> None:
        whole_in_range("steps", self.steps, 1, MOST_PAIRS)

    def missing(self, setting: Setting) -> str:
        return _missing_pairs(self.steps, setting)

    def cost(self, setting: Setting) -> Cost:  # noqa: ARG002
        return Cost(2 * self.steps)

    def __str__(self) -> str:
        return f"both scores at {_steps(self.steps)}"


class Pairs(NamedTuple):
    """Scores of one point along its trajectory, the steps first; JAX arrays."""

    x: Any  #: (steps, *latent), from x_T on
    cond: Any  #: (steps, *latent), the score with the prompt
    uncond: Any  #: (steps, *latent), the score without
    sigma: Any  #: (steps,) noise levels

    @property
    def difference(self) -> Any:
        """``s_Δ = s_c − s_u``."""
        return self.cond - self.uncond


@dataclass(frozen=True)
class StartPairs(Evidence):
    """Both scores at the starting noise x_T, at its own timestep and at another one: the score gets `TwoPairs`.

    The second timestep is that of sampling step ``step``, negative from the end: x_T was not made for it, so it is
    off the trajectory. The score is a JAX function of one point; the audit compiles and maps it.
    """

    step: int = -3
    on_trajectory: ClassVar[bool] = False

    def timestep(self, setting: Setting) -> int:
        return setting.sampler_timesteps[self.step]

    def missing(self, setting: Setting) -> str:
        if not setting.has_pairs:
            return _missing_pairs(1, setting)
        fewest, there = -self.step if self.step < 0 else self.step + 1, len(setting.sampler_timesteps)
        return "" if there >= fewest else f"a sampler of at least {fewest} steps, got {there}"

    def cost(self, setting: Setting) -> Cost:  # noqa: ARG002
        return Cost(2, 2, 0, "start pairs")

    def __str__(self) -> str:
        return "both scores at the starting noise, at the first timestep and at a late one"


class TwoPairs(NamedTuple):
    """Scores of the starting noise of one point: two `jaxmem.ScorePair`."""

    first: Any  #: at (x_T, t₀)
    late: Any  #: at (x_T, t_late)
    sigma: Any  #: noise level of t₀


@dataclass(frozen=True)
class HessianProducts(Evidence):
    """Products of both Hessians with ``s_Δ`` at the first sampling step: the score gets `Products`."""

    def missing(self, setting: Setting) -> str:
        return _missing_pairs(1, setting)

    def cost(self, setting: Setting) -> Cost:  # noqa: ARG002
        return Cost(2, 2, 2, "products")

    def __str__(self) -> str:
        return "products of both Hessians with the score difference at the first step"


class Products(NamedTuple):
    """Vectors of one point, flat, float32."""

    cond: np.ndarray  #: (d,) ``H_c s_Δ``
    uncond: np.ndarray  #: (d,) ``H_u s_Δ``
    difference: np.ndarray  #: (d,) ``s_Δ``


@dataclass(frozen=True)
class Images(Evidence):
    """All generations of one prompt, at least ``fewest``: the score gets uint8, (m, h, w, 3), and returns (m,).

    ``multiple``: height and width have to be multiples of it.
    """

    fewest: int = 1
    multiple: int = 1

    def __post_init__(self) -> None:
        at_least("fewest", self.fewest, 1)
        at_least("multiple", self.multiple, 1)

    def missing(self, setting: Setting) -> str:
        if setting.noises < self.fewest:
            return f"{self.fewest} noises per prompt, got {setting.noises}"
        if not setting.with_images:
            return "images, so all steps of the sampler"
        if any(side % self.multiple for side in setting.image_sides or ()):
            return f"images with sides that are multiples of {self.multiple}, got {setting.image_sides}"
        return ""

    def cost(self, setting: Setting) -> Cost:
        return Cost(setting.scores_per_step * len(setting.timesteps), 0, 0, "images")

    def __str__(self) -> str:
        return f"generated images, {self.fewest} or more per prompt"


def _missing_pairs(fewest: int, setting: Setting) -> str:
    """What is missing of score pairs at the first sampling steps."""
    if not setting.has_pairs:
        return UNPAIRED
    there = len(setting.timesteps)
    return "" if there >= fewest else f"{fewest} sampling steps, got {there}"


def _steps(number: int | None) -> str:
    return "all sampling steps" if number is None else f"the first {f'{number} steps' if number > 1 else 'step'}"
