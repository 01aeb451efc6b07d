"""Figures 1, 2a and 2b of the paper, and the errors of the learned Hessian, from a `toy2d` run."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.lines import Line2D

from jaxmem.report.style import GENERAL, MEMORIZED, NEUTRAL, REFERENCE, SEQUENTIAL, figure

COLOURS = (MEMORIZED, GENERAL)
NAMES = ("memorized sample", "general sample")
Arrays = dict[str, np.ndarray]


def landscapes(arrays: Arrays, path: Path) -> None:
    """Figure 1: log p_t around a general sample and around the duplicated point, on one scale."""
    offsets, t = arrays["landscape_offsets"], int(arrays["landscape_timestep"])
    surfaces = [arrays["landscape_general"], arrays["landscape_memorized"]]
    # Far from the point the log density falls without end; below this floor the shape no longer matters.
    top = max(surface.max() for surface in surfaces)
    floor = top - 60
    with figure(path, 7.2, 3.6) as canvas:
        axes = []
        for i, (surface, title) in enumerate(
            zip(surfaces, ("(a) general: a smooth surface", "(b) memorized: an isolated peak"), strict=True)
        ):
            axis: Any = canvas.add_subplot(1, 2, i + 1, projection="3d")
            x, y = np.meshgrid(offsets, offsets, indexing="ij")
            axis.plot_surface(
                x, y, np.maximum(surface, floor), cmap=SEQUENTIAL, vmin=floor, vmax=top, rcount=61, ccount=61, lw=0
            )
            axis.set(zlim=(floor, top), xlabel="offset in $x_1$", ylabel="offset in $x_2$", title=title)
            axis.set(xticks=(-1, 0, 1), yticks=(-1, 0, 1))
            axis.view_init(elev=24, azim=-55)
            axes.append(axis)
        bar = canvas.colorbar(ScalarMappable(Normalize(floor, top), SEQUENTIAL), ax=axes, shrink=0.6, pad=0.08)
        bar.set_label(f"log density at t = {t}")


def score_field(arrays: Arrays, path: Path) -> None:
    """Figure 2a: the learned score as arrows over the training points, with the two sampling paths."""
    points, grid, field = arrays["training_points"], arrays["field_grid"], arrays["second_order_field"]
    t = int(arrays["field_timestep"])
    length = np.linalg.norm(field, axis=1)
    with figure(path, 6.0, 4.8) as canvas:
        axis = canvas.add_subplot()
        axis.scatter(
            points[:, 0], points[:, 1], s=3, color=NEUTRAL, alpha=0.35, lw=0, label="training points", rasterized=True
        )
        # Arrows show the direction, their colour the magnitude: lengths would span three decades.
        unit = field / np.maximum(length, 1e-12)[:, None]
        arrows = axis.quiver(*grid.T, *unit.T, length, cmap=SEQUENTIAL, norm=LogNorm(), scale=38, width=0.0032)
        for trajectory, colour, name in zip(arrays["second_order_paths"], COLOURS, NAMES, strict=True):
            axis.plot(*trajectory.T, color=colour, lw=2, label=f"path of a {name}")
            axis.plot(*trajectory[0], "o", color=colour, ms=7, mec="white")
        axis.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
        bar = canvas.colorbar(arrows, ax=axis, shrink=0.85)
        bar.set_label(f"length of the learned score at t = {t}")
        canvas.legend(loc="outside upper center", ncols=3, markerscale=3)


def eigenvalues(arrays: Arrays, path: Path) -> None:
    """Figure 2b: both eigenvalues of the learned Hessian at every timestep, with the closed form."""
    found, exact = arrays["second_order_eigenvalues"], arrays["second_order_closed_form"]
    true = np.linalg.eigvalsh(exact)[..., ::-1]
    t = arrays["timestep"]
    with figure(path, 7.2, 3.4) as canvas:
        wide, zoom = canvas.subplots(1, 2)
        for axis in (wide, zoom):
            for p, colour in enumerate(COLOURS):
                axis.plot(t, found[p], color=colour, lw=1.6)
                axis.plot(t, true[p], color=REFERENCE, lw=0.9, ls=(0, (4, 3)))
            axis.axhline(0, color=NEUTRAL, lw=0.6)
            axis.set(xlabel="timestep t")
        wide.set(ylabel="eigenvalues of the Hessian", yscale="symlog", xlim=(0, 999))
        wide.set_yscale("symlog", linthresh=1)
        wide.set_title("all timesteps, logarithmic beyond ±1")
        near = t <= 150
        zoom.set(xlim=(0, 150), ylim=(true[0, 12].min(), max(5.0, found[1, near].max())))
        zoom.set_title("t ≤ 150, linear")
        handles = [
            *(Line2D([], [], color=c, label=n) for c, n in zip(COLOURS, NAMES, strict=True)),
            Line2D([], [], color=REFERENCE, lw=0.9, ls=(0, (4, 3)), label="closed form on the same path"),
        ]
        canvas.legend(handles=handles, loc="outside upper center", ncols=3)


def hessian_errors(metrics: dict[str, Any], path: Path) -> None:
    """Relative error of the learned Hessian on both paths, second-order against first-order training."""
    with figure(path, 7.2, 3.2) as canvas:
        axes = canvas.subplots(1, 2, sharey=True)
        for axis, which, name in zip(axes, ("memorized", "general"), NAMES, strict=True):
            for source, colour, label in (
                (metrics, GENERAL, "second-order loss"),
                (metrics["first_order"], MEMORIZED, "first-order loss only"),
            ):
                table = source["hessian_rel_error"]
                axis.plot([int(t) for t in table], [row[which] for row in table.values()], color=colour, label=label)
            axis.set(xlabel="timestep t", yscale="log", title=f"path of a {name}", xlim=(0, 999))
            axis.grid(axis="y", lw=0.4)
        axes[0].set_ylabel("‖learned − exact‖ / ‖exact‖")
        canvas.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)


def draw(arrays: Arrays, metrics: dict[str, Any], folder: Path) -> list[Path]:
    """All figures of a run."""
    paths = [
        folder / name
        for name in ("figure1_landscapes.png", "figure2a_scores.png", "figure2b_eigenvalues.png", "hessian_errors.png")
    ]
    landscapes(arrays, paths[0])
    score_field(arrays, paths[1])
    eigenvalues(arrays, paths[2])
    hessian_errors(metrics, paths[3])
    return paths
