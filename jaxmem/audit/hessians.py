"""What needs more than scores: products with the Hessians, and one evaluation off the trajectory."""

import shutil
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxmem.audit import store
from jaxmem.audit.trajectory import mapped, require_numbers, run_start
from jaxmem.audit.work import Work
from jaxmem.detectors import Detector, HessianProducts, Products, StartPairs, TwoPairs
from jaxmem.jacobian import ScoreJacobian, score_jacobian
from jaxmem.krylov import Factorization, Status, begin
from jaxmem.score import ScorePair
from jaxmem.spectra import batch_spectra, count_positive
from jaxmem.spectra.driver import drive
from jaxmem.spectra.programs import Measured, Programs, measure
from jaxmem.spectra.ritz import ritz_table

COUNTING = "counting"  #: the folder, in that of the run, of counts that are under way
_KRYLOV_KEY = 1_000_000  # folded into the seed's key: no starting noise has this number


def run_start_pairs(work: Work, memory: int) -> None:
    """The score pair of the starting noise at a late timestep, which no trajectory visits there."""
    plan, run, setting = work.plan, work.run, work.plan.setting()
    wanted: dict[int, list[Detector]] = {}
    for detector in work.detectors:
        if isinstance(detector.needs, StartPairs):
            wanted.setdefault(detector.needs.timestep(setting), []).append(detector)
    for t, detectors in wanted.items():
        late, first = run_start(work, t), run_start(work, plan.timesteps[0])
        for number in plan.batches():
            key = store.pairs(number, t)
            work.progress("start pairs", number, plan.num_batches)
            if not run.done(key):
                points, filled = plan.points(number), plan.filled(number)
                keep, noise = len(points), points % plan.noises
                with work.unit(key, "start pairs", evaluations=keep, memory=memory):
                    given = np.asarray(work.scores(work.first(filled), t, work.cond(filled)))[:keep]  # of all devices
                    uncond = jnp.asarray(first[noise])
                    early = ScorePair(uncond + store.first_difference(run, number), uncond)
                    found = early, ScorePair(jnp.asarray(given), jnp.asarray(late[noise])), jnp.float32(plan.sigma[0])
                    scores = {
                        one.name: np.asarray(mapped(one.score, TwoPairs, (0, 0, None))(*found)) for one in detectors
                    }
                    for one in detectors:
                        require_numbers(one, scores[one.name], keep)
                        work.check(scores[one.name], points, t, f"score of {one.name!r}")
                    run.save(key, **{store.score_of(name): values for name, values in scores.items()})
        work.progress("start pairs", plan.num_batches, plan.num_batches)


def run_products(work: Work, programs: Programs) -> None:
    """``H_c s_Δ`` and ``H_u s_Δ`` at the first step: two linearisations and two products per point."""
    plan, run, t = work.plan, work.run, work.plan.timesteps[0]
    detectors = [detector for detector in work.detectors if isinstance(detector.needs, HessianProducts)]
    if not detectors:
        return
    for number in plan.batches():
        key = store.products(number)
        work.progress("products with both Hessians", number, plan.num_batches)
        if not run.done(key):
            points, filled = plan.points(number), plan.filled(number)
            counts = dict(evaluations=2 * len(points), products=2 * len(points), memory=programs.peak_bytes)
            with work.unit(key, "products", **counts):
                x, difference = work.first(filled), store.first_difference(run, number)
                full = np.concatenate([difference, np.repeat(difference[-1:], len(filled) - len(points), 0)])
                vectors = full.reshape(len(filled), -1)
                products = [
                    _product(work, programs, x, t, cond, jnp.asarray(vectors))
                    for cond in (work.cond(filled), work.uncond(len(filled)))
                ]
                each = [Products(*rows) for rows in zip(*products, vectors, strict=True)][: len(points)]
                scores = {d.name: np.array([d.score(found) for found in each], np.float64) for d in detectors}
                for d in detectors:
                    require_numbers(d, scores[d.name], len(points))
                    work.check(scores[d.name], points, t, f"score of {d.name!r}")
                run.save(key, **{store.score_of(name): values for name, values in scores.items()})
    work.progress("products with both Hessians", plan.num_batches, plan.num_batches)


def _product(work: Work, programs: Programs, x: Any, t: int, cond: Any, vectors: Array) -> np.ndarray:
    # The operators of one condition are gone before the next are made: they are the largest things there are.
    return np.asarray(programs.forward(linearise(work, programs, x, t, cond), vectors))


def run_spectra(work: Work, programs: Programs, memory: int) -> None:
    """Eigenvalues of the conditional Hessian, with their measured noise: a unit is a batch at one timestep."""
    plan, run = work.plan, work.run
    if plan.method == "none":
        return
    total, done = plan.num_batches * len(plan.spectral_timesteps), 0
    for number in plan.batches():
        for t in plan.spectral_timesteps:
            key = store.spectrum(number, t)
            work.progress("spectra", done, total)
            if not run.done(key):
                points = plan.points(number)
                products = plan.products_per_spectrum * len(points)
                counts = dict(evaluations=len(points), products=products, memory=memory)
                with work.unit(key, "spectra", **counts):
                    x = store.latents(run, plan, number, t)
                    find = _exact if plan.method == "eigh" else partial(_lanczos, programs=programs)
                    eigenvalues, noise = find(work, number, x, t)
                    run.save(key, eigenvalues=eigenvalues, noise=noise)
            done += 1
    work.progress("spectra", total, total)


def _exact(work: Work, number: int, x: np.ndarray, t: int) -> tuple[np.ndarray, np.ndarray]:
    """All eigenvalues of a batch, and their noise."""
    cond = work.cond(work.plan.points(number))
    options: dict[str, Any] = dict(chunk=work.plan.columns, mesh=work.mesh)
    found = batch_spectra(work.score, work.spread_state, jnp.asarray(x), t, cond, **options)
    return np.asarray(found.eigenvalues, np.float64), np.asarray(found.noise, np.float64)


def _lanczos(work: Work, number: int, x: np.ndarray, t: int, programs: Programs) -> tuple[np.ndarray, np.ndarray]:
    """Ritz values of a batch, NaN padded, and their noise."""
    points, filled = work.plan.points(number), work.plan.filled(number)
    x = np.concatenate([x, np.repeat(x[-1:], len(filled) - len(points), 0)])
    operators = linearise(work, programs, x, t, work.cond(filled))
    factorizations, measured = factorise(work, programs, operators, filled, t)
    table = ritz_table(factorizations, measured.noise, symmetric=True)
    return table.values[: len(points)], table.noise[: len(points)]


def linearise(work: Work, programs: Programs, x: Any, t: int, cond: Any) -> ScoreJacobian:
    """The Jacobians of one batch."""
    return programs.operators(
        work.model.state, jnp.asarray(x), jnp.full(len(x), t, jnp.int32), jax.tree.map(jnp.asarray, cond)
    )


def factorise(
    work: Work, programs: Programs, operators: ScoreJacobian, points: np.ndarray, t: int
) -> tuple[Factorization, Measured]:
    """Lanczos of one batch, each point from the start vector of its noise and timestep; points as leading axis."""
    plan = work.plan
    starts = jnp.stack([jax.random.normal(start_key(work, point, t), (plan.size,)) for point in points.tolist()])
    measured = measure(programs, operators, starts)

    def on_step(f: Factorization) -> None:
        bad = np.asarray(f.status) == Status.NONFINITE
        work.check(np.where(bad, np.nan, 0.0), points, t, "product")

    begun = jax.vmap(partial(begin, max_steps=plan.num_steps))(starts)
    return jax.device_get(drive(programs.step(operators), begun, on_step)), measured


def start_key(work: Work, point: int, t: int) -> Any:
    """Of Krylov starts: the same for all prompts, another one for each noise and timestep."""
    noise = work.plan.first_noise + point % work.plan.noises
    key = jax.random.fold_in(jax.random.key(work.seed), _KRYLOV_KEY + noise)
    return jax.random.fold_in(key, t)


def run_counts(work: Work) -> None:
    """Numbers of positive eigenvalues, one point after another; products go on after a kill."""
    plan, run = work.plan, work.run
    if plan.count_budget is None:
        return
    total, done = plan.num_points * len(plan.spectral_timesteps), 0
    for point in range(plan.num_points):
        number, row = divmod(point, plan.batch)
        for t in plan.spectral_timesteps:
            key = store.count(point, t)
            work.progress("counts", done, total)
            if not run.done(key):
                folder = run.directory / COUNTING / key
                with work.unit(key, "counts", evaluations=1, products=plan.products_per_count):
                    x = store.latents(run, plan, number, t)[row]
                    operator = score_jacobian(work.score, work.model.state, x, t, work.cond_of(point))
                    sigma = float(work.model.schedule.sigma[t])
                    options: dict[str, Any] = dict(max_products=plan.count_budget, key=start_key(work, point, t))
                    # the vectors of an estimate one after another, because each holds a basis
                    options |= dict(sigma=sigma, folder=folder, chunk=1 if plan.estimates_counts else plan.columns)
                    found = count_positive(operator, **options)
                    tangent = found.tangent
                    assert tangent is not None  # sigma was given; for the type checker
                    counts = found._asdict() | {f"tangent_{name}": x for name, x in tangent._asdict().items()}
                    run.save(key, **{name: np.asarray(counts[name], np.float64) for name in store.COUNTS})
                shutil.rmtree(folder, ignore_errors=True)
            done += 1
    shutil.rmtree(run.directory / COUNTING, ignore_errors=True)
    work.progress("counts", total, total)
