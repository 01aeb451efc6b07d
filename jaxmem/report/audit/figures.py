"""The figures of an audit, as SVG in memory: scores by category, spectra, counts, ROC curves."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from jaxmem.memorization import evaluation
from jaxmem.memorization.standing import mean
from jaxmem.report.audit.view import AuditView, Group
from jaxmem.report.style import CATEGORIES, NEUTRAL, figure, mean_and_range, plain

PANELS = 6  # statistics in one figure, so that a page of paper holds it


class Drawing(NamedTuple):
    """An image file and what it shows, in words for those who do not see it."""

    svg: bytes
    alternative: str


@contextmanager
def drawing(into: list[Drawing], alternative: str, width: float, height: float) -> Iterator[Any]:
    stream = BytesIO()
    with figure(stream, width, height) as canvas:
        yield canvas
    into.append(Drawing(stream.getvalue(), alternative))


def _legend(canvas: Any, groups: list[Group], *more: Line2D) -> None:
    handles = [
        Line2D([], [], color=g.colour, marker=g.marker, ms=5, label=f"{plain(g.name, 28)} ({g.members.sum()})")
        for g in groups
    ]
    canvas.legend(handles=[*handles, *more], loc="outside upper center", ncols=min(4, len(handles) + len(more)))


def balanced(items: list[Any], most: int) -> list[list[Any]]:
    """As few parts of at most ``most`` items as there can be, of about equal length."""
    number = -(-len(items) // most)
    return [items[len(items) * i // number : len(items) * (i + 1) // number] for i in range(number)]


def distributions(view: AuditView) -> list[Drawing]:
    """One panel per statistic: every prompt's mean score as a point, by group, at each timestep it was taken at."""
    drawings: list[Drawing] = []
    statistics: dict[str, list[int]] = {}
    for d, detector in enumerate(view.detectors):
        if (~np.isnan(view.scores[:, d])).any():
            statistics.setdefault(detector.statistic, []).append(d)
    for part in balanced(list(statistics.values()), PANELS):
        columns = min(3, len(part))
        rows = -(-len(part) // columns)
        words = "Scores by group of prompts, for " + ", ".join(_title(view, those) for those in part)
        with drawing(drawings, words, max(3.1 * columns, 6.4), 2.5 * rows + 0.4) as canvas:
            axes = canvas.subplots(rows, columns, squeeze=False).ravel()
            for axis in axes[len(part) :]:
                axis.set_axis_off()
            for axis, those in zip(axes, part, strict=False):
                strips(axis, view, those)
            _legend(canvas, view.groups)
    return drawings


def _title(view: AuditView, those: list[int]) -> str:
    """Title of a panel: that of its detector, or of several without the timestep or steps in which they differ."""
    first = view.detectors[those[0]]
    end = ", " if first.timestep is None else ", t = "
    return first.title if len(those) == 1 else first.title.partition(end)[0]


def strips(axis: Any, view: AuditView, those: list[int]) -> None:
    """Points, quartiles (bar) and median (black) of each group at each of some detectors of one statistic."""
    random = np.random.default_rng(0)  # only moves points sideways, apart from each other
    first, number = view.detectors[those[0]], len(view.groups)
    width = 0.8 / number
    for g, group in enumerate(view.groups):
        values = view.scores[group.members][:, those]  # (prompts, detectors)
        centres = np.arange(len(those)) + (g - (number - 1) / 2) * width
        seen = ~np.isnan(values).all(0)
        if not seen.any():
            continue
        low, middle, high = np.nanquantile(values[:, seen], (0.25, 0.5, 0.75), axis=0)
        axis.vlines(centres[seen], low, high, color=group.colour, lw=5, alpha=0.3)
        x = centres + width * random.uniform(-0.3, 0.3, values.shape)
        dense = {"rasterized": values.size > 400}
        axis.plot(x.ravel(), values.ravel(), group.marker, color=group.colour, ms=3, alpha=0.6, mew=0, **dense)
        axis.hlines(middle, centres[seen] - width / 3, centres[seen] + width / 3, color="black", lw=1.4, zorder=3)
    axis.set_xlim(-0.55, len(those) - 0.45)
    several = len(those) > 1
    if first.timestep is not None:
        named = _chosen(len(those), 6).tolist()
        axis.set_xticks(named, [str(view.detectors[those[place]].timestep) for place in named])
        axis.set_xlabel("timestep t", fontsize=9)
    elif several:
        axis.set_xticks(range(len(those)), [str(view.detectors[d].steps) for d in those])
        axis.set_xlabel("sampling steps", fontsize=9)
    else:
        axis.set_xticks([])
    shown = view.scores[:, those][~np.isnan(view.scores[:, those])]
    if first.is_count:
        axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, -0.5), max(high, 1))
    elif shown.min() > 0 and shown.max() > 100 * shown.min():
        axis.set_yscale("log")
    elif first.timestep is not None and np.abs(shown).max() > 10:
        axis.set_yscale("symlog", linthresh=1)  # eigenvalues grow as 1/σ²
    axis.minorticks_off()
    title = "\n".join(plain(line) for line in wrap(_title(view, those), 34)[:2])
    axis.set_title(f"{title}\nmemorized is {first.memorized_is}", fontsize=9)
    axis.set_ylabel("count" if first.is_count else "score", fontsize=9)


def _chosen(number: int, most: int = 4) -> np.ndarray:
    return np.unique(np.linspace(0, number - 1, min(most, number)).round().astype(int))


def spectra(view: AuditView) -> list[Drawing]:
    """Sorted eigenvalues times sigma² by group at up to four timesteps, and the largest of them enlarged."""
    drawings: list[Drawing] = []
    chosen, length = _chosen(len(view.result.spectral_timesteps)), view.scaled.shape[-1]
    what = "eigenvalue" if view.result.method == "eigh" else "Ritz value"
    zoom = min(length, max(20, length // 10))
    rows = 2 if zoom < length else 1
    steps = ", ".join(str(t) for t in view.result.spectral_timesteps[chosen])
    words = f"Sorted {what}s by group at timesteps {steps}; in the text and tables as counts"
    with drawing(drawings, words, max(2.35 * len(chosen), 4.4), 2.2 * rows + 0.6) as canvas:
        axes = canvas.subplots(rows, len(chosen), squeeze=False)
        for column, k in enumerate(chosen):
            for row in range(rows):
                axis, shown = axes[row, column], (length, zoom)[row]
                rank = np.arange(1, shown + 1)
                for group in view.groups:
                    values = view.scaled[group.members][:, :, k, :shown]
                    values = values.reshape(-1, shown)
                    single = [np.column_stack([rank, one]) for one in values[:30]]
                    axis.add_collection(
                        LineCollection(single, colors=group.colour, lw=0.4, alpha=0.35, rasterized=True)
                    )
                    axis.plot(rank, mean(values, 0), color=group.colour, lw=2)
                axis.axhline(0, color="black", lw=0.7)
                axis.axhline(-0.5, color="black", lw=0.7, ls=":")
                axis.margins(x=0.01)
            axes[0, column].set_title(f"t = {view.result.spectral_timesteps[k]}")
            axes[-1, column].set_xlabel(f"rank of the {what}")
        for row in range(rows):
            axes[row, 0].set_ylabel(f"σ² × {what}" + ("" if row == 0 else f"\nthe {zoom} largest"))
        _legend(canvas, view.groups, Line2D([], [], color="black", lw=0.9, ls=":", label="above: free to move"))
    return drawings


def counts(view: AuditView) -> list[Drawing]:
    """Positive and tangent counts over the timesteps by group: mean, and the range over prompts and noises."""
    panels = [
        (view.counts["tangent"], "above −1/(2σ²)", "tangent count: directions free to move"),
        (view.counts["positive"], "above 0 (beyond rounding)", "positive count (the paper)"),
    ]
    what = "eigenvalues" if view.exact else "Ritz values (at least as many eigenvalues)"
    drawings: list[Drawing] = []
    words = "Tangent and positive counts over timesteps, mean and range by group"
    with drawing(drawings, words, 8.4, 3.4) as canvas:
        for axis, (values, label, title) in zip(canvas.subplots(1, 2), panels, strict=True):
            _over_time(axis, view, view.result.spectral_timesteps, values)
            axis.set(ylabel=f"{what}\n{label}", title=title)
        _legend(canvas, view.groups)
    return drawings


def guidance(view: AuditView) -> list[Drawing]:
    """The difference that the prompt makes to the predicted noise, over the sampling steps, by group."""
    drawings: list[Drawing] = []
    with drawing(drawings, "Norm of the difference of predicted noises over timesteps, by group", 6.4, 3.2) as canvas:
        axis = canvas.subplots()
        _over_time(axis, view, view.result.timesteps, view.result.eps_difference)
        axis.set_ylabel("‖ε(x, prompt) − ε(x, no prompt)‖\n(latent units)")
        _legend(canvas, view.groups)
    return drawings


def _over_time(axis: Any, view: AuditView, t: np.ndarray, values: np.ndarray) -> None:
    for group in view.groups:
        part = values[group.members].reshape(-1, values.shape[-1])
        mean_and_range(axis, t, part, color=group.colour, marker=group.marker)
    axis.set_xlabel("timestep t (noise at the right, image at the left)")
    axis.xaxis.label.set_fontsize(9)


def roc(view: AuditView) -> list[Drawing]:
    """ROC curves of one detector per family over all prompts and noises, and the part of few false alarms enlarged."""
    drawings: list[Drawing] = []
    if min(view.memorized.sum(), (view.labelled & ~view.memorized).sum()) < evaluation.FEWEST_LABELS:
        return drawings
    with drawing(drawings, "ROC curves; their areas are in the table of detectors", 8.4, 3.7) as canvas:
        left, right = canvas.subplots(1, 2)
        for place, d in enumerate(view.leads):
            values = view.result.scores[view.labelled][:, :, d]
            truth = np.broadcast_to(view.memorized[view.labelled, None], values.shape)
            there = ~np.isnan(values)
            if len(np.unique(truth[there])) < 2:
                continue
            detector = view.detectors[d]
            curve = evaluation.roc(values[there], truth[there], memorized_is=detector.memorized_is)
            style = {
                "color": CATEGORIES[place],
                "ls": ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 2)))[place],
            }
            for axis in (left, right):
                axis.plot(curve.fpr, curve.tpr, label=plain(detector.title, 48), lw=1.8, **style)
        left.plot([0, 1], [0, 1], color=NEUTRAL, lw=0.8)
        left.set(title="all", xlim=(-0.01, 1.01))
        right.set(title="few false alarms", xlim=(-0.0005, 0.1))
        for rate in (0.01, 0.03):
            right.axvline(rate, color=NEUTRAL, lw=0.8, ls=":")
        for axis in (left, right):
            axis.set(xlabel="false positive rate", ylabel="true positive rate", ylim=(-0.01, 1.02))
        canvas.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return drawings
