"""Figures 3, 4 and 5 of the paper, and the distances behind "clearly new", from an `mnist` run."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from jaxmem.memorization.sharpness import positive_count, tangent_count
from jaxmem.report.style import GENERAL, MEMORIZED, NEUTRAL, figure, mean_and_range

Arrays = dict[str, np.ndarray]


def _names(arrays: Arrays) -> tuple[int, int]:
    memorized = np.asarray(arrays["memorized"], bool)
    return int(arrays["label"][~memorized][0]), int(arrays["label"][memorized][0])


def samples(arrays: Arrays, path: Path) -> None:
    """Figure 3: the training image that was repeated, generated memorized samples, and kept general ones."""
    general, memorized = _names(arrays)
    analysed, is_memorized = arrays["analysed"], np.asarray(arrays["memorized"], bool)
    columns = 12
    rows = [
        (analysed[is_memorized][:columns], "samples", f"digit {memorized}: generated", MEMORIZED),
        (analysed[~is_memorized][:columns], "samples", f"digit {general}: generated, clearly new", GENERAL),
        (analysed[~is_memorized][:columns], "nearest_image", "the nearest training image of each", NEUTRAL),
    ]
    with figure(path, 8.4, 3.0) as canvas:
        layout: Any = canvas.subfigures(1, 2, width_ratios=[1.5, columns])
        left = layout[0].add_subplot()
        left.imshow(arrays["training_memorized"], cmap="gray", vmin=-1, vmax=1)
        left.set_title(f"the {memorized} in the\ntraining set", color=MEMORIZED)
        left.set_axis_off()
        for axis, (indices, source, title, colour) in zip(layout[1].subplots(len(rows), 1), rows, strict=True):
            axis.imshow(_strip(arrays[source][indices], columns), cmap="gray", vmin=-1, vmax=1)
            axis.set_title(title, color=colour, loc="left")
            axis.set_axis_off()


def _strip(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """Images side by side with white gaps, filled up to a number of columns."""
    height, width = images.shape[1:]
    strip = np.ones((height, columns * (width + gap) - gap))
    for i, image in enumerate(images):
        strip[:, i * (width + gap) : i * (width + gap) + width] = image
    return strip


def _chosen(arrays: Arrays, most: int = 5) -> np.ndarray:
    """Columns of a few timesteps, spread over those analysed, descending towards t = 0."""
    t = arrays["timestep"]
    return np.unique(np.linspace(0, len(t) - 1, min(most, len(t))).round().astype(int))[::-1]


def spectra(arrays: Arrays, path: Path) -> None:
    """Figure 4: sorted eigenvalues of every sample at selected timesteps, and the 80 largest."""
    eigenvalues, is_memorized = arrays["eigenvalues"], np.asarray(arrays["memorized"], bool)
    general, memorized = _names(arrays)
    columns = _chosen(arrays)
    groups = [(eigenvalues[~is_memorized], GENERAL), (eigenvalues[is_memorized], MEMORIZED)]
    with figure(path, 2.1 * len(columns) + 0.6, 4.6) as canvas:
        axes = canvas.subplots(2, len(columns), squeeze=False)
        for c, column in enumerate(columns):
            for row, most in ((0, eigenvalues.shape[-1]), (1, min(80, eigenvalues.shape[-1]))):
                axis, rank = axes[row, c], np.arange(1, most + 1)
                for values, colour in groups:
                    part = values[:, column, :most]
                    axis.plot(rank, part[:12].T, color=colour, lw=0.4, alpha=0.3)
                    axis.plot(rank, part.mean(0), color=colour, lw=2)
                axis.axhline(0, color="black", lw=0.7)
                axis.margins(x=0)
                axis.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True)
            axes[0, c].set_title(f"t = {arrays['timestep'][column]}")
            axes[1, c].set_xlabel("rank of the eigenvalue")
        axes[0, 0].set_ylabel("eigenvalue, all")
        axes[1, 0].set_ylabel("eigenvalue, 80 largest")
        handles = [
            Line2D([], [], color=GENERAL, lw=2, label=f"digit {general}, not memorized: mean"),
            Line2D([], [], color=MEMORIZED, lw=2, label=f"digit {memorized}, memorized: mean"),
            Line2D([], [], color=NEUTRAL, lw=0.6, label="single samples"),
        ]
        canvas.legend(handles=handles, loc="outside upper center", ncols=3)


def counts(arrays: Arrays, path: Path) -> None:
    """Figure 5, and the tangent count beside it: counts against the timestep, mean and range."""
    is_memorized, t = np.asarray(arrays["memorized"], bool), arrays["timestep"]
    general, memorized = _names(arrays)
    panels = [
        (positive_count(arrays["eigenvalues"]), "positive eigenvalues of the Hessian", "positive count (the paper)"),
        (
            tangent_count(arrays["eigenvalues"], arrays["sigma"]),
            "eigenvalues above $-1/(2\\sigma_t^2)$",
            "tangent count: directions free to move",
        ),
    ]
    with figure(path, 7.6, 3.3) as canvas:
        for axis, (values, label, title) in zip(canvas.subplots(1, 2), panels, strict=True):
            for mask, colour, name, marker in (
                (~is_memorized, GENERAL, f"digit {general}, not memorized", "o"),
                (is_memorized, MEMORIZED, f"digit {memorized}, memorized", "s"),
            ):
                mean_and_range(axis, t, values[mask], color=colour, marker=marker, label=f"{name}: mean, range")
            # Most of the change is at small t, where a linear axis has no room.
            axis.set_xscale("symlog", linthresh=10, linscale=0.5)
            ticks = [tick for tick in (0, 10, 20, 50, 100, 200, 500, 1000) if tick <= max(t.max(), 10)]
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.minorticks_off()
            axis.set(xlabel="timestep t", ylabel=label, title=title)
            axis.set_ylim(bottom=min(-0.5, -0.02 * values.max()))
        canvas.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=2)


def distances(arrays: Arrays, path: Path) -> None:
    """Calibrated ℓ2 distances of all samples, with the threshold of "clearly new"."""
    general, memorized = _names(arrays)
    copied = arrays["sample_label"] == memorized
    values, threshold = arrays["calibrated_l2"], float(arrays["threshold"])
    bins = np.linspace(0, max(2.0, values.max()), 50).tolist()
    with figure(path, 6.4, 3.0) as canvas:
        axis = canvas.add_subplot()
        axis.hist(values[~copied], bins, color=GENERAL, alpha=0.75, label=f"digit {general}, not memorized")
        axis.hist(values[copied], bins, color=MEMORIZED, alpha=0.75, label=f"digit {memorized}, memorized")
        axis.axvline(threshold, color="black", ls="--", lw=1, label=f"clearly new: at least {threshold:g}")
        axis.set(xlabel="calibrated ℓ2 distance to the training set (copies are near 0)", ylabel="samples")
        canvas.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=3)


def draw(arrays: Arrays, metrics: dict[str, Any], folder: Path) -> list[Path]:
    """All figures of a run."""
    del metrics
    drawers = {
        "figure3_samples.png": samples,
        "figure4_spectra.png": spectra,
        "figure5_counts.png": counts,
        "calibrated_l2.png": distances,
    }
    for name, drawer in drawers.items():
        drawer(arrays, folder / name)
    return [folder / name for name in drawers]
