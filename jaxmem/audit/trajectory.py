"""Guided DDIM sampling with the score pair of every step: the pool of evaluations that serves most detectors."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxmem.audit.work import Work
from jaxmem.memorization.detectors import SCORE_EVOLUTION_STEPS, eps_difference, score_evolution
from jaxmem.sampling import ddim_step
from jaxmem.score import ScorePair


class Step(NamedTuple):
    """One step of a batch."""

    x: Array  #: the next x_t
    eps_difference: Array  #: ‖eps_c − eps_u‖ per point
    difference: Array  #: s_c − s_u


@partial(jax.jit, static_argnames="guidance")
def advance(cond: Array, uncond: Array, x: Array, scales: Array, guidance: float) -> Step:
    """One DDIM step under guidance, from the two scores."""

    def one(cond: Array, uncond: Array, x: Array) -> Step:
        pair = ScorePair(cond, uncond)
        x = ddim_step(pair.guided(guidance), x, (scales[0], scales[1]), (scales[2], scales[3]))
        return Step(x, eps_difference(pair, scales[1]), pair.difference)

    return jax.vmap(one)(cond, uncond, x)


_evolution = jax.jit(jax.vmap(score_evolution, 1))


def run_start(work: Work, t: int) -> np.ndarray:
    """The unconditional score at the starting noises, which is the same for all prompts, shape (noises, *latent).

    Its row holds what is there to be warned of, see `jaxmem.audit.result.read_warnings`.
    """
    key, plan = f"start-{t:04d}", work.plan
    if not work.run.done(key):
        with work.unit(key, "trajectory", evaluations=plan.noises) as row:
            parts = []
            for first in range(0, plan.noises, plan.batch):
                chosen = np.minimum(np.arange(first, first + plan.batch), plan.noises - 1)
                parts.append(np.asarray(work.scores(work.noise[chosen], t, work.uncond(plan.batch))))
            found = np.concatenate(parts)[: plan.noises]
            work.check(found, len(work.texts) * plan.noises + np.arange(plan.noises), t)
            work.run.save(key, found)
            row["noise_share"] = work.noise_share(found, work.noise, t)
            row["warnings"] = list(work.model.reading.warnings)
    return work.run.load(key)


def run_trajectory(work: Work, memory: int) -> None:
    """Sample all batches; a unit is a segment of steps of one batch, see `segment_keys` for what it saves."""
    plan, run = work.plan, work.run
    start = run_start(work, plan.timesteps[0])
    total, before = plan.num_batches * len(plan.timesteps), 0
    for number in plan.batches():
        for index, steps in enumerate(plan.segments):
            work.progress("sampling steps", before, total)
            if not run.done(f"path-{number:05d}-{index:03d}"):
                _run_segment(work, number, index, steps, start, memory, before, total)
            before += len(steps)
    work.progress("sampling steps", total, total)


def _run_segment(
    work: Work, number: int, index: int, steps: range, start: np.ndarray, memory: int, before: int, total: int
) -> None:
    """Saves ``x-…`` (the end), ``eps-…`` (the norms), ``at-…`` (x_t of spectra), of the first also its differences."""
    plan, run = work.plan, work.run
    points, filled = plan.points(number), plan.filled(number)
    keep, key = len(points), f"path-{number:05d}-{index:03d}"
    scales = jnp.asarray(work.sampler.scales(), jnp.float32)
    start_at = work.first(filled)
    if index:
        end = run.load(f"x-{number:05d}-{index - 1:03d}")
        start_at = np.concatenate([end, np.repeat(end[-1:], len(filled) - keep, 0)])
    x = work.batch(start_at, 0, work.cond(filled))[0]
    cond, uncond = work.cond(filled), work.uncond(len(filled))
    evaluations = keep * (2 * len(steps) - (index == 0))  # the first unconditional one is that of `run_start`
    norms: list[np.ndarray] = []
    differences: list[Array] = []
    with work.unit(key, "trajectory", evaluations=evaluations, memory=memory):
        for step in steps:
            work.progress("sampling steps", before + len(norms), total)
            t = plan.timesteps[step]
            if t in plan.spectral_timesteps:
                run.save(f"at-{number:05d}-{t:04d}", np.asarray(x)[:keep])
            given = work.scores(x, t, cond)
            shared = step == 0
            without = work.batch(start[filled % plan.noises], t, cond)[0] if shared else work.scores(x, t, uncond)
            x, norm, difference = advance(given, without, x, scales[step], plan.guidance)
            norms.append(np.asarray(norm)[:keep])
            work.check(norms[-1], points, t)
            if step < SCORE_EVOLUTION_STEPS:
                differences.append(difference)
        if index == 0:
            run.save(f"difference-{number:05d}", np.asarray(differences[0])[:keep])
            if len(differences) == SCORE_EVOLUTION_STEPS:
                run.save(f"evolution-{number:05d}", np.asarray(_evolution(jnp.stack(differences)))[:keep])
        work.check(np.asarray(x)[:keep], points, plan.timesteps[steps[-1]], "latent after the step")
        run.save(f"eps-{number:05d}-{index:03d}", np.stack(norms, 1))
        run.save(f"x-{number:05d}-{index:03d}", np.asarray(x)[:keep])


def run_images(work: Work) -> None:
    """Decode the end of each trajectory, where sampling goes so far."""
    plan, run = work.plan, work.run
    if not plan.with_images:
        return
    for number in plan.batches():
        work.progress("images", int(plan.points(number)[0]), plan.num_points)
        key = f"image-{number:05d}"
        if not run.done(key):
            with work.unit(key, "images"):
                latents = run.load(f"x-{number:05d}-{len(plan.segments) - 1:03d}")
                run.save(key, work.model.decode(jnp.asarray(latents)))
    work.progress("images", plan.num_points, plan.num_points)
