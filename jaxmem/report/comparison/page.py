"""One page about a comparison of checkpoints: a single file for screen and paper that loads nothing from anywhere."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmem import __version__
from jaxmem.comparison import onset
from jaxmem.comparison.checkpoint import Checkpoint, Spread
from jaxmem.comparison.result import Comparison
from jaxmem.memorization import verdicts
from jaxmem.memorization.chance import level_of
from jaxmem.memorization.verdicts import Verdict
from jaxmem.report.audit.page import SIZE, environment, number, style_and_script, with_size
from jaxmem.report.audit.pictures import data_uri, thumbnail
from jaxmem.report.comparison.figure import AREAS, LETTERS, against_steps
from jaxmem.runs.durable import write_atomically

TEMPLATES = Path(__file__).parent / "templates"
MOST_ROWS = 400  # images in the table; comparison.csv has all


class ImageRow(NamedTuple):
    """One image in the table."""

    name: str
    caption: str
    picture: str  #: data URI; empty where images are not shown
    first: dict[str, tuple[int | None, int | None]]  #: by series: the first step at which it is reproduced, isolated
    cells: list[tuple[Checkpoint, Verdict, float]]  #: of each checkpoint, with the calibrated ℓ2 of the nearest


def write_page(found: Comparison, path: Path) -> Path:
    """Write the page of a comparison, and return its path."""
    page = render(found, written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))
    write_atomically(path, lambda stream: stream.write(page.encode()))
    return path


def render(found: Comparison, title: str = "Memorization against training steps", written: str = "") -> str:
    """The page as text; equal comparisons give equal pages."""
    made = environment(TEMPLATES)
    made.filters |= {"ends": ends}
    figures = {"steps": [(data_uri(one.svg, "svg+xml"), one.alternative) for one in against_steps(found)]}
    page = made.get_template("comparison.html").render(
        title=title, written=written, version=__version__, size=SIZE, **style_and_script(),
        found=found, checkpoints=list(zip(found.checkpoints, found.signs, strict=True)), figures=figures,
        image_rows=image_rows(found), letters=LETTERS, words=verdicts.WORDS, areas=AREAS, label=label_of(found),
        copy=verdicts.COPY, level=_level(found), chance=onset.CHANCE, judged=_judged(found),
        reproduced=first_steps(found, "reproduced"), unfinished=[one for one in found.checkpoints if not one.finished],
        has_similarity=any(np.isfinite(e.similarity) for one in found.checkpoints for e in one.evidence),
    )  # fmt: skip
    return with_size(page)


def ends(found: Spread | None) -> str:
    """The interval of a number; empty where there is none."""
    return "" if found is None or np.isnan(found.low) else f"[{number(found.low)}, {number(found.high)}]"


def label_of(found: Comparison) -> Any:
    """What a checkpoint is called in a heading: its step, and its series where there are several."""
    several = len(found.series) > 1
    return lambda one: f"{one.place.step} · {one.place.series}" if several else f"{one.place.step}"


def first_steps(found: Comparison, word: verdicts.Word) -> dict[str, int | None]:
    """By series the first step at which any image has a verdict."""
    return {
        name: next((one.place.step for one in there if one.number[word]), None) for name, there in found.series.items()
    }


def image_rows(found: Comparison) -> list[ImageRow]:
    """The images, those first that are reproduced or isolated the earliest, at the most checkpoints."""
    reproduced = {name: found.first("reproduced", name) for name in found.series}
    isolated = {name: found.first("isolated", name) for name in found.series}

    def key(i: int) -> tuple[float, float, float]:
        closest = np.nan_to_num([one.evidence[i].closest for one in found.checkpoints], nan=9.0)
        return _earliest(reproduced, i), _earliest(isolated, i), float(closest.min())

    return [
        ImageRow(
            name=found.images[i],
            caption=found.captions[i],
            picture="" if found.thumbnails is None else thumbnail(found.thumbnails[i]),
            first={name: (reproduced[name][i], isolated[name][i]) for name in found.series},
            cells=[(one, one.verdicts[i], one.evidence[i].closest) for one in found.checkpoints],
        )
        for i in sorted(range(len(found.images)), key=key)[:MOST_ROWS]
    ]


def _earliest(steps: dict[str, list[int | None]], i: int) -> float:
    """The first step of an image in any series; infinite where there is none."""
    return min((float(step) for each in steps.values() if (step := each[i]) is not None), default=np.inf)


def _level(found: Comparison) -> float | None:
    """The p-value up to which an image stands out; None without enough held-out images."""
    if all(sign.standing_out is None for sign in found.signs):
        return None
    return level_of(found.checkpoints[0].evidence[0].held_out)


def _judged(found: Comparison) -> int | None:
    return next((one.judged for one in found.checkpoints if one.judged is not None), None)
