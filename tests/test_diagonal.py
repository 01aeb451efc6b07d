"""The diagonal of an operator against its matrix, its errors against many draws, and the map made of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from operators import skewed

import jaxmem as jm
from jaxmem.detectors import curvature_map
from jaxmem.function_operators import MatrixOperator
from jaxmem.oracles import GaussianMixtureScore, gaussian


def test_all_entries_are_those_of_the_matrix():
    matrix = skewed(90)
    found = jm.diagonal(MatrixOperator(matrix))
    np.testing.assert_allclose(found.values, np.diag(matrix), rtol=1e-6)
    assert found.num_products == 90
    assert not found.standard_errors.any()
    symmetric = jm.diagonal(MatrixOperator(matrix).symmetric)
    np.testing.assert_array_equal(symmetric.values, found.values)
    assert symmetric.num_products == 90  # not twice as many


def test_errors_of_an_estimate_cover():
    matrix = skewed(200, seed=3)
    operator, exact = MatrixOperator(matrix), np.diag(matrix).astype(np.float64)
    found = [jm.diagonal(operator, max_products=40, key=jax.random.key(i)) for i in range(100)]
    assert found[0].num_products == 40
    covered = np.mean([np.abs(one.values - exact) <= 1.96 * one.standard_errors for one in found])
    # 20,000 entries, those of one draw correlated: Student's t with 39 degrees of freedom puts 94.3 % there.
    assert 0.93 < covered < 0.96
    spread = np.sqrt(np.square(matrix.astype(np.float64)).sum(1) - exact**2)  # Bekas et al.: of the row's others
    # A mean of 100 estimated errors is off by about 1.1 %; the largest of 200 by four times that, and two to spare.
    np.testing.assert_allclose(np.mean([one.standard_errors for one in found], 0), spread / np.sqrt(40), rtol=0.08)


def test_a_diagonal_matrix_is_exact_from_few_probes():
    found = jm.diagonal(
        MatrixOperator(np.diag(np.arange(60.0, dtype=np.float32))), max_products=8, key=jax.random.key(0)
    )
    np.testing.assert_array_equal(found.values, np.arange(60.0))
    np.testing.assert_array_equal(found.standard_errors, 0)


def test_a_map_of_curvature_is_its_closed_form():
    """Two Gaussians, the conditional one narrow in the first rows: there, and only there, the map is positive."""
    schedule, t, shape = jm.NoiseSchedule(), 300, (4, 3, 2)
    narrow = np.where(np.arange(4)[:, None, None] < 2, 0.1, 1.0) * np.ones(shape)
    alpha, sigma = float(schedule.alpha[t]), float(schedule.sigma[t])
    score, x = GaussianMixtureScore(schedule), jnp.ones(24)

    def hessian(variances):
        factors = jnp.diag(jnp.sqrt(jnp.asarray(variances.ravel() - 0.05, jnp.float32)))
        return jm.score_jacobian(score, gaussian(jnp.zeros(24), factors, 0.05), x, t)

    difference = hessian(narrow) - hessian(np.ones(shape))
    assert jm.diagonal(difference).num_products == 48
    assert jm.diagonal(difference, max_products=33, key=jax.random.key(0)).num_products == 32
    found = curvature_map(jm.diagonal(difference).values, sigma, shape)
    exact = sigma * (1 / (alpha**2 * narrow + sigma**2) - 1 / (alpha**2 + sigma**2)).sum(-1)
    np.testing.assert_allclose(found, exact, atol=1e-4)
    assert (found[:2] > 0.1).all()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_products": 7, "key": jax.random.key(0)}, "max_products: expected at least 8, got 7"),
        ({"max_products": 20}, "key: expected a random key"),
        ({"chunk": 0}, "chunk: expected at least 1"),
    ],
)
def test_misuse_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        jm.diagonal(MatrixOperator(skewed(30)), **options)


def test_a_product_that_is_nan_is_refused():
    with pytest.raises(ValueError, match="a product holds NaN"):
        jm.diagonal(jm.from_matvec(lambda v: v * jnp.nan, 5, symmetric=True))
