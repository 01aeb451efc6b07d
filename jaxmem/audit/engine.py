"""Run an audit: settle it, say what it takes, do its stages, finish the run."""

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmem.audit.cost import count_disk_bytes, estimate
from jaxmem.audit.directions import run_directions
from jaxmem.audit.hessians import COUNTING, run_anisotropy, run_counts, run_jeon, run_spectra
from jaxmem.audit.plan import ModelFacts, Plan
from jaxmem.audit.result import FIRST_STEP, read_audit
from jaxmem.audit.summary import summarise, write_table
from jaxmem.audit.trajectory import run_images, run_trajectory
from jaxmem.audit.work import Work, starting_noise
from jaxmem.config import AuditConfig
from jaxmem.model import Model
from jaxmem.prompts import Prompt, as_prompts, merge
from jaxmem.runs.directory import Run
from jaxmem.runs.progress import Progress, Say, quiet, silent
from jaxmem.runs.stages import wall_seconds
from jaxmem.spectra.dense import require_disk


def run_audit(
    model: Model,
    prompts: Iterable[str | Prompt] | None,
    config: AuditConfig,
    out: str | Path | None,
    *,
    neutral: Iterable[str | Prompt] = (),
    name: str = "",
    progress: Progress = silent,
    say: Say = quiet,
) -> dict[str, Any]:
    """Run all detectors over prompts × noises, as a run that continues where it was left, and return the metrics.

    Args:
        model: what `StableDiffusion.load` gives, or another `jaxmem.model.Model`.
        prompts: the prompts that are audited: texts, or `Prompt` objects as `jaxmem.prompts.read_prompts` gives them;
            None for those that the model brings with it (`Model.prompts`).
        config: how.
        out: folder of the run; None says what it would take and returns nothing.
        neutral: prompts that ranks are compared with (percentiles); they are measured in the same run.
        name: what the model is called, for people; the run knows it by the hash of its weights.
        progress: told of each stage.
        say: gets the estimate of work, time and memory before the run is begun, line by line.

    All prompts see the same starting noises. Batches are fixed by the config and the number of prompts, so a run that
    was killed continues to the same bits; a unit that a kill can lose is 10 sampling steps of one batch, or one batch
    of anything else.

    Raises:
        ValueError: bad settings, a prompt that comes twice, parameters that are not finite, too little memory, or a
            folder that holds another run; nothing was written then.
        OSError: the folder cannot be written; the same call continues.
    """
    if not isinstance(model, Model):
        raise ValueError(
            f"model: expected a jaxmem.Model such as StableDiffusion.load(source) gives, got {type(model).__name__}"
        )
    prompts = model.prompts() if prompts is None else as_prompts(prompts)
    neutral = as_prompts(neutral, "neutral")
    every = [*prompts, *neutral]
    both = {prompt.text for prompt in prompts} & {prompt.text for prompt in neutral}
    if both:
        raise ValueError(
            f"neutral: expected prompts that are not audited, got {len(both)} that are ({min(both)!r:.60}); take them"
            f" out of one of the two lists"
        )
    merge(
        [(f"{'audited' if n < len(prompts) else 'neutral'} prompt {n + 1}", p) for n, p in enumerate(every)],
        "prompts",
    )
    if any(prompt.category == "all" for prompt in prompts):
        raise ValueError("prompts: expected another category than 'all', which is that of the total; rename it")
    devices = jax.local_devices()
    plan = Plan.of(facts(model, config.ddim_steps), config, len(prompts), len(neutral), len(devices))
    model.check()
    texts = [prompt.text for prompt in every]
    truncated = model.truncated(texts)
    if any(truncated):
        say(f"{sum(truncated)} prompt(s) have more tokens than the text encoder takes and are cut, as in diffusers")
    if not plan.has_pairs:
        say(
            "left out: Wen, Jeon, score evolution and anisotropy, which compare scores with and without the prompt;"
            " this model has no unconditional score"
        )
    work = Work(
        run=None,
        plan=plan,
        model=model,
        sampler=model.sampler(config.ddim_steps),
        conditions=model.conditions([*texts, ""] if plan.has_pairs else texts),
        noise=starting_noise(config.seed, plan.noises, model.shape),
        texts=texts,
        seed=config.seed,
        mesh=jax.make_mesh((len(devices),), ("points",), devices=devices) if len(devices) > 1 else None,
        progress=progress,
    )
    config_values = asdict(config) | {
        "guidance": plan.guidance,
        "prompts": [{"prompt": p.text, "label": p.label, "category": p.category} for p in every],
    }

    def open_run(folder: str | Path) -> Run:
        return Run.open(
            folder, config_values, experiment="audit", model=model.identity(texts), plan=asdict(plan), dtype="float32"
        )

    # A folder that has something is looked at before the estimate takes its time, a new one is made after it.
    run = open_run(out) if out is not None and _holds_something(Path(out)) else None
    if run is not None and run.finished:
        return run.metrics()
    if out is not None and not (Path(out) / COUNTING).exists():  # where a count was begun its file is there
        require_disk(count_disk_bytes(plan), Path(out), "an exact count")
    expected = estimate(work)
    if name:
        say(f"audited model: {name}")
    for line in expected.lines:
        say(line)
    contradiction = model.contradiction(expected.noise_share)
    if contradiction:
        say(f"warning: {contradiction}")  # those of its files were said when it was loaded
    if out is None:
        return {}
    run = open_run(out) if run is None else run
    work = replace(work, run=run)
    if not run.done(FIRST_STEP):
        warnings = [*model.warnings, *([contradiction] if contradiction else [])]
        with work.unit(FIRST_STEP, "first step") as row:
            row |= {"noise_share": expected.noise_share, "warnings": warnings}
    run_trajectory(work, expected.evaluation_bytes)
    run_jeon(work, expected.programs)
    run_anisotropy(work, expected.evaluation_bytes)
    run_images(work)
    run_spectra(work, expected.programs, expected.spectrum_bytes)
    run_counts(work)
    run_directions(work, expected.programs)
    return _finish(run, plan, truncated, name)


def facts(model: Model, num_steps: int) -> ModelFacts:
    """What a plan of so many sampling steps depends on of a model."""
    timesteps = tuple(model.sampler(num_steps).timesteps.tolist())
    sigma = tuple(float(model.schedule.sigma[t]) for t in timesteps)
    return ModelFacts(tuple(model.shape), timesteps, sigma, model.has_pairs, model.guidance, model.prediction)


def _holds_something(path: Path) -> bool:
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def _finish(run: Run, plan: Plan, truncated: list[bool], name: str) -> dict[str, Any]:
    result = read_audit(run)
    metrics = summarise(result, truncated)
    metrics["model"] = name
    metrics["warnings"] = list(result.warnings)
    metrics["num_products"] = sum(row["products"] for row in run.rows())
    metrics["num_evaluations"] = sum(row["evaluations"] for row in run.rows())
    metrics["costs"] = result.costs
    metrics["wall_seconds"] = wall_seconds(run)
    labels = [-1 if prompt.label is None else int(prompt.label) for prompt in result.prompts]
    points = plan.num_prompts * plan.noises
    write_table(run.directory, metrics, result.detectors)
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
    return run.metrics()
