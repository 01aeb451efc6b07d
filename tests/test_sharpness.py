import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.diffusion import NoiseSchedule
from jaxmem.memorization.sharpness import below_bound, positive_count, sum_of_largest, tangent_count
from jaxmem.oracles import EmpiricalScore, GaussianMixtureScore, gaussian


def test_positive_count_and_its_threshold():
    values = np.array([[3.0, 1e-14, 1e-16, 0.0, -2.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    np.testing.assert_array_equal(positive_count(values), [2, 5])
    np.testing.assert_array_equal(positive_count(values, np.array([0.5, 2.5])), [1, 3])
    assert positive_count(np.array([1 + 2j, -1 + 0j])) == 1


def test_tangent_count_is_the_number_of_wide_directions():
    # A linear manifold: 3 directions of variance 1 and 2 of variance 1e-4, the rest flat.
    schedule, t = NoiseSchedule(), 100
    alpha, sigma = schedule.alpha[t], schedule.sigma[t]
    factor = np.zeros((20, 5))
    factor[:5, :5] = np.diag([1, 1, 1, 1e-2, 1e-2])
    score = GaussianMixtureScore(schedule)
    spectrum = score.spectrum(gaussian(jnp.zeros(20), jnp.asarray(factor, jnp.float32)), np.zeros(20), t)
    wide = (alpha**2 * np.diag(factor[:5, :5]) ** 2 > sigma**2).sum()
    assert tangent_count(spectrum, sigma) == wide == 3
    assert positive_count(spectrum) == 0  # a Gaussian has no positive curvature anywhere
    memorized = EmpiricalScore(schedule).spectrum(np.eye(20)[:3] * 9, alpha * 9 * np.eye(20)[0], t)
    assert tangent_count(memorized, sigma) == 0
    assert below_bound(memorized * (1 - 1e-9), sigma) == 0
    assert below_bound(memorized * 1.1, sigma) == 1
    assert below_bound(memorized * 1.1, sigma, 0.09 / sigma**2) == 1
    assert below_bound(memorized * 1.1, sigma, 0.11 / sigma**2) == 0
    np.testing.assert_array_equal(tangent_count(np.zeros((3, 2, 4)), np.ones(2)), np.full((3, 2), 4))


def test_sum_of_largest():
    np.testing.assert_allclose(sum_of_largest([[1.0, -5.0, 3.0]], 2), [4.0])
    with pytest.raises(ValueError, match="k: expected 1 to 3"):
        sum_of_largest([1.0, 2.0, 3.0], 4)
