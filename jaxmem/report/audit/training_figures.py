"""The figure of the looks at training images: each measure, of training and of held-out images."""

from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from jaxmem.audit.training.found import LookFound, TrainingFound
from jaxmem.audit.training.records import WITH
from jaxmem.memorization.verdicts import WORDS, Word
from jaxmem.report.audit.figures import PANELS, Drawing, drawing
from jaxmem.report.style import GENERAL, MEMORIZED, NEUTRAL, plain

#: Colour and marker of a verdict.
SHOWN: dict[Word, tuple[str, str]] = {
    "reproduced": (MEMORIZED, "D"),
    "isolated": ("#CC79A7", "s"),
    "no sign": ("#009E73", "o"),
    "not decided": (NEUTRAL, "^"),
}


def looks(found: TrainingFound) -> list[Drawing]:
    """One panel per measure at the latest timestep: every image as a point, by its verdict; held-out ones beside."""
    drawings: list[Drawing] = []
    look = found.looks.get(WITH)
    if look is None:
        return drawings
    chosen = [d for d in look.leads if look.detectors[d].timestep == look.judged][:PANELS]
    values = look.scores.mean(1)
    chosen = [d for d in chosen if np.isfinite(values[:, d]).any()]
    if not chosen:
        return drawings
    groups = _groups(found)
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    words = "Measures at noised images, by verdict: " + ", ".join(look.detectors[d].title for d in chosen)
    with drawing(drawings, words, max(2.6 * columns, 6.4), 2.7 * rows + 0.5) as canvas:
        axes = canvas.subplots(rows, columns, squeeze=False).ravel()
        for axis in axes[len(chosen) :]:
            axis.set_axis_off()
        for axis, d in zip(axes, chosen, strict=False):
            _panel(axis, look, d, values[:, d], groups)
        handles = [
            Line2D([], [], color=colour, marker=marker, ls="", ms=5, label=f"{name} ({members.sum()})")
            for name, members, colour, marker in groups
        ]
        canvas.legend(handles=handles, loc="outside upper center", ncols=min(5, len(handles)))
    return drawings


def _groups(found: TrainingFound) -> list[tuple[str, np.ndarray, str, str]]:
    """Held-out images, then training images by verdict: name, members, colour, marker."""
    held_out = np.array([record.held_out for record in found.records])
    words = np.array([verdict.word for verdict in found.verdicts] + [""] * int(held_out.sum()))
    groups = [("held out", held_out, GENERAL, "o")] if held_out.any() else []
    groups += [(word, words == word, *SHOWN[word]) for word in reversed(WORDS) if (words == word).any()]
    return groups


def _panel(axis: Any, look: LookFound, d: int, values: np.ndarray, groups: list[Any]) -> None:
    random, detector = np.random.default_rng(0), look.detectors[d]  # only moves points sideways
    for place, (_, members, colour, marker) in enumerate(groups):
        there = values[members][np.isfinite(values[members])]
        x = place + random.uniform(-0.28, 0.28, len(there))
        axis.plot(x, there, marker, color=colour, ms=3.5, alpha=0.6, mew=0, rasterized=len(there) > 400)
        if len(there):
            axis.hlines(np.median(there), place - 0.3, place + 0.3, color="black", lw=1.4, zorder=3)
    axis.set_xticks([])
    shown = values[np.isfinite(values)]
    if detector.is_count:
        axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    elif shown.min() > 0 and shown.max() > 20 * shown.min():
        axis.set_yscale("log")
    elif np.abs(shown).max() > 10:
        axis.set_yscale("symlog", linthresh=1)
    axis.minorticks_off()
    axis.set_title(f"{plain(detector.title, 34)}\nmemorized is {detector.memorized_is}", fontsize=9)
    axis.set_ylabel("count" if detector.is_count else "score", fontsize=9)
