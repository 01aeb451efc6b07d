"""Estimates of local dimension beside the true one, as a figure."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxmem.report.style import CATEGORIES, NEUTRAL, figure

MARKS = ("o", "s", "^", "D", "v", "P", "x", "+", "*")


def draw(arrays: dict[str, np.ndarray], _metrics: dict[str, Any], folder: Path) -> list[Path]:
    """One panel for each manifold: estimates over the true dimension, point by point."""
    names, truth, estimators = (arrays[name] for name in ("manifold", "dimension", "estimator"))
    relative = arrays["estimates"] / truth[:, None, None]
    path = folder / "dimension.png"
    folder.mkdir(exist_ok=True)
    with figure(path, 10.0, 6.0) as canvas:
        axis = canvas.add_subplot()
        axis.axhline(1, color=NEUTRAL, lw=1)
        width = 0.8 / len(estimators)
        for e, estimator in enumerate(estimators):
            places = np.arange(len(names)) + (e - (len(estimators) - 1) / 2) * width
            mean, spread = relative[:, e].mean(-1), relative[:, e].std(-1, ddof=1)
            axis.errorbar(
                places, mean, spread, fmt=MARKS[e], color=CATEGORIES[e % len(CATEGORIES)], ms=5, lw=1, label=estimator,
                mfc="none" if e >= len(CATEGORIES) else None,
            )  # fmt: skip
        axis.set_xticks(np.arange(len(names)), [f"{name}\n({k})" for name, k in zip(names, truth, strict=True)])
        axis.tick_params(axis="x", rotation=45)
        axis.set(ylabel="estimate / true dimension, mean and spread over points", ylim=(0, 2.2))
        axis.legend(ncols=3, loc="upper left")
    return [path]
