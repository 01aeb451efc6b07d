"""How many eigenvalues lie above a level, from a first Lanczos run, what it deflated, and runs on what was left.

*Bias.* Where the density jumps at the level, the middle of a quadrature's bounds is off by a share of their width, and
that share hardly depends on the number of steps. A run of M steps contains the runs of fewer: a line through its
estimates against their widths, one slope for all vectors, meets width 0 at the count.

*Variance.* It is known: the mass of a random direction on K of d dimensions is Beta(K/2, (d - K)/2), so one vector
estimates K with variance 2 K (1 - K/d) d/(d + 2), and no scatter of a handful of estimates has to be trusted.
"""

from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.stats

from jaxmem.spectra.quadrature import Tridiagonal, mass_above, top_pair

# Shares of a run's steps whose estimates the line against the widths is drawn through.
_SHARES = (0.4, 0.55, 0.75, 1.0)
# Standard error of the slope, which can be ±0.5: what was seen with the spectra of benchmarks/counting.py.
_SLOPE_ERROR = 0.02
_NORMAL = 1.96  # 95 %


class Estimate(NamedTuple):
    """A number of eigenvalues above a level."""

    lower: int  #: certified
    estimate: float
    interval: tuple[float, float]  #: 95 %


class Runs(NamedTuple):
    """What the Lanczos runs on one operator of size d said."""

    size: int  #: d
    first: Tridiagonal
    ritz_values: np.ndarray  #: of the first run
    taken: int  #: of them deflated
    margin: float  #: how far beyond a level an eigenvalue of what was left must be, to be certain
    probes: list[Tridiagonal]  #: runs from fresh vectors on what was left


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


def _extrapolated(curves: np.ndarray) -> tuple[np.ndarray, float]:
    """Counts at width 0 per run, and the standard error that the extrapolation adds to their mean."""
    counts = curves[:, -1, 0] - _slope(curves) * curves[:, -1, 1]
    first, last = curves[:, 0, 1].mean(), curves[:, -1, 1].mean()
    # Widths fall like 1/m, or faster. Where they do not, an eigenvalue of high multiplicity sits at the level, or a
    # cluster that m steps do not split: then the bounds are all that is known.
    error = _SLOPE_ERROR if last < 0.6 * first else 0.5 / _NORMAL
    return counts, error * last


def probe_steps(runs: Runs, level: float, left: int, signs_known: bool) -> int:
    """How many of the ``left`` steps each fresh vector should get, as far as the first run can tell.

    ``signs_known``: no Ritz value above the level is nearer to it than its residual.
    """
    most = len(runs.first.diagonal)
    best = _extrapolated(_curve(runs.first, runs.size, level, most)[None])[0][0]
    if signs_known and best - runs.taken <= 2 * (2 * (runs.taken + 1)) ** 0.5:
        return left  # perhaps nothing is left: one long run sees best whether that is so
    lengths = np.unique(np.geomspace(min(20, most), most, 12).astype(int))
    found = [_extrapolated(_curve(runs.first, runs.size, level, length)[None]) for length in lengths.tolist()]
    bias = np.abs(np.array([counts[0] for counts, _ in found]) - best)
    bias = np.maximum.accumulate(bias[::-1])[::-1]  # small by chance at one length is not small
    errors = np.array([error for _, error in found])
    variance = 2 * max(best - runs.taken, 1.0) / np.maximum(left // lengths, 0.5)
    return int(lengths[np.argmin(bias**2 + errors**2 + variance)])


def combine(runs: Runs, level: float) -> Estimate:
    """Estimate, 95 % interval and bound for the number of eigenvalues above a level.

    The first run's own estimate, of variance 2 K, and that of the others, of variance 2 (K - taken) / probes, are
    independent, and are averaged by these.
    """
    size, first, ritz_values, taken, margin, probes = runs
    values = [probe.values() for probe in probes]
    certain = max((int((found > level + margin).sum()) for found in values), default=0)
    lower = max(int((ritz_values > level).sum()), taken + certain)
    if not any((found > level).any() for found in values):
        return Estimate(lower, float(lower), (float(lower), float(lower + _hidden(runs, level))))
    rest = size - taken
    curves = np.stack([_curve(probe, rest, level, len(probe.diagonal)) for probe in probes])
    counts, error = _extrapolated(curves)
    own, own_error = _extrapolated(_curve(first, size, level, max(len(probe.diagonal) for probe in probes))[None])

    def variances(count: float) -> tuple[float, float]:
        left, count = min(max(count - taken, 0.0), rest), min(max(count, 0.0), size)
        return (
            2 * left * (1 - left / rest) / len(probes) + error**2,
            2 * count * (1 - count / size) + own_error**2,
        )

    ours, others = variances(taken + max(float(counts.mean()), 1.0))
    weight = ours / max(ours + others, 1e-300)
    estimate = (1 - weight) * (taken + float(counts.mean())) + weight * float(own[0])

    def distance(count: float) -> float:
        """Of the estimate from a count, in standard errors that the estimate would have if that were the truth."""
        ours, others = variances(count)
        return (estimate - count) / max(((1 - weight) ** 2 * ours + weight**2 * others) ** 0.5, 1e-12)

    # The score interval: the counts that the estimate is not improbably far from.
    low, high = 0.0, float(size)
    if distance(low) > _NORMAL:
        low = scipy.optimize.brentq(lambda count: distance(count) - _NORMAL, low, estimate)
    if distance(high) < -_NORMAL:
        high = scipy.optimize.brentq(lambda count: distance(count) + _NORMAL, estimate, high)
    low = max(float(low), float(lower))
    return Estimate(lower, float(max(estimate, lower)), (low, max(float(high), low)))


def _hidden(runs: Runs, level: float) -> int:
    """How many eigenvalues may be so close above the level that no fresh vector has seen them, with 95 %.

    They are among those that the largest Ritz value of what is left cannot be told from. Of these there are taken to be
    as many per unit as among the five lowest that were found, or half of what lies so near the level on either side,
    which the middle of a quadrature's bounds is: the larger.
    """
    tops = [top_pair(probe) for probe in runs.probes if len(probe.diagonal)]
    unseen = min((value + residual - level for value, residual in tops), default=0.0)
    found = np.sort(runs.ritz_values[runs.ritz_values > level])[:5] - level
    reach = found[-1] if len(found) else np.abs(runs.ritz_values).max(initial=0.0)
    if unseen <= 0 or reach <= 0:
        return 0
    near = (runs.size - runs.taken) * min(mass_above(probe, level).middle for probe in runs.probes)
    return int(scipy.stats.poisson.ppf(0.95, max((len(found) + 1) * unseen / reach, near)))
