"""Where a prompt stands: its place in a list, and its percentile in a reference list. Needs no labels."""

from typing import Any, Literal

import numpy as np
import scipy.stats

End = Literal["high", "low"]  #: the end of a detector's scores that means memorized


def sign_of(memorized_is: End) -> int:
    """1 where high scores mean memorized, -1 where low ones do."""
    if memorized_is not in ("high", "low"):
        raise ValueError(f"memorized_is: expected 'high' or 'low', got {memorized_is!r}")
    return 1 if memorized_is == "high" else -1


def mean(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Mean of what is not NaN; NaN where nothing is."""
    number = np.sum(~np.isnan(values), axis)
    return np.where(number > 0, np.nansum(values, axis) / np.maximum(number, 1), np.nan)


def rank(scores: Any, *, memorized_is: End) -> np.ndarray:
    """Places among the scores themselves, 1 the most memorized; equal scores share the better place; NaN stays NaN."""
    scores = np.asarray(scores, np.float64)
    there = ~np.isnan(scores)
    places = np.full(scores.shape, np.nan)
    places[there] = scipy.stats.rankdata(-sign_of(memorized_is) * scores[there], method="min")
    return places


def percentile(scores: Any, reference: Any, *, memorized_is: End) -> np.ndarray:
    """Where scores stand in a reference list: the percentage of it that is less memorized, half of what is equal.

    100 is above all of the list, 50 its middle. For prompts without labels: how unusual a prompt is among neutral
    ones; its rank among n reference prompts and itself is ``1 + (1 - percentile/100) n``, ties in the middle.

    Args:
        scores: any shape, NaN stays NaN.
        reference: the reference list's scores of the same detector, aggregated the same way; NaN is left out.
        memorized_is: ``"high"`` or ``"low"``.

    Raises:
        ValueError: an empty reference, or an unknown direction.
    """
    sign = sign_of(memorized_is)
    scores, listed = sign * np.asarray(scores, np.float64), sign * np.asarray(reference, np.float64).ravel()
    listed = np.sort(listed[~np.isnan(listed)])
    if listed.size == 0:
        raise ValueError("reference: expected at least one score that is a number, got none")
    below, up_to = np.searchsorted(listed, scores, "left"), np.searchsorted(listed, scores, "right")
    return np.where(np.isnan(scores), np.nan, 50 * (below + up_to) / listed.size)
