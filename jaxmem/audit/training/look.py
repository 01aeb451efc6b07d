"""The look from the image itself: spectra and denoising errors at noised images, with their captions and without.

A memorized image sits on a peak of its own, and to see it there no sampling is needed. The points are
``x_t = α x_0 + σ ε``: an audit whose trajectory is made of images instead of by a sampler, so its stages, its units and
its detectors of one timestep are those of `jaxmem.audit`. Each of the two looks is a run of its own in the audit's
folder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmem.audit import store
from jaxmem.audit.cost import Load, Prepared
from jaxmem.audit.hessians import run_counts, run_spectra
from jaxmem.audit.plan import Plan
from jaxmem.audit.scale import DEFAULTS
from jaxmem.audit.training.given import Pictures
from jaxmem.audit.training.records import FOLDER, WITH, WITHOUT, with_leads
from jaxmem.audit.work import Work, starting_noise
from jaxmem.detectors import Detector, columns
from jaxmem.diffusion import posterior_mean
from jaxmem.runs import memory
from jaxmem.runs.directory import Run
from jaxmem.runs.progress import Progress
from jaxmem.training_images import TrainingImages

_ENCODED = 16  # images that are encoded as one unit of work


class Looks(NamedTuple):
    """Both looks, settled: without their runs."""

    works: Mapping[str, Work]
    pictures: Pictures

    def lines(self) -> list[str]:
        """What the images take: said when they were read and compared, before the run is begun."""
        held_out = len(self.pictures.records) - self.pictures.number
        beside = f" and {held_out:,} held-out ones" if held_out else ""
        return [
            f"images: {self.pictures.number:,} training images{beside}, {len(self.pictures.looked):,} looked at;"
            f" up to {memory.gigabytes(self.pictures.bytes)} of memory to compare them",
            *(line for part in self.pictures.parts for line in _oddities(part)),
        ]

    def load(self) -> Load:
        """Count the work of both."""
        each = [
            Load(
                plan.num_points
                * len(plan.timesteps)
                * (1 + plan.image_pairs + (plan.method != "none") + (plan.count_budget is not None)),
                plan.num_points * len(plan.timesteps) * (plan.products_per_spectrum + plan.products_per_count),
            )
            for plan in (work.plan for work in self.works.values())
        ]
        return Load(sum(one.evaluations for one in each), sum(one.products for one in each))


def _oddities(images: TrainingImages) -> list[str]:
    """What may be meant, and may be a slip: images without a caption among others, captions without an image."""
    lines, bare = [], sum(not image.captions for image in images.images)
    if 0 < bare < len(images):
        lines.append(f"{images.source.name}: images without a caption: {bare:,} of {len(images):,}")
    if images.unused:
        named = ", ".join(images.unused[:3]) + (", …" if len(images.unused) > 3 else "")
        lines.append(f"{images.source.name}: caption files that belong to no image: {len(images.unused):,} ({named})")
    return lines


def settle(work: Work, entries: Sequence[Detector], pictures: Pictures) -> Looks:
    """Settle what is done at images: with captions, and without where the model knows that.

    Raises:
        ValueError: a caption that the model does not know, or a timestep that its sampler does not visit.
    """
    model, data = work.model, pictures.data
    plan = look_plan(work.plan, model.schedule, data.image_timesteps, data.image_noises, len(pictures.looked))
    captions = [pictures.captions[i] for i in pictures.looked]
    texts = list(dict.fromkeys(captions))
    number = {text: i for i, text in enumerate(texts)}
    chosen = {WITH: np.array([number[text] for text in captions])}
    if model.has_pairs:
        texts.append("")
        chosen[WITHOUT] = np.full(len(captions), len(texts) - 1)
    try:
        conditions = model.conditions(texts)
    except ValueError as error:
        raise ValueError(f"training: {str(error).removeprefix('prompts: ')}") from None
    shared: dict[str, Any] = dict(
        run=None,
        conditions=conditions,
        noise=starting_noise(work.seed, plan.noises, model.shape),
        texts=[pictures.records[i].name for i in pictures.looked],
    )
    works = {}
    for name, which in chosen.items():
        paired = replace(plan, image_pairs=name == WITH and model.has_pairs)
        chosen_there = columns(with_leads(entries), paired.setting())
        own: dict[str, Any] = dict(plan=paired, detectors=chosen_there, condition_of=which)
        works[name] = replace(work, **shared, **own, progress=_named(work.progress, name))
    return Looks(works, pictures)


def look_plan(plan: Plan, schedule: Any, timesteps: Sequence[int], noises: int, number: int) -> Plan:
    """The plan of a look: images in place of prompts, batches and spectra as in the audit.

    By default timesteps near 281 and 41 on the usual scale: late enough to tell one image from others like it, and
    early enough for a network to have resolved how sharp its density is.

    Raises:
        ValueError: a timestep that the sampler does not visit.
    """
    visited = plan.sampler_timesteps
    for t in timesteps:
        if t not in visited:
            near = min(visited, key=lambda one: abs(one - t))
            raise ValueError(
                f"image_timesteps: expected ones of the sampler ({len(visited)} from {visited[0]} down to"
                f" {visited[-1]}), got {t}; the nearest is {near}"
            )
    chosen = set(timesteps) or {plan.scale.nearest(place, visited) for place in DEFAULTS[1:]}
    descending = tuple(sorted(chosen, reverse=True))
    return replace(
        plan,
        num_prompts=number,
        num_reference=0,
        noises=noises,
        guidance=1.0,
        has_pairs=False,
        timesteps=descending,
        sigma=tuple(float(schedule.sigma[t]) for t in descending),
        spectral_timesteps=descending,
        directions=0,
        at_images=True,
    )


def run_looks(looks: Looks, main: Work, prepared: Prepared) -> None:
    """Do both looks, each in its own run."""
    clean = run_encoding(main, looks.pictures)
    for name, work in looks.works.items():
        manifest = main.run.manifest
        provenance = {key: manifest[key] for key in ("model", "detectors", "evidence", "training", "dtype")}
        run = Run.open(
            Path(main.run.directory) / FOLDER / name,
            {"look": name, "seed": work.seed},
            experiment="at images",
            plan=asdict(work.plan),
            **provenance,
        )
        if run.finished:
            continue
        there = replace(work, run=run)
        run_noised(there, clean, prepared.evaluation_bytes)
        run_spectra(there, prepared.programs, prepared.spectrum_bytes)
        run_counts(there)
        run.finalise({"num_images": len(looks.pictures.looked)}, {})


def run_encoding(work: Work, pictures: Pictures) -> np.ndarray:
    """The clean samples x_0 of the images that are looked at, (I, *latent); a unit is a few images."""
    looked = pictures.looked
    total = len(looked)
    for first in range(0, total, _ENCODED):
        key = store.clean(first)
        work.progress("encode training images", first, total)
        if not work.run.done(key):
            with work.unit(key, "encoding"):
                found = np.asarray(work.model.encode(pictures.pixels(looked[first : first + _ENCODED])), np.float32)
                expected = (min(_ENCODED, total - first), *work.plan.latent_shape)
                if found.shape != expected or not np.isfinite(found).all():
                    raise ValueError(
                        f"model: expected finite samples of shape {expected} from `encode`, got shape {found.shape}"
                    )
                work.run.save(key, clean=found)
    work.progress("encode training images", total, total)
    return np.concatenate([work.run.load(store.clean(first))["clean"] for first in range(0, total, _ENCODED)])


def run_noised(work: Work, clean: np.ndarray, memory: int) -> None:
    """Noise the images, and denoise them again; a unit is one batch at some timesteps."""
    plan, schedule = work.plan, work.model.schedule
    for number in plan.batches():
        points, filled = plan.points(number), plan.filled(number)
        work.progress("denoise images", int(points[0]), plan.num_points)
        for index, steps in enumerate(plan.segments):
            key = store.path(number, index)
            if work.run.done(key):
                continue
            evaluations = len(points) * len(steps) * (1 + plan.image_pairs)
            with work.unit(key, "denoising", evaluations=evaluations, memory=memory):
                x_0, cond, arrays = clean[filled // plan.noises], work.cond(filled), {}
                for t in (plan.timesteps[step] for step in steps):
                    alpha, sigma = np.float32(schedule.alpha[t]), np.float32(schedule.sigma[t])
                    x = alpha * x_0 + sigma * work.first(filled)
                    score = np.asarray(work.scores(x, t, cond))
                    work.check(score[: len(points)], points, t)
                    arrays[store.x_at(t)] = x[: len(points)]
                    arrays[store.error_at(t)] = _error(x, score, x_0, alpha, sigma)[: len(points)]
                    if plan.image_pairs:
                        plain = np.asarray(work.scores(x, t, work.uncond(plan.batch)))
                        work.check(plain[: len(points)], points, t)
                        arrays[store.plain_error_at(t)] = _error(x, plain, x_0, alpha, sigma)[: len(points)]
                work.run.save(key, **arrays)
    work.progress("denoise images", plan.num_points, plan.num_points)


def _error(x: np.ndarray, score: np.ndarray, x_0: np.ndarray, alpha: Any, sigma: Any) -> np.ndarray:
    """Mean squared error of the denoised images, in float64: of a sharp peak it is far below the values themselves."""
    mean = posterior_mean(score.astype(np.float64), x.astype(np.float64), float(alpha), float(sigma))
    squares = np.square(mean - x_0.astype(np.float64))
    return np.asarray(squares.reshape(len(x), -1).mean(1))


def _named(progress: Progress, name: str) -> Progress:
    """Progress of one look, apart from that of the audit's own stages."""
    return partial(_report, progress, name.replace("-", " "))


def _report(progress: Progress, name: str, task: str, done: int, total: int) -> None:
    progress(f"{task}, {name}", done, total)
