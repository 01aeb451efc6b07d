"""Bootstrap over prompts: a resample takes a prompt with all its noises, or leaves all of them out."""

from collections.abc import Sequence
from typing import Any

import numpy as np

_CHUNK = 1_000_000  # numbers in a block of resamples, 8 MB


def interval(drawn: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled values."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def mean_interval(scores: Any, *, seed: int = 0, num_resamples: int = 1000) -> tuple[float, tuple[float, float]]:
    """Mean of all scores that are not NaN, and its bootstrap 95 % interval over prompts.

    Args:
        scores: shape (N, M) or (N,), NaN where not done.
        seed: of the resamples.
        num_resamples: 1,000 put the ends of an interval at the 25th smallest and largest.

    Raises:
        ValueError: another shape, infinite scores, fewer than two prompts with a score, or no resamples.
    """
    scores = np.asarray(scores, np.float64)
    _check_resamples(num_resamples)
    if scores.ndim not in (1, 2) or np.isinf(scores).any():
        raise ValueError(
            f"scores: expected finite numbers or NaN, shape (N, M) or (N,), got shape {scores.shape} with"
            f" {np.isinf(scores).sum()} infinite"
        )
    scores = scores.reshape(len(scores), -1)
    there = ~np.isnan(scores)
    sums, counts = np.where(there, scores, 0).sum(1)[there.any(1)], there.sum(1)[there.any(1)]
    if counts.size < 2:
        raise ValueError(f"scores: expected two prompts or more with a score, got {counts.size}")
    drawn = np.random.default_rng(seed).integers(len(counts), size=(num_resamples, len(counts)))
    return float(sums.sum() / counts.sum()), interval(sums[drawn].sum(1) / counts[drawn].sum(1))


def resampled_rates(
    scores: np.ndarray, labels: np.ndarray, limits: Sequence[float], *, seed: int = 0, num_resamples: int = 1000
) -> np.ndarray:
    """AUC, and the largest TPR with FPR ≤ each limit, of resampled prompts: shape (resamples, 1 + limits).

    ROC curves of examples with whole weights, those of their prompts. Memorized prompts and others are drawn apart:
    each kind keeps its number.

    Args:
        scores: shape (N, M), high is memorized, NaN where not done; every prompt has one score at least.
        labels: shape (N,), both kinds.
        limits: of the FPR.
        seed: of the resamples.
        num_resamples: how many.

    Memory: about 60 MB for blocks of resamples, and 8 bytes times the resamples times the prompts.

    Raises:
        ValueError: no resamples.
    """
    _check_resamples(num_resamples)
    rng, there = np.random.default_rng(seed), ~np.isnan(scores)
    weights = np.zeros((num_resamples, len(labels)))
    for kind in (True, False):
        members = np.flatnonzero(labels == kind)
        weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), num_resamples)
    prompt = np.broadcast_to(np.arange(len(labels))[:, None], scores.shape)[there]
    values = scores[there]
    order = np.argsort(-values, kind="stable")
    prompt, values = prompt[order], values[order]
    last = np.flatnonzero(np.append(values[1:] != values[:-1], True))  # equal scores are passed together
    chunk = max(1, _CHUNK // len(values))
    return np.concatenate(
        [_curves(weights[i : i + chunk], prompt, labels[prompt], last, limits) for i in range(0, num_resamples, chunk)]
    )


def _curves(
    weights: np.ndarray, prompt: np.ndarray, positive: np.ndarray, last: np.ndarray, limits: Sequence[float]
) -> np.ndarray:
    weights = weights[:, prompt]
    true, false = (np.cumsum(weights * kind, 1)[:, last] for kind in (positive, ~positive))
    tpr, fpr = true / true[:, -1:], false / false[:, -1:]
    corner = np.zeros((len(weights), 1))
    tpr, fpr = np.hstack([corner, tpr]), np.hstack([corner, fpr])
    auc = (np.diff(fpr, axis=1) * (tpr[:, 1:] + tpr[:, :-1]) / 2).sum(1)
    return np.stack([auc, *(np.where(fpr <= limit, tpr, 0).max(1) for limit in limits)], 1)


def _check_resamples(num_resamples: int) -> None:
    if num_resamples < 1:
        raise ValueError(f"num_resamples: expected at least 1, got {num_resamples}")
