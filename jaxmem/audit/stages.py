"""The stages of an audit in their order, and its end: the files that say what all its parts found."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxmem.audit.cost import Prepared, count_disk_bytes
from jaxmem.audit.generations import write_generations
from jaxmem.audit.hessians import COUNTING, run_counts, run_products, run_spectra, run_start_pairs
from jaxmem.audit.plan import Plan
from jaxmem.audit.result import Audit, read_parts
from jaxmem.audit.summary import summary_metrics
from jaxmem.audit.training.found import training_metrics
from jaxmem.audit.training.records import look_runs
from jaxmem.audit.training.table import write_images
from jaxmem.audit.trajectory import run_images, run_trajectory
from jaxmem.audit.whole import NUMBER, Whole
from jaxmem.audit.work import Work
from jaxmem.detectors import Detector
from jaxmem.runs.origin import now
from jaxmem.runs.stages import wall_seconds
from jaxmem.spectra.dense import require_disk


def run_stages(work: Work, prepared: Prepared) -> None:
    """Collect the evidence of all points of a run; what is recorded is not done again."""
    run_trajectory(work, prepared.evaluation_bytes)
    run_products(work, prepared.programs)
    run_start_pairs(work, prepared.evaluation_bytes)
    run_images(work)
    run_spectra(work, prepared.programs, prepared.spectrum_bytes)
    run_counts(work)


def require_count_disk(plan: Plan, folder: Path) -> None:
    """Refuse a disk that an exact count does not fit on; where a count was begun its file is there."""
    if not (folder / COUNTING).exists():
        require_disk(count_disk_bytes(plan), folder, "an exact count")


def finish(whole: Whole, entries: Sequence[Detector], name: str) -> Audit:
    """Write the results of all parts into the folder of the audit; ``metrics.json`` comes last.

    Args:
        whole: all parts, each done.
        entries: the detectors.
        name: what the model is called.

    Raises:
        OSError: a file cannot be written; the same call continues.
    """
    run, plan, result = whole.run, whole.plan, read_parts(whole, entries)
    metrics = summary_metrics(result)
    metrics["model"] = name
    metrics["warnings"] = list(result.warnings)
    rows = [*whole.rows(), *(row for look in look_runs(run) for row in look.rows())]
    metrics["num_products"] = sum(row["products"] for row in rows)
    metrics["num_evaluations"] = sum(row["evaluations"] for row in rows)
    if result.training is not None:
        metrics["training"] = training_metrics(result.training)
    metrics["costs"] = result.costs
    metrics["wall_seconds"] = wall_seconds(*(part.run for part in whole.parts), *look_runs(run))
    metrics["finished"] = now()
    metrics[NUMBER] = len(whole.parts) - 1
    labels = [-1 if prompt.label is None else int(prompt.label) for prompt in result.prompts]
    points = plan.num_prompts * plan.noises
    result.to_csv(run.directory / "results.csv")
    if result.training is not None:
        write_images(result.training, run.directory / "images.csv")
    write_generations(result, run.directory, run.process)
    run.finalise(
        metrics,
        {
            "eigenvalues": result.eigenvalues.reshape(points, *result.eigenvalues.shape[2:]),
            "noise": result.noise.reshape(points, -1),
            "label": np.repeat(labels, plan.noises),
            "timestep": result.spectral_timesteps,
            "method": np.asarray(result.method),
            "scores": result.scores.reshape(points, -1),
            "detectors": np.asarray([detector.name for detector in result.detectors]),
            "eps_difference": result.eps_difference.reshape(points, -1),
            "timesteps": result.timesteps,
            "sigma": result.sigma,
        },
    )
    return replace(result, metrics=run.metrics())
