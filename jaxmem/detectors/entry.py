"""A detector is one entry: what it is, who published it, what evidence it needs, and how that becomes a score."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from jaxmem.detectors.evidence import Evidence, Setting
from jaxmem.memorization.standing import End, sign_of
from jaxmem.prompts import RESULTS_COLUMNS, STANDING_COLUMNS

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,60}")
_UNRANKED = 100


def _none(setting: Setting) -> dict[str, Any]:  # noqa: ARG001
    return {}


@dataclass(frozen=True)
class Detector:
    """One measure of memorization: a column of an audit, or one at each timestep of spectra.

    >>> import numpy as np
    >>> from jaxmem import detectors
    >>> spread = detectors.Detector(
    ...     name="pixel-spread", title="Spread of pixels between generations", formula="mean std of a pixel",
    ...     source="an example", memorized_is="low", needs=detectors.Images(fewest=2),
    ...     score=lambda images: np.full(len(images), images.std(0).mean()),
    ... )
    >>> float(spread.score(np.zeros((3, 8, 8, 3), np.uint8))[0])
    0.0

    Raises:
        ValueError: a name that is no column's, an unknown end, or evidence of no known kind.
    """

    name: str  #: unique, of letters, digits and ``. _ + -``
    title: str  #: for tables; ``{…}`` is filled from ``parameters``, ``{steps}`` from the evidence
    formula: str  #: filled in the same way
    source: str  #: who published it
    memorized_is: End  #: ``"high"`` or ``"low"``, fixed beforehand and never turned by the data
    needs: Evidence  #: the kind of evidence
    score: Callable[..., Any]  #: the evidence of one point (and the parameters) to a number
    as_released: str = ""  #: where public code differs from the paper; empty where it does not
    interval: Callable[..., Any] | None = None  #: the evidence to the ends of a 95 % interval, of estimates
    parameters: Callable[[Setting], dict[str, Any]] = field(default=_none)  #: keyword arguments of ``score``
    is_count: bool = False  #: whole numbers, with ties
    statistic: str = ""  #: detectors of one statistic share a figure and a place in the ranking; the name by default
    place: int = _UNRANKED  #: of its statistic among those that lead the page's ranking, the lowest first
    timestep: int | None = None  #: of a spectrum; set by `columns`

    def __post_init__(self) -> None:
        if self.timestep is None and not _NAME.fullmatch(self.name):
            raise ValueError(f"name: expected letters, digits and . _ + - (at most 61), got {self.name!r}")
        if self.name in (taken := (*RESULTS_COLUMNS, *STANDING_COLUMNS)):
            raise ValueError(f"name: expected none of {', '.join(taken)} (columns of results.csv), got {self.name!r}")
        if not isinstance(self.needs, Evidence):
            raise ValueError(f"needs: expected a kind of evidence, such as Images(fewest=2), got {self.needs!r}")
        sign_of(self.memorized_is)
        object.__setattr__(self, "statistic", self.statistic or self.name)

    @property
    def on_trajectory(self) -> bool:
        """Whether it needs only points that a sampler visits anyway."""
        return self.needs.on_trajectory

    @property
    def identity(self) -> str:
        """What tells it from another entry of its name, as far as values can: a run knows it again by that."""
        score = getattr(self.score, "__qualname__", type(self.score).__qualname__)
        return f"{score}({self.needs!r}), memorized is {self.memorized_is}"

    @property
    def steps(self) -> int | None:
        """Number of sampling steps that it needs, of evidence from the first ones."""
        return getattr(self.needs, "steps", None)


def columns(detectors: Iterable[Detector], setting: Setting) -> tuple[Detector, ...]:
    """The columns of an audit: detectors with parameters, titles and timesteps filled in, those that can run there.

    Detectors of spectra come last, timestep by timestep. Of two of one statistic with the same evidence (the mean over
    5 steps and over all, of 5) the first stands for both.
    """
    able = [detector for detector in detectors if not detector.needs.missing(setting)]
    found: list[Detector] = []
    for detector in (one for one in able if not one.needs.per_timestep):
        column = _filled(detector, setting)
        same = column.statistic, column.needs, column.score
        if not any((one.statistic, one.needs, one.score) == same for one in found):
            found.append(column)
    spectral = [one for one in able if one.needs.per_timestep]
    found += [_filled(detector, setting, timestep) for timestep in setting.spectral_timesteps for detector in spectral]
    return tuple(found)


def _filled(detector: Detector, setting: Setting, timestep: int | None = None) -> Detector:
    needs, parameters = detector.needs.at(setting), detector.parameters(setting)
    title, formula = detector.title, detector.formula
    for word, value in {"steps": getattr(needs, "steps", None), **parameters}.items():
        title, formula = (
            text.replace(f"{{{word}}}", f"{value:g}" if isinstance(value, float) else str(value))
            for text in (title, formula)
        )
    if detector.interval is not None and setting.estimates_counts:
        title += " (estimate)"
    return replace(
        detector,
        name=detector.name if timestep is None else f"{detector.name}@t{timestep}",
        title=title if timestep is None else f"{title}, t = {timestep}",
        formula=formula,
        needs=needs,
        score=partial(detector.score, **parameters) if parameters else detector.score,
        parameters=_none,
        timestep=timestep,
    )


_registered: dict[str, Detector] = {}


def register(detector: Detector) -> Detector:
    """Make a detector known by its name: audits run it from now on, and `jaxmem.read_audit` knows it.

    Raises:
        ValueError: another detector has the name.
    """
    if _registered.setdefault(detector.name, detector) != detector:
        raise ValueError(f"name: expected one that no other detector has, got {detector.name!r}; choose another name")
    return detector


def registered() -> tuple[Detector, ...]:
    """All detectors that are known, in the order of an audit's table."""
    return tuple(_registered.values())


def choose(wanted: Iterable[str | Detector] | None) -> tuple[Detector, ...]:
    """Detectors by name or as they are; None for all that are registered.

    Raises:
        ValueError: an unknown name, or two detectors of one name.
    """
    if wanted is None:
        return registered()
    if isinstance(wanted, str | Detector):
        raise ValueError(f"detectors: expected a list of names or of Detector objects, got {wanted!r:.60}")
    found: dict[str, Detector] = {}
    for one in wanted:
        if isinstance(one, str) and one not in _registered:
            raise ValueError(
                f"detectors: expected some of {', '.join(_registered)}, got {one!r};"
                f" `jaxmem.detectors.register` makes another one known"
            )
        detector = _registered[one] if isinstance(one, str) else one
        if not isinstance(detector, Detector):
            raise ValueError(f"detectors: expected names or Detector objects, got {one!r:.60}")
        if found.setdefault(detector.name, detector) != detector:
            raise ValueError(f"detectors: expected names that differ, got two detectors called {detector.name!r}")
        if _registered.get(detector.name, detector) != detector:
            raise ValueError(
                f"detectors: expected one whose name no registered detector has, got {detector.name!r}; choose another"
                f" name"
            )
    if not found:
        raise ValueError("detectors: expected at least one, got none; None is all that are registered")
    return tuple(found.values())


def require_evidence(detectors: Sequence[Detector], setting: Setting) -> None:
    """Refuse detectors that were asked for and that an audit of this shape cannot run.

    Raises:
        ValueError: evidence is missing.
    """
    for detector in detectors:
        if missing := detector.needs.missing(setting):
            raise ValueError(
                f"detectors: {detector.name!r} needs at least {missing}; leave it out or change the settings"
            )


def table() -> list[dict[str, str]]:
    """One row per registered detector, for documentation: what it is, what it needs and what that costs per point."""
    shown = Setting(
        timesteps=tuple(range(50)), sampler_timesteps=tuple(range(50)), spectral_timesteps=(281,), method="eigh",
        num_eigenvalues=256, spectrum_products=257, noises=4, with_images=True, at_images=True, image_pairs=True,
    )  # fmt: skip
    rows = []
    for detector in registered():
        filled = replace(columns([detector], shown)[0], timestep=None, name=detector.name)
        cost = detector.needs.cost(shown)
        products = {0: "none", shown.spectrum_products: "those of a spectrum or of a count"}
        rows.append(
            {
                "name": detector.name,
                "title": filled.title.partition(", t = ")[0],
                "formula": filled.formula,
                "source": detector.source,
                "as released": detector.as_released,
                "memorized is": detector.memorized_is,
                "needs": str(detector.needs),
                "products": products.get(cost.products, str(cost.products)),
            }
        )
    return rows
