"""`jaxmem.compare`: audits of several checkpoints of one training, side by side."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxmem.audit.tables import write_csv
from jaxmem.comparison.checkpoint import Checkpoint, read_checkpoint
from jaxmem.comparison.onset import Advice, Sign, advise, sign
from jaxmem.comparison.same import refuse_others
from jaxmem.comparison.steps import places
from jaxmem.detectors import Detector
from jaxmem.extras import require_package
from jaxmem.memorization.verdicts import Word
from jaxmem.runs.directory import Run

_TEXTS = ("series", "run", "model", "image", "caption", "sha256", "verdict", "reasons")


@dataclass(frozen=True)
class Comparison:
    """Checkpoints by series and step, all with the same T training images."""

    checkpoints: tuple[Checkpoint, ...]  #: by series, then by step
    images: list[str]  #: T names
    captions: list[str]  #: T, the first of each image
    thumbnails: np.ndarray | None  #: (T, h, w, 3) uint8, where all runs show their images

    @cached_property
    def series(self) -> dict[str, list[Checkpoint]]:
        """Checkpoints by the name of their series, in the order of their steps."""
        found: dict[str, list[Checkpoint]] = {}
        for checkpoint in self.checkpoints:
            found.setdefault(checkpoint.place.series, []).append(checkpoint)
        return found

    @cached_property
    def signs(self) -> list[Sign]:
        """What each checkpoint shows, see `jaxmem.comparison.onset`."""
        return [sign(checkpoint, len(self.checkpoints)) for checkpoint in self.checkpoints]

    @cached_property
    def advice(self) -> list[Advice]:
        """What is said of each series: stop before a step, or why nothing is said."""
        found = []
        for name, checkpoints in self.series.items():
            signs = [one for one, there in zip(self.signs, self.checkpoints, strict=True) if there in checkpoints]
            found.append(advise(name, [checkpoint.place.step for checkpoint in checkpoints], signs))
        return found

    def first(self, word: Word, series: str) -> list[int | None]:
        """Of each image the first step of a series at which its verdict is this one; None where it never is."""
        there = self.series[series]
        return [next((one.place.step for one in there if one.words[i] == word), None) for i in range(len(self.images))]

    def columns(self) -> dict[str, list[Any]]:
        """The table by column, one row per image and run: where the run stands, then the columns of ``images.csv``."""
        table: dict[str, list[Any]] = {}
        for one in self.checkpoints:
            place = {"series": one.place.series, "step": one.place.step, "run": one.run, "model": one.model}
            repeated = {name: [value] * len(self.images) for name, value in place.items()}
            for name, values in (repeated | {n: v for n, v in one.table.items() if n != "held out"}).items():
                table.setdefault(name, []).extend(values)
        return table

    def to_dataframe(self) -> Any:
        """One row per image and run, as a pandas DataFrame.

        Raises:
            MissingExtra: pandas is not installed.
        """
        require_package("pandas", "Comparison.to_dataframe")
        import pandas

        return pandas.DataFrame(self.columns())

    def to_csv(self, path: str | Path) -> Path:
        """Write the table of `to_dataframe`, and return its path.

        Raises:
            OSError: the file cannot be written; one that was there is as before.
        """
        return write_csv(self.columns(), Path(path), texts=_TEXTS)

    def write_page(self, path: str | Path) -> Path:
        """Write one HTML file that needs no network, and return its path.

        Raises:
            OSError: the file cannot be written; one that was there is as before.
        """
        from jaxmem.report.comparison.page import write_page

        return write_page(self, Path(path))


def compare(
    runs: Iterable[str | Path],
    *,
    steps: Sequence[int] | None = None,
    series: Sequence[str] | None = None,
    detectors: Iterable[Detector] = (),
) -> Comparison:
    """Compare audits of several checkpoints of one training: verdicts, counts and distances against its steps.

    Args:
        runs: folders of audits with training images, finished or not: of the same images, with the same settings.
        steps: the training step of each run; by default the number in the name of its network, as in
            ``checkpoint-500/unet``, of its model or its folder.
        series: what line of checkpoints each run belongs to, such as ``"raw"`` and ``"average"``; by default its name
            without the step.
        detectors: entries of your own that ran in them and are not registered.

    Images of one run after the other are in memory.

    Raises:
        ValueError: fewer than two runs, one that is no audit with training images, other images or settings, no step in
            a name, or two runs of the same step and series.
    """
    opened = [Run.read(run) for run in runs]
    if len(opened) < 2:
        raise ValueError(f"runs: expected two or more, got {len(opened)}")
    entries = tuple(detectors)
    refuse_others(opened)
    there = places(opened, steps, series)
    found, records, thumbnails = [], [], None
    for run, place in zip(opened, there, strict=True):
        checkpoint, training = read_checkpoint(run, place, entries)
        found.append(checkpoint)
        records, thumbnails = [record for record in training.records if not record.held_out], training.thumbnails
        del training  # with the generations of the run
    shows = thumbnails is not None and all(run.manifest["training"]["show"] for run in opened)
    order = list(dict.fromkeys(one.place.series for one in found))
    return Comparison(
        checkpoints=tuple(sorted(found, key=lambda one: (order.index(one.place.series), one.place.step))),
        images=[record.name for record in records],
        captions=[record.captions[0] if record.captions else "" for record in records],
        thumbnails=thumbnails[: len(records)] if shows and thumbnails is not None else None,
    )
