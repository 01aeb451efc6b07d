"""Nearest training examples and the calibrated distance against scikit-learn and float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from jaxmem.memorization import distances
from jaxmem.memorization.distances import calibrated_l2, nearest_training


@pytest.fixture(scope="module")
def points() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(34)  # no two of the distances nearly equal
    return rng.normal(size=(17, 30)).astype(np.float32), rng.normal(size=(203, 30)).astype(np.float32)


@pytest.mark.parametrize("chunk", [1, 64, 203, 1024])
def test_neighbours_equal_those_of_scikit_learn(points, chunk: int):
    x, training = points
    found = nearest_training(jnp.asarray(x), jnp.asarray(training), num_neighbours=50, chunk=chunk)
    oracle = NearestNeighbors(n_neighbors=50, algorithm="brute").fit(training.astype(np.float64))
    expected, indices = oracle.kneighbors(x.astype(np.float64))
    # float32: 30 squares summed, at most (30/2 + 2) · 6e-8 in any order; so no two can change places
    assert np.min(np.diff(expected) / expected[:, 1:]) > 4e-6
    np.testing.assert_array_equal(found.indices, indices)
    np.testing.assert_array_equal(found.index, indices[:, 0])
    np.testing.assert_allclose(found.distances, expected, rtol=2e-6)
    np.testing.assert_array_equal(found.distance, found.distances[:, 0])


def test_the_calibrated_distance_follows_its_formula(points):
    x, training = points
    found = calibrated_l2(jnp.asarray(x), jnp.asarray(training))
    difference = x[:, None].astype(np.float64) - training[None].astype(np.float64)
    exact = np.sort(np.sqrt((difference**2).sum(-1)), axis=1)[:, :50]
    # float32 rounding of two distances, as above, and of a mean of 50
    np.testing.assert_allclose(found, exact[:, 0] / (0.5 * exact.mean(1)), rtol=6e-6)
    other = calibrated_l2(jnp.asarray(x), jnp.asarray(training), num_neighbours=3, alpha=1.0)
    np.testing.assert_allclose(other, exact[:, 0] / exact[:, :3].mean(1), rtol=6e-6)


def test_a_near_copy_keeps_its_distance_in_float32():
    rng = np.random.default_rng(1)
    training = rng.uniform(-1, 1, (60, 784)).astype(np.float32)
    x = training[[7]].copy()
    x[0, 300] = np.float32(x[0, 300] + 1e-4)
    exact = abs(float(x[0, 300]) - float(training[7, 300]))
    found = nearest_training(jnp.asarray(x), jnp.asarray(training))
    assert found.index.tolist() == [7]
    # one difference of two float32 numbers is exact; ‖x‖² + ‖y‖² − 2xᵀy would be off by 1e-5 at a square of 1e-8
    np.testing.assert_allclose(found.distance, exact, rtol=1e-6)


def test_copies_are_at_zero_and_even_distances_at_two():
    copy = jnp.ones((1, 4))
    assert calibrated_l2(copy, jnp.ones((50, 4))).tolist() == [0.0]
    assert calibrated_l2(copy, jnp.zeros((50, 4))).tolist() == [2.0]


def test_the_lower_index_of_equal_distances_comes_first():
    training = jnp.asarray([[2.0], [1.0], [1.0], [-1.0]])
    for chunk in (1, 2, 4):
        found = nearest_training(jnp.zeros((1, 1)), training, num_neighbours=4, chunk=chunk)
        assert found.indices.tolist() == [[1, 2, 3, 0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        # in tests the shape annotations would speak first
        (
            lambda x, y: distances._check(x, y[:, :2], 1, 1),
            r"expected shapes \(n, d\) and \(m, d\), got \(2, 3\) and \(60, 2\)",
        ),
        (lambda x, y: nearest_training(x, y, num_neighbours=61), "num_neighbours: expected 1 to 60, .*got 61"),
        (lambda x, y: nearest_training(x, y, num_neighbours=0), "num_neighbours: expected 1 to 60, .*got 0"),
        (lambda x, y: nearest_training(x, y, chunk=0), "chunk: expected at least 1, got 0"),
        (lambda x, y: calibrated_l2(x, y[:49]), "num_neighbours: expected 1 to 49, .*got 50"),
        (lambda x, y: calibrated_l2(x, y, alpha=0.0), r"alpha: expected a positive number, got 0\.0"),
    ],
)
def test_misuse_is_refused(call, message: str):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((2, 3)), jnp.zeros((60, 3)))
