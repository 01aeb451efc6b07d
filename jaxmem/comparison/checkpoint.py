"""One checkpoint of a comparison: what its audit found about the training images, in a few numbers with intervals."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from jaxmem.audit.result import read_audit
from jaxmem.audit.training.found import LookFound, TrainingFound, Whatever
from jaxmem.audit.training.records import LEADS, WITH, WITHOUT
from jaxmem.audit.training.table import image_columns
from jaxmem.comparison.steps import Place
from jaxmem.detectors import Detector
from jaxmem.memorization.bootstrap import mean_interval
from jaxmem.memorization.verdicts import WORDS, Evidence, Verdict, Word
from jaxmem.runs.directory import Run
from jaxmem.training_images.duplicates import first_of_groups

COUNTS = ("tangent-count", "positive-count")
HELD_OUT = "held-out"


class Spread(NamedTuple):
    """A number and the ends of its 95 % interval; NaN where there is none."""

    value: float
    low: float = float("nan")
    high: float = float("nan")


class Distances(NamedTuple):
    """Calibrated ℓ2 distances of generations to their nearest training images; NaN where there are none."""

    number: int
    smallest: float = float("nan")
    lower: float = float("nan")  #: quartile
    median: float = float("nan")
    upper: float = float("nan")  #: quartile


@dataclass(frozen=True)
class Checkpoint:
    """What one run says of T training images; all runs of a comparison have the same."""

    run: str  #: name of its folder
    place: Place
    model: str  #: what it is called, and its network where another was put into it
    sha256: str  #: of its weights
    finished: bool
    drawn: bool  #: generations were compared with the images, so that an image can be reproduced
    verdicts: list[Verdict]  #: T
    evidence: list[Evidence]  #: T
    groups: np.ndarray  #: (T,) equal for duplicates
    whatever: Whatever
    distances: Distances
    counts: Mapping[tuple[str, str], Spread]  #: mean counts at images, by `COUNTS` and look or `HELD_OUT`
    areas: Mapping[tuple[str, str], Spread]  #: AUC of training against held-out images, by statistic and look
    judged: int | None  #: timestep of counts and areas; None where no look was begun
    table: Mapping[str, list[Any]]  #: columns of ``images.csv``, without the held-out images

    @cached_property
    def words(self) -> list[Word]:
        """T verdicts, in a word each."""
        return [verdict.word for verdict in self.verdicts]

    @cached_property
    def number(self) -> dict[Word, int]:
        """Images by verdict."""
        return {word: self.words.count(word) for word in WORDS}

    @property
    def reproduced(self) -> int:
        """Groups of duplicates that generations return."""
        return sum(self.words[i] == "reproduced" for i in first_of_groups(self.groups))

    @cached_property
    def share(self) -> Spread:
        """Share of the images that are reproduced, a group of duplicates as one; interval of Clopper and Pearson."""
        if not self.drawn:
            return Spread(float("nan"))
        number = len(first_of_groups(self.groups))
        ends = scipy.stats.binomtest(self.reproduced, number).proportion_ci(0.95, method="exact")
        return Spread(self.reproduced / number, float(ends.low), float(ends.high))


def read_checkpoint(run: Run, place: Place, detectors: Iterable[Detector]) -> tuple[Checkpoint, TrainingFound]:
    """Read a run; what was found is given beside it, with its pictures, for whoever needs them.

    Raises:
        ValueError: the run has not come to the training images.
    """
    result = read_audit(run, detectors)
    found = result.training
    if found is None:
        raise ValueError(
            f"{run.directory}: expected an audit that has come to its training images, got one that has not; the"
            f" command that began it continues it"
        )
    trained = [record for record in found.records if not record.held_out]
    look = found.looks.get(WITH)
    identity = run.manifest.get("model") or {}
    checkpoint = Checkpoint(
        run=run.directory.resolve().name,
        place=place,
        model=", ".join(filter(None, [(result.metrics or {}).get("model"), identity.get("unet_weights")])),
        sha256=str(identity.get("sha256", "")),
        finished=run.finished,
        drawn=found.nearest is not None,
        verdicts=found.verdicts,
        evidence=found.evidence,
        groups=np.array([record.group for record in trained]),
        whatever=found.whatever,
        distances=_distances(found),
        counts=_counts(found),
        areas={} if look is None else _areas(found, look.judged, (result.metrics or {}).get("training")),
        judged=None if look is None else look.judged,
        table={column: values[: len(trained)] for column, values in image_columns(found).items()},
    )
    return checkpoint, found


def group_mean(values: np.ndarray, groups: np.ndarray) -> Spread:
    """Mean over images and noises, (I, M), with a bootstrap interval over groups of duplicates; NaN is no value."""
    numbers = np.unique(groups)
    longest = max((int((groups == group).sum()) for group in numbers), default=0)
    rows = np.full((len(numbers), longest, *values.shape[1:]), np.nan)
    for row, group in zip(rows, numbers, strict=True):
        row[: (groups == group).sum()] = values[groups == group]
    rows = rows.reshape(len(numbers), -1)
    there = int((~np.isnan(rows)).any(1).sum())
    if there < 2:  # one group alone cannot be resampled
        return Spread(float(np.nanmean(rows)) if there else float("nan"))
    mean, ends = mean_interval(rows)
    return Spread(mean, *ends)


def _distances(found: TrainingFound) -> Distances:
    """Of the generations whose prompt is the caption of a training image."""
    nearest = found.nearest
    values = np.array([])
    if nearest is not None:
        captions = {text for record in found.records if not record.held_out for text in record.captions or ("",)}
        own = np.repeat([prompt.text in captions for prompt in found.prompts], found.noises)
        values = nearest.calibrated[own & np.isfinite(nearest.calibrated)]
    if not values.size:
        return Distances(0)
    lower, median, upper = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return Distances(len(values), float(values.min()), lower, median, upper)


def _counts(found: TrainingFound) -> dict[tuple[str, str], Spread]:
    """Mean counts where they were counted; of held-out images with their captions."""
    held_out = np.array([record.held_out for record in found.records])
    groups = np.array([record.group for record in found.records])
    counts: dict[tuple[str, str], Spread] = {}
    for statistic in COUNTS:
        for name, look, members in _members(found, held_out):
            values = look.column(f"{statistic}@t{look.judged}")[members]
            if np.isfinite(values).any():
                counts[statistic, name] = group_mean(values, groups[members])
    return counts


def _members(found: TrainingFound, held_out: np.ndarray) -> list[tuple[str, LookFound, np.ndarray]]:
    there = [(name, found.looks[name], ~held_out) for name in (WITH, WITHOUT) if name in found.looks]
    return [*there, *([(HELD_OUT, found.looks[WITH], held_out)] if WITH in found.looks and held_out.any() else [])]


def _areas(found: TrainingFound, judged: int, metrics: Any) -> dict[tuple[str, str], Spread]:
    """By statistic and look, at the judged timestep; those of a finished run are in its metrics."""
    rates: Any = (metrics or {}).get("evaluation")
    if rates is None:
        rates = {look: {name: one._asdict() for name, one in each.items()} for look, each in found.evaluations.items()}
    areas: dict[tuple[str, str], Spread] = {}
    for look, each in rates.items():
        for statistic in LEADS:
            one = each.get(f"{statistic}@t{judged}") or {}
            if one.get("auc") is not None:
                areas[statistic, look] = Spread(one["auc"], *(one.get("auc_interval") or ()))
    return areas
