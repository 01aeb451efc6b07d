"""Sampling, with the pair of scores at every step: the evaluations that most detectors need."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxmem.audit import store
from jaxmem.audit.steps import guided_step, unguided_step
from jaxmem.audit.work import Work
from jaxmem.detectors import Detector, Pairs, ScorePairs


@cache
def mapped(score: Callable[..., Any], evidence: Callable[..., Any], axes: tuple[int | None, ...]) -> Any:
    """A detector's score, compiled for a batch of points; ``axes`` is theirs in the parts of the evidence."""
    return jax.jit(jax.vmap(lambda *parts: score(evidence(*parts)), axes))


def require_numbers(detector: Detector, scores: np.ndarray, number: int) -> None:
    """Refuse a score that is not one number, before it is kept."""
    if np.shape(scores) != (number,):
        raise ValueError(
            f"detectors: expected one number for each point from the score of {detector.name!r}, got an array of shape"
            f" {np.shape(scores)[1:]}; correct it and start the same call again"
        )


def run_start(work: Work, t: int) -> np.ndarray:
    """Unconditional score at the starting noises, the same for all prompts, shape (noises, *shape)."""
    key, plan = store.start(t), work.plan
    if not work.run.done(key):
        with work.unit(key, "trajectory", evaluations=plan.noises):
            parts = []
            for first in range(0, plan.noises, plan.batch):
                chosen = np.minimum(np.arange(first, first + plan.batch), plan.noises - 1)
                parts.append(np.asarray(work.scores(work.noise[chosen], t, work.uncond(plan.batch))))
            found = np.concatenate(parts)[: plan.noises]
            work.check(found, len(work.texts) * plan.noises + np.arange(plan.noises), t)
            work.run.save(key, uncond=found)
    return work.run.load(key)["uncond"]


def run_trajectory(work: Work, memory: int) -> None:
    """Sample all batches; a unit is a segment of steps of one batch, see `jaxmem.audit.store` for what it keeps."""
    plan, run = work.plan, work.run
    start = run_start(work, plan.timesteps[0]) if plan.has_pairs else None
    total, before = plan.num_batches * len(plan.timesteps), 0

    def report(done: int) -> None:
        work.progress("sampling steps", before + done, total)

    for number in plan.batches():
        for index, steps in enumerate(plan.segments):
            report(0)
            key = store.path(number, index)
            if not run.done(key):
                # the first score without the prompt is that of `run_start`
                each = plan.scores_per_step * len(steps) - (plan.has_pairs and index == 0)
                evaluations = len(plan.points(number)) * each
                with work.unit(key, "trajectory", evaluations=evaluations, memory=memory):
                    run.save(key, **_sample_segment(work, number, index, start, report))
            before += len(steps)
    work.progress("sampling steps", total, total)


def _sample_segment(
    work: Work, number: int, index: int, start: np.ndarray | None, report: Callable[[int], None]
) -> dict[str, np.ndarray]:
    """Sample some steps of a batch, and return the arrays of its unit.

    ``start`` has the unconditional scores at the starting noises, if the model has pairs of scores.
    """
    plan, steps = work.plan, work.plan.segments[index]
    points, filled = plan.points(number), plan.filled(number)
    keep = len(points)
    scales = jnp.asarray(work.sampler.scales(), jnp.float32)
    start_at = work.first(filled)
    if index:
        end = work.run.load(store.path(number, index - 1), "end")["end"]
        start_at = np.concatenate([end, np.repeat(end[-1:], len(filled) - keep, 0)])
    cond = work.cond(filled)
    x = work.batch(start_at, 0, cond)[0]
    of_pairs = [one for one in work.detectors if isinstance(one.needs, ScorePairs)] if index == 0 else []
    num_pairs = max((one.steps or 0 for one in of_pairs), default=0)
    arrays: dict[str, np.ndarray] = {}
    norms: list[np.ndarray] = []
    pairs: list[tuple[Array, Array, Array]] = []
    for step in steps:
        report(step - steps[0])
        t = plan.timesteps[step]
        if t in plan.spectral_timesteps:
            arrays[store.x_at(t)] = np.asarray(x)[:keep]
        given = work.scores(x, t, cond)
        if start is None:
            x = unguided_step(work.sampler, given, x, jnp.int32(t), scales[step])
            work.check(np.asarray(given)[:keep], points, t)
            continue
        shared = start[filled % plan.noises] if step == 0 else None
        without = work.scores(x, t, work.uncond(plan.batch)) if shared is None else work.batch(shared, t, cond)[0]
        if step < num_pairs:
            pairs.append((x, given, without))
        sigma = jnp.float32(plan.sigma[step])
        x, norm, difference = guided_step(
            work.sampler, given, without, x, jnp.int32(t), scales[step], sigma, plan.guidance
        )
        norms.append(np.asarray(norm)[:keep])
        work.check(norms[-1], points, t)
        if step == 0:
            arrays["difference"] = np.asarray(difference)[:keep]
    arrays["end"] = np.asarray(x)[:keep]
    work.check(arrays["end"], points, plan.timesteps[steps[-1]], "latent after the step")
    if norms:
        arrays["norms"] = np.stack(norms, 1)
    return arrays | _scores_of_pairs(work, of_pairs, pairs, points)


def _scores_of_pairs(
    work: Work, detectors: Sequence[Detector], pairs: Sequence[tuple[Array, Array, Array]], points: np.ndarray
) -> dict[str, np.ndarray]:
    """Scores of the detectors that need the pairs of the first steps."""
    found = {}
    for detector in detectors:
        number = detector.steps or 1
        sigma = jnp.asarray(work.plan.sigma[:number], jnp.float32)
        stacked = [jnp.stack(part) for part in zip(*pairs[:number], strict=True)]  # the points are axis 1
        scores = np.asarray(mapped(detector.score, Pairs, (1, 1, 1, None))(*stacked, sigma))[: len(points)]
        require_numbers(detector, scores, len(points))
        work.check(scores, points, work.plan.timesteps[number - 1], f"score of {detector.name!r}")
        found[store.score_of(detector.name)] = scores
    return found


def run_images(work: Work) -> None:
    """Decode the end of each trajectory, where sampling goes so far."""
    plan, run = work.plan, work.run
    if not plan.with_images:
        return
    for number in plan.batches():
        work.progress("images", int(plan.points(number)[0]), plan.num_points)
        key = store.image(number)
        if not run.done(key):
            with work.unit(key, "images"):
                latents = run.load(store.path(number, len(plan.segments) - 1), "end")["end"]
                run.save(key, images=work.model.decode(jnp.asarray(latents)))
    work.progress("images", plan.num_points, plan.num_points)
