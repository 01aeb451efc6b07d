"""The figure of a comparison: images by verdict, distances, counts and areas against the training steps."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

from jaxmem.audit.training.records import WITH, WITHOUT
from jaxmem.comparison.checkpoint import HELD_OUT, Checkpoint, Spread
from jaxmem.comparison.result import Comparison
from jaxmem.memorization.verdicts import COPY, WORDS, Word
from jaxmem.report.audit.figures import Drawing, drawing
from jaxmem.report.audit.training_figures import SHOWN
from jaxmem.report.style import CATEGORIES, NEUTRAL, plain

LETTERS: dict[Word, str] = {"reproduced": "R", "isolated": "I", "no sign": "–", "not decided": "?"}
AREAS = {"tangent-count": "tangent count", "denoising-error": "error of denoising"}  #: those that are drawn, in words
_LINES = {WITH: ("-", "with caption"), WITHOUT: ("--", "without caption"), HELD_OUT: (":", "held out, with caption")}
_MARKERS = "osD^vP"
_WIDE = 30  # times that the largest step is the smallest, from which the axis of steps is logarithmic
_ROW = 3  # panels
_MOST_TICKS = 5
_SMALL: dict[str, Any] = dict(
    fontsize=7.5, handlelength=2.2, labelspacing=0.25, frameon=True, framealpha=0.7, edgecolor="none"
)

Panel = Callable[[Any, Comparison], None]


def against_steps(found: Comparison) -> list[Drawing]:
    """Bars of verdicts for each series, and below them a panel for each measure that is there."""
    drawings: list[Drawing] = []
    panels = [panel for panel, there in _PANELS if there(found)]
    number = len(found.series)
    tops, rows = -(-number // _ROW), -(-len(panels) // _ROW)
    words = "Against the training steps: images by verdict, the share reproduced, distances, counts and areas"
    with drawing(drawings, words, 8.6, 2.5 * tops + 2.5 * rows + 0.6) as canvas:
        heights = [2.5 * tops + 0.2, 2.5 * rows + 0.4]
        upper, lower = canvas.subfigures(2, 1, height_ratios=heights) if panels else (canvas, None)
        axes = upper.subplots(tops, min(number, _ROW), squeeze=False).ravel()
        for axis in axes[number:]:
            axis.set_axis_off()
        for axis, (name, checkpoints) in zip(axes, found.series.items(), strict=False):
            _bars(axis, checkpoints, plain(name, 34) if number > 1 else "images by verdict")
        axes[0].set_ylabel("training images")
        patches = [Patch(color=SHOWN[word][0], label=f"{LETTERS[word]}  {word}") for word in WORDS]
        upper.legend(handles=patches, loc="outside upper center", ncols=4)
        if lower is None:
            return drawings
        axes = lower.subplots(rows, min(len(panels), _ROW), squeeze=False).ravel()
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        for axis, draw in zip(axes, panels, strict=False):
            draw(axis, found)
            _steps(axis, found)
        if number > 1:
            lines = [
                Line2D([], [], color=colour, marker=marker, ms=4, label=plain(name, 34))
                for (name, _), (colour, marker) in zip(found.series.items(), _styles(found), strict=True)
            ]
            lower.legend(handles=lines, loc="outside upper center", ncols=min(number, _ROW))
    return drawings


def _bars(axis: Any, checkpoints: Sequence[Checkpoint], title: str) -> None:
    """Stacked by verdict, the worst at the bottom, each with its letter and number where it is tall enough."""
    places, total = np.arange(len(checkpoints)), len(checkpoints[0].words)
    bottom = np.zeros(len(checkpoints))
    for word in WORDS:
        numbers = np.array([one.number[word] for one in checkpoints])
        axis.bar(places, numbers, 0.72, bottom, color=SHOWN[word][0], edgecolor="white", lw=0.5)
        for x, y, height in zip(places, bottom, numbers, strict=True):
            if height >= 0.09 * total and len(checkpoints) <= 12:
                label = f"{LETTERS[word]} {height}" if len(checkpoints) <= 6 else str(height)
                axis.text(x, y + height / 2, label, ha="center", va="center", color="white", fontsize=8)
        bottom = bottom + numbers
    axis.set_xticks(places, [str(one.place.step) for one in checkpoints], rotation=45 if len(places) > 6 else 0)
    axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.set(title=title, xlabel="training step")


def _styles(found: Comparison) -> list[tuple[str, str]]:
    return [(CATEGORIES[i % len(CATEGORIES)], _MARKERS[i % len(_MARKERS)]) for i in range(len(found.series))]


def _lines(axis: Any, found: Comparison, value: Callable[[Checkpoint], Spread], style: str = "-") -> None:
    """One line for each series, with the intervals as bars; what is NaN is left out."""
    steps = [one.place.step for one in found.checkpoints]
    apart = 0.012 * (max(steps) - min(steps))  # so that bars of several series are seen
    for i, (checkpoints, (colour, marker)) in enumerate(zip(found.series.values(), _styles(found), strict=True)):
        there = [(one.place.step, value(one)) for one in checkpoints if np.isfinite(value(one).value)]
        if not there:
            continue
        x, y = np.array([step + i * apart for step, _ in there]), np.array([spread.value for _, spread in there])
        ends = np.array([[spread.value - spread.low, spread.high - spread.value] for _, spread in there]).T
        kept = {"color": colour, "marker": marker, "ms": 4, "lw": 1.5, "elinewidth": 0.9, "capsize": 2}
        axis.errorbar(x, y, yerr=np.maximum(np.nan_to_num(ends), 0), ls=style, **kept)


def _steps(axis: Any, found: Comparison) -> None:
    steps = sorted({one.place.step for one in found.checkpoints})
    positive = [step for step in steps if step > 0]
    if positive and positive[-1] > _WIDE * positive[0]:
        axis.set_xscale("symlog", linthresh=positive[0])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_minor_formatter(NullFormatter())
    places = axis.transScale.transform([(step, 0) for step in steps])[:, 0]
    chosen = [0]
    for i in range(1, len(steps)):  # numbers that would touch the one before are left out
        if places[i] - places[chosen[-1]] >= (places[-1] - places[0]) / _MOST_TICKS / 1.5:
            chosen.append(i)
    axis.set_xticks([steps[i] for i in chosen], [str(steps[i]) for i in chosen])
    axis.set_xlabel("training step", fontsize=9)
    axis.title.set_fontsize(9)


def _share(axis: Any, found: Comparison) -> None:
    _lines(axis, found, lambda one: Spread(*(100 * x for x in one.share)))
    axis.set(title="images reproduced", ylabel="% of the images [95 %]")
    _from_zero(axis)


def _distances(axis: Any, found: Comparison) -> None:
    for checkpoints, (colour, marker) in zip(found.series.values(), _styles(found), strict=True):
        there = [one for one in checkpoints if one.distances.number]
        x = [one.place.step for one in there]
        axis.fill_between(
            x,
            [one.distances.lower for one in there],
            [one.distances.upper for one in there],
            color=colour,
            alpha=0.18,
            lw=0,
        )
        axis.plot(x, [one.distances.median for one in there], color=colour, marker=marker, ms=4)
        axis.plot(x, [one.distances.smallest for one in there], color=colour, ls=":", lw=1.2)
    axis.axhline(COPY, color="black", lw=0.8, ls="--")
    axis.set(title="generations to their nearest image", ylabel="calibrated ℓ2")
    _from_zero(axis)
    _key(axis, [("-", "median, quartiles"), (":", "smallest")], black=[("--", f"copy: ≤ {COPY}")])


def _counts(statistic: str, title: str) -> Panel:
    def draw(axis: Any, found: Comparison) -> None:
        drawn = []
        for look, (style, words) in _LINES.items():
            if any((statistic, look) in one.counts for one in found.checkpoints):
                _lines(axis, found, partial(_count, key=(statistic, look)), style)
                drawn.append((style, words))
        judged = next(one.judged for one in found.checkpoints if one.judged is not None)
        axis.set(title=f"{title}, t = {judged}", ylabel="mean over images [95 %]")
        _from_zero(axis)
        _key(axis, drawn)

    return draw


def _areas(axis: Any, found: Comparison) -> None:
    drawn = []
    for (statistic, words), style in zip(AREAS.items(), ("-", "--"), strict=True):
        if any((statistic, WITH) in one.areas for one in found.checkpoints):
            _lines(axis, found, partial(_area, key=(statistic, WITH)), style)
            drawn.append((style, words))
    axis.axhline(0.5, color=NEUTRAL, lw=0.8, ls=":")
    axis.set(title="training or held out, at the images", ylabel="AUC [95 %]")
    axis.set_ylim(min(axis.get_ylim()[0], 0.4), 1.04)
    _key(axis, drawn)


def _without_caption(axis: Any, found: Comparison) -> None:
    _lines(axis, found, lambda one: Spread(one.whatever.copies))
    drawn = max(one.whatever.drawn for one in found.checkpoints)
    axis.set(title="generations without a caption", ylabel=f"return an image, of {drawn}")
    _from_zero(axis)
    axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def _from_zero(axis: Any) -> None:
    """Show zero, with room for markers at both ends."""
    top = max(axis.dataLim.y1, 1.0)
    axis.set_ylim(-0.03 * top, 1.06 * top)


def _key(axis: Any, lines: Sequence[tuple[str, str]], black: Sequence[tuple[str, str]] = ()) -> None:
    """A small legend of the styles of lines, whose colours are those of the series."""
    both = [*((*line, "#444444") for line in lines), *((*line, "black") for line in black)]
    if len(both) > 1:
        handles = [Line2D([], [], ls=style, color=colour, lw=1.2, label=words) for style, words, colour in both]
        axis.legend(handles=handles, **_SMALL)


def _count(one: Checkpoint, key: tuple[str, str]) -> Spread:
    return one.counts.get(key, _NONE)


def _area(one: Checkpoint, key: tuple[str, str]) -> Spread:
    return one.areas.get(key, _NONE)


_NONE = Spread(float("nan"))
_PANELS: list[tuple[Panel, Callable[[Comparison], bool]]] = [
    (_share, lambda found: any(one.drawn for one in found.checkpoints)),
    (_distances, lambda found: any(one.distances.number for one in found.checkpoints)),
    (
        _counts("tangent-count", "free directions at the images"),
        lambda found: any(("tangent-count", WITH) in one.counts for one in found.checkpoints),
    ),
    (
        _counts("positive-count", "positive eigenvalues there"),
        lambda found: any(("positive-count", WITH) in one.counts for one in found.checkpoints),
    ),
    (_areas, lambda found: any((name, WITH) in one.areas for one in found.checkpoints for name in AREAS)),
    (_without_caption, lambda found: any(one.whatever.drawn for one in found.checkpoints)),
]
