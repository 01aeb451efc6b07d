"""How well a detector's scores tell memorized prompts from others: AUC, TPR at a bounded FPR, and their intervals.

Scores have shape (N, M), N prompts by M initial noises, or (N,). With ``per="point"`` every prompt × noise is one
example, which is what an auditor with one generation per prompt meets; with ``per="prompt"`` a prompt's score is its
mean over the noises, which is what published tables with n generations report. NaN is "not done" and left out. Which
direction means memorized is the detector's, fixed beforehand: labels are never flipped, and an AUC may be below 0.5
(released evaluations turn an AUC below 0.5 round, and take the TPR at the FPR nearest to 1 %, which may be above it).

What repeats is the prompt: the noises of one prompt are not independent, so intervals come from resampling prompts
with all their noises, memorized and other ones apart (their numbers were chosen, not drawn).
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxmem.extras import require
from jaxmem.memorization.bootstrap import interval, resampled_rates
from jaxmem.memorization.standing import End, sign_of

Per = Literal["point", "prompt"]  #: what one example is
# Of each kind, below which reports show no figure of detection. Two groups of n that have nothing to do with a measure
# are perfectly apart with a chance of 1 in C(2n, n): 1 in 6 for two, 1 in 20 for three, 1 in 70 for four, 1 in 252 for
# five. The best of the dozen measures of an audit is picked.
FEWEST_LABELS = 5
FPR_LIMITS = (0.01, 0.03)  #: as in the tables of Jeon et al. 2025, here as upper limits


class Roc(NamedTuple):
    """The curve of a detector over all thresholds, the strictest first."""

    fpr: np.ndarray
    tpr: np.ndarray
    thresholds: np.ndarray  #: in the detector's units; the first, which accepts nothing, is infinite


class Evaluation(NamedTuple):
    """What one detector achieves on labelled prompts. None is "not estimable"."""

    auc: float | None
    auc_interval: tuple[float, float] | None  #: 95 %
    tpr_at_1: float | None  #: the largest TPR with FPR ≤ 1 %
    tpr_at_3: float | None  #: the largest TPR with FPR ≤ 3 %
    tpr_intervals: tuple[tuple[float, float] | None, tuple[float, float] | None]  #: 95 %, of the two
    num_positive: int  #: examples: points or prompts, see ``per``
    num_negative: int
    num_positive_prompts: int
    num_negative_prompts: int


def roc(scores: Any, labels: Any, *, memorized_is: End) -> Roc:
    """The ROC curve of examples, every distinct score a threshold (ties are passed together); scikit-learn's.

    An example is called memorized if its score is at least (``memorized_is="high"``) or at most (``"low"``) the
    threshold.

    Args:
        scores: shape (n,), finite.
        labels: shape (n,), True is memorized; both kinds must be there.
        memorized_is: ``"high"`` or ``"low"``.

    Raises:
        ValueError: bad shapes, scores that are not finite, one kind of labels only, or an unknown direction.
        MissingExtra: scikit-learn, of jaxmem[audit], is not installed.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if scores.ndim != 1 or labels.shape != scores.shape or labels.dtype != bool or not np.isfinite(scores).all():
        raise ValueError(
            f"scores and labels: expected finite numbers and booleans of one shape (n,), got {scores.shape} and"
            f" {labels.shape} of {labels.dtype}, {int((~np.isfinite(scores)).sum())} scores not finite"
        )
    if labels.all() or not labels.any():
        raise ValueError(f"labels: expected both kinds, got {labels.sum()} memorized of {labels.size}")
    sign = sign_of(memorized_is)
    require("audit", "ROC curves")
    from sklearn import metrics

    # Points in between are kept: the last one within a limit may be one of them.
    fpr, tpr, thresholds = metrics.roc_curve(labels, sign * scores, drop_intermediate=False)
    return Roc(fpr, tpr, sign * thresholds)


def evaluate(
    scores: Any,
    labels: Any,
    *,
    memorized_is: End,
    per: Per = "point",
    seed: int = 0,
    num_resamples: int = 1000,
) -> Evaluation:
    """AUC and TPR at FPR ≤ 1 % and ≤ 3 % with bootstrap 95 % intervals.

    A TPR is the largest of all thresholds whose FPR is at most the limit, never the nearest. Where fewer than
    1/limit negatives are there, one false positive would break the limit and the rate is None; so is everything
    where one kind of label is missing, and an interval of fewer than two prompts of a kind.

    Intervals are percentiles of the resamples. Of simulated tables (30 + 45 prompts of four noises that share half
    their variance) 92.5 % of 1,000 held the true AUC, 96 % and 93 % of 300 the true rates at 1 % and 3 %; with the
    noises taken for independent it was 77 % for the AUC. Where all resamples agree, as for perfect separation, the
    interval has no width, which says nothing of prompts that were not drawn.

    Args:
        scores: shape (N, M) or (N,), NaN where not done.
        labels: shape (N,), True is memorized.
        memorized_is: ``"high"`` or ``"low"``, of the detector.
        per: ``"point"`` or ``"prompt"``; see the module. A prompt needs all its noises then.
        seed: of the resamples.
        num_resamples: 1,000 put the ends of an interval at the 25th smallest and largest.

    >>> found = evaluate([[3.0, 2.0], [4.0, 1.0], [1.0, 0.0]], np.array([True, True, False]), memorized_is="high")
    >>> found.auc, found.tpr_at_1, found.num_negative
    (0.9375, None, 2)

    Raises:
        ValueError: bad shapes, infinite scores, an unknown direction or ``per``, or no resamples.
    """
    scores, labels = as_prompts(scores, labels, per)
    sign = sign_of(memorized_is)
    there = ~np.isnan(scores)
    done, labels, scores = there.any(1), labels[there.any(1)], scores[there.any(1)]
    there = there[done]
    flags = np.broadcast_to(labels[:, None], scores.shape)[there]
    sizes = int(flags.sum()), int((~flags).sum())
    prompts = int(labels.sum()), int((~labels).sum())
    if min(sizes) == 0:
        return Evaluation(None, None, None, None, (None, None), *sizes, *prompts)
    curve = roc(scores[there], flags, memorized_is=memorized_is)
    limits = [limit if sizes[1] * limit >= 1 else None for limit in FPR_LIMITS]
    rates = [None if limit is None else float(curve.tpr[curve.fpr <= limit].max()) for limit in limits]
    auc_interval: Any = None
    intervals: list[Any] = [None, None]
    if min(prompts) >= 2:
        drawn = resampled_rates(sign * scores, labels, FPR_LIMITS, seed=seed, num_resamples=num_resamples)
        auc_interval = interval(drawn[:, 0])
        intervals = [None if rate is None else interval(drawn[:, 1 + i]) for i, rate in enumerate(rates)]
    auc = float(np.trapezoid(curve.tpr, curve.fpr))
    return Evaluation(auc, auc_interval, rates[0], rates[1], (intervals[0], intervals[1]), *sizes, *prompts)


def evaluate_categories(
    scores: Any,
    labels: Sequence[bool | None],
    categories: Sequence[str | None],
    *,
    memorized_is: End,
    per: Per = "point",
    seed: int = 0,
    num_resamples: int = 1000,
) -> dict[str, Evaluation]:
    """`evaluate` of all memorized prompts (``"all"``) and of each memorized category, always against all negatives.

    Prompts without a label are left out; those without a category count only in ``"all"``. Categories of negatives
    are not told apart. In the order in which they appear.

    Raises:
        ValueError: as `evaluate`, or if the lengths differ, or a category is called "all".
    """
    scores = np.asarray(scores, np.float64)
    if not len(scores) == len(labels) == len(categories):
        raise ValueError(
            f"labels and categories: expected one for each of {len(scores)} prompts, got {len(labels)} and"
            f" {len(categories)}"
        )
    labelled = np.array([one is not None for one in labels], bool)
    flags = np.array([bool(one) for one in labels], bool)
    names = dict.fromkeys(name for flag, name in zip(flags, categories, strict=True) if flag and name is not None)
    if "all" in names:
        raise ValueError("categories: expected another name than 'all', which is that of the total")

    def against_the_negatives(chosen: np.ndarray) -> Evaluation:
        chosen = labelled & (chosen | ~flags)
        options: Any = dict(memorized_is=memorized_is, per=per, seed=seed, num_resamples=num_resamples)
        return evaluate(scores[chosen], flags[chosen], **options)

    each = {name: against_the_negatives(np.array([one == name for one in categories], bool)) for name in names}
    return {"all": against_the_negatives(flags), **each}


def per_prompt(scores: Any) -> np.ndarray:
    """Mean over a prompt's noises, shape (N,); NaN where one of them is."""
    scores = np.asarray(scores, np.float64)
    return scores if scores.ndim == 1 else scores.mean(1)


def as_prompts(scores: Any, labels: Any, per: Per) -> tuple[np.ndarray, np.ndarray]:
    """Scores as (N, M) and labels as (N,), or a ValueError."""
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if per not in ("point", "prompt"):
        raise ValueError(f"per: expected 'point' or 'prompt', got {per!r}")
    if scores.ndim not in (1, 2) or labels.shape != scores.shape[:1] or labels.dtype != bool:
        raise ValueError(
            f"scores and labels: expected shapes (N, M) or (N,), and (N,) of booleans, got {scores.shape} and"
            f" {labels.shape} of {labels.dtype}"
        )
    if np.isinf(scores).any():
        raise ValueError(
            f"scores: expected finite numbers, or NaN where not done, got {np.isinf(scores).sum()} infinite"
        )
    if per == "prompt":
        scores = per_prompt(scores)
    return scores if scores.ndim == 2 else scores[:, None], labels
