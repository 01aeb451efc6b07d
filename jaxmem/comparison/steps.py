"""Which checkpoint is it? The training step and the series of a run, from names or as given.

A series is one line of checkpoints, such as raw weights or their averages: runs whose names are equal where the step is
taken out, as ``checkpoint-*/unet`` and ``checkpoint-*/unet_ema``.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from jaxmem.runs.directory import Run

_STEP = re.compile(r"(?:checkpoint|ckpt|steps?|iter(?:ation)?|epoch)s?[-_ =.]?(\d+)", re.IGNORECASE)
_NUMBER = re.compile(r"\d+")


class Place(NamedTuple):
    """Where a run stands."""

    step: int
    series: str  #: its name; empty where there is nothing to tell apart


def places(runs: Sequence[Run], steps: Sequence[int] | None, series: Sequence[str] | None) -> list[Place]:
    """The place of each run: what is given; else the name of its network, its model or its folder, if it has a step.

    Raises:
        ValueError: a run without a step, another number of steps or series than runs, or two runs in one place.
    """
    for name, given in (("steps", steps), ("series", series)):
        if given is not None and len(given) != len(runs):
            raise ValueError(f"{name}: expected one for each of the {len(runs)} runs, got {len(given)}")
    if steps is not None and min(steps) < 0:
        raise ValueError(f"steps: expected training steps, 0 or more, got {min(steps)}")
    read = _given(runs, steps) if steps is not None else [_read(run) for run in runs]
    if nameless := [str(run.directory) for run, place in zip(runs, read, strict=True) if place is None]:
        raise ValueError(
            f"steps: expected a training step in the name of each run or of its model, such as checkpoint-500, got none"
            f" of {', '.join(nameless)}; give `steps`, one for each run"
        )
    found = [place for place in read if place is not None]
    if series is not None:
        found = [place._replace(series=name) for place, name in zip(found, series, strict=True)]
    _refuse_equal(found, runs)
    return found


def names_of(run: Run) -> list[str]:
    """What a run and its model are called, the most telling name first."""
    network = (run.manifest.get("model") or {}).get("unet_weights")
    model = (run.metrics().get("model") or "") if run.finished else ""
    # "stable-diffusion, LoRA checkpoint-500/…" are two names
    return [*([network] if network else []), *reversed(model.split(", ")), run.directory.resolve().name]


def _given(runs: Sequence[Run], steps: Sequence[int]) -> list[Place | None]:
    """Places of given steps: series by the first kind of name in which every run has its own step, else one series."""
    for names in zip(*([*reversed(names_of(run))] for run in runs), strict=False):  # folders first: all have one
        found = [_with_number(name, step) for name, step in zip(names, steps, strict=True)]
        if all(found):
            return list(found)
    return [Place(step, "") for step in steps]


def _with_number(name: str, step: int) -> Place | None:
    spans = [one.span() for one in _NUMBER.finditer(name) if int(one[0]) == step]
    return Place(step, _without(name, spans[0])) if spans else None


def _read(run: Run) -> Place | None:
    names = names_of(run)
    for name in names:
        if stepped := _STEP.search(name):
            return Place(int(stepped[1]), _without(name, stepped.span(1)))
    numbers = list(_NUMBER.finditer(names[-1]))
    return Place(int(numbers[0][0]), _without(names[-1], numbers[0].span())) if len(numbers) == 1 else None


def _without(name: str, span: tuple[int, int]) -> str:
    return f"{name[: span[0]]}*{name[span[1] :]}"


def _refuse_equal(found: Sequence[Place], runs: Sequence[Run]) -> None:
    there: dict[Place, Run] = {}
    for place, run in zip(found, runs, strict=True):
        if place in there:
            raise ValueError(
                f"runs: expected one run of each step of a series, got two of step {place.step}"
                f"{f' of {place.series}' if place.series else ''}, {there[place].directory} and {run.directory}; leave"
                f" one out, or tell them apart by `steps` or `series`"
            )
        there[place] = run
