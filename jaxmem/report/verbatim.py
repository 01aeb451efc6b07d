"""The figures of `jaxmem.experiments.verbatim`: the paper's, counts beside exact ones, and from when on one sees it."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxmem.audit import read_audit
from jaxmem.report import paper
from jaxmem.report.style import CATEGORIES as COLOURS
from jaxmem.report.style import NEUTRAL, figure

_KINDS = ("none", "matching", "template")
_COURSE = {
    "positive-count": "positive count",
    "tangent-count": "tangent count",
    "largest-sum": "sum of the largest",
    "trace": "trace",
    "eps-difference": "‖ε_c − ε_u‖",
}


def draw(arrays: dict[str, np.ndarray], metrics: dict[str, Any], folder: Path) -> list[Path]:
    """Draw all figures of a finished run."""
    audit = read_audit(folder.parent / "audit")
    blank = np.full((1, *arrays["example"].shape[1:]), 0, np.uint8)
    training = np.concatenate([arrays["example"], np.repeat(blank, len(audit.prompts) - len(arrays["example"]), 0)])
    made = paper.draw(audit, folder, training)
    made += [folder / "counts.png", folder / "course.png", folder / "returned.png"]
    _counts(metrics["counts"], made[-3])
    _course(metrics["course"], made[-2])
    _returned(arrays, audit, made[-1])
    return made


def _counts(table: dict[str, Any], path: Path) -> None:
    """Mean counts of each category with 95 % intervals, of the model (filled) and of the training sets (open)."""
    timesteps = np.array([int(t) for t in table])
    with figure(path, 8.4, 3.4) as canvas:
        for axis, what in zip(canvas.subplots(1, 2), ("positive", "tangent"), strict=True):
            for number, kind in enumerate(_KINDS):
                for name, style, label in ((what, "o-", kind), (f"{what}_of_training_set", "s:", None)):
                    mean = np.array([table[str(t)][kind][name][0] for t in timesteps])
                    low, high = np.array([table[str(t)][kind][name][1] for t in timesteps]).T
                    fill = {"mfc": "white"} if label is None else {}
                    shift = 6 * (number - 1)
                    axis.errorbar(
                        timesteps + shift,
                        mean,
                        (mean - low, high - mean),
                        fmt=style,
                        color=COLOURS[number],
                        ms=4,
                        capsize=2,
                        label=label,
                        **fill,
                    )
            axis.plot([], [], "s:", color=NEUTRAL, mfc="white", label="the caption's training set, exact")
            axis.set(xlabel="timestep t", ylabel=f"{what} eigenvalues of 256", yscale="symlog", ylim=(-0.3, None))
            axis.legend(fontsize=8)


def _course(course: dict[str, Any], path: Path) -> None:
    """AUC of each statistic over the sampling steps, matching and template against none."""
    with figure(path, 9.0, 3.5) as canvas:
        axes = canvas.subplots(1, 2, sharey=True)
        for axis, kind in zip(axes, _KINDS[1:], strict=True):
            for number, (name, label) in enumerate(_COURSE.items()):
                timesteps, values = (np.array(part, float) for part in zip(*course[name][kind], strict=True))
                marker = "" if len(timesteps) > 20 else "o"
                axis.plot(timesteps, values, marker=marker, ms=4, color=COLOURS[number % len(COLOURS)], label=label)
            axis.axhline(0.95, color=NEUTRAL, lw=0.8, ls=":")
            axis.set(xlabel="timestep t (sampling runs from right to left)", title=f"{kind} against none")
        axes[0].set_ylabel("AUC")
        axes[0].legend(fontsize=8, loc="lower left")


def _returned(arrays: dict[str, np.ndarray], audit: Any, path: Path) -> None:
    """Of ten matching captions the training image and what four noises give, with the distance."""
    members = paper.categories(audit)["matching"][:10]
    noises = audit.images.shape[1]
    with figure(path, 9.5, 1.05 * (noises + 1) + 0.3) as canvas:
        axes = canvas.subplots(noises + 1, len(members), squeeze=False)
        for column, n in enumerate(members):
            for row, axis in enumerate(axes[:, column]):
                axis.set(xticks=[], yticks=[])
                image = arrays["example"][n] if row == 0 else audit.images[n, row - 1]
                axis.imshow(image, cmap="gray", interpolation="nearest")
                if row:
                    axis.set_xlabel(f"{arrays['own_distance'][n, row - 1]:.1f}", fontsize=8, labelpad=1)
        for row in range(noises + 1):
            axes[row, 0].set_ylabel("training" if row == 0 else f"noise {row}", fontsize=8)
