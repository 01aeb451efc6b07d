"""How figures look: one place for colours, sizes, the file format, and what several figures draw alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxmem.memorization.standing import mean
from jaxmem.terminal import visible

# Okabe and Ito's palette, distinguishable with every common colour vision deficiency.
MEMORIZED = "#D55E00"
GENERAL = "#0072B2"
REFERENCE = "#000000"
NEUTRAL = "#7F7F7F"
SEQUENTIAL = "cividis"
CATEGORIES = (GENERAL, MEMORIZED, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

RC: Any = {
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.titlesize": 10,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "figure.constrained_layout.use": True,
    "mathtext.fontset": "dejavusans",
    "svg.hashsalt": "jaxmem",
}


def plain(text: str, length: int = 40) -> str:
    """Text that matplotlib shows as it is, in one line and shortened: a dollar sign would begin a formula."""
    text = " ".join(visible(text, keep="\n\t\r").split())
    return (text if len(text) <= length else text[: length - 1] + "…").replace("$", r"\$")


@contextmanager
def figure(target: Path | BytesIO, width: float, height: float) -> Iterator[Figure]:
    """A figure of the given size in inches, written when the block ends: a PNG file at 160 dpi, or SVG in memory.

    Figures are made without pyplot: no global state, no display, safe in threads and notebooks. Equal figures give
    equal bytes.
    """
    with mpl.rc_context(RC):
        canvas = Figure(figsize=(width, height))
        yield canvas
        if isinstance(target, BytesIO):
            canvas.savefig(target, dpi=160, format="svg", metadata={"Date": None})
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(target, dpi=160)


def mean_and_range(
    ax: Axes, x: np.ndarray, values: np.ndarray, *, color: str, marker: str = "o", label: str | None = None
) -> None:
    """Mean over the points, (points, steps), as a line and their range as a band; NaN is no value."""
    there = ~np.isnan(values).all(0)
    if not there.any():
        return
    x, values = x[there], values[:, there]
    ax.fill_between(x, np.nanmin(values, 0), np.nanmax(values, 0), color=color, alpha=0.18, lw=0)
    ax.plot(x, mean(values, 0), color=color, marker=marker, ms=4 if len(x) < 20 else 2.5, label=label)


def residual_bars(
    ax: Axes,
    values: np.ndarray,
    residuals: np.ndarray,
    *,
    color: str,
    marker: str = "o",
    filled: bool = True,
    label: str | None = None,
) -> None:
    """Ritz values against their rank as points, with their residuals as bars."""
    ax.errorbar(
        np.arange(1, len(values) + 1),
        values,
        yerr=residuals,
        fmt=marker,
        color=color,
        markersize=4,
        markerfacecolor=color if filled else "none",
        elinewidth=1,
        capsize=2,
        label=label,
    )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
