"""Run an audit: settle it, say what it takes, do its stages, finish the run."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from jaxmem.audit import store
from jaxmem.audit.cost import AuditCost, prepare
from jaxmem.audit.directions import run_directions
from jaxmem.audit.extend import extend, find_begun, read_all
from jaxmem.audit.result import Audit
from jaxmem.audit.settle import Order, listen, settle
from jaxmem.audit.stages import finish, require_count_disk, run_stages
from jaxmem.audit.training.given import TrainingData
from jaxmem.audit.training.look import run_looks
from jaxmem.audit.training.nearest import run_nearest, run_records
from jaxmem.audit.whole import read_whole
from jaxmem.config import AuditConfig
from jaxmem.detectors import Detector
from jaxmem.model import Model
from jaxmem.prompts import Prompt
from jaxmem.runs.directory import holds_something
from jaxmem.runs.origin import Origin
from jaxmem.runs.progress import Progress, Say, quiet, silent


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
        folder: of the run. A finished run of some of these prompts, noises and detectors, and of the same settings, is
            extended by the others; what it has comes first.
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
    call = listen(model, prompts, config, neutral, detectors, training)
    folder, origin = Path(folder), origin or Origin()
    order = settle(call, progress, say)
    begun = find_begun(call, order, folder)
    if begun is None:
        return _run(order, folder, origin, name, say)
    if begun.more:
        say(f"the run in {folder} is extended by {' and '.join(begun.more)}; what it has is kept")
    if not begun.run.finished:
        _run(begun.base, folder, origin, name, say)
    return extend(call, order, begun.run, origin, name, progress, say)


def _run(order: Order, folder: Path, origin: Origin, name: str, say: Say) -> Audit:
    """Begin the run of an audit, or continue it, to its end."""
    work, model = order.work, order.work.model
    # A folder that has something is looked at before the estimate takes its time, a new one is made after it.
    run = order.open_run(folder, origin) if holds_something(folder) else None
    if run is not None and run.finished:
        return read_all(run, order.entries, say)
    require_count_disk(work.plan, folder)
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
    run_stages(work, prepared)
    run_directions(work, prepared.programs)
    if order.looks is not None:
        run_records(work, order.looks.pictures)
        run_nearest(work, order.looks.pictures)
        run_looks(order.looks, work, prepared)
    return finish(read_whole(run, 0), order.entries, name)


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
    order = settle(listen(model, prompts, config, neutral, detectors, training), silent, say)
    prepared = prepare(order.work, order.looks)
    warning = model.contradiction(prepared.noise_share)
    cost = prepared.cost
    cost = cost._replace(lines=(*cost.lines, f"warning: {warning}")) if warning else cost
    for line in cost.lines:
        say(line)
    return cost
