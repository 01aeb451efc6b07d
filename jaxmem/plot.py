"""Figures of results in one call each: a spectrum, counts against the timestep, a spectral density.

Each function draws into matplotlib axes, or makes some with pyplot where it gets none, and returns them:

    axes = jaxmem.plot.spectrum(found, sigma=schedule.sigma[281])
    axes.figure.savefig("spectrum.pdf")

Calls with the same axes draw over each other; give each a ``label`` and a ``color``. Labels that the axes already have
stay. Colours are Okabe and Ito's, which differ with every common colour vision deficiency.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from jaxmem.extras import require

require("audit", "plots")

import matplotlib as mpl  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

from jaxmem.memorization.standing import mean  # noqa: E402
from jaxmem.report.style import GENERAL, NEUTRAL, RC, REFERENCE, mean_and_range, residual_bars  # noqa: E402
from jaxmem.spectra.counting import Count  # noqa: E402
from jaxmem.spectra.density import Density  # noqa: E402
from jaxmem.spectra.methods import Dense  # noqa: E402
from jaxmem.spectra.result import Spectrum  # noqa: E402

_UNIT = r"$1/x^2$"  # of eigenvalues of a Hessian of log p(x)
_TWO_COLUMNS = 40  # characters of a label with which two columns of a legend are no wider than new axes


@contextmanager
def _drawing(ax: Axes | None, xlabel: str, ylabel: str, legend: bool) -> Iterator[Axes]:
    """The axes to draw into, with labels unless they have some, and a legend in the end."""
    if ax is not None and not isinstance(ax, Axes):
        raise ValueError(f"ax: expected matplotlib axes or None, got {type(ax).__name__}")
    with mpl.rc_context(RC if ax is None else {}):
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.figure(figsize=(5.6, 3.6)).subplots()
        yield ax
        ax.set_xlabel(ax.get_xlabel() or xlabel)
        ax.set_ylabel(ax.get_ylabel() or ylabel)
        labels = ax.get_legend_handles_labels()[1]
        if legend and labels:  # above the axes, where it hides nothing
            columns = 2 if len(labels) > 1 and max(map(len, labels)) <= _TWO_COLUMNS else 1
            ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns, frameon=False)


def spectrum(
    spectrum: Spectrum,
    ax: Axes | None = None,
    *,
    sigma: float | None = None,
    log: bool = False,
    label: str | None = None,
    color: str = GENERAL,
    marker: str = "o",
    legend: bool = True,
) -> Axes:
    """Eigenvalues against their rank, from the largest; of complex ones the real part.

    Eigenvalues of a dense method are a line; Ritz values are points with their residuals as bars. A batch is one faint
    line per point, without residuals, and the mean over the points. A grey band shows what rounding can have done to
    zero, ``±noise`` (the largest of a batch): signs within it are undecided.

    Args:
        spectrum: of one point, or of a batch.
        ax: axes to draw into; by default new ones.
        sigma: noise level of the points. Adds ``-1/sigma²``, below which no exact eigenvalue lies, and
            ``-1/(2 sigma²)``, above which the tangent count counts.
        log: logarithmic eigenvalue axis on both sides of zero; linear within ±noise, or within 1/10,000 of the largest
            absolute value where that is more.
        label: name in the legend.
        color: of line, points and bars.
        marker: of Ritz values.
        legend: whether to add a legend.

    Raises:
        ValueError: ``ax`` is no axes.
    """
    values, noise = np.asarray(spectrum.eigenvalues).real, float(np.max(spectrum.noise))
    dense = isinstance(spectrum.method, Dense)
    rank = np.arange(1, values.shape[-1] + 1)
    name = "eigenvalue" if dense else "Ritz value"
    part = "real part of the " if np.iscomplexobj(spectrum.eigenvalues) else ""
    with _drawing(ax, f"rank of the {name}, from the largest", f"{part}eigenvalue ({_UNIT})", legend) as ax:
        if values.ndim > 1:
            ax.plot(rank, values.T, color=color, lw=0.6, alpha=0.35)
            among = f"mean of {len(values)} points"
            ax.plot(rank, mean(values, 0), color=color, lw=2, label=f"{label}: {among}" if label else among)
        elif dense:
            ax.plot(rank, values, color=color, marker=marker if len(rank) <= 40 else "", ms=4, label=label)
        else:
            name = label or "Ritz values, bars: residuals"
            residual_bars(ax, values, spectrum.residuals, color=color, marker=marker, label=name)
        _reference_levels(ax, noise, sigma)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if log:
            scale = np.nanmax(np.abs(values))
            ax.set_yscale("symlog", linthresh=max(noise, scale / 10_000) or 1.0)
    return ax


def _reference_levels(ax: Axes, noise: float, sigma: float | None) -> None:
    """The zero line, the band of rounding, and the two levels that follow from sigma; once per axes."""
    drawn = ax.get_legend_handles_labels()[1]

    def once(name: str) -> dict[str, Any]:
        return {"label": None if name in drawn else name}

    ax.axhline(0, color=REFERENCE, lw=0.8)
    if noise:
        ax.axhspan(-noise, noise, color=NEUTRAL, alpha=0.3, lw=0, **once(f"rounding, ±{noise:.1g}"))
    if sigma is not None:
        bound = 1 / float(sigma) ** 2
        ax.axhline(-bound / 2, color=REFERENCE, lw=1, ls=":", **once(r"$-1/(2\sigma_t^2)$: free to move above"))
        ax.axhline(-bound, color=REFERENCE, lw=1, ls="--", **once(r"$-1/\sigma_t^2$: lower bound"))


def count_against_t(
    timesteps: Any,
    counts: Any,
    ax: Axes | None = None,
    *,
    label: str | None = None,
    color: str = GENERAL,
    marker: str = "o",
    legend: bool = True,
) -> Axes:
    """Numbers of eigenvalues against the timestep.

    Of `Count` the estimates with their 95 % intervals as bars, and the certified lower bounds where these are less. Of
    numbers for several points the mean as a line and the range as a band.

    Args:
        timesteps: shape (steps,).
        counts: a `Count` for each timestep, or numbers of shape (steps,) or (points, steps); NaN where there is none.
        ax: axes to draw into; by default new ones.
        label: name in the legend.
        color: of line, bars and band.
        marker: of each timestep.
        legend: whether to add a legend.

    Raises:
        ValueError: counts that are not one per timestep, or ``ax`` is no axes.
    """
    t = np.asarray(timesteps)
    style: dict[str, Any] = dict(color=color, marker=marker, ms=4)
    found = list(counts) if any(isinstance(count, Count) for count in counts) else None
    values = np.array([count.estimate for count in found] if found else counts, float)
    if t.ndim != 1 or values.ndim not in (1, 2) or values.shape[-1] != len(t):
        raise ValueError(
            f"counts: expected one per timestep, shape ({t.size},) or (points, {t.size}), got shape {values.shape}"
        )
    with _drawing(ax, "timestep t", "number of positive eigenvalues", legend) as ax:
        if found:
            low, high = np.array([count.interval for count in found]).T
            bars = np.maximum(np.stack([values - low, high - values]), 0)
            ax.errorbar(t, values, bars, capsize=3, elinewidth=1, label=label or "estimate, 95 % interval", **style)
            lower = np.array([count.lower for count in found])
            if (lower < values).any():
                ax.plot(t, lower, "_", color=color, ms=9, mew=1.5, label="certified lower bound")
        elif values.ndim == 1:
            ax.plot(t, values, label=label, **style)
        else:
            name = f"{label}: mean, range" if label else "mean, range"
            mean_and_range(ax, t, values, color=color, marker=marker, label=name)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def density(
    density: Density,
    ax: Axes | None = None,
    *,
    bins: int | None = 40,
    cumulative: bool = False,
    label: str | None = None,
    color: str = GENERAL,
    legend: bool = True,
) -> Axes:
    """Spectral density, the share of the eigenvalues per unit of λ; or its integral ``F(λ) = #{λ_i <= λ} / d``.

    Args:
        density: of `jaxmem.spectral_density`.
        ax: axes to draw into; by default new ones.
        bins: intervals of equal width that the density is averaged over; None for those of ``density.levels``.
            Intervals of less than 1/num_steps of the range show single Ritz values.
        cumulative: draw F instead, with a band of half the bounds' width and two standard errors on either side.
        label: name in the legend.
        color: of line and area.
        legend: whether to add a legend.

    Raises:
        ValueError: ``ax`` is no axes, or ``bins`` is below 1.
    """
    if bins is not None and bins < 1:
        raise ValueError(f"bins: expected at least 1, or None for the density's own levels, got {bins}")
    ylabel = r"share of eigenvalues $\leq\lambda$" if cumulative else r"density of eigenvalues ($x^2$)"
    with _drawing(ax, rf"eigenvalue $\lambda$ ({_UNIT})", ylabel, legend) as ax:
        if cumulative:
            error = density.width / 2 + 2 * density.standard_error
            low, high = np.clip(density.cumulative - error, 0, 1), np.clip(density.cumulative + error, 0, 1)
            ax.fill_between(
                density.levels, low, high, color=color, alpha=0.2, lw=0, label="bounds and 2 standard errors"
            )
            ax.plot(density.levels, density.cumulative, color=color, label=label)
        else:
            edges, below = density.levels, density.cumulative
            if bins is not None:
                edges = np.linspace(edges[0], edges[-1], bins + 1)
                below = np.interp(edges, density.levels, below)
            shares = np.diff(below) / np.diff(edges)
            ax.stairs(shares, edges, fill=True, color=color, alpha=0.25)
            ax.stairs(shares, edges, color=color, lw=1.5, label=label)  # from zero, which is a sticky edge
        ax.axvline(0, color=REFERENCE, lw=0.8)
        ax.margins(x=0)
    return ax
