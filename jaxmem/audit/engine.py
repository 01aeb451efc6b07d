"""Run an audit: settle it, say what it takes, do its stages, finish the run."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxmem.audit import store
from jaxmem.audit.cost import AuditCost, count_disk_bytes, prepare
from jaxmem.audit.directions import run_directions
from jaxmem.audit.generations import write_generations
from jaxmem.audit.hessians import COUNTING, run_counts, run_products, run_spectra, run_start_pairs
from jaxmem.audit.plan import Plan
from jaxmem.audit.result import Audit, read_audit
from jaxmem.audit.settle import settle
from jaxmem.audit.summary import summary_metrics
from jaxmem.audit.training.found import training_metrics
from jaxmem.audit.training.given import TrainingData
from jaxmem.audit.training.look import run_looks
from jaxmem.audit.training.nearest import run_nearest, run_records
from jaxmem.audit.training.records import look_runs
from jaxmem.audit.training.table import write_images
from jaxmem.audit.trajectory import run_images, run_trajectory
from jaxmem.config import AuditConfig
from jaxmem.detectors import Detector
from jaxmem.model import Model
from jaxmem.prompts import Prompt
from jaxmem.runs.directory import Run, holds_something
from jaxmem.runs.origin import Origin, now
from jaxmem.runs.progress import Progress, Say, quiet, silent
from jaxmem.runs.stages import wall_seconds
from jaxmem.spectra.dense import require_disk


def audit(
    model: Model,
    prompts: Iterable[str | Prompt] | None = None,
    config: AuditConfig | None = None,
    *,
    folder: str | Path,
    neutral: Iterable[str | Prompt] = (),
    detectors: Iterable[str | Detector] | None = None,
    training: TrainingData | None = None,
    name: str = "",
    origin: Origin | None = None,
    progress: Progress = silent,
    say: Say = quiet,
) -> Audit:
    """Run detectors over prompts × noises, as a run that continues where it was left, and return what they found.

    Args:
        model: what `StableDiffusion.load` gives, or another `jaxmem.model.Model`.
        prompts: the prompts that are audited: texts, or `Prompt` objects as `jaxmem.prompts.read_prompts` gives them;
            None for those that the model brings with it (`Model.prompts`).
        config: how; the defaults of `AuditConfig` if None.
        folder: of the run.
        neutral: prompts that ranks are compared with (percentiles); they are measured in the same run.
        detectors: names of registered ones and entries of your own (`jaxmem.detectors`); None for all that are
            registered and that an audit of this config has the evidence for.
        training: images that the model was trained on: beside each generation the nearest of them, a look from each of
            them, and of each a verdict (`jaxmem.audit.training`). Without ``prompts`` their captions are audited, and
            no prompt; without ``neutral`` ones, captions that ship show what the model gives whatever it is asked.
        name: what the model is called, for people; the run knows it by the hash of its weights.
        origin: command line and files, which the manifest of a new run says beside the time; they decide nothing.
        progress: told of each stage.
        say: gets the estimate of work, time and memory before the run is begun, line by line.

    All prompts see the same starting noises. Batches are fixed by the config and the number of prompts, so a run that
    was killed continues to the same bits; a unit that a kill can lose is 10 sampling steps of one batch, or one batch
    of anything else.

    Raises:
        ValueError: bad settings, a prompt that comes twice, detectors whose evidence the config does not give,
            parameters that are not finite, too little memory, or a folder that holds another run; nothing was written
            then.
        OSError: the folder cannot be written; the same call continues.
    """
    order = settle(model, prompts, config, neutral, detectors, training, progress, say)
    origin = origin or Origin()
    work, plan = order.work, order.work.plan
    # A folder that has something is looked at before the estimate takes its time, a new one is made after it.
    run = order.open_run(folder, origin) if holds_something(Path(folder)) else None
    if run is not None and run.finished:
        return read_audit(run, order.entries)
    if not (Path(folder) / COUNTING).exists():  # where a count was begun its file is there
        require_disk(count_disk_bytes(plan), Path(folder), "an exact count")
    if name:
        say(f"audited model: {name}")
    prepared = prepare(work, order.looks)
    for line in prepared.cost.lines:
        say(line)
    run = order.open_run(folder, origin) if run is None else run
    work = replace(work, run=run)
    contradiction = model.contradiction(prepared.noise_share)
    if contradiction:
        say(f"warning: {contradiction}")  # those of its files were said when it was loaded
    if not run.done(store.FIRST_STEP):
        warnings = [*model.warnings, *([contradiction] if contradiction else [])]
        with work.unit(store.FIRST_STEP, "first step") as row:
            row |= {"noise_share": prepared.noise_share, "warnings": warnings}
    run_trajectory(work, prepared.evaluation_bytes)
    run_products(work, prepared.programs)
    run_start_pairs(work, prepared.evaluation_bytes)
    run_images(work)
    run_spectra(work, prepared.programs, prepared.spectrum_bytes)
    run_counts(work)
    run_directions(work, prepared.programs)
    if order.looks is not None:
        run_records(work, order.looks.pictures)
        run_nearest(work, order.looks.pictures)
        run_looks(order.looks, work, prepared)
    return _finish(run, plan, order.entries, name)


def audit_cost(
    model: Model,
    prompts: Iterable[str | Prompt] | None = None,
    config: AuditConfig | None = None,
    *,
    neutral: Iterable[str | Prompt] = (),
    detectors: Iterable[str | Detector] | None = None,
    training: TrainingData | None = None,
    say: Say = quiet,
) -> AuditCost:
    """What `audit` would take with these arguments; writes nothing, and times one batch.

    Raises:
        ValueError: as `audit`.
    """
    order = settle(model, prompts, config, neutral, detectors, training, silent, say)
    prepared = prepare(order.work, order.looks)
    warning = model.contradiction(prepared.noise_share)
    cost = prepared.cost
    cost = cost._replace(lines=(*cost.lines, f"warning: {warning}")) if warning else cost
    for line in cost.lines:
        say(line)
    return cost


def _finish(run: Run, plan: Plan, entries: Sequence[Detector], name: str) -> Audit:
    result = read_audit(run, entries)
    metrics = summary_metrics(result)
    metrics["model"] = name
    metrics["warnings"] = list(result.warnings)
    rows = [row for part in (run, *look_runs(run)) for row in part.rows()]
    metrics["num_products"] = sum(row["products"] for row in rows)
    metrics["num_evaluations"] = sum(row["evaluations"] for row in rows)
    if result.training is not None:
        metrics["training"] = training_metrics(result.training)
    metrics["costs"] = result.costs
    metrics["wall_seconds"] = wall_seconds(run)
    metrics["finished"] = now()
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
