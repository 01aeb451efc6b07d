"""Scores of the detectors from what the stages saved, and what each detector would cost alone."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmem.audit.plan import Plan
from jaxmem.memorization.detectors import SCORE_EVOLUTION_STEPS, TILES_PER_SIDE
from jaxmem.memorization.registry import Detector, Family, detectors
from jaxmem.memorization.table import score_table
from jaxmem.runs.directory import Run

# Which of the numbers that `jaxmem.audit.hessians.run_counts` saves are the estimate and the ends of its interval.
_COUNTED = {"positive-count": (1, slice(2, 4)), "tangent-count": (6, slice(7, 9))}


class Raw(NamedTuple):
    """What the stages saved, by point (reference prompts come last); NaN where a unit is not done."""

    eps_difference: np.ndarray  #: (P, S)
    jeon: np.ndarray  #: (P,)
    evolution: np.ndarray  #: (P,)
    anisotropy: np.ndarray  #: (P,)
    eigenvalues: np.ndarray  #: (P, K, L)
    noise: np.ndarray  #: (P, K)
    counts: np.ndarray  #: (P, K, 9): see `jaxmem.audit.hessians.run_counts`
    images: np.ndarray | None  #: (P, h, w, 3)
    sampled: np.ndarray  #: (P,)


def detector_scores(plan: Plan, raw: Raw) -> tuple[tuple[Detector, ...], np.ndarray]:
    """The detectors that this plan runs, and their scores, shape (prompts, noises, D)."""
    counted = plan.count_budget is not None
    images = raw.images
    tiled = images is not None and plan.noises > 1 and not any(side % TILES_PER_SIDE for side in images.shape[1:3])
    families: dict[Family, bool] = {
        "wen": plan.has_pairs,
        "jeon": plan.has_pairs,
        "score-evolution": plan.has_pairs and len(plan.timesteps) >= SCORE_EVOLUTION_STEPS,
        "anisotropy": plan.anisotropy_timestep is not None,
        "tiled-l2": tiled,
        "spectrum": bool(plan.spectral_timesteps),
    }
    chosen = detectors(
        len(plan.timesteps),
        families=[name for name, there in families.items() if there],
        spectral_timesteps=plan.spectral_timesteps,
        method=plan.method,
        k=min(5, plan.num_eigenvalues or 5),
        num_noises=plan.noises,
        counted=counted,
        estimated=plan.estimates_counts,
        anisotropy_weights=plan.anisotropy_weights,
    )

    def nested(array: np.ndarray) -> np.ndarray:
        return array.reshape(len(array) // plan.noises, plan.noises, *array.shape[1:])

    columns = {"jeon": raw.jeon, "score-evolution": raw.evolution, "anisotropy": raw.anisotropy}
    for k, t in enumerate(plan.spectral_timesteps if counted else ()):
        columns |= {f"{name}@t{t}": raw.counts[:, k, estimate] for name, (estimate, _) in _COUNTED.items()}
    table = score_table(
        chosen,
        eps_difference=nested(raw.eps_difference),
        timesteps=plan.timesteps,
        sigma=plan.sigma,
        spectral_timesteps=plan.spectral_timesteps,
        eigenvalues=nested(raw.eigenvalues),
        noise=nested(raw.noise),
        columns={name: nested(values) for name, values in columns.items()},
        images=None if images is None else nested(images),
        sampled=nested(raw.sampled),
    )
    return chosen, table


def count_intervals(plan: Plan, raw: Raw) -> dict[str, np.ndarray]:
    """The 95 % intervals of estimated counts, shape (points, 2), by the detector whose score they belong to.

    Exact counts have none.
    """
    return {
        f"{name}@t{t}": raw.counts[:, k, ends]
        for k, t in enumerate(plan.spectral_timesteps if plan.estimates_counts else ())
        for name, (_, ends) in _COUNTED.items()
    }


def costs(plan: Plan, run: Run, chosen: Sequence[Detector], scores: np.ndarray) -> list[dict[str, Any]]:
    """What each detector alone costs for the points that it was measured at: it shares most of it with others.

    ``evaluations`` (forward passes of the network) and ``products`` are counted; ``seconds`` are those of its stage and
    the evaluations before, at this run's seconds per evaluation; ``bytes`` is the largest memory of its programs
    beside the parameters, by the compiler's account.
    """
    stages: dict[str, dict[str, float]] = {}
    for row in run.costs():
        if "key" not in row:
            continue
        if missing := {"stage", "evaluations", "seconds", "bytes"} - row.keys():
            raise ValueError(
                f"{run.directory}: expected a stage, evaluations, seconds and bytes in costs-*.jsonl, got a line of"
                f" {row['key']!r} without {', '.join(sorted(missing))}; delete that line"
            )
        stage = stages.setdefault(row["stage"], dict.fromkeys(("evaluations", "seconds", "bytes"), 0.0))
        stage["evaluations"] += row["evaluations"]
        stage["seconds"] += row["seconds"]
        stage["bytes"] = max(stage["bytes"], row["bytes"])
    nothing = {"evaluations": 0.0, "seconds": 0.0, "bytes": 0.0}
    path = stages.get("trajectory", nothing)
    per_evaluation = path["seconds"] / max(path["evaluations"], 1)
    found = []
    for i, detector in enumerate(chosen):
        points = int((~np.isnan(scores[..., i])).sum())
        sampled, evaluations, products, name = _needs(plan, detector)
        own = stages.get(name, nothing)
        # A stage's seconds are spread evenly over its timesteps: all do the same there.
        share = len(plan.spectral_timesteps) if name in ("spectra", "counts") else 1
        found.append(
            {
                "detector": detector.name,
                "evaluations": points * (sampled + evaluations),
                "products": points * products,
                "seconds": points * sampled * per_evaluation + own["seconds"] / share,
                "bytes": int(max(own["bytes"], path["bytes"])),
            }
        )
    return found


def _needs(plan: Plan, detector: Detector) -> tuple[int, int, int, str]:
    """Per point: evaluations on the trajectory, others, products; and the stage that does these."""
    if detector.timestep is not None:
        before = plan.scores_per_step * plan.timesteps.index(detector.timestep)
        if plan.count_budget is not None and detector.is_count:
            return before, 1, min(plan.count_budget, plan.size + 1), "counts"
        return before, 1, plan.products_per_spectrum, "spectra"
    return {
        "wen": (2 * (detector.number or 1), 0, 0, ""),
        "jeon": (2, 2, 2, "jeon"),
        "score-evolution": (2 * SCORE_EVOLUTION_STEPS, 0, 0, ""),
        "anisotropy": (2, 2, 0, "anisotropy"),
        "tiled-l2": (plan.scores_per_step * len(plan.timesteps), 0, 0, "images"),
    }[detector.statistic]
