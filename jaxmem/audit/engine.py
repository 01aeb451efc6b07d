"""Run an audit: settle it, say what it takes, do its stages, finish the run."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmem.audit import store
from jaxmem.audit.cost import AuditCost, count_disk_bytes, prepare
from jaxmem.audit.directions import run_directions
from jaxmem.audit.generations import write_generations
from jaxmem.audit.hessians import COUNTING, run_counts, run_products, run_spectra, run_start_pairs
from jaxmem.audit.plan import ModelFacts, Plan
from jaxmem.audit.result import Audit, read_audit
from jaxmem.audit.steps import require_steps
from jaxmem.audit.summary import summary_metrics
from jaxmem.audit.trajectory import run_images, run_trajectory
from jaxmem.audit.work import Work, starting_noise
from jaxmem.config import AuditConfig
from jaxmem.detectors import Detector, choose, columns, require_evidence
from jaxmem.detectors.evidence import UNPAIRED
from jaxmem.model import Model, require_attributes, to_pictures
from jaxmem.prompts import Prompt, as_prompts, merge
from jaxmem.runs.directory import Run, holds_something
from jaxmem.runs.functions import captured, name_of
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
    order, origin = _settle(model, prompts, config, neutral, detectors, progress, say), origin or Origin()
    work, plan = order.work, order.work.plan
    # A folder that has something is looked at before the estimate takes its time, a new one is made after it.
    run = order.open_run(folder, origin) if holds_something(Path(folder)) else None
    if run is not None and run.finished:
        return read_audit(run, order.entries)
    if not (Path(folder) / COUNTING).exists():  # where a count was begun its file is there
        require_disk(count_disk_bytes(plan), Path(folder), "an exact count")
    if name:
        say(f"audited model: {name}")
    prepared = prepare(work)
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
    return _finish(run, plan, order.entries, name)


def audit_cost(
    model: Model,
    prompts: Iterable[str | Prompt] | None = None,
    config: AuditConfig | None = None,
    *,
    neutral: Iterable[str | Prompt] = (),
    detectors: Iterable[str | Detector] | None = None,
    say: Say = quiet,
) -> AuditCost:
    """What `audit` would take with these arguments; writes nothing, and times one batch.

    Raises:
        ValueError: as `audit`.
    """
    order = _settle(model, prompts, config, neutral, detectors, silent, say)
    prepared = prepare(order.work)
    warning = model.contradiction(prepared.noise_share)
    cost = prepared.cost
    cost = cost._replace(lines=(*cost.lines, f"warning: {warning}")) if warning else cost
    for line in cost.lines:
        say(line)
    return cost


class _Order(NamedTuple):
    """An audit that was checked and settled, before its run is there."""

    work: Work  #: without the run
    entries: tuple[Detector, ...]
    open_run: Callable[[str | Path, Origin], Run]


def _settle(
    model: Model,
    prompts: Iterable[str | Prompt] | None,
    config: AuditConfig | None,
    neutral: Iterable[str | Prompt],
    detectors: Iterable[str | Detector] | None,
    progress: Progress,
    say: Say,
) -> _Order:
    """Check the arguments of an audit and settle what it does."""
    if not isinstance(model, Model):
        raise ValueError(
            f"model: expected a jaxmem.Model such as StableDiffusion.load(source) gives, got {type(model).__name__}"
        )
    require_attributes(model)
    listed = model.prompts() if prompts is None else as_prompts(prompts)
    prompts, neutral = _checked(listed, as_prompts(neutral, "neutral"))
    every = [*prompts, *neutral]
    entries = choose(detectors)
    config = _without_needless_spectra(config or AuditConfig(), entries)
    devices = jax.local_devices()
    sampler = require_steps(model.sampler(config.ddim_steps), model.shape)
    plan = Plan.of(ModelFacts.of(model, sampler), config, len(prompts), len(neutral), len(devices))
    chosen = columns(entries, plan.setting())
    if detectors is not None:
        require_evidence(entries, plan.setting())
    elif not chosen:  # with pairs there always is a detector
        raise ValueError(
            f"method: expected spectra of a model without an unconditional score, got {plan.method!r} and nothing else"
            f" that a detector looks at; leave `method` out, add a `count_budget`, or take 2 `noises` and all steps"
        )
    if (plan.with_images or plan.directions) and type(model).decode is Model.decode:
        to_pictures(np.zeros((1, *model.shape)))
    model.check()
    texts = [prompt.text for prompt in every]
    conditions = _conditions(model, texts, len(prompts))
    truncated = model.truncated(texts)
    _say_what_is_missing(truncated, entries, plan, say)
    work = Work(
        run=None,
        plan=plan,
        model=model,
        sampler=sampler,
        conditions=conditions,
        noise=starting_noise(config.seed, plan.noises, model.shape),
        texts=texts,
        seed=config.seed,
        mesh=jax.make_mesh((len(devices),), ("points",), devices=devices) if len(devices) > 1 else None,
        progress=progress,
        detectors=chosen,
    )
    rows = [
        {"prompt": p.text, "label": p.label, "category": p.category, "truncated": bool(cut)}
        for p, cut in zip(every, truncated, strict=True)
    ]
    manifest: dict[str, Any] = {
        "config": asdict(config) | {"guidance": plan.guidance, "prompts": rows},
        "detectors": [detector.name for detector in entries],
        "evidence": {detector.name: detector.identity for detector in entries},
        "experiment": "audit",
        "plan": asdict(plan),
        "sampler": {"name": name_of(type(sampler)), "sha256": captured(partial(type(sampler).step, sampler))},
        "dtype": "float32",
    }
    identity = partial(model.identity, texts)
    return _Order(work, entries, lambda folder, origin: Run.open(folder, origin=origin, model=identity(), **manifest))


def _say_what_is_missing(truncated: list[bool], entries: Sequence[Detector], plan: Plan, say: Say) -> None:
    """Tell of prompts that are cut, and of detectors that the model cannot have."""
    if any(truncated):
        say(f"{sum(truncated)} prompt(s) have more tokens than the text encoder takes and are cut, as in diffusers")
    without = [entry.name for entry in entries if entry.needs.missing(plan.setting()) == UNPAIRED]
    if without:
        say(
            f"left out: {', '.join(without)}, which compare scores with and without the prompt; this model has no"
            f" unconditional score"
        )


def _checked(prompts: list[Prompt], neutral: list[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Refuse prompts that come twice, and a category that is called as the total is."""
    both = {prompt.text for prompt in prompts} & {prompt.text for prompt in neutral}
    if both:
        raise ValueError(
            f"neutral: expected prompts that are not audited, got {len(both)} that are ({min(both)!r:.60}); take them"
            f" out of one of the two lists"
        )
    merge(
        [
            *((f"audited prompt {n + 1}", prompt) for n, prompt in enumerate(prompts)),
            *((f"neutral prompt {n + 1}", prompt) for n, prompt in enumerate(neutral)),
        ],
        "prompts",
    )
    if any(prompt.category == "all" for prompt in prompts):
        raise ValueError("prompts: expected another category than 'all', which is that of the total; rename it")
    return prompts, neutral


def _without_needless_spectra(config: AuditConfig, entries: Iterable[Detector]) -> AuditConfig:
    """``method="auto"`` is "none" where nothing needs spectra and nothing else in the config speaks of them."""
    speaks = config.timesteps or config.directions or config.count_budget is not None
    if config.method != "auto" or speaks or any(entry.needs.per_timestep for entry in entries):
        return config
    return replace(config, method="none")


def _conditions(model: Model, texts: list[str], num_prompts: int) -> Any:
    """Conditions of all prompts, the neutral ones last, and, where there are pairs, of none; checked."""
    number = len(texts) + model.has_pairs
    try:
        conditions = model.conditions([*texts, ""] if model.has_pairs else texts)
    except ValueError:
        if num_prompts == len(texts):
            raise
        try:
            model.conditions(texts[num_prompts:])
        except ValueError as error:
            raise ValueError(f"neutral: {str(error).removeprefix('prompts: ')}") from None
        raise
    # of another number JAX would clamp an index that is too large
    for path, leaf in jax.tree_util.tree_flatten_with_path(conditions)[0]:
        if np.shape(leaf)[:1] != (number,):
            raise ValueError(
                f"model: expected `conditions` of {number} prompts with {number} as leading axis, got shape"
                f" {np.shape(leaf)}{' in ' + jax.tree_util.keystr(path) if path else ''}"
            )
    return conditions


def _finish(run: Run, plan: Plan, entries: Sequence[Detector], name: str) -> Audit:
    result = read_audit(run, entries)
    metrics = summary_metrics(result)
    metrics["model"] = name
    metrics["warnings"] = list(result.warnings)
    metrics["num_products"] = sum(row["products"] for row in run.rows())
    metrics["num_evaluations"] = sum(row["evaluations"] for row in run.rows())
    metrics["costs"] = result.costs
    metrics["wall_seconds"] = wall_seconds(run)
    metrics["finished"] = now()
    labels = [-1 if prompt.label is None else int(prompt.label) for prompt in result.prompts]
    points = plan.num_prompts * plan.noises
    result.to_csv(run.directory / "results.csv")
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
