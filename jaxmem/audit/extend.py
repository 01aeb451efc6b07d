"""Extend an audit by prompts, noises or detectors: only what is new is computed.

A call that asks for all that a folder has, and for more, is met one kind after another: prompts, then noises, then
detectors. Each is a rectangle of points, which an extension collects as a run of its own (`jaxmem.audit.whole`). What
was there comes first in the lists of the audit as it is then, so that numbers of prompts stay.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmem.audit import store
from jaxmem.audit.beyond import more_than, next_call, restrict
from jaxmem.audit.cost import prepare
from jaxmem.audit.directions import decode_directions, extreme_points
from jaxmem.audit.plan import Plan
from jaxmem.audit.result import Audit, read_audit
from jaxmem.audit.settle import Call, Order, settle
from jaxmem.audit.stages import finish, require_count_disk, run_stages
from jaxmem.audit.training.nearest import run_nearest
from jaxmem.audit.whole import EXPERIMENT, NUMBER, Covers, Whole, extension_folder, read_whole, whole_manifest
from jaxmem.audit.work import Work
from jaxmem.detectors import Detector, HessianProducts, ScorePairs, StartPairs, columns
from jaxmem.runs.directory import Run
from jaxmem.runs.identity import differences
from jaxmem.runs.manifest import RECORDED, is_run, refuse_other_work
from jaxmem.runs.origin import Origin
from jaxmem.runs.progress import Progress, Say, quiet, silent
from jaxmem.spectra.programs import Programs

_FREE = ("num_prompts", "num_reference", "noises", "batch", "directions")  # fields of a plan that an extension changes


class Begun(NamedTuple):
    """An audit in a folder, begun by a call that asked for no more than this one does."""

    run: Run
    base: Order  #: of what is there
    more: tuple[str, ...]  #: what the call asks for beyond it, in words


def find_begun(call: Call, order: Order, folder: Path) -> Begun | None:
    """Look in a folder for an audit that is a part of what is asked for; None where `Order.open_run` has to judge.

    Raises:
        ValueError: the audit there has other settings, or detectors are added whose evidence it did not collect.
    """
    if not is_run(folder):
        return None
    run = Run.read(folder)
    if run.manifest.get("experiment") != "audit" or not _differ(run.manifest, order):
        return None
    *earlier, newest = (read_whole(run, k).manifest for k in range(_number(run) + 1))
    for state in earlier:
        same = restrict(call, state)
        if same is not None and next_call(call, state) is None and not _differ(state, _settled(same, order)):
            return Begun(run, order, ())
    base = restrict(call, newest)
    if base is None:
        return None
    settled = _settled(base, order)
    refuse_other_work(folder, _compared(newest), settled.description)
    _refuse_other_evidence(newest, order)
    return Begun(run, settled, more_than(call, newest))


def extend(call: Call, order: Order, begun: Run, origin: Origin, name: str, progress: Progress, say: Say) -> Audit:
    """Do what a call asks for beyond a finished audit, and return all that the folder has then.

    Args:
        call: what is asked for, all that is there included.
        order: of the call.
        begun: the audit's run.
        origin: of the call, for the manifests of extensions.
        name: what the model is called.
        progress: told of each stage.
        say: gets the estimate of each extension.

    Raises:
        ValueError: as `jaxmem.audit`, or an extension of another call is under way.
    """
    run, found = _reopened(begun), None
    while True:
        number = _number(run)
        ahead, whole = extension_folder(run, number + 1), read_whole(run, number)
        wanted = next_call(call, whole.manifest)
        if wanted is None:
            return found or read_all(run, order.entries, say)
        if is_run(ahead):
            wanted = _begun_before(call, order, ahead)
        found = _extend_once(whole, _settled(wanted, order, progress), ahead, origin, name, say)


def read_all(run: Run, entries: Sequence[Detector], say: Say) -> Audit:
    """Read a finished audit; say where it has more than what was asked for."""
    if _number(run):
        say(f"the run in {run.directory} was extended; its results are those of all that it has")
    return read_audit(run, entries)


def _begun_before(call: Call, order: Order, folder: Path) -> Call:
    """The part of a call that an extension was begun for; refuses one that was begun for something else."""
    there = whole_manifest(Run.read(folder))
    wanted = restrict(call, there)
    if wanted is None:
        raise ValueError(
            f"{folder}: expected the call that began this extension, or one that asks for more, got another one"
            f" ({differences(_compared(there), order.description)}); repeat that call, or delete this folder"
        )
    return wanted


def _extend_once(whole: Whole, order: Order, folder: Path, origin: Origin, name: str, say: Say) -> Audit:
    """Do one extension, and write what the audit is with it."""
    covers, work = _settle_part(whole, order)
    sections = {"experiment": EXPERIMENT, "plan": asdict(work.plan), "whole": asdict(order.work.plan)}
    manifest = order.manifest | sections | {"covers": covers._asdict()}
    run = Run.open(folder, origin=origin, **manifest)
    work = replace(work, run=run)
    if not run.finished:
        if covers.prompts:
            _collect(work, whole, order, say)
        run.finalise({"num_points": len(covers.prompts) * work.plan.noises}, {})
    return finish(read_whole(whole.run, len(whole.parts)), order.entries, name)


def _settle_part(whole: Whole, order: Order) -> tuple[Covers, Work]:
    """What an extension covers of an order that goes beyond the whole in one kind, and its work without the run."""
    full, texts = order.work, list(order.work.texts)
    there = {row["prompt"] for row in whole.manifest["config"]["prompts"]}
    listed = [i for i, text in enumerate(texts) if text not in there] or list(range(len(texts)))
    first_noise = whole.plan.noises if full.plan.noises > whole.plan.noises else 0
    noises = full.plan.noises - first_noise
    devices = 1 if full.mesh is None else full.mesh.size
    plan = replace(
        full.plan,
        num_prompts=len(listed),
        num_reference=0,
        noises=noises,
        first_noise=first_noise,
        batch=min(full.plan.batch, -(-len(listed) * noises // devices) * devices),
        directions=0,
    )
    covers, detectors = Covers(tuple(listed)), full.detectors
    if len(listed) == len(texts) and not first_noise:
        added = [one for one in order.entries if one.name not in whole.manifest["detectors"]]
        detectors = tuple(one for one in columns(added, full.plan.setting()) if _is_scored_by_stages(one))
        covers = Covers(tuple(listed) if detectors else (), tuple(one.name for one in added))
        plan = _first_steps(plan, detectors)
    which = np.array([*listed, *([len(texts)] if plan.has_pairs else [])])  # the empty prompt is last
    conditions = jax.tree.map(lambda leaf: leaf[which], full.conditions)
    return covers, replace(
        full,
        plan=plan,
        conditions=conditions,
        noise=full.noise[first_noise:],
        texts=[texts[i] for i in listed],
        detectors=detectors,
    )


def _is_scored_by_stages(detector: Detector) -> bool:
    """Whether no run keeps the evidence, but only the score."""
    return isinstance(detector.needs, ScorePairs | HessianProducts | StartPairs)


def _first_steps(plan: Plan, detectors: tuple[Detector, ...]) -> Plan:
    """The plan of no more steps than these detectors need, without spectra."""
    steps = max((one.steps or 1 for one in detectors), default=1)
    return replace(
        plan,
        timesteps=plan.timesteps[:steps],
        sigma=plan.sigma[:steps],
        spectral_timesteps=(),
        method="none",
        count_budget=None,
    )


def _collect(work: Work, whole: Whole, order: Order, say: Say) -> None:
    """Do the stages of an extension."""
    run = work.run
    require_count_disk(work.plan, run.directory)
    prepared = prepare(work)
    for line in prepared.cost.lines:
        say(line)
    run_stages(work, prepared)
    if run.manifest["covers"]["detectors"] is None:
        if order.looks is not None:
            run_nearest(work, order.looks.pictures)
        _extend_directions(work, read_whole(whole.run, len(whole.parts)), order, prepared.programs)


def _extend_directions(work: Work, whole: Whole, order: Order, programs: Programs) -> None:
    """Decode directions again where other points are the extreme ones now."""
    plan = whole.plan
    if not plan.directions:
        return
    t = plan.scale.judged(plan.spectral_timesteps)
    values = np.full((plan.num_points, plan.num_eigenvalues), np.nan)
    for part in whole.full:
        shapes: dict[str, tuple[int, ...]] = {"eigenvalues": (plan.num_eigenvalues,)}
        values[part.points] = store.gather(part.run, part.plan, partial(store.spectrum, t=t), shapes)["eigenvalues"]
    chosen = extreme_points(values[: plan.num_prompts * plan.noises])
    there = whole.directions
    if there is None or there[1]["point"] != [list(divmod(point, plan.noises)) for point in chosen]:
        # programs are compiled for the batch of the extension
        all_points = replace(order.work, run=work.run, plan=replace(plan, batch=work.plan.batch))
        decode_directions(all_points, programs, chosen, t, partial(whole.latents, t=t))


def _settled(call: Call, order: Order, progress: Progress = silent) -> Order:
    """Settle a part of what was settled before."""
    return settle(call, progress, quiet, None if order.looks is None else order.looks.pictures)


def _refuse_other_evidence(manifest: dict[str, Any], order: Order) -> None:
    """Refuse detectors for which sampling or spectra would have to be done again."""
    there, now = manifest["plan"], order.description["plan"]
    if differing := [name for name in now if name not in _FREE and there.get(name) != now[name]]:
        names = [one.name for one in order.entries if one.name not in manifest["detectors"]]
        raise ValueError(
            f"detectors: expected to add some that look at what the run has, or at its first steps, got"
            f" {', '.join(names)}, with which its plan is another ({', '.join(differing)}); run them in another folder"
        )


def _differ(manifest: dict[str, Any], order: Order) -> bool:
    return bool(differences(_compared(manifest), order.description))


def _compared(manifest: dict[str, Any]) -> dict[str, Any]:
    """The sections of a manifest that have to be the same."""
    return {name: value for name, value in manifest.items() if name not in (*RECORDED, "extensions")}


def _number(run: Run) -> int:
    """How many extensions an audit has, those that are done."""
    return int(run.metrics().get(NUMBER, 0)) if run.finished else 0


def _reopened(run: Run) -> Run:
    """Open a run to write in it, whatever it is of."""
    return Run.open(run.directory, **{name: one for name, one in _compared(run.manifest).items() if name != "format"})
