"""The directions in which a sample can move, as pictures: eigenvectors of the Hessian, decoded."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.audit import store
from jaxmem.audit.hessians import factorise, linearise
from jaxmem.audit.work import Work
from jaxmem.diffusion import posterior_mean
from jaxmem.jacobian import ScoreJacobian
from jaxmem.memorization.sharpness import sum_of_largest
from jaxmem.spectra.programs import Programs
from jaxmem.spectra.ritz import ritz_pairs, ritz_vectors, unstacked

_LARGEST = 5  # the sum of so many eigenvalues chooses the two points
_DEVIATIONS = 4  # of the noise in one direction, sigma each


def run_directions(work: Work, programs: Programs) -> None:
    """Decode the eigenvectors of the two `extreme_points`."""
    plan, run = work.plan, work.run
    if not plan.directions or run.done(store.DIRECTIONS):
        return
    t = plan.scale.judged(plan.spectral_timesteps)
    tables = [run.load(store.spectrum(number, t), "eigenvalues")["eigenvalues"] for number in plan.batches()]

    def latents(point: int) -> np.ndarray:
        number, row = divmod(point, plan.batch)
        return store.latents(run, plan, number, t)[row]

    chosen = extreme_points(np.concatenate(tables)[: plan.num_prompts * plan.noises])
    decode_directions(work, programs, chosen, t, latents)


def extreme_points(values: np.ndarray) -> list[int]:
    """Choose the points with the smallest and the largest sum of their ``_LARGEST`` largest eigenvalues."""
    there = int((~np.isnan(values)).sum(1).min())  # fewer where a Krylov space closed early
    sums = sum_of_largest(values, min(_LARGEST, there))
    return [int(np.nanargmin(sums)), int(np.nanargmax(sums))]


def decode_directions(
    work: Work, programs: Programs, chosen: Sequence[int], t: int, latents: Callable[[int], np.ndarray]
) -> None:
    """Decode the eigenvectors of two points, whose x_t ``latents`` gives, and record them.

    x_t is moved by ``±a v``, ``a = 4 sigma``, and the posterior mean ``E[x_0 | x_t] = (x_t + sigma² s) / alpha`` is
    decoded, with the score of the prompt. Where the density is an isolated peak it does not follow the move: its
    derivative along v is ``(1 + sigma² lambda) / alpha``.
    """
    plan, run = work.plan, work.run
    work.progress("directions", 0, 2)
    amplitude = _DEVIATIONS * float(work.model.schedule.sigma[t])
    products = 2 * plan.products_per_direction
    evaluations = 2 * (2 + 2 * plan.directions)
    with work.unit(store.DIRECTIONS, "directions", evaluations=evaluations, products=products) as row:
        found: list[tuple[np.ndarray, ...]] = []
        for point in chosen:
            found.append(_decode(work, programs, point, latents(point), t, amplitude))
            work.progress("directions", len(found), 2)
        eigenvalues, base, moved = (np.stack(arrays) for arrays in zip(*found, strict=True))
        run.save(store.DIRECTIONS, eigenvalues=eigenvalues, base=base, moved=moved)
        row |= {
            "point": [list(divmod(point, plan.noises)) for point in chosen],
            "timestep": t,
            "amplitude": amplitude,
        }


def _decode(
    work: Work, programs: Programs, point: int, x: np.ndarray, t: int, amplitude: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    plan = work.plan
    many = work.cond(np.full(plan.batch, point))
    operators = linearise(work, programs, np.repeat(x[None], plan.batch, 0), t, many)
    find = _exact if plan.method == "eigh" else _ritz
    found, rows = find(work, programs, operators, point, t)
    k = plan.directions
    values, vectors = np.full(k, np.nan), np.zeros((k, plan.size))
    there = min(k, len(rows))  # fewer where a Krylov space closed early
    values[:there], vectors[:there] = found[:there], rows[:there]
    moves = amplitude * np.stack([-vectors, vectors], 1).reshape(2 * k, *plan.latent_shape)
    points = np.concatenate([x[None], x + moves]).astype(np.float32)
    schedule = work.model.schedule
    alpha, sigma = float(schedule.alpha[t]), float(schedule.sigma[t])
    means = []
    for first in range(0, len(points), plan.batch):
        index = np.minimum(np.arange(first, first + plan.batch), len(points) - 1)
        scores = work.scores(points[index], t, many)
        means.append(posterior_mean(np.asarray(scores), points[index], alpha, sigma))
    images = work.model.decode(jnp.asarray(np.concatenate(means)[: len(points)], jnp.float32))
    return values, images[0], images[1:].reshape(k, 2, *images.shape[1:])


def _exact(work: Work, programs: Programs, operators: ScoreJacobian, point: int, t: int) -> tuple[np.ndarray, ...]:
    """Eigenvalues, descending, and eigenvectors as rows; a batch holds one point, and its products are columns."""
    size, batch = work.plan.size, work.plan.batch
    rows = []
    for first in range(0, size, batch):
        columns = jax.nn.one_hot(np.arange(first, first + batch), size)  # zero beyond the last
        rows.append(np.asarray(programs.forward(operators, columns), np.float64))
    matrix = np.concatenate(rows)[:size]
    work.check(matrix[None], np.array([point]), t, "Jacobian")
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return values[::-1], vectors.T[::-1]


def _ritz(work: Work, programs: Programs, operators: ScoreJacobian, point: int, t: int) -> tuple[np.ndarray, ...]:
    """Ritz values and vectors of a point; a batch holds it repeated."""
    one = unstacked(factorise(work, programs, operators, np.full(work.plan.batch, point), t)[0])[0]
    pairs = ritz_pairs(one, symmetric=True)
    return pairs.values, ritz_vectors(one, pairs)
