"""How many eigenvalues lie above a level, from a first Lanczos run, what it deflated, and runs on what was left.

*The interval* assumes nothing about the spectrum. A run from a random vector bounds the vector's mass above the level
from both sides (`jaxmem.spectra.quadrature`); the mass of a random direction on K of d dimensions is
Beta(K/2, (d - K)/2); so the counts that make the observed bounds improbable are known, and what is left is the
interval. It is as wide as the runs fail to resolve the level, and no smoothness is made up where they do. Two things
are approximate: the mean of n such masses is taken for one Beta (exact for n = 1), and the weight of the first run
against the others is chosen from the data. For the second the ends are at 1.25 % each, half of what is promised.

*The estimate* does assume: that the density is smooth but for a jump at the level. There the middle of a quadrature's
bounds is off by a share of their width, and that share hardly depends on the number of steps. A run of m steps contains
the runs of fewer: a line through its estimates against their widths, one slope for all vectors, meets width 0 at the
count. With it go the number of steps that each vector gets, and nothing else.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.special

from jaxmem.spectra.quadrature import Tridiagonal, mass_above

# Error probability of each end. The two together are half of the 5 % that is promised: the weights of the runs come
# from the widths of their bounds, which are not quite independent of the masses.
_TAIL = 0.0125
_NORMAL = 2.24  # the normal quantile of that tail; only the weights depend on it
_QUANTILES = (np.arange(200) + 0.5) / 200  # of one mass, which a probability is averaged over

# Shares of a run's steps whose estimates the line against the widths is drawn through.
_SHARES = (0.4, 0.55, 0.75, 1.0)
# Standard error of the slope, which can be ±0.5: what was seen with the spectra of benchmarks/counting.py.
_SLOPE_ERROR = 0.02
_FALLING = 0.6  # of the width at the first share, which 1/m would bring to 0.4, is left at the last: the line holds
_UNIFORM = 12**-0.5  # standard deviation of what may be anywhere between bounds, in widths
# Steps that a vector gets if there are so many: a line through what fewer steps say is off by more than it mends. Of 16
# spectra (d = 4,096, 39 and 80 steps) ten had errors 1.1 to 3 times as large with 13 steps as with 26; of the others
# only a null space had clearly smaller ones, and is unresolved with either.
_FEWEST = 25
_NEARLY = 1.05  # of the smallest squared error expected: of vectors that give this, as few, with as many steps


class Estimate(NamedTuple):
    """A number of eigenvalues above a level."""

    lower: int  #: certified
    estimate: float
    interval: tuple[float, float]  #: 95 %


class Runs(NamedTuple):
    """What the Lanczos runs on one operator of size d said."""

    size: int  #: d
    first: Tridiagonal
    ritz_values: np.ndarray  #: of the first run, descending
    taken: int  #: of them deflated
    level: float  #: above which they lie
    coupling: float  #: of what was left (see `jaxmem.spectra.deflation`)
    margin: float  #: how far beyond a level an eigenvalue of what was left must be, to be certain
    probes: list[Tridiagonal]  #: runs from fresh vectors on what was left


def combine(runs: Runs, level: float) -> Estimate:
    """Estimate, 95 % interval and bound for the number of eigenvalues above a level.

    What was left after deflation at one level is, at a lower one, short of a multiple of one projection, so of at most
    one eigenvalue: that is added to the upper end.
    """
    values = [probe.values() for probe in runs.probes]
    certain = max((int((found > level + runs.margin).sum()) for found in values), default=0)
    lower = max(int((runs.ritz_values > level).sum()), runs.taken + certain)
    # Only of the first run: rounding lets the others find the value that deflation gives to what it took.
    upper = max(runs.size - int((runs.ritz_values <= level).sum()), lower)
    estimate = _estimate(runs, level) if any((found > level).any() for found in values) else float(lower)
    low, high, middle = _interval(runs, level, float(np.clip(estimate, lower, upper)))
    high += level < runs.level and runs.coupling > runs.level
    low, high = (min(max(end, lower), upper) for end in (low, high))
    if not low <= estimate <= high:  # the density is not what the estimate takes it for
        estimate = float(np.clip(middle, low, high))
    return Estimate(lower, float(estimate), (float(low), float(high)))


def _interval(runs: Runs, level: float, guess: float) -> tuple[int, int, float]:
    """The counts that do not make the bounds of the masses improbable, and the middle of these bounds.

    ``guess``, a count, decides the weights of the runs.

    With the weight w, ``T = w d μ + (1 - w) (taken + (d - taken) mean(ν))`` of the first vector's mass μ and the fresh
    ones' ν has the mean K. T is not known, but is between the values that the lower and the upper bounds give. For each
    K its distribution is, and grows with K: an end is where the tail falls below what is allowed. At least what was
    deflated is there.
    """
    size, taken, count = runs.size, runs.taken, len(runs.probes)
    rest = size - taken
    first = size * np.array(_bounds(runs.first, level))
    fresh = taken + rest * np.mean([_bounds(probe, level) for probe in runs.probes], 0)
    # Where nothing seems to be left the others say so alone: any share of the first run would only blur that.
    variances = _variance(guess, size), _variance(guess - taken, rest) / count if guess > taken else 0.0
    weights = np.linspace(0, 1, 5)  # few: the less they tell of the masses
    half = (weights * np.ptp(first) + (1 - weights) * np.ptp(fresh)) / 2
    half += _NORMAL * np.sqrt(weights**2 * variances[0] + (1 - weights) ** 2 * variances[1])
    weight = float(weights[np.argmin(half)])
    low, high = weight * first + (1 - weight) * fresh

    def at_most(value: float, count_above: int) -> float:
        """The probability of T ≤ value if so many eigenvalues are above the level."""
        if weight == 0:
            return float(_mass_at_most((value - taken) / rest, count_above - taken, rest, count))
        if weight == 1:
            return float(_mass_at_most(value / size, count_above, size, 1))
        others = (value - weight * size * _mass_quantiles(count_above, size)) / (1 - weight)
        return float(_mass_at_most((others - taken) / rest, count_above - taken, rest, count).mean())

    slack = 1e-9 * size  # T is a sum of float64 weights
    highest = _last(lambda k: at_most(high + slack, k) >= _TAIL, taken, size)
    lowest = size - _last(lambda k: 1 - at_most(low - slack, size - k) >= _TAIL, 0, rest)
    return lowest, highest, (low + high) / 2


def _last(holds: Callable[[int], bool], first: int, last: int) -> int:
    """The largest integer from first to last up to which it holds; first if nowhere."""
    while first < last:
        middle = (first + last + 1) // 2
        first, last = (middle, last) if holds(middle) else (first, middle - 1)
    return first


def _bounds(run: Tridiagonal, level: float) -> tuple[float, float]:
    middle, width = mass_above(run, level)
    return middle - width / 2, middle + width / 2


def _variance(count: float, size: int) -> float:
    """Of one vector's estimate of how many of ``size`` there are: ``2 K (1 - K/d) d/(d + 2)``; at least for one."""
    count = min(max(count, 1.0), size - 1.0)
    return 2 * count * (1 - count / size) * size / (size + 2)


def _mass_at_most(value: Any, count: int, size: int, vectors: int) -> Any:
    """P(the mean mass of ``vectors`` random directions on ``count`` of ``size`` dimensions ≤ value).

    The mean of n of Beta(K/2, (d - K)/2) is taken for Beta(n K/2, n (d - K)/2): the mean is the same, the variance
    nearly ((n d + 2) for n (d + 2)), and so is the tail near 0, that of a sum of n K squares.
    """
    if count <= 0 or count >= size:
        return np.where(value >= (count > 0), 1.0, 0.0)
    return scipy.special.betainc(vectors * count / 2, vectors * (size - count) / 2, np.clip(value, 0, 1))


def _mass_quantiles(count: int, size: int) -> np.ndarray:
    if count <= 0 or count >= size:
        return np.full(len(_QUANTILES), float(count > 0))
    return scipy.special.betaincinv(count / 2, (size - count) / 2, _QUANTILES)


def _estimate(runs: Runs, level: float) -> float:
    """The first run's own estimate and that of the others, which are independent, averaged by their errors."""
    size, taken, count = runs.size, runs.taken, len(runs.probes)
    rest = size - taken
    curves = np.stack([_curve(probe, rest, level, len(probe.diagonal)) for probe in runs.probes])
    longest = max(len(probe.diagonal) for probe in runs.probes)
    (fresh, error), (own, own_error) = (
        _extrapolated(curves),
        _extrapolated(_curve(runs.first, size, level, longest)[None]),
    )
    ours = _variance(fresh, rest) / count + error**2
    others = _variance(taken + max(fresh, 1.0), size) + own_error**2
    return (others * (taken + fresh) + ours * own) / (ours + others)


def _curve(run: Tridiagonal, size: int, level: float, steps: int) -> np.ndarray:
    """Estimates and widths, in eigenvalues, after shares of ``steps`` steps of a run: shape (shares, 2)."""
    lengths = [max(1, round(share * steps)) for share in _SHARES]
    return size * np.array([mass_above(run.first(length), level) for length in lengths])


def _slope(curves: np.ndarray) -> float:
    """One slope of estimates against widths, for runs that each have their own count: curves (runs, shares, 2)."""
    centred = curves - curves.mean(1, keepdims=True)
    square = np.sum(centred[..., 1] ** 2)
    # Beyond ±1/2 the count would be outside the bounds of the quadrature.
    return float(np.clip(np.sum(centred[..., 0] * centred[..., 1]) / square, -0.5, 0.5)) if square > 0 else 0.0


def _extrapolated(curves: np.ndarray) -> tuple[float, float]:
    """The mean count at width 0, and the standard error that the extrapolation adds to it.

    Where widths do not fall like 1/m, or faster, an eigenvalue of high multiplicity sits at the level, or a cluster
    that m steps do not split: then the bounds are all that is known.
    """
    first, last = curves[:, 0].mean(0), curves[:, -1].mean(0)
    error = _SLOPE_ERROR if last[1] < _FALLING * first[1] else _UNIFORM
    return float(last[0] - _slope(curves) * last[1]), error * float(last[1])


def probe_steps(runs: Runs, level: float, left: int, signs_known: bool) -> int:
    """How many of the ``left`` steps each fresh vector should get, as far as the first run can tell.

    ``signs_known``: no Ritz value above the level is nearer to it than its residual.
    """
    most = len(runs.first.diagonal)
    best = _extrapolated(_curve(runs.first, runs.size, level, most)[None])[0]
    if left < 2 * _FEWEST or (signs_known and best - runs.taken <= 2 * (2 * (runs.taken + 1)) ** 0.5):
        return left  # perhaps nothing is left: one long run sees best whether that is so
    numbers = np.unique(np.geomspace(2, left // _FEWEST, 12).astype(int))
    lengths = left // numbers
    found = [
        _extrapolated(_curve(runs.first, runs.size, level, min(length, most))[None]) for length in lengths.tolist()
    ]
    bias = np.maximum.accumulate(
        [abs(count - best) for count, _ in found]
    )  # small by chance at one length is not small
    errors = bias**2 + np.array([error for _, error in found]) ** 2 + _variance(best - runs.taken, runs.size) / numbers
    return int(lengths[np.argmax(errors <= _NEARLY * errors.min())])
