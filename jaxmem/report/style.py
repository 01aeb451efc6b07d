"""How figures look: one place for colours, sizes and the file format."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

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
