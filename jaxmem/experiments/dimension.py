"""Estimators of local dimension side by side, on data whose dimension is known.

Those of `jaxmem.dimension` see the exact score of the noised data, at some of its points; the classical ones see
samples of the same data, through scikit-dimension where that is installed. Writes a run: ``spectra.npz`` has every
estimate, ``dimension.csv`` the mean and the spread of each.
"""

import csv
import io
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.config import DimensionConfig
from jaxmem.diffusion import NoiseSchedule
from jaxmem.dimension import denoising_dimension, flipd, fpregress, normal_bundle, spectral_gap
from jaxmem.jacobian import score_jacobian
from jaxmem.manifolds import EmbeddedScore, SpheresScore, isometry, lollipop, swiss_roll
from jaxmem.memorization.sharpness import tangent_count
from jaxmem.oracles import EmpiricalScore, GaussianMixture, GaussianMixtureScore
from jaxmem.runs.directory import Run
from jaxmem.runs.durable import write_atomically
from jaxmem.runs.progress import Progress, silent
from jaxmem.runs.stages import timed, wall_seconds
from jaxmem.score import Score
from jaxmem.spectra import spectrum

SCHEDULE = NoiseSchedule()
TABLE = "dimension.csv"
#: Estimators from the score, by the names of their columns; from samples by scikit-dimension's names.
FROM_SCORE = ("FLIPD", "FPRegress", "denoising error", "tangent count", "normal bundle", "spectral gap")
FROM_SAMPLES = ("MLE", "TwoNN", "lPCA")
_SPACING = 0.015  # of grids on manifolds, less than half of the smallest σ/α that a `DimensionConfig` allows


class Manifold(NamedTuple):
    """Data of a known dimension, its score, and how it is drawn."""

    dimension: int
    score: Score
    state: Any
    draw: Callable[[np.random.Generator, int], np.ndarray]  #: n samples of the part that is looked at, (n, D)


def manifolds() -> dict[str, Manifold]:
    """The twelve, from 1 of 2 dimensions to 50 of 2,000."""
    grids: dict[str, np.ndarray] = {"Swiss roll": swiss_roll(_SPACING), "lollipop": lollipop(_SPACING)}
    candy = grids["lollipop"][:, 0] < 1
    return {
        "line in 2": _affine(1, 2),
        "5-plane in 20": _affine(5, 20),
        "20-plane in 200": _affine(20, 200),
        "50-plane in 2,000": _affine(50, 2000),
        "circle in 2": _spheres([1.0], 2),
        "sphere in 3": _spheres([1.0], 3),
        "5-sphere in 100": _spheres([1.0], 6, embedded=100),
        "flat torus in 6": _spheres([1.0, 1.0, 1.0], 2),
        "Swiss roll in 3": _grid(2, grids["Swiss roll"], np.ones(len(grids["Swiss roll"]), bool)),
        "lollipop, candy": _grid(2, grids["lollipop"], candy),
        "lollipop, stick": _grid(1, grids["lollipop"], ~candy),
        "mixture, 8 of 2, 4, 8": _mixture((2, 4, 8), 2),
    }


def _affine(dimension: int, size: int) -> Manifold:
    factor = isometry(size, dimension)
    state = GaussianMixture(jnp.zeros(1), *_float32(np.zeros((1, size)), factor[None], np.zeros(1)))
    draw = lambda rng, n: rng.normal(size=(n, dimension)) @ factor.T  # noqa: E731
    return Manifold(dimension, GaussianMixtureScore(SCHEDULE), state, draw)


def _spheres(radii: list[float], ambient: int, embedded: int = 0) -> Manifold:
    score, radius = SpheresScore(SCHEDULE, ambient), np.asarray(radii)

    def draw(rng: np.random.Generator, n: int) -> np.ndarray:
        found = rng.normal(size=(n, len(radii), ambient))
        return (found / np.linalg.norm(found, axis=-1, keepdims=True) * radius[:, None]).reshape(n, -1)

    dimension, state = len(radii) * (ambient - 1), _float32(radius)[0]
    if not embedded:
        return Manifold(dimension, score, state, draw)
    basis = isometry(embedded, len(radii) * ambient)
    inside = EmbeddedScore(score, SCHEDULE), (state, _float32(basis)[0])
    return Manifold(dimension, *inside, lambda rng, n: draw(rng, n) @ basis.T)


def _grid(dimension: int, points: np.ndarray, part: np.ndarray) -> Manifold:
    """The data is all points of the grid; those that are looked at are of one part."""
    score, state, inside = EmpiricalScore(SCHEDULE), _float32(points)[0], points[part]
    return Manifold(dimension, score, state, lambda rng, n: inside[rng.integers(len(inside), size=n)])


def _mixture(dimensions: tuple[int, ...], which: int) -> Manifold:
    """Planes of several dimensions in 30, far from each other; the points are of one of them."""
    size, largest = 30, max(dimensions)
    factors, means = np.zeros((len(dimensions), size, largest)), np.zeros((len(dimensions), size))
    for k, dimension in enumerate(dimensions):
        factors[k, :, :dimension] = isometry(size, dimension, seed=k)
        means[k, k] = 10.0
    weights = jnp.full(len(dimensions), -np.log(len(dimensions)), jnp.float32)
    state = GaussianMixture(weights, *_float32(means, factors, np.zeros(len(dimensions))))
    draw = lambda rng, n: means[which] + rng.normal(size=(n, largest)) @ factors[which].T  # noqa: E731
    return Manifold(dimensions[which], GaussianMixtureScore(SCHEDULE), state, draw)


def _float32(*arrays: np.ndarray) -> list[Any]:
    return [jnp.asarray(array, jnp.float32) for array in arrays]


def run_dimension(config: DimensionConfig, out: Path, progress: Progress = silent) -> dict[str, Any]:
    """Run or resume the comparison in the folder ``out`` and return its metrics; the folder gets ``dimension.csv``.

    Raises:
        ValueError: ``out`` holds another run.
        OSError: the folder cannot be written; the same call continues.
    """
    classical = FROM_SAMPLES if find_spec("skdim") else ()
    run = Run.open(
        out, asdict(config), experiment="dimension", seeds={"data": config.seed}, classical=classical, dtype="float32"
    )
    if run.finished:
        return run.metrics()
    every = manifolds()
    with timed(run, "estimates"):
        for number, (name, manifold) in enumerate(every.items()):
            progress("manifolds", number, len(every))
            if not run.done(key := f"manifold-{number}"):
                found = estimates(manifold, config, number, classical)
                run.save(key, estimates=found.values, products=np.asarray(found.products))
                run.append({"key": key, "manifold": name})
        progress("manifolds", len(every), len(every))
    kept = [run.load(f"manifold-{number}") for number in range(len(every))]
    arrays = {
        "manifold": np.asarray(list(every)),
        "dimension": np.array([manifold.dimension for manifold in every.values()]),
        "estimator": np.asarray([*FROM_SCORE, *classical]),
        "estimates": np.stack([one["estimates"] for one in kept]),
    }
    table = summary(arrays)
    write_atomically(out / TABLE, lambda stream: stream.write(_as_csv(table)))
    metrics = {
        "table": table,
        "num_products": int(sum(int(one["products"]) for one in kept)),
        "wall_seconds": wall_seconds(run),
    }
    run.finalise(metrics, arrays)
    return run.metrics()


class Estimates(NamedTuple):
    """Estimates at points of one manifold: (E, P), and the products they took."""

    values: np.ndarray
    products: int


def estimates(manifold: Manifold, config: DimensionConfig, number: int, classical: tuple[str, ...]) -> Estimates:
    """All estimators at the same points of one manifold."""
    rng = np.random.default_rng([config.seed, number])
    samples = manifold.draw(rng, config.num_samples)
    points = samples[: config.num_points]
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), number), config.num_points)
    rows = [_from_score(manifold, x, key, config) for x, key in zip(_float32(points)[0], keys, strict=True)]
    values = np.array([row.values for row in rows]).T
    local = [_from_samples(name, samples, config) for name in classical]
    return Estimates(np.concatenate([values, *local]) if local else values, sum(row.products for row in rows))


def _from_score(manifold: Manifold, x: Any, key: Any, config: DimensionConfig) -> Estimates:
    t, call = config.timestep, (manifold.score, manifold.state, x)
    error_key, bundle_key, point_key = jax.random.split(key, 3)
    options: dict[str, Any] = dict(schedule=SCHEDULE)
    density = flipd(*call, t, **options)
    slope = fpregress(*call, config.regression, **options)
    error = denoising_dimension(*call, t, key=error_key, **options)
    bundle = normal_bundle(*call, t, key=bundle_key, **options)
    noised = SCHEDULE.alpha[t] * x + SCHEDULE.sigma[t] * jax.random.normal(point_key, x.shape)
    found = spectrum(score_jacobian(*call[:2], jnp.asarray(noised, jnp.float32), t))
    count = float(tangent_count(found.eigenvalues, SCHEDULE.sigma[t]))
    values = [density.value, slope.value, error.value, count, bundle.value, float(spectral_gap(found.eigenvalues))]
    products = density.num_products + slope.num_products + int(found.num_products)
    return Estimates(np.array(values), products)


def _from_samples(name: str, samples: np.ndarray, config: DimensionConfig) -> np.ndarray:
    """(1, P) a classical estimator at the first samples, from the neighbours of each among all of them."""
    import skdim.id

    estimator = getattr(skdim.id, name)()
    if name == "MLE":
        found = estimator.fit(samples, n_neighbors=config.neighbours).dimension_pw_
    else:
        found = estimator.fit_transform_pw(samples, n_neighbors=config.neighbours)
    return np.asarray(found, np.float64)[None, : config.num_points]


def summary(arrays: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """One row per manifold and estimator: mean over its points, what it is off by, and the spread."""
    mean, spread = arrays["estimates"].mean(-1), arrays["estimates"].std(-1, ddof=1)
    return [
        {
            "manifold": str(name),
            "dimension": int(dimension),
            "estimator": str(estimator),
            "mean": float(mean[m, e]),
            "bias": float(mean[m, e] - dimension),
            "spread": float(spread[m, e]),
        }
        for m, (name, dimension) in enumerate(zip(arrays["manifold"], arrays["dimension"], strict=True))
        for e, estimator in enumerate(arrays["estimator"])
    ]


def _as_csv(table: list[dict[str, Any]]) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return stream.getvalue().encode()
