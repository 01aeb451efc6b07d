"""Detectors at one timestep: counts and sums of the eigenvalues of the conditional Hessian; the error of denoising."""

import math

from jaxmem.detectors.entry import Detector
from jaxmem.detectors.evidence import Setting
from jaxmem.detectors.evidence_at_timesteps import Counts, DenoisingErrors, Eigenvalues, ErrorsAt, SpectrumAt
from jaxmem.memorization.sharpness import negative_trace_of_cube, spectral_gap, sum_of_largest

ROUNDING = 1e-12  #: squared error of denoising that float32 makes of samples of unit size
MOST_SUMMED = 5  #: eigenvalues in the sum of the largest: the first trial's choice
_JEON = "Jeon et al., ICML 2025"


def _number_summed(setting: Setting) -> dict[str, int]:
    return {"k": min(MOST_SUMMED, setting.num_eigenvalues)}


def _sum_of_largest(spectrum: SpectrumAt, k: int) -> float:
    values = spectrum.eigenvalues
    return float(sum_of_largest(values, k)) if len(values) >= k else float("nan")


def _gap(spectrum: SpectrumAt) -> float:
    values = spectrum.eigenvalues
    return float(spectral_gap(values)) if len(values) > 1 else float("nan")  # one has no gap


def _gain(errors: ErrorsAt) -> float:
    return math.log((errors.without + ROUNDING) / (errors.given + ROUNDING))


DETECTORS = (
    Detector(
        name="positive-count",
        title="Positive eigenvalues",
        formula="#{λ > 0}",
        source="the paper reproduced here",
        as_released="no code was released; the paper counts λ > 1e-15, here λ above the spectrum's measured rounding",
        memorized_is="low",
        needs=Counts(),
        score=lambda counts: counts.positive,
        interval=lambda counts: counts.positive_interval,
        is_count=True,
        place=0,
    ),
    Detector(
        name="tangent-count",
        title="Tangent directions",
        formula="#{λ > -1/(2σ²)}",
        source="this library",
        memorized_is="low",
        needs=Counts(),
        score=lambda counts: counts.tangent,
        interval=lambda counts: counts.tangent_interval,
        is_count=True,
        place=7,
    ),
    Detector(
        name="largest-sum",
        title="Sum of the {k} largest eigenvalues",
        formula="λ₁ + … + λ_{k}",
        source="this library",
        memorized_is="low",
        needs=Eigenvalues(whole=False),
        score=_sum_of_largest,
        parameters=_number_summed,
        place=3,
    ),
    Detector(
        name="largest",
        title="Largest eigenvalue",
        formula="λ₁",
        source="this library",
        memorized_is="low",
        needs=Eigenvalues(whole=False),
        score=lambda spectrum: spectrum.eigenvalues.max(),
    ),
    Detector(
        name="smallest",
        title="Smallest eigenvalue",
        formula="λ_d",
        source="this library",
        memorized_is="low",
        needs=Eigenvalues(whole=False),
        score=lambda spectrum: spectrum.eigenvalues.min(),
    ),
    Detector(
        name="trace",
        title="Trace",
        formula="tr H = Σ λ_i",
        source=f"{_JEON} (E‖s‖² = -tr H)",
        memorized_is="low",
        needs=Eigenvalues(),
        score=lambda spectrum: spectrum.eigenvalues.sum(),
    ),
    Detector(
        name="cubed-trace",
        title="Negative trace of the cube",
        formula="-tr H³ = -Σ λ_i³",
        source=f"{_JEON} (E‖H s‖² = -tr H³)",
        memorized_is="high",
        needs=Eigenvalues(),
        score=lambda spectrum: negative_trace_of_cube(spectrum.eigenvalues),
    ),
    Detector(
        name="spectral-gap",
        title="Dimension before the spectral gap",
        formula="d - argmax_i (s_i - s_{i+1}), s the absolute λ, descending",
        source="Ventura et al., 2024 (singular values of the Jacobian; no code was released)",
        memorized_is="low",
        needs=Eigenvalues(),
        score=_gap,
        is_count=True,
    ),
    Detector(
        name="denoising-error",
        title="Error of denoising",
        formula="mean (x̂₀(x_t) − x₀)², x̂₀ = (x_t + σ² s)/α",
        source="the loss threshold of membership inference: Yeom et al., CSF 2018; Matsumoto et al., 2023",
        memorized_is="low",
        needs=DenoisingErrors(),
        score=lambda errors: errors.given,
    ),
    Detector(
        name="denoising-gain",
        title="Gain of the caption in denoising",
        formula="log(error of denoising without the caption / error with it)",
        source="this library",
        memorized_is="high",
        needs=DenoisingErrors(pairs=True),
        score=_gain,
    ),
)
