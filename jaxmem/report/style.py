"""How figures look: one place for colours, sizes and the file format."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

# Okabe and Ito's palette, distinguishable with every common colour vision deficiency.
MEMORIZED = "#D55E00"
GENERAL = "#0072B2"
REFERENCE = "#000000"
NEUTRAL = "#7F7F7F"
SEQUENTIAL = "cividis"

_RC: Any = {
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
}


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of the given size in inches, written to ``path`` at 160 dots per inch when the block ends.

    Figures are made without pyplot: no global state, no display, safe in threads and notebooks.
    """
    with mpl.rc_context(_RC):
        canvas = Figure(figsize=(width, height))
        yield canvas
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(path, dpi=160)
