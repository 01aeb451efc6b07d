"""Which prompts stand out from a reference list, and how many of them would by chance, all measures together.

A prompt that was never memorized is one more of the kind of the reference prompts. Put among the R of them it is as
likely to be the most unusual one as each of the others, by whatever statistic that treats all R + 1 alike. So
``p = (number of the R + 1 that are at least as unusual) / (R + 1)`` is at most a level with no more than that chance: a
conformal p-value, exact for measures that depend on each other in any way, and for few reference prompts.

The statistic is Fisher's: the sum over measures of -log(place / (R + 1)), place 1 the most memorized. It is large where
one measure is extreme or several are high.

Prompts of a list share the reference, so they are not listed independently of each other. Their number by chance is all
the same expected to be at most the level times the prompts, because expectations add up.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmem.memorization.standing import End, sign_of

LEVELS = (0.01, 0.05)  #: of the p-value up to which a prompt is listed: the first that the reference list can reach
_EQUAL = 1e-9  # sums of the same logarithms in another order differ by rounding


class Listing(NamedTuple):
    """Which of N prompts are listed, and by which rule."""

    p: np.ndarray  #: (N,) conformal p-values, NaN where a measure is missing
    num_reference: int  #: reference prompts with all measures
    level: float | None  #: p is at most this where a prompt is listed; None where the reference is too short
    listed: np.ndarray  #: (N,) bool

    @property
    def rate(self) -> float:
        """The share of prompts that are not memorized, of the reference's kind, which is listed: at most this."""
        return 0.0 if self.level is None else num_beyond(self.level, self.num_reference) / (self.num_reference + 1)

    @property
    def by_chance(self) -> float:
        """How many of the prompts would be listed on average, at most, were none memorized."""
        return self.rate * int((~np.isnan(self.p)).sum())


def num_beyond(level: float, num_reference: int) -> int:
    """How many of a reference list and one more prompt can have p ≤ level."""
    return int(level * (num_reference + 1) + _EQUAL)


def level_of(num_reference: int) -> float | None:
    """The first of `LEVELS` that so long a reference list can reach; None where it is too short for any."""
    return next((level for level in LEVELS if num_beyond(level, num_reference)), None)


def is_beyond(p: Any, level: float) -> Any:
    """Whether a p-value is at most a level; NaN is not."""
    with np.errstate(invalid="ignore"):
        return np.asarray(p) <= level + _EQUAL


def list_prompts(scores: np.ndarray, reference: np.ndarray, *, memorized_is: Sequence[End]) -> Listing:
    """List the prompts whose conformal p-value is at most the level that the length of the reference allows.

    The level is the first of `LEVELS` at which anything can be listed: 1 % from 99 reference prompts on, 5 % from 19.

    Args:
        scores: shape (N, D), of N prompts by D measures; NaN where one is missing.
        reference: shape (R, D), the same of reference prompts; those with a NaN are left out.
        memorized_is: of each measure ``"high"`` or ``"low"``.

    Raises:
        ValueError: shapes that do not fit, or an unknown direction.
    """
    p = conformal_p(scores, reference, memorized_is=memorized_is)
    number = int((~np.isnan(reference).any(1)).sum()) if reference.shape[1] else 0
    level = level_of(number)
    return Listing(p, number, level, np.zeros(len(p), bool) if level is None else is_beyond(p, level))


def conformal_p(scores: np.ndarray, reference: np.ndarray, *, memorized_is: Sequence[End]) -> np.ndarray:
    """Conformal p-values of prompts, shape (N,): small where a prompt is more memorized than the reference.

    Args:
        scores: as `list_prompts`.
        reference: as `list_prompts`.
        memorized_is: as `list_prompts`.

    >>> reference = np.arange(19.0)[:, None]
    >>> conformal_p(np.array([[20.0], [18.0], [-1.0]]), reference, memorized_is=["high"]).tolist()
    [0.05, 0.1, 1.0]

    Raises:
        ValueError: as `list_prompts`.
    """
    scores, reference = np.asarray(scores, np.float64), np.asarray(reference, np.float64)
    width = len(memorized_is)
    if scores.ndim != 2 or reference.ndim != 2 or not scores.shape[1] == reference.shape[1] == width:
        raise ValueError(
            f"scores and reference: expected shapes (N, {width}) and (R, {width}), a column for each of memorized_is,"
            f" got {scores.shape} and {reference.shape}"
        )
    signs = np.array([sign_of(end) for end in memorized_is], np.float64)
    scores, reference = signs * scores, signs * reference
    reference = reference[~np.isnan(reference).any(1)]
    number = len(reference)
    found = np.full(len(scores), np.nan)
    if not (number and width):
        return found
    unusual = -np.log(np.arange(1, number + 2) / (number + 1))  # of places from 1
    ordered = np.sort(reference, 0)
    # Of each reference prompt how many of the reference are at least as memorized; equal ones share the last place.
    before = np.stack([number - np.searchsorted(ordered[:, d], reference[:, d], "left") for d in range(width)], 1)
    for n in np.flatnonzero(~np.isnan(scores).any(1)):
        place = (reference >= scores[n]).sum(0)  # from 0: the prompt itself comes on top
        of_reference = unusual[before - 1 + (scores[n] >= reference)].sum(1)
        found[n] = (1 + (of_reference >= unusual[place].sum() - _EQUAL).sum()) / (number + 1)
    return found
