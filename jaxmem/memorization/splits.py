"""Thresholds fixed on one half of the prompts, and what they do on the other half."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmem.memorization.evaluation import Per, as_prompts, roc
from jaxmem.memorization.standing import End, sign_of


class Split(NamedTuple):
    """A threshold fixed on one half of the prompts and what it does on the other."""

    limit: float  #: on the FPR of the first half
    threshold: float | None  #: memorized is at least ("high") or at most ("low") that; None accepts nothing
    fitted_fpr: float  #: on the first half
    fitted_tpr: float
    fpr: float  #: on the second half
    tpr: float
    tpr_by_category: dict[str, float]  #: on the second half; NaN where it has none
    num_negative: tuple[int, int]  #: examples of the two halves
    num_positive: tuple[int, int]


def threshold_split(
    scores: Any,
    labels: Any,
    *,
    memorized_is: End,
    categories: Sequence[str | None] | None = None,
    per: Per = "point",
    limit: float = 0.01,
    seed: int = 0,
) -> Split | None:
    """Fix the threshold on one half of the prompts, ``FPR ≤ limit`` there, and report both rates on the other half.

    The halves are drawn with prompts whole, memorized categories and negatives each in halves (the first gets the odd
    one). The threshold lies midway between the last score that is accepted and the first that is not. None, "not
    estimable", where the first half has fewer than 1/limit negatives, or where a half misses one kind.

    Raises:
        ValueError: as `jaxmem.memorization.evaluation.evaluate`, a limit outside (0, 1), or categories of another
            number.
    """
    scores, labels = as_prompts(scores, labels, per)
    sign = sign_of(memorized_is)
    if not 0 < limit < 1:
        raise ValueError(f"limit: expected a rate between 0 and 1, got {limit}")
    names = [None] * len(labels) if categories is None else list(categories)
    if len(names) != len(labels):
        raise ValueError(f"categories: expected one for each of {len(labels)} prompts, got {len(names)}")
    first = _halves(labels, names, seed)

    def examples(chosen: np.ndarray) -> np.ndarray:
        return sign * scores[chosen][~np.isnan(scores[chosen])]

    negative = examples(first & ~labels), examples(~first & ~labels)
    positive = examples(first & labels), examples(~first & labels)
    if len(negative[0]) * limit < 1 or min(len(part) for part in (*negative, *positive)) == 0:
        return None
    fit = np.concatenate([positive[0], negative[0]])
    curve = roc(fit, np.arange(len(fit)) < len(positive[0]), memorized_is="high")
    accepted = curve.thresholds[curve.fpr <= limit][-1]
    below = fit[fit < accepted]
    threshold = accepted
    if np.isfinite(accepted) and below.size:
        middle = below.max() + (accepted - below.max()) / 2
        threshold = middle if middle > below.max() else accepted

    def rate(values: np.ndarray) -> float:
        return float((values >= threshold).mean()) if values.size else float("nan")

    of_category = {
        name: rate(examples(~first & labels & np.array([one == name for one in names], bool)))
        for name in dict.fromkeys(name for name, flag in zip(names, labels, strict=True) if flag and name is not None)
    }
    return Split(
        limit,
        float(sign * threshold) if np.isfinite(threshold) else None,
        rate(negative[0]),
        rate(positive[0]),
        rate(negative[1]),
        rate(positive[1]),
        of_category,
        (len(negative[0]), len(negative[1])),
        (len(positive[0]), len(positive[1])),
    )


def _halves(labels: np.ndarray, categories: Sequence[str | None], seed: int) -> np.ndarray:
    """Which prompts are of the first half."""
    strata = [(flag, name if flag else None) for flag, name in zip(labels.tolist(), categories, strict=True)]
    rng, first = np.random.default_rng(seed), np.zeros(len(strata), bool)
    for stratum in dict.fromkeys(strata):
        members = rng.permutation([i for i, one in enumerate(strata) if one == stratum])
        first[members[: -(-len(members) // 2)]] = True
    return first
