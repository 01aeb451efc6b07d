"""The figures of `jaxmem.experiments.finetune`: what the checkpoints give back."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxmem.report.style import CATEGORIES as COLOURS
from jaxmem.report.style import figure

_KINDS = {"single": "o-", "many": "s:"}
_SHOWN = 8  # captions with a single image


def draw(arrays: dict[str, np.ndarray], metrics: dict[str, Any], folder: Path) -> list[Path]:
    """Draw all figures of a finished run."""
    made = [folder / "returned.png", folder / "drawn.png"]
    _shares(metrics["returned"], made[0])
    _drawn(arrays, made[1])
    return made


def _shares(returned: dict[str, Any], path: Path) -> None:
    """The share of samples that are images which were trained on, against the steps."""
    with figure(path, 5.6, 3.4) as canvas:
        axis = canvas.subplots()
        for number, (way, table) in enumerate(returned.items()):
            for kind, style in _KINDS.items():
                shares = [row[kind] for row in table.values()]
                axis.plot(
                    [int(step) for step in table], shares, style, ms=4, color=COLOURS[number], label=f"{way}, {kind}"
                )
        axis.set(
            xlabel="steps of training", ylabel="samples that are training images", xscale="log", ylim=(-0.03, 1.03)
        )
        axis.legend(fontsize=8)


def _drawn(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Of captions with a single image the image, and what the checkpoints of all weights draw from one noise."""
    steps, drawn = arrays["full_steps"], arrays["full_drawn"][:, :, 0]
    shown = np.flatnonzero(arrays["kind"] == "single")[:_SHOWN]
    rows = [("training", arrays["example"]), *((f"{step} steps", drawn[k]) for k, step in enumerate(steps))]
    with figure(path, 0.95 * len(shown) + 0.6, 0.95 * len(rows)) as canvas:
        axes = canvas.subplots(len(rows), len(shown), squeeze=False)
        for row, (label, images) in enumerate(rows):
            axes[row, 0].set_ylabel(label, fontsize=8)
            for axis, c in zip(axes[row], shown, strict=True):
                axis.set(xticks=[], yticks=[])
                axis.imshow(images[c], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
