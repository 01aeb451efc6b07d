import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.diffusion import NoiseSchedule
from jaxmem.oracles import (
    EmpiricalScore,
    GaussianMixture,
    GaussianMixtureScore,
    Separable,
    SeparableScore,
    gaussian,
)

SCHEDULE = NoiseSchedule()


def _mixture(rng, d, dtype=jnp.float64):
    return GaussianMixture(
        jnp.asarray(np.log([0.5, 0.3, 0.2]), dtype),
        jnp.asarray(rng.normal(size=(3, d)), dtype),
        jnp.asarray(rng.normal(size=(3, d, 2)), dtype),
        jnp.asarray([0.1, 0.0, 0.5], dtype),
    )


def _cases(d, dtype=jnp.float64):
    rng = np.random.default_rng(7)
    yield GaussianMixtureScore(SCHEDULE), _mixture(rng, d, dtype)
    yield GaussianMixtureScore(SCHEDULE), gaussian(jnp.ones(d, dtype), jnp.asarray(rng.normal(size=(d, d)), dtype))
    yield EmpiricalScore(SCHEDULE), jnp.asarray(rng.normal(size=(6, d)), dtype)
    yield (
        SeparableScore(SCHEDULE),
        Separable(jnp.asarray(rng.uniform(0, 2, d), dtype), jnp.asarray(rng.choice([-1.0, 1.0], d), dtype)),
    )


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("t", [0, 100, 400, 999])
def test_hessian_is_the_derivative_of_the_score(case, t, x64):
    score, state = list(_cases(9))[case]
    x = jnp.asarray(np.random.default_rng(t).normal(size=9) * 0.7)
    derivative = np.asarray(jax.jacfwd(lambda x: score(state, x, t, None))(x))
    exact = score.hessian(state, x, t)
    # Both in float64 by different routes: at t = 0 rounding of 1e-16 is multiplied by 1/sigma² = 1e4 twice, in logits
    # and in what they weigh.
    np.testing.assert_allclose(derivative, exact, atol=1e-8 * np.abs(exact).max())
    np.testing.assert_allclose(exact, exact.T, atol=1e-12 * np.abs(exact).max())


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("d", [5, 24])
@pytest.mark.parametrize("t", [0, 300])
def test_spectrum_is_lapacks_of_the_hessian(case, d, t, x64):
    score, state = list(_cases(d))[case]
    x = jnp.asarray(np.random.default_rng(t + d).normal(size=d) * 0.7)
    dense = np.linalg.eigvalsh(score.hessian(state, x, t))[::-1]
    closed = score.spectrum(state, x, t)
    np.testing.assert_allclose(closed, dense, atol=1e-9 * np.abs(dense).max())


def test_score_is_the_gradient_of_the_noised_log_density(x64):
    # The density itself, by numerical convolution in one dimension: no formula in common.
    rng = np.random.default_rng(0)
    means, spreads, weights = np.array([-1.0, 0.5]), np.array([0.3, 0.6]), np.array([0.4, 0.6])
    state = GaussianMixture(
        jnp.log(jnp.asarray(weights)), jnp.asarray(means)[:, None], jnp.zeros((2, 1, 1)), jnp.asarray(spreads**2)
    )
    t = 250
    alpha, sigma = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
    grid = np.linspace(-6, 6, 200_001)
    data = sum(w * np.exp(-0.5 * ((grid - m) / s) ** 2) / s for w, m, s in zip(weights, means, spreads, strict=True))

    def log_density(x):
        return np.log(np.sum(data * np.exp(-0.5 * ((x - alpha * grid) / sigma) ** 2)))

    for x in rng.normal(size=5):
        slope = (log_density(x + 1e-5) - log_density(x - 1e-5)) / 2e-5
        ours = GaussianMixtureScore(SCHEDULE)(state, jnp.asarray([x]), t)
        np.testing.assert_allclose(ours, [slope], rtol=1e-6)  # central differences of step 1e-5 leave 1e-8


def test_mixture_log_density_integrates_to_one_and_has_the_score_as_slope():
    state = GaussianMixture(
        jnp.log(jnp.array([0.25, 0.75])),
        jnp.array([[0.5, 0.0], [-0.5, 0.3]]),
        jnp.ones((2, 2, 1)) * 0.4,
        jnp.array([0.0, 0.3]),
    )
    score, t = GaussianMixtureScore(SCHEDULE), 300
    axis = np.linspace(-6, 6, 121)
    density = [np.exp(score.log_density(state, np.array([a, b]), t)) for a in axis for b in axis]
    np.testing.assert_allclose(np.sum(density) * 0.1**2, 1, rtol=1e-6)  # the trapezoid rule is spectral here
    x, step = np.array([0.3, -0.8]), 1e-5
    slope = [
        (score.log_density(state, x + step * e, t) - score.log_density(state, x - step * e, t)) / (2 * step)
        for e in np.eye(2)
    ]
    np.testing.assert_allclose(score(state, jnp.asarray(x, jnp.float32), t), slope, rtol=1e-4)  # float32 score


def test_gaussian_hessian_is_minus_the_noised_precision():
    rng = np.random.default_rng(3)
    factor = rng.normal(size=(6, 6))
    state = gaussian(jnp.zeros(6), jnp.asarray(factor, jnp.float32), 0.2)
    alpha, sigma = SCHEDULE.alpha[200], SCHEDULE.sigma[200]
    covariance = 0.2 * np.eye(6) + np.asarray(state.factors[0], np.float64) @ np.asarray(state.factors[0]).T
    exact = -np.linalg.inv(alpha**2 * covariance + sigma**2 * np.eye(6))
    ours = GaussianMixtureScore(SCHEDULE).hessian(state, rng.normal(size=6), 200)
    np.testing.assert_allclose(ours, exact, rtol=1e-5)  # variance 0.2 passes through float32


def test_identities_in_expectation(x64):
    # E‖s‖² = -E tr H for any smooth density, and for a Gaussian E‖Hs‖² = -tr H³.
    rng = np.random.default_rng(5)
    state, score, t, n = _mixture(rng, 4), GaussianMixtureScore(SCHEDULE), 150, 40_000
    alpha, sigma = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
    labels = rng.choice(3, size=n, p=[0.5, 0.3, 0.2])
    means, factors, variances = (np.asarray(part) for part in state[1:])
    data = means[labels] + np.sqrt(variances[labels])[:, None] * rng.normal(size=(n, 4))
    data += np.einsum("ndr,nr->nd", factors[labels], rng.normal(size=(n, 2)))
    x = jnp.asarray(alpha * data + sigma * rng.normal(size=(n, 4)))
    scores = jax.vmap(score, (None, 0, None))(state, x, t)
    jacobians = jax.vmap(jax.jacfwd(score, 1), (None, 0, None))(state, x, t)
    difference = jnp.sum(scores**2, 1) + jnp.trace(jacobians, axis1=1, axis2=2)
    # Four standard errors of the Monte Carlo mean: fails by chance once in 16,000, and the seed is fixed.
    assert abs(difference.mean()) < 4 * difference.std() / n**0.5
    assert abs(difference.mean()) < 0.05 * jnp.mean(jnp.sum(scores**2, 1))

    state = gaussian(jnp.asarray([1.0, 0.0, -1.0]), jnp.asarray(rng.normal(size=(3, 3))), 0.1)
    hessian = score.hessian(state, np.zeros(3), t)
    x = jnp.asarray(rng.multivariate_normal(alpha * np.asarray(state.means[0]), np.linalg.inv(-hessian), size=n))
    products = np.asarray(jax.vmap(score, (None, 0, None))(state, x, t)) @ hessian
    squares = (products**2).sum(1)
    assert abs(squares.mean() + np.trace(hessian @ hessian @ hessian)) < 4 * squares.std() / n**0.5


def test_bound_and_memorized_limit_at_sixteen_thousand_dimensions():
    rng = np.random.default_rng(1)
    data, t = rng.normal(size=(5, 16_384)), 100
    alpha, sigma = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
    # Half way between two points two weights are equal and one direction is free: the only eigenvalue off the bound.
    spectrum = EmpiricalScore(SCHEDULE).spectrum(data, alpha * (data[0] + data[1]) / 2, t)
    np.testing.assert_allclose(spectrum[1:], -1 / sigma**2, rtol=1e-9)
    gap = np.sum((data[0] - data[1]) ** 2) / 4
    np.testing.assert_allclose(spectrum[0], alpha**2 / sigma**4 * gap - 1 / sigma**2, rtol=1e-9)


def test_separable_counts_are_set_by_the_amplitudes():
    d, t, positives = 16_384, 300, 1234
    alpha, sigma = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
    amplitudes = np.where(np.arange(d) < positives, 1.5, 0.5) * sigma / alpha
    state = Separable(jnp.asarray(amplitudes, jnp.float32), jnp.ones(d))
    # At the ridge (x = 0) the sign of a curvature is that of alpha m - sigma.
    spectrum = SeparableScore(SCHEDULE).spectrum(state, np.zeros(d), t)
    assert (spectrum > 0).sum() == positives
    np.testing.assert_allclose(spectrum[0], (1.5**2 - 1) / sigma**2, rtol=1e-5)


def test_a_gaussian_of_whole_numbers_keeps_its_variance():
    assert gaussian([0, 0], [[1], [0]], 0.5).variances.tolist() == [0.5]


def test_points_of_another_dimension_are_refused():
    with pytest.raises(ValueError, match=r"x: expected shape \(3,\), as the data \(4, 3\) have, got \(1,\)"):
        EmpiricalScore(NoiseSchedule()).spectrum(np.ones((4, 3)), np.ones(1), 5)
