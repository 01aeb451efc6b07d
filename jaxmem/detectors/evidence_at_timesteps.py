"""Kinds of evidence of which there is one at each timestep of spectra: eigenvalues, counts, errors of denoising."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from jaxmem.detectors.evidence import UNPAIRED, Cost, Evidence, Setting


@dataclass(frozen=True)
class Eigenvalues(Evidence):
    """Eigenvalues of the conditional Hessian, at each timestep of spectra: the score gets `SpectrumAt`.

    A detector with this evidence is one column per timestep. ``whole``: it needs all of them; else Ritz values do,
    of which only the largest and the smallest approximate eigenvalues.
    """

    whole: bool = True
    per_timestep: ClassVar[bool] = True

    def missing(self, setting: Setting) -> str:
        allowed = ("eigh",) if self.whole else ("eigh", "lanczos")
        if setting.method in allowed and setting.spectral_timesteps:
            return ""
        return f"spectra of method {' or '.join(map(repr, allowed))}, got method {setting.method!r}"

    def cost(self, setting: Setting) -> Cost:
        return Cost(0, 1, setting.spectrum_products, "spectra")  # and sampling to the timestep

    def __str__(self) -> str:
        return "all eigenvalues at each timestep" if self.whole else "extreme eigenvalues at each timestep"


class SpectrumAt(NamedTuple):
    """Eigenvalues of one point at one timestep."""

    eigenvalues: np.ndarray  #: (L,) descending, float64; fewer where a Krylov space closed early
    noise: float  #: what rounding can have moved an eigenvalue by, measured
    sigma: float  #: noise level
    timestep: int


@dataclass(frozen=True)
class Counts(Evidence):
    """Numbers of eigenvalues above 0 and above −1/(2σ²), at each timestep of spectra: the score gets `CountsAt`.

    They are exact where all eigenvalues are computed, else those of `jaxmem.count_positive`. A detector with this
    evidence is one column per timestep.
    """

    per_timestep: ClassVar[bool] = True

    def missing(self, setting: Setting) -> str:
        there = setting.method == "eigh" or setting.count_products is not None
        if there and setting.spectral_timesteps:
            return ""
        return f"spectra of method 'eigh' or counts, got method {setting.method!r} and no counts"

    def cost(self, setting: Setting) -> Cost:
        if setting.count_products is None:
            return Cost(0, 1, setting.spectrum_products, "spectra")
        return Cost(0, 1, setting.count_products, "counts")

    def __str__(self) -> str:
        return "counts of eigenvalues at each timestep"


@dataclass(frozen=True)
class DenoisingErrors(Evidence):
    """``mean (x̂_0(x_t) − x_0)²`` at each timestep, where x_0 is known: the score gets `ErrorsAt`.

    Only points made of images have it (`jaxmem.audit`, ``training``), so no detector of prompts can need it. ``pairs``:
    it needs the error without the caption, too.
    """

    pairs: bool = False
    on_trajectory: ClassVar[bool] = False
    per_timestep: ClassVar[bool] = True

    def missing(self, setting: Setting) -> str:
        if not setting.at_images:
            return "images to look at, got prompts alone"
        return "" if setting.image_pairs or not self.pairs else UNPAIRED

    def cost(self, setting: Setting) -> Cost:  # noqa: ARG002
        return Cost(0, 1 + self.pairs, 0, "denoising")

    def __str__(self) -> str:
        both = ", with its caption and without," if self.pairs else ""
        return f"the error of denoising an image{both} at each timestep"


class ErrorsAt(NamedTuple):
    """Errors of denoising one image at one timestep, ``mean (x̂_0(x_t) − x_0)²``."""

    given: float  #: with the condition of the look
    without: float  #: without a caption; NaN where that is not there


class CountsAt(NamedTuple):
    """Counts of one point at one timestep."""

    positive: float  #: eigenvalues above 0, beyond rounding: a number, or an estimate
    positive_interval: tuple[float, float]  #: 95 %; the number itself where it is exact
    tangent: float  #: eigenvalues above −1/(2σ²)
    tangent_interval: tuple[float, float]
    sigma: float
    timestep: int
