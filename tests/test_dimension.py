"""Estimators of dimension on manifolds of known dimension: closed forms in float64 NumPy, and coverage over keys."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import jaxmem as jm
from jaxmem.config import DimensionConfig
from jaxmem.dimension import denoising_dimension, flipd, fpregress, normal_bundle, spectral_gap
from jaxmem.manifolds import EmbeddedScore, SpheresScore, bessel_ratio, isometry, lollipop, swiss_roll
from jaxmem.memorization.sharpness import tangent_count
from jaxmem.oracles import EmpiricalScore, GaussianMixture, GaussianMixtureScore, gaussian

SCHEDULE = jm.NoiseSchedule()
T = 10  # σ/α = 0.047
KEY = jax.random.key(0)
EMPIRICAL = EmpiricalScore(SCHEDULE)


def affine(dimension, size, seed=0):
    """Gaussian data of standard deviations 1 to 2 in a random subspace, and a point of it."""
    rng = np.random.default_rng(seed)
    factor = isometry(size, dimension, seed) * rng.uniform(1, 2, dimension)
    return gaussian(np.zeros(size), factor), factor @ rng.normal(size=dimension)


def on_sphere(ambient, seed=0):
    point = np.random.default_rng(seed).normal(size=ambient)
    return point / np.linalg.norm(point)


def closed_form_flipd(state, x, t):
    """``D + σ² (tr H + ‖s‖²)`` at αx in float64, from the covariance of a Gaussian alone."""
    alpha, sigma = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
    factor = np.asarray(state.factors[0], np.float64)
    covariance = alpha**2 * factor @ factor.T + sigma**2 * np.eye(len(x))
    inverse = np.linalg.inv(covariance)
    s = -inverse @ (alpha * np.asarray(x))
    return len(x) + sigma**2 * (-np.trace(inverse) + s @ s)


@pytest.mark.parametrize(("dimension", "size"), [(1, 2), (5, 20), (20, 200), (100, 400)])
def test_flipd_is_its_closed_form_on_affine_data(dimension, size):
    state, x = affine(dimension, size)
    found = flipd(GaussianMixtureScore(SCHEDULE), state, jnp.asarray(x, jnp.float32), T, schedule=SCHEDULE)
    exact = closed_form_flipd(state, x, T)
    np.testing.assert_allclose(found.value, exact, rtol=1e-4)
    assert abs(exact - dimension) < 0.02 * dimension  # what σ/α = 0.047 leaves of deviations from 1 on
    assert (found.num_products, found.num_evaluations, found.standard_error) == (size, 1, 0)


def test_an_estimated_flipd_covers_its_closed_form():
    # 300 dimensions of 2,000, of which 300 products hold no basis: the estimate has an error worth an interval.
    state, x = affine(300, 2000)
    call = partial(
        flipd,
        GaussianMixtureScore(SCHEDULE),
        state,
        jnp.asarray(x, jnp.float32),
        T,
        schedule=SCHEDULE,
        max_products=300,
    )
    exact = closed_form_flipd(state, x, T)
    found = [call(key=jax.random.key(seed)) for seed in range(40)]
    assert sum(one.interval[0] <= exact <= one.interval[1] for one in found) >= 34  # of 95 %: less in 1 of 300
    assert all(one.num_products == 300 for one in found)
    assert np.mean([one.value for one in found]) == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("ambient", [2, 3, 6, 21])
@pytest.mark.parametrize("kappa", [0.3, 20.0, 400.0, 1e4])
def test_the_ratio_of_bessel_functions(x64, ambient, kappa):
    order = ambient / 2 - 1
    exact = scipy.special.ive(order + 1, kappa) / scipy.special.ive(order, kappa)
    np.testing.assert_allclose(bessel_ratio(ambient, jnp.asarray(kappa)), exact, rtol=1e-9)


@pytest.mark.parametrize(("ambient", "t"), [(2, 60), (3, 60)])
def test_a_sphere_is_the_limit_of_points_on_it(x64, ambient, t):
    """The score and its Hessian beside those of a dense grid, on the sphere and off it."""
    ours = SpheresScore(SCHEDULE, ambient)
    if ambient == 2:
        angle = np.linspace(0, 2 * np.pi, 2000, endpoint=False)
        points = np.stack([np.cos(angle), np.sin(angle)], -1)
    else:  # Fibonacci's lattice
        i = np.arange(20000) + 0.5
        height, turn = 1 - 2 * i / 20000, np.pi * (1 + 5**0.5) * i
        points = np.stack([np.sqrt(1 - height**2) * np.cos(turn), np.sqrt(1 - height**2) * np.sin(turn), height], -1)
    for stretch in (1.0, 1.2, 0.7):
        x = jnp.asarray(stretch * on_sphere(ambient) * SCHEDULE.alpha[t])
        np.testing.assert_allclose(ours(jnp.ones(1), x, t), EMPIRICAL(jnp.asarray(points), x, t), rtol=1e-4, atol=1e-3)
        hessian = jax.jacfwd(lambda y: ours(jnp.ones(1), y, t))(x)
        np.testing.assert_allclose(hessian, EMPIRICAL.hessian(points, x, t), rtol=1e-3, atol=0.05)


MANIFOLDS = {
    "circle": (SpheresScore(SCHEDULE, 2), np.ones(1), on_sphere(2), 1),
    "sphere": (SpheresScore(SCHEDULE, 3), np.ones(1), on_sphere(3), 2),
    "5-sphere": (SpheresScore(SCHEDULE, 6), np.ones(1), on_sphere(6), 5),
    "20-sphere": (SpheresScore(SCHEDULE, 21), np.ones(1), on_sphere(21), 20),
    "flat torus": (SpheresScore(SCHEDULE, 2), np.array([1.0, 2.0, 1.5]), np.array([0, 1, 2, 0, 0, -1.5]), 3),
    "sphere in 200": (
        EmbeddedScore(SpheresScore(SCHEDULE, 6), SCHEDULE),
        (np.ones(1), isometry(200, 6)),
        isometry(200, 6) @ on_sphere(6),
        5,
    ),
}


@pytest.mark.parametrize("name", MANIFOLDS)
def test_every_estimator_on_curved_manifolds(name):
    score, state, x, dimension = MANIFOLDS[name]
    state = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), state)
    x = jnp.asarray(x, jnp.float32)
    # Curvature: of the unit n-sphere FLIPD is off by about n² (σ/α)²/4.
    curved = 0.02 * dimension
    found = flipd(score, state, x, T, schedule=SCHEDULE)
    assert found.value == pytest.approx(dimension, abs=curved)
    slope = fpregress(score, state, x, [2, 5, 10], schedule=SCHEDULE)
    assert slope.value == pytest.approx(dimension, abs=curved)
    assert slope.num_products == 2 * x.size  # nothing is asked at the last level
    bundle = normal_bundle(score, state, x, T, schedule=SCHEDULE, key=KEY)
    assert bundle.value == dimension
    assert bundle.num_evaluations == 4 * x.size
    error = denoising_dimension(score, state, x, T, schedule=SCHEDULE, key=KEY)
    # Noise of k directions turns a point of the sphere by more than its share: k² (σ/α)² less.
    bent = dimension**2 * (SCHEDULE.sigma[T] / SCHEDULE.alpha[T]) ** 2
    assert abs(error.value - dimension) < 4 * error.standard_error + bent
    operator = jm.score_jacobian(score, state, SCHEDULE.alpha[T].astype(np.float32) * x, T)
    eigenvalues = jm.spectrum(operator).eigenvalues
    assert tangent_count(eigenvalues, SCHEDULE.sigma[T]) == dimension
    assert spectral_gap(eigenvalues) == dimension


def test_whole_numbers_are_exact_on_affine_subspaces_and_gaps_are_not_where_there_is_none():
    score = GaussianMixtureScore(SCHEDULE)
    for dimension, size in [(1, 2), (5, 20), (20, 60)]:
        state, x = affine(dimension, size)
        x = jnp.asarray(x, jnp.float32)
        for centred in (True, False):
            found = normal_bundle(score, state, x, T, schedule=SCHEDULE, key=KEY, centred=centred)
            assert found.value == dimension
        eigenvalues = score.spectrum(state, np.asarray(SCHEDULE.alpha[T] * x), T)
        assert spectral_gap(eigenvalues) == dimension
        assert tangent_count(eigenvalues, SCHEDULE.sigma[T]) == dimension
    # A memorized point has dimension 0: FLIPD and counts say so, gaps cannot.
    state, x = gaussian(np.zeros(6), np.zeros((6, 1))), jnp.zeros(6)
    assert flipd(score, state, x, T, schedule=SCHEDULE).value == pytest.approx(0, abs=1e-5)
    assert denoising_dimension(score, state, x, T, schedule=SCHEDULE, key=KEY).value == pytest.approx(0, abs=1e-5)
    assert tangent_count(score.spectrum(state, x, T), SCHEDULE.sigma[T]) == 0
    assert normal_bundle(score, state, x, T, schedule=SCHEDULE, key=KEY).value >= 1


def test_gaps_of_logarithms_are_others():
    assert spectral_gap([-100, -90, -1, 1e-3, 5e-4]) == 3
    assert spectral_gap([-100, -90, -1, 1e-3, 5e-4], gap="log") == 2
    assert spectral_gap([-100, -90, 0, 0], gap="log") == 2  # zeros have a logarithm, too


def test_a_mixture_has_the_dimension_of_the_place():
    factors = np.zeros((3, 50, 8))
    for k, (dimension, start) in enumerate([(2, 0), (8, 10), (4, 30)]):
        factors[k, start : start + dimension, :dimension] = np.eye(dimension)
    means = np.zeros((3, 50))
    means[1, 45] = means[2, 46] = 8.0
    state = GaussianMixture(
        jnp.log(jnp.full(3, 1 / 3)), *(jnp.asarray(a, jnp.float32) for a in (means, factors)), jnp.zeros(3)
    )
    for k, dimension in enumerate([2, 8, 4]):
        found = flipd(GaussianMixtureScore(SCHEDULE), state, state.means[k], T, schedule=SCHEDULE)
        assert found.value == pytest.approx(dimension, abs=0.02 * dimension)


def test_grids_have_the_dimensions_of_what_they_are_grids_of():
    roll = swiss_roll(0.02)
    low, high = roll[:, 1].min() + 0.3, roll[:, 1].max() - 0.3
    inside = roll[(roll[:, 1] > low) & (roll[:, 1] < high)]
    places = jnp.asarray(inside[np.linspace(0, len(inside) - 1, 9).astype(int)[1:-1]], jnp.float32)
    state = jnp.asarray(roll, jnp.float32)
    found = [flipd(EMPIRICAL, state, x, T, schedule=SCHEDULE).value for x in places]
    np.testing.assert_allclose(found, 2, atol=0.1)
    state = jnp.asarray(lollipop(0.02), jnp.float32)
    for x, dimension in [((0.0, 0.2), 2), ((2.0, 0.0), 1)]:
        found = flipd(EMPIRICAL, state, jnp.asarray(x), T, schedule=SCHEDULE).value
        assert found == pytest.approx(dimension, abs=0.02)


def test_the_regression_is_that_of_its_text():
    """Euler's sums and a least-squares line, by NumPy, from the values of `flipd`."""
    state, x = affine(3, 10)
    x, steps = jnp.asarray(x, jnp.float32), [40, 5, 20, 80]
    score = GaussianMixtureScore(SCHEDULE)
    found = fpregress(score, state, x, steps, schedule=SCHEDULE)
    levels = np.log([SCHEDULE.sigma[t] / SCHEDULE.alpha[t] for t in sorted(steps)])
    slopes = np.array([closed_form_flipd(state, x, t) - 10 for t in sorted(steps)])
    log_density = np.append(0, np.cumsum(slopes[:-1] * np.diff(levels)))
    assert found.value == pytest.approx(10 + np.polyfit(levels, log_density, 1)[0], rel=1e-4)


def test_intervals_of_the_error_of_denoising_cover():
    """Each draw is a χ² of the dimension, times what σ leaves: of 300 keys."""
    state, x = gaussian(np.zeros(12), isometry(12, 2)), jnp.zeros(12)
    score = GaussianMixtureScore(SCHEDULE)
    # At x = 0, x̂_0 = α P x_t with x_t = σε: (α/σ)² α² σ² ‖Pε‖² = α⁴ ‖Pε‖².
    truth = 2 * float(SCHEDULE.alpha[T] ** 4)
    found = [denoising_dimension(score, state, x, T, schedule=SCHEDULE, key=jax.random.key(i)) for i in range(300)]
    assert sum(one.interval[0] <= truth <= one.interval[1] for one in found) >= 272  # of 94 %: less in 1 of 300


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda s, x: flipd(s, jnp.ones(1), x, 1000, schedule=SCHEDULE), "t: expected 0 to 999"),
        (lambda s, x: fpregress(s, jnp.ones(1), x, [5, 5], schedule=SCHEDULE), "two or more that differ, got"),
        (lambda s, x: fpregress(s, jnp.ones(1), x, [5, 1000], schedule=SCHEDULE), "t: expected 0 to 999"),
        (
            lambda s, x: flipd(s, jnp.ones(1), x, 5, schedule=jm.FlowSchedule()),
            "schedule: expected that of the score, NoiseSchedule.*, got FlowSchedule",
        ),
        (
            lambda s, x: flipd(s, jnp.ones(1), jnp.array([1, 0]), 5, schedule=SCHEDULE),
            "x: expected floating point, got int32",
        ),
        (
            lambda s, x: normal_bundle(s, jnp.ones(1), x, 5, schedule=SCHEDULE, key=KEY, num_scores=2),
            "more scores than values, got 2 and 2",
        ),
        (
            lambda s, x: normal_bundle(s, jnp.ones(1), x, 5, schedule=SCHEDULE, key=KEY, batch=0),
            "batch: expected at least 1, got 0",
        ),
        (lambda s, x: DimensionConfig(timestep=1), "timestep: expected 5 to 999, got 1"),
        (lambda s, x: DimensionConfig(regression=(5, 5)), "regression: expected two timesteps or more that differ"),
        (lambda s, x: DimensionConfig(num_samples=50), "num_samples: expected at least 108, got 50"),
        (lambda s, x: normal_bundle(s, jnp.ones(1), x, 5, schedule=SCHEDULE), "key: expected a random key, got none"),
        (
            lambda s, x: normal_bundle(s, jnp.ones(1), x, 5, schedule=SCHEDULE, key=KEY, gap="ratio"),
            "gap: expected difference or log, got 'ratio'",
        ),
        (
            lambda s, x: denoising_dimension(s, jnp.ones(1), x, 5, schedule=SCHEDULE, key=KEY, draws=1),
            "draws: expected at least 2, got 1",
        ),
        (
            lambda s, x: denoising_dimension(s, jnp.ones(1), x * jnp.nan, 5, schedule=SCHEDULE, key=KEY),
            "a score holds NaN or infinity",
        ),
        (lambda s, x: spectral_gap([1.0]), "eigenvalues: expected all of one spectrum"),
        (lambda s, x: spectral_gap([1.0, np.nan]), "got NaN or infinity among them"),
        (lambda s, x: spectral_gap(5.0), r"two or more numbers, got shape \(\)"),
    ],
)
def test_what_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call(SpheresScore(SCHEDULE, 2), jnp.asarray([1.0, 0.0]))


@dataclass(frozen=True)
class Conditional:
    """A Gaussian on a plane, as pictures (2, 3, 2), moved by a condition; the state is narrow."""

    schedule: jm.FlowSchedule

    def __call__(self, state, x, t, cond):
        alpha, sigma = self.schedule.at(t, x.dtype)
        off = x.reshape(-1) - alpha * cond["mean"]
        inside = jnp.matmul(state, jnp.matmul(state.T, off, precision="highest"), precision="highest")
        return -((off - inside) / sigma**2 + inside / (alpha**2 + sigma**2)).reshape(x.shape)


@pytest.mark.parametrize("narrow", [jnp.bfloat16, jnp.float32])
def test_pictures_conditions_flow_and_narrow_parameters(narrow):
    """Four of twelve coordinates are free; parameters in bfloat16 are computed with in float32."""
    schedule, t = jm.FlowSchedule(), 40_000  # σ/α = 0.042
    score, state = Conditional(schedule), jnp.eye(12)[:, :4].astype(narrow)
    x, cond = jnp.full((2, 3, 2), 0.5), {"mean": jnp.full(12, 0.5)}
    options = dict(schedule=schedule)
    assert flipd(score, state, x, t, cond, **options).value == pytest.approx(4, abs=0.02)
    assert fpregress(score, state, x, [20_000, t], cond, **options).value == pytest.approx(4, abs=0.02)
    assert normal_bundle(score, state, x, t, cond, key=KEY, **options).value == 4
    found = denoising_dimension(score, state, x, t, cond, key=KEY, **options)
    assert abs(found.value - 4) < 4 * found.standard_error + 0.02


def test_rounding_of_the_point_is_no_dimension():
    """A memorized point far from 0 at a noise near float32's resolution there: still 0."""
    schedule, size = jm.FlowSchedule(), 500
    state, x = gaussian(np.full(size, 8.0), np.zeros((size, 1))), jnp.full(size, 8.0)
    found = denoising_dimension(GaussianMixtureScore(schedule), state, x, 20, schedule=schedule, key=KEY)
    assert abs(found.value) < 0.1


def test_the_comparison_of_estimators(tmp_path, monkeypatch):
    """On three of the manifolds, interrupted once: its table, and the run as it is read again."""
    from jaxmem.experiments import dimension as experiment

    every = experiment.manifolds()
    assert len(every) == 12
    sizes = {name: manifold.draw(np.random.default_rng(0), 2).shape[1] for name, manifold in every.items()}
    assert sizes["50-plane in 2,000"] == 2000
    chosen = {name: every[name] for name in ("line in 2", "circle in 2", "mixture, 8 of 2, 4, 8")}
    monkeypatch.setattr(experiment, "manifolds", lambda: chosen)
    config = DimensionConfig(num_points=3, num_samples=120)
    seen = []

    def stop(task, done, total):
        seen.append((done, total))
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiment.run_dimension(config, tmp_path, stop)
    metrics = experiment.run_dimension(config, tmp_path)
    assert seen == [(0, 3), (1, 3)]
    table = {(row["manifold"], row["estimator"]): row for row in metrics["table"]}
    for name, manifold in chosen.items():
        assert table[name, "tangent count"]["mean"] == manifold.dimension
        assert table[name, "FLIPD"]["bias"] == pytest.approx(0, abs=0.02 * manifold.dimension)
        assert table[name, "denoising error"]["bias"] == pytest.approx(0, abs=0.5 * manifold.dimension**0.5)
    assert experiment.run_dimension(config, tmp_path) == metrics
    lines = (tmp_path / "dimension.csv").read_text().splitlines()
    assert lines[0] == "manifold,dimension,estimator,mean,bias,spread"
    assert len(lines) == 1 + len(table)
    # products: of FLIPD and two levels of FPRegress, and of a spectrum with its check
    assert metrics["num_products"] == 3 * sum(4 * size + 1 for size in (2, 2, 30))


def test_classical_estimators_are_those_of_scikit_dimension():
    skdim = pytest.importorskip("skdim", reason="scikit-dimension is not installed: it comes with jaxmem[parity]")
    from jaxmem.experiments.dimension import _from_samples

    samples = np.random.default_rng(0).normal(size=(300, 4)) @ isometry(10, 4).T
    config = DimensionConfig(num_points=5, num_samples=300, neighbours=50)
    found = skdim.id.TwoNN().fit_transform_pw(samples, n_neighbors=50)
    np.testing.assert_array_equal(_from_samples("TwoNN", samples, config)[0], found[:5])
    np.testing.assert_array_equal(_from_samples("lPCA", samples, config)[0], np.full(5, 4.0))
    assert _from_samples("MLE", samples, config).shape == (1, 5)
