"""Scores of the detectors from what the stages kept, and what each detector would cost alone."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmem.audit import store
from jaxmem.audit.plan import Plan
from jaxmem.detectors import (
    Counts,
    CountsAt,
    DenoisingErrors,
    Detector,
    Eigenvalues,
    EpsDifferences,
    ErrorsAt,
    HessianProducts,
    Images,
    ScorePairs,
    SpectrumAt,
    StartPairs,
    columns,
)
from jaxmem.memorization.sharpness import positive_count, tangent_count
from jaxmem.runs.directory import Run


class Kept(NamedTuple):
    """What the stages kept, by point (reference prompts come last); NaN where a unit is not done."""

    eps_difference: np.ndarray  #: (P, S)
    eigenvalues: np.ndarray  #: (P, K, L)
    noise: np.ndarray  #: (P, K)
    counts: dict[str, np.ndarray]  #: (P, K) or (P, K, 2), see `jaxmem.audit.store.gather_counts`
    images: np.ndarray | None  #: (P, h, w, 3)
    sampled: np.ndarray  #: (P,) bool
    scores: dict[str, np.ndarray]  #: (P,) of detectors whose evidence was not kept
    errors: np.ndarray  #: (P, S, 2) mean (x̂_0 − x_0)² at points made of images, and the same without a caption


def read_kept(run: Run, plan: Plan, detectors: Sequence[Detector]) -> Kept:
    """Read a run, finished or not.

    Raises:
        ValueError: a file is damaged.
    """
    norms = [
        store.gather(run, plan, partial(store.path, segment=i), {"norms": (len(steps),)})["norms"]
        for i, steps in enumerate(plan.segments if plan.has_pairs else ())
    ]
    if not plan.has_pairs:
        norms = [np.full((plan.num_points, len(plan.timesteps)), np.nan)]
    errors = np.full((plan.num_points, len(plan.timesteps), 2), np.nan)
    for i, t in enumerate(plan.timesteps if plan.at_images else ()):
        key = partial(store.path, segment=store.segment_of(plan, t))
        names = [store.error_at(t), *([store.plain_error_at(t)] if plan.image_pairs else [])]
        for place, found_errors in enumerate(store.gather(run, plan, key, dict.fromkeys(names, ())).values()):
            errors[:, i, place] = found_errors
    k, width = len(plan.spectral_timesteps), plan.num_eigenvalues
    eigenvalues, noise = np.full((plan.num_points, k, width), np.nan), np.full((plan.num_points, k), np.nan)
    for i, t in enumerate(plan.spectral_timesteps if plan.method != "none" else ()):
        shapes = {"eigenvalues": (width,), "noise": ()}
        found = store.gather(run, plan, partial(store.spectrum, t=t), shapes)
        eigenvalues[:, i], noise[:, i] = found["eigenvalues"], found["noise"]
    counts = store.gather_counts(run, plan)
    if plan.count_budget is None:
        counts = _exact_counts(plan, eigenvalues, noise)
    images, sampled = store.gather_images(run, plan)
    return Kept(
        eps_difference=np.concatenate(norms, 1),
        eigenvalues=eigenvalues,
        noise=noise,
        counts=counts,
        images=images,
        sampled=sampled,
        scores=read_scores(run, plan, detectors),
        errors=errors,
    )


def read_scores(run: Run, plan: Plan, detectors: Sequence[Detector]) -> dict[str, np.ndarray]:
    """Scores that stages computed, from the units that keep them."""
    found: dict[str, np.ndarray] = {}
    for detector in columns(detectors, plan.setting()):
        key: Callable[[int], str]
        if isinstance(detector.needs, ScorePairs):
            key = partial(store.path, segment=0)
        elif isinstance(detector.needs, HessianProducts):
            key = store.products
        elif isinstance(detector.needs, StartPairs):
            key = partial(store.pairs, t=detector.needs.timestep(plan.setting()))
        else:
            continue
        name = store.score_of(detector.name)
        found[detector.name] = store.gather(run, plan, key, {name: ()})[name]
    return found


def _exact_counts(plan: Plan, eigenvalues: np.ndarray, noise: np.ndarray) -> dict[str, np.ndarray]:
    """Counts of whole spectra, as `jaxmem.audit.store.gather_counts`: intervals are the numbers themselves."""
    sigma = np.array([plan.sigma[plan.timesteps.index(t)] for t in plan.spectral_timesteps])
    whole = ~np.isnan(eigenvalues).any(-1)
    positive = np.where(whole & ~np.isnan(noise), positive_count(eigenvalues, noise), np.nan)
    tangent = np.where(whole, tangent_count(eigenvalues, np.broadcast_to(sigma, noise.shape)), np.nan)
    return {
        "estimate": positive,
        "interval": np.stack([positive, positive], -1),
        "tangent_estimate": tangent,
        "tangent_interval": np.stack([tangent, tangent], -1),
    }


class Scores(NamedTuple):
    """Columns of an audit, and what they say of its points; NaN where not done."""

    detectors: tuple[Detector, ...]  #: D
    values: np.ndarray  #: (P, D) float64
    intervals: dict[str, np.ndarray]  #: (P, 2) by the name of a column, of estimates


def compute_scores(plan: Plan, kept: Kept, detectors: Iterable[Detector]) -> Scores:
    """The scores of all columns that these detectors have in this audit."""
    sides = None if kept.images is None else kept.images.shape[1:3]
    setting = plan.setting(sides)
    chosen = columns(detectors, setting)
    values = np.full((plan.num_points, len(chosen)), np.nan)
    intervals: dict[str, np.ndarray] = {}
    for d, detector in enumerate(chosen):
        if detector.name in kept.scores:
            values[:, d] = kept.scores[detector.name]
            continue
        if isinstance(detector.needs, Images):
            for points, evidence in _generations(plan, kept, detector.needs):
                values[points, d] = _called(detector, evidence, (plan.noises,))
            continue
        estimated = detector.interval is not None and setting.estimates_counts
        ends = np.full((plan.num_points, 2), np.nan)
        for point in range(plan.num_points):
            evidence = _EVIDENCE[type(detector.needs)](plan, kept, detector, point)
            if evidence is not None:
                values[point, d] = _called(detector, evidence, ())
                if estimated and detector.interval is not None:
                    ends[point] = detector.interval(evidence)
        if estimated:
            intervals[detector.name] = ends
    return Scores(chosen, values, intervals)


def _called(detector: Detector, evidence: Any, shape: tuple[int, ...]) -> np.ndarray:
    """What a score gives, checked: a detector may be anybody's."""
    try:
        found = np.asarray(detector.score(evidence), np.float64)
    except Exception as error:
        error.add_note(f"raised by, or for what was returned by, the score of the detector {detector.name!r}")
        raise
    if found.shape != shape or np.isinf(found).any():
        raise ValueError(
            f"detectors: expected from the score of {detector.name!r} finite numbers of shape {shape}, or NaN, got"
            f" {found.tolist()!r:.60} of shape {found.shape}; correct it, and start the same call again"
        )
    return found


def _generations(plan: Plan, kept: Kept, needs: Images) -> Iterable[tuple[slice, np.ndarray]]:
    """The points of each prompt whose images are all there, and its images."""
    if kept.images is None or plan.noises < needs.fewest:
        return
    for first in range(0, plan.num_points, plan.noises):
        points = slice(first, first + plan.noises)
        if kept.sampled[points].all():
            yield points, kept.images[points]


def _norms(plan: Plan, kept: Kept, detector: Detector, point: int) -> np.ndarray | None:  # noqa: ARG001
    norms = kept.eps_difference[point, : detector.steps]
    return None if np.isnan(norms).any() else norms


def _spectrum(plan: Plan, kept: Kept, detector: Detector, point: int) -> SpectrumAt | None:
    k, t, sigma = _place(plan, detector)
    values, needs = kept.eigenvalues[point, k], detector.needs
    there = ~np.isnan(values)
    if not there.any() or (isinstance(needs, Eigenvalues) and needs.whole and not there.all()):
        return None
    return SpectrumAt(values[there], float(kept.noise[point, k]), sigma, t)


def _counts(plan: Plan, kept: Kept, detector: Detector, point: int) -> CountsAt | None:
    k, t, sigma = _place(plan, detector)
    counts = {name: array[point, k] for name, array in kept.counts.items()}
    if np.isnan(counts["estimate"]) and np.isnan(counts["tangent_estimate"]):
        return None
    positive, tangent = float(counts["estimate"]), float(counts["tangent_estimate"])
    return CountsAt(positive, tuple(counts["interval"]), tangent, tuple(counts["tangent_interval"]), sigma, t)


def _error(plan: Plan, kept: Kept, detector: Detector, point: int) -> ErrorsAt | None:
    given, without = kept.errors[point, _place(plan, detector)[0]]
    return None if np.isnan(given) else ErrorsAt(float(given), float(without))


def _place(plan: Plan, detector: Detector) -> tuple[int, int, float]:
    """Of a detector of spectra: the index of its timestep, the timestep and the noise level."""
    t = detector.timestep
    assert t is not None  # `columns` sets it for these; for the type checker
    return plan.spectral_timesteps.index(t), t, plan.sigma[plan.timesteps.index(t)]


_EVIDENCE: dict[type, Callable[[Plan, Kept, Detector, int], Any]] = {
    EpsDifferences: _norms,
    Eigenvalues: _spectrum,
    Counts: _counts,
    DenoisingErrors: _error,
}


def costs(plan: Plan, directory: Path, recorded: Iterable[dict[str, Any]], found: Scores) -> list[dict[str, Any]]:
    """What each detector alone costs for the points that it was measured at: it shares most of it with others.

    ``evaluations`` (forward passes of the network) and ``products`` are counted; ``seconds`` are those of its stage and
    the evaluations before, at this run's seconds per evaluation; ``bytes`` is the largest memory of its programs
    beside the parameters, by the compiler's account.

    Args:
        plan: of the audit.
        directory: of the audit, for messages.
        recorded: cost rows of its runs.
        found: its scores.

    Raises:
        ValueError: a row lacks what it should have.
    """
    stages: dict[str, dict[str, float]] = {}
    for row in recorded:
        if "key" not in row:
            continue
        if missing := {"stage", "evaluations", "seconds", "bytes"} - row.keys():
            raise ValueError(
                f"{directory}: expected a stage, evaluations, seconds and bytes in costs-*.jsonl, got a line of"
                f" {row['key']!r} without {', '.join(sorted(missing))}; delete that line"
            )
        stage = stages.setdefault(row["stage"], dict.fromkeys(("evaluations", "seconds", "bytes"), 0.0))
        stage["evaluations"] += row["evaluations"]
        stage["seconds"] += row["seconds"]
        stage["bytes"] = max(stage["bytes"], row["bytes"])
    nothing = {"evaluations": 0.0, "seconds": 0.0, "bytes": 0.0}
    path = stages.get("trajectory", nothing)
    per_evaluation = path["seconds"] / max(path["evaluations"], 1)
    setting = plan.setting()
    rows = []
    for i, detector in enumerate(found.detectors):
        points = int((~np.isnan(found.values[:, i])).sum())
        cost = detector.needs.cost(setting)
        sampling = (
            cost.sampling
            if detector.timestep is None
            else setting.scores_per_step * plan.timesteps.index(detector.timestep)
        )
        own = stages.get(cost.stage, nothing)
        # A stage's seconds are spread evenly over its timesteps: all do the same there.
        share = 1 if detector.timestep is None else len(plan.spectral_timesteps)
        rows.append(
            {
                "detector": detector.name,
                "evaluations": points * (sampling + cost.evaluations),
                "products": points * cost.products,
                "seconds": points * sampling * per_evaluation + own["seconds"] / share,
                "bytes": int(max(own["bytes"], path["bytes"])),
            }
        )
    return rows
