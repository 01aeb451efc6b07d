"""The detectors that an audit can run: what each is, who published it, and which direction means memorized."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from jaxmem.memorization.detectors import ANISOTROPY_WEIGHTS, SCORE_EVOLUTION_STEPS
from jaxmem.memorization.standing import End

AuditMethod = Literal["eigh", "lanczos", "none"]
Family = Literal["wen", "jeon", "score-evolution", "anisotropy", "tiled-l2", "spectrum"]
METHODS: tuple[AuditMethod, ...] = get_args(AuditMethod)
FAMILIES: tuple[Family, ...] = get_args(Family)


@dataclass(frozen=True)
class Detector:
    """One column of an audit's table: what it is, who published it, and which direction means memorized."""

    name: str  #: unique, for instance ``"wen-5"`` or ``"positive-count@t281"``
    title: str  #: for tables
    formula: str
    paper: str
    memorized_is: End  #: ``"high"`` or ``"low"``, fixed beforehand and never turned by the data
    as_released: str  #: where public code differs from the paper; empty where it does not
    on_trajectory: bool  #: needs only what a sampler visits anyway
    is_count: bool  #: whole numbers, with ties
    statistic: str  #: the name without its number and timestep
    number: int | None = None  #: of steps (Wen) or of eigenvalues (their sum)
    timestep: int | None = None  #: of a spectrum


class _Statistic(NamedTuple):
    """The words for a detector of one spectrum."""

    title: str
    formula: str
    paper: str
    memorized_is: End
    extreme: bool = False  # means the same for the Ritz values of some Lanczos steps
    is_count: bool = False
    as_released: str = ""


_SEED = "the paper reproduced here"
_OURS = "this library"
_NO_CODE = "no code was released; the paper counts λ > 1e-15, here λ above the spectrum's measured rounding"
_JEON = "Jeon et al., ICML 2025"


_SPECTRAL = {
    "positive-count": _Statistic("Positive eigenvalues", "#{λ > 0}", _SEED, "low", is_count=True, as_released=_NO_CODE),
    "tangent-count": _Statistic("Tangent directions", "#{λ > -1/(2σ²)}", _OURS, "low", is_count=True),
    "largest-sum": _Statistic("Sum of the {k} largest eigenvalues", "λ₁ + … + λ_{k}", _OURS, "low", extreme=True),
    "largest": _Statistic("Largest eigenvalue", "λ₁", _OURS, "low", extreme=True),
    "smallest": _Statistic("Smallest eigenvalue", "λ_d", _OURS, "low", extreme=True),
    "trace": _Statistic("Trace", "tr H = Σ λ_i", f"{_JEON} (E‖s‖² = -tr H)", "low"),
    "cubed-trace": _Statistic("Negative trace of the cube", "-tr H³ = -Σ λ_i³", f"{_JEON} (E‖H s‖² = -tr H³)", "high"),
}


def detectors(
    num_steps: int,
    *,
    families: Collection[Family] | None = None,
    spectral_timesteps: Sequence[int] = (),
    method: AuditMethod = "none",
    k: int = 5,
    num_noises: int = 1,
    counted: bool = False,
    estimated: bool = True,
    anisotropy_weights: tuple[float, float] = ANISOTROPY_WEIGHTS,
) -> tuple[Detector, ...]:
    """The detectors that an audit of this shape can run, in the order of the table.

    Args:
        num_steps: how many steps of the sampler are made from x_T on.
        families: which of `FAMILIES`; None for all that the other arguments allow.
        spectral_timesteps: where spectra are taken.
        method: ``"eigh"`` for whole spectra, ``"lanczos"`` for Ritz values, of which only the extreme ones say
            something about the eigenvalues (neither counts nor traces), ``"none"``.
        k: of the sum of the k largest. The default is the first trial's.
        num_noises: generations per prompt; `jaxmem.memorization.detectors.tiled_l2` needs two.
        counted: the counts come from `jaxmem.count_positive`, as ``columns`` of
            `jaxmem.memorization.table.score_table`.
        estimated: of ``counted``: whether they are estimates, as their titles then say.
        anisotropy_weights: those that `jaxmem.memorization.detectors.anisotropy` is called with.

    Raises:
        ValueError: an unknown family or method, a family that these arguments do not allow, or a number below 1.
    """
    for name, value in (("num_steps", num_steps), ("k", k), ("num_noises", num_noises)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    needs = {
        "score-evolution": (num_steps >= SCORE_EVOLUTION_STEPS, f"{SCORE_EVOLUTION_STEPS} steps, got {num_steps}"),
        "tiled-l2": (num_noises >= 2, f"two noises per prompt, got {num_noises}"),
        "spectrum": (
            len(spectral_timesteps) > 0 and (method != "none" or counted),
            f"spectral_timesteps and a method, got {tuple(spectral_timesteps)} and {method!r}",
        ),
    }
    if families is None:
        families = [name for name in FAMILIES if needs.get(name, (True, ""))[0]]
    for name in families:
        if name not in FAMILIES:
            raise ValueError(f"families: expected some of {FAMILIES}, got {name!r}")
        allowed, need = needs.get(name, (True, ""))
        if not allowed:
            raise ValueError(f"families: {name!r} needs at least {need}; leave it out or give what it needs")
    found = _wen(num_steps) if "wen" in families else []
    found += [
        one for one in (_JEON_PRODUCTS, _EVOLUTION, _anisotropy(*anisotropy_weights), _TILED) if one.name in families
    ]
    if "spectrum" in families:
        found += [
            _spectral(name, statistic, timestep, k, estimated=statistic.is_count and counted and estimated)
            for timestep in spectral_timesteps
            for name, statistic in _SPECTRAL.items()
            if method == "eigh" or (statistic.extreme and method == "lanczos") or (statistic.is_count and counted)
        ]
    return tuple(found)


def _wen(num_steps: int) -> list[Detector]:
    """At the first step, the first five, and all."""
    found: list[Detector] = []
    for number, words in ((1, "first step"), (5, "first 5 steps"), (num_steps, f"all {num_steps} steps")):
        if number > num_steps or any(one.number == number for one in found):
            continue
        name = "wen-all" if words.startswith("all") else f"wen-{number}"
        formula = "‖ε_c - ε_u‖₂" if number == 1 else f"mean of ‖ε_c - ε_u‖₂ over {number} steps"
        paper = "Wen et al., ICLR 2024"
        found.append(
            Detector(name, f"Score difference, {words}", formula, paper, "high", "", True, False, "wen", number)
        )
    return found


_JEON_PRODUCTS = Detector(
    "jeon",
    "Hessian difference, first step",
    "‖H_c s_Δ - H_u s_Δ‖₂",
    _JEON,
    "high",
    "not squared, as here (the paper squares; the ranking of points is the same)",
    True,
    False,
    "jeon",
)
_EVOLUTION = Detector(
    "score-evolution",
    "Score evolution, first 3 steps",
    "‖s_Δ(x₁) - s_Δ(x₀)‖² + ‖s_Δ(x₂) - s_Δ(x₁)‖²",
    "an anonymous repository, 2026",
    "high",
    "",
    True,
    False,
    "score-evolution",
)
_TILED = Detector(
    "tiled-l2",
    "Tiled distance between generations",
    "mean over pairs of max over tiles of √(Σ(a - b)²/n)",
    "Carlini et al., USENIX Security 2023",
    "low",
    "",
    True,
    False,
    "tiled-l2",
)


def _anisotropy(norm: float, cosine: float) -> Detector:
    return Detector(
        "anisotropy",
        "Norm and anisotropy",
        f"{norm:g} ‖ε_c - ε_u‖₂(x_T, t₀) + {cosine:g} mean cos(ε_u, ε_c - ε_u)(x_T, t_late)",
        "Asthana and Belagiannis, ICLR 2026",
        "high",
        "for models that predict v the norm is that of s_Δ over σ; σ is nearly 1 there",
        False,
        False,
        "anisotropy",
    )


def _spectral(name: str, statistic: _Statistic, timestep: int, k: int, estimated: bool) -> Detector:
    number = k if name == "largest-sum" else None
    title = f"{statistic.title.format(k=k)}{' (estimate)' if estimated else ''}, t = {timestep}"
    formula = statistic.formula.replace("{k}", str(k))
    return Detector(
        f"{name}@t{timestep}",
        title,
        formula,
        statistic.paper,
        statistic.memorized_is,
        statistic.as_released,
        True,
        statistic.is_count,
        name,
        number,
        timestep,
    )
