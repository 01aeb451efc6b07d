"""An audit in parts: its own run and the extensions in its folder, each with some of the points of the whole.

An extension is a run in ``extension-1/``, ``extension-2/`` … of the audit's folder. Its manifest is that of the audit
as it is with this extension, and says beside it what the extension covers. It counts from when the ``metrics.json`` of
the audit says so, which is written anew, and last, when an extension is done: until then the audit is read as it was,
though tables and images of the whole may be in its folder already.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmem.audit import store
from jaxmem.audit.plan import Plan
from jaxmem.audit.scores import Kept, read_kept, read_scores
from jaxmem.detectors import Detector
from jaxmem.runs.directory import Run
from jaxmem.runs.manifest import RECORDED

EXPERIMENT = "audit extension"
NUMBER = "extensions"  #: in the metrics of an audit: how many extensions they are of


class Covers(NamedTuple):
    """What an extension has of the audit as it is with it."""

    prompts: tuple[int, ...]  #: positions in the list, reference prompts last
    detectors: tuple[str, ...] | None = None  #: names whose scores it has, and nothing else; None for all evidence


class Part(NamedTuple):
    """A run with some of the points of an audit."""

    run: Run
    plan: Plan  #: of these points
    points: np.ndarray  #: (P,) their numbers in the whole
    names: frozenset[str]  #: detectors that it was run for
    only_scores: bool = False


@dataclass(frozen=True)
class Whole:
    """An audit with its extensions."""

    run: Run  #: the audit's own, in whose folder the others are
    manifest: dict[str, Any]  #: as if all had been run at once
    plan: Plan
    parts: tuple[Part, ...]  #: as they were made

    @property
    def full(self) -> list[Part]:
        """The parts that have all evidence of their points."""
        return [part for part in self.parts if not part.only_scores]

    def rows(self) -> list[dict[str, Any]]:
        """The rows of all parts."""
        return [row for part in self.parts for row in part.run.rows()]

    def costs(self) -> list[dict[str, Any]]:
        """The costs of all parts."""
        return [row for part in self.parts for row in part.run.costs()]

    @property
    def directions(self) -> tuple[Run, dict[str, Any]] | None:
        """The run that has the directions, and their row; a later part has some where the extreme points are others."""
        runs = [part.run for part in self.parts if part.run.done(store.DIRECTIONS)]
        return (runs[-1], next(row for row in runs[-1].rows() if row["key"] == store.DIRECTIONS)) if runs else None

    def place(self, point: int) -> tuple[Part, int, int]:
        """Find the part that has a point, its batch there, and its row in the batch."""
        for part in self.full:
            found = np.flatnonzero(part.points == point)
            if len(found):
                return part, *divmod(int(found[0]), part.plan.batch)
        raise ValueError(f"{self.run.directory}: expected point {point} in a part of the audit, got none")

    def latents(self, point: int, t: int) -> np.ndarray:
        """x_t of a point at a timestep of spectra, where sampling has come there."""
        part, number, row = self.place(point)
        return store.latents(part.run, part.plan, number, t)[row]


def extension_folder(run: Run, number: int) -> Path:
    """The folder of an extension, counted from 1."""
    return run.directory / f"extension-{number}"


def read_whole(run: Run, number: int | None = None) -> Whole:
    """An audit with its extensions.

    Args:
        run: the audit's own.
        number: of extensions, those that come first; None for those that its metrics are of.

    Raises:
        ValueError: a manifest is damaged or missing.
    """
    if number is None:
        number = run.metrics().get(NUMBER, 0) if run.finished else 0
    runs = [Run.read(extension_folder(run, k)) for k in range(1, number + 1)]
    manifest = run.manifest | (whole_manifest(runs[-1]) if runs else {})
    if runs:
        manifest |= {name: run.manifest[name] for name in RECORDED if name in run.manifest}
        manifest["extensions"] = {
            one.directory.name: {name: one.manifest[name] for name in RECORDED if name in one.manifest} for one in runs
        }
    plan = Plan.from_manifest(manifest.get("plan") or {})
    if not runs:
        own = frozenset(run.manifest.get("detectors") or ())
        return Whole(run, manifest, plan, (Part(run, plan, np.arange(plan.num_points), own),))
    position = {row["prompt"]: i for i, row in enumerate(manifest["config"]["prompts"])}
    parts = [_part(one, plan, position) for one in (run, *runs)]
    return Whole(run, manifest, plan, tuple(parts))


def whole_manifest(run: Run) -> dict[str, Any]:
    """The manifest of an audit as it is with an extension, from that of the extension's run."""
    there = {name: value for name, value in run.manifest.items() if name not in ("covers", "whole")}
    return there | {"experiment": "audit", "plan": run.manifest["whole"]}


def _part(run: Run, whole: Plan, position: dict[str, int]) -> Part:
    """The part that a run is; prompts are known by their texts, since a list is longer with each extension."""
    plan, rows = Plan.from_manifest(run.manifest["plan"]), run.manifest["config"]["prompts"]
    names, only_scores, listed = run.manifest["detectors"], False, range(len(rows))
    if run.manifest.get("experiment") == EXPERIMENT:
        listed, added = (run.manifest["covers"][name] for name in Covers._fields)
        names, only_scores = (names, False) if added is None else (added, True)
    prompts = np.array([position[rows[i]["prompt"]] for i in listed], int)
    points = prompts[:, None] * whole.noises + plan.first_noise + np.arange(plan.noises)
    return Part(run, plan, points.ravel(), frozenset(names), only_scores)


def merge_kept(whole: Whole, detectors: Sequence[Detector]) -> Kept:
    """What all parts kept, by the points of the whole.

    Raises:
        ValueError: a file is damaged.
    """
    own = [[one for one in detectors if one.name in part.names] for part in whole.parts]
    if len(whole.parts) == 1:
        return read_kept(whole.run, whole.plan, detectors)
    scores: dict[str, np.ndarray] = {}
    merged: dict[str, Any] = {}
    images = None
    for part, entries in zip(whole.parts, own, strict=True):
        if part.only_scores:
            some = read_scores(part.run, part.plan, entries) if len(part.points) else {}
        else:
            kept = read_kept(part.run, part.plan, entries)
            some, counts = kept.scores, kept.counts
            for name in ("eps_difference", "eigenvalues", "noise", "errors"):
                _put(merged, name, getattr(kept, name), part.points, whole.plan.num_points)
            for name, array in counts.items():
                _put(merged.setdefault("counts", {}), name, array, part.points, whole.plan.num_points)
            if kept.images is not None:
                if images is None:
                    images = np.zeros((whole.plan.num_points, *kept.images.shape[1:]), np.uint8)
                images[part.points] = kept.images
            merged.setdefault("sampled", np.zeros(whole.plan.num_points, bool))[part.points] = kept.sampled
        for name, array in some.items():
            _put(scores, name, array, part.points, whole.plan.num_points)
    return Kept(images=images, scores=scores, **merged)


def _put(into: dict[str, np.ndarray], name: str, array: np.ndarray, points: np.ndarray, number: int) -> None:
    """Put the rows of a part at their points; the others stay NaN until theirs comes."""
    into.setdefault(name, np.full((number, *array.shape[1:]), np.nan))[points] = array
