"""What an audit will do, decided before it starts: points, batches, timesteps. It is part of the run's manifest."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxmem.audit.scale import DEFAULTS, LEAST_ALPHA, UsualScale
from jaxmem.config import AuditConfig
from jaxmem.detectors.evidence import AuditMethod, Setting

LARGEST_EXACT = 2048  #: dimensions up to which the whole spectrum is computed by default
_CHUNK = 64  # columns of an exact Jacobian taken together, of small latents
SEGMENT = 10  # sampling steps that are recorded together, which is what a kill can lose


class ModelFacts(NamedTuple):
    """Plain values of a `jaxmem.model.Model` that a plan depends on, so that a page loads no network."""

    shape: tuple[int, ...]
    timesteps: tuple[int, ...]  #: visited by the sampler, descending
    alpha: tuple[float, ...]  #: signal scales at these timesteps
    sigma: tuple[float, ...]  #: noise scales there
    usual_timesteps: tuple[float, ...]  #: their places on the usual scale, see `jaxmem.audit.scale`
    unit: str  #: of timesteps, see `jaxmem.diffusion.Schedule`
    has_pairs: bool
    guidance: float
    prediction: str

    @classmethod
    def of(cls, model: Any, sampler: Any) -> "ModelFacts":
        """What a plan depends on of a `jaxmem.model.Model` that is sampled by this sampler."""
        timesteps, schedule = tuple(sampler.timesteps.tolist()), model.schedule
        return cls(
            shape=tuple(model.shape),
            timesteps=timesteps,
            alpha=tuple(float(schedule.alpha[t]) for t in timesteps),
            sigma=tuple(float(schedule.sigma[t]) for t in timesteps),
            usual_timesteps=tuple(schedule.usual_timestep(t) for t in timesteps),
            unit=schedule.unit,
            has_pairs=model.has_pairs,
            guidance=model.guidance,
            prediction=model.prediction,
        )


@dataclass(frozen=True)
class Plan:
    """Plain values that decide what is computed, in which order and in which batches.

    Point p is prompt ``p // noises`` from starting noise ``first_noise + p % noises``; the reference prompts come after
    the audited ones. Batch b is the points ``b batch`` to ``(b + 1) batch - 1``.
    """

    num_prompts: int
    num_reference: int
    noises: int
    batch: int
    ddim_steps: int
    guidance: float
    timesteps: tuple[int, ...]  #: visited, descending
    sigma: tuple[float, ...]
    spectral_timesteps: tuple[int, ...]  #: descending, among ``timesteps``
    sampler_timesteps: tuple[int, ...]  #: all of the sampler's, also those that are not visited
    method: AuditMethod
    num_steps: int
    count_budget: int | None
    directions: int
    latent_shape: tuple[int, ...]  #: shape of one x
    prediction: str = "eps"  #: what the network predicts
    has_pairs: bool = True  #: each point has a score with its prompt and one without
    usual_timesteps: tuple[float, ...] = ()  #: of ``sampler_timesteps``; without, they are their own places
    unit: str = ""  #: of timesteps; empty for indices of a table
    first_noise: int = 0  #: number of noise 0 among those that the seed gives: others where a run is extended
    at_images: bool = False  #: points are noised images, `jaxmem.audit.training.look`, and "prompts" are these images
    image_pairs: bool = False  #: these are denoised without their captions, too

    @classmethod
    def of(
        cls, model: ModelFacts, config: AuditConfig, num_prompts: int, num_reference: int = 0, num_devices: int = 1
    ) -> "Plan":
        """Settle what the config leaves open; a batch is a multiple of the devices.

        Raises:
            ValueError: a timestep is not visited, or there are more Lanczos steps than dimensions, or a budget is too
                small for an estimate, or there is no prompt, or directions are asked for of one sample, or guidance
                of a model that has no pairs of scores.
        """
        if num_prompts < 1:
            raise ValueError("prompts: expected at least one, got none")
        size = int(np.prod(model.shape))
        method = _method(config, size)
        visited = model.timesteps
        run = visited[: config.steps_run]
        batch = config.batch or (16 if size <= LARGEST_EXACT else 1)
        batch = min(batch, (num_prompts + num_reference) * config.noises)
        two = num_prompts * config.noises > 1  # directions are of two samples, the most and the least memorized
        if config.directions and not two:
            raise ValueError(
                f"directions: expected 0 for one sample of one prompt, got {config.directions}: they compare two; add"
                f" `noises` or prompts"
            )
        directions = config.directions if config.directions is not None else 3 if method == "eigh" and two else 0
        wants_spectra = method != "none" or config.count_budget is not None
        guidance = model.guidance if config.guidance is None else config.guidance
        if guidance != 1 and not model.has_pairs:
            raise ValueError(
                f"guidance: expected 1, which is none, for a model without an unconditional score, got {guidance:g};"
                f" leave it out"
            )
        return cls(
            num_prompts=num_prompts,
            num_reference=num_reference,
            noises=config.noises,
            batch=-(-batch // num_devices) * num_devices,
            ddim_steps=config.ddim_steps,
            guidance=guidance,
            timesteps=run,
            sigma=model.sigma[: config.steps_run],
            spectral_timesteps=_spectral(config, model, run, method) if wants_spectra else _no_spectra(config),
            sampler_timesteps=visited,
            method=method,
            num_steps=config.num_steps,
            count_budget=config.count_budget,
            directions=min(directions, size, config.num_steps if method == "lanczos" else size),
            latent_shape=model.shape,
            prediction=model.prediction,
            has_pairs=model.has_pairs,
            usual_timesteps=model.usual_timesteps,
            unit=model.unit,
        )

    @classmethod
    def from_manifest(cls, values: Any) -> "Plan":
        """Read the plan of a run from its manifest."""
        try:
            plain: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
            }
            return cls(**plain)
        except (TypeError, AttributeError) as error:
            raise ValueError(
                f"manifest.json: expected the plan of an audit of this version of jaxmem, got another one ({error});"
                f" run the audit again"
            ) from None

    @property
    def scale(self) -> UsualScale:
        """Places of the sampler's timesteps on the usual scale."""
        return UsualScale(dict(zip(self.sampler_timesteps, self.usual_timesteps, strict=False)))

    @property
    def num_points(self) -> int:
        return (self.num_prompts + self.num_reference) * self.noises

    @property
    def size(self) -> int:
        return int(np.prod(self.latent_shape))

    @property
    def estimates_counts(self) -> bool:
        """Whether counts are estimates: their budget is too small for exact ones."""
        return self.count_budget is not None and self.count_budget <= self.size

    @property
    def columns(self) -> int:
        """Number of columns of an exact Jacobian taken together; for large points the size of a batch."""
        return min(_CHUNK, self.size) if self.size <= LARGEST_EXACT else self.batch

    @property
    def scores_per_step(self) -> int:
        """Number of score evaluations at one sampling step of one point: with the prompt, and without."""
        return 2 if self.has_pairs else 1

    @property
    def num_eigenvalues(self) -> int:
        """Number of eigenvalues, or Ritz values, in one spectrum; 0 without spectra."""
        return {"eigh": self.size, "lanczos": self.num_steps, "none": 0}[self.method]

    @property
    def products_per_spectrum(self) -> int:
        """Number of Jacobian products for one spectrum, measurements of rounding included."""
        return {"eigh": self.size + 1, "lanczos": 2 * self.num_steps + 3, "none": 0}[self.method]

    @property
    def products_per_count(self) -> int:
        """Largest number of Jacobian products for one count; 0 without counts."""
        return 0 if self.count_budget is None else min(self.count_budget, self.size + 1)

    @property
    def products_per_direction(self) -> int:
        """Number of Jacobian products for the eigenvectors of one point."""
        return self.size if self.method == "eigh" else self.products_per_spectrum

    @property
    def with_images(self) -> bool:
        """Whether sampling goes to the end, where images are decoded."""
        return len(self.timesteps) == len(self.sampler_timesteps) and not self.at_images

    @property
    def num_batches(self) -> int:
        return -(-self.num_points // self.batch)

    @property
    def segments(self) -> list[range]:
        """Ranges of sampling steps that are recorded together."""
        count = len(self.timesteps)
        return [range(first, min(first + SEGMENT, count)) for first in range(0, count, SEGMENT)]

    def setting(self, image_sides: tuple[int, int] | None = None) -> Setting:
        """Evidence that an audit of this plan has for detectors."""
        counted = self.count_budget is not None
        return Setting(
            timesteps=self.timesteps,
            sampler_timesteps=self.sampler_timesteps,
            spectral_timesteps=self.spectral_timesteps,
            method=self.method,
            num_eigenvalues=self.num_eigenvalues,
            spectrum_products=self.products_per_spectrum,
            count_products=self.products_per_count if counted else None,
            estimates_counts=self.estimates_counts,
            noises=self.noises,
            has_pairs=self.has_pairs,
            with_images=self.with_images,
            image_sides=image_sides,
            prediction=self.prediction,
            at_images=self.at_images,
            image_pairs=self.image_pairs,
        )

    def points(self, number: int) -> np.ndarray:
        """The points of a batch; the last may have fewer than ``batch``."""
        return np.arange(number * self.batch, min((number + 1) * self.batch, self.num_points))

    def filled(self, number: int) -> np.ndarray:
        """The points of a batch, filled up by repeating the last, so that one program serves all batches."""
        return np.minimum(np.arange(number * self.batch, (number + 1) * self.batch), self.num_points - 1)

    def batches(self) -> Iterator[int]:
        return iter(range(self.num_batches))


def _method(config: AuditConfig, size: int) -> AuditMethod:
    """The method of spectra; refuses what it cannot do with points of ``size`` numbers."""
    from jaxmem.spectra.counting import FEWEST_STEPS  # here: it loads JAX, which a page of a plan does not need

    method = config.method if config.method != "auto" else "eigh" if size <= LARGEST_EXACT else "lanczos"
    if method == "eigh" and size > LARGEST_EXACT:
        raise ValueError(
            f"method: expected 'lanczos' for latents of {size} dimensions, got 'eigh', which takes up to"
            f" {LARGEST_EXACT}; for counts add a `count_budget`"
        )
    if method == "lanczos" and config.num_steps > size:
        raise ValueError(f"num_steps: expected 1 to {size} (the size of a latent), got {config.num_steps}")
    fewest = 2 * FEWEST_STEPS + 3  # of count_positive: Lanczos steps of two products, and three that measure
    if config.count_budget is not None and config.count_budget < min(fewest, size + 1):
        estimate = f"{fewest} products per point, or " if fewest <= size else ""
        raise ValueError(
            f"count_budget: expected at least {estimate}{size + 1} for exact counts, got {config.count_budget}"
        )
    if config.count_budget is not None and method == "eigh":
        raise ValueError(
            f"count_budget: expected none with method 'eigh', whose counts are exact, got {config.count_budget};"
            f" for estimates add `method` lanczos or none"
        )
    if config.directions and method == "none":
        raise ValueError(
            f"directions: expected 0 with method 'none', got {config.directions}: they are eigenvectors of a spectrum"
        )
    return method


def _no_spectra(config: AuditConfig) -> tuple[int, ...]:
    if config.timesteps:
        raise ValueError(f"timesteps: expected none with method 'none' and no count budget, got {config.timesteps}")
    return ()


def _spectral(config: AuditConfig, model: ModelFacts, run: tuple[int, ...], method: str) -> tuple[int, ...]:
    """Choose the timesteps of spectra, descending: the given ones, or the first and, of whole spectra, late ones.

    The first is the first with a signal that float32 can show in a curvature, if one is run.
    """
    if not config.timesteps:
        scale = UsualScale(dict(zip(model.timesteps, model.usual_timesteps, strict=True)))
        first = next((t for t, alpha in zip(run, model.alpha, strict=False) if alpha >= LEAST_ALPHA), run[0])
        nearest = [scale.nearest(place, model.timesteps) for place in DEFAULTS]
        chosen = {first, *(t for t in nearest if t in run)} if method == "eigh" else {first}
        return tuple(sorted(chosen, reverse=True))
    for timestep in config.timesteps:
        if timestep not in run:
            near = min(run, key=lambda t: abs(t - timestep))
            raise ValueError(
                f"timesteps: expected ones that the sampling steps visit ({len(run)} from {run[0]} down to"
                f" {run[-1]}{', ' + model.unit if model.unit else ''}), got {timestep}; the nearest is {near}"
            )
    return tuple(sorted(config.timesteps, reverse=True))
