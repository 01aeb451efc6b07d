"""A comparison as a table for the terminal."""

from pathlib import Path

import numpy as np
from rich.console import Console

from jaxmem.audit.training.records import WITH
from jaxmem.comparison.checkpoint import Spread
from jaxmem.comparison.result import Comparison
from jaxmem.memorization.verdicts import WORDS
from jaxmem.report.tables import print_path, print_table
from jaxmem.terminal import visible


def print_comparison(found: Comparison, paths: list[Path], console: Console) -> None:
    """Print images by verdict and the main numbers of each checkpoint, what is said of each series, and the files."""
    several = len(found.series) > 1
    names = ["series"] * several + ["step", *WORDS, "median ℓ2", "free directions", "AUC", "without a caption"]
    rows = []
    for one in found.checkpoints:
        numbers = [
            _number(Spread(one.distances.median)),
            _number(one.counts.get(("tangent-count", WITH))),
            _number(one.areas.get(("tangent-count", WITH))),
            f"{one.whatever.copies} of {one.whatever.drawn}",
        ]
        verdicts = [str(one.number[word]) for word in WORDS]
        rows.append([one.place.series] * several + [str(one.place.step), *verdicts, *numbers])
    title = f"{len(found.images)} training images by verdict, against the training steps; brackets: 95 %"
    print_table(title, names, rows, console, words="series" if several else "")
    for advice in found.advice:
        said = "no step to stop before" if advice.stop_before is None else f"stop before step {advice.stop_before}"
        name = f"{visible(advice.series)}: " if several else ""
        console.print(f"{name}{said}. {advice.reason}", highlight=False, markup=False)
    console.print("The page, and one row per image and run:", highlight=False)
    for path in paths:
        print_path(path, console)


def _number(found: Spread | None) -> str:
    if found is None or np.isnan(found.value):
        return ""
    return f"{found.value:.3g}" + ("" if np.isnan(found.low) else f" [{found.low:.3g}, {found.high:.3g}]")
