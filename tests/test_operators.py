"""Operators and their algebra against NumPy and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

import jaxmem as jm
from jaxmem.function_operators import MatrixOperator
from jaxmem.operators import Operator
from jaxmem.oracles import EmpiricalScore

D = 40
RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(2, D, D)).astype(np.float32)
V = RNG.normal(size=D).astype(np.float32)
KEY = jax.random.key(0)
#: Sums of 40 products of float32 numbers of order 1, whose order differs.
close = dict(rtol=0, atol=1e-5 * 40)


@pytest.mark.parametrize(
    ("operator", "matrix"),
    [
        (lambda a, b: a, A),
        (lambda a, b: a.T, A.T),
        (lambda a, b: a.T.T, A),
        (lambda a, b: a + b, A + B),
        (lambda a, b: a - b, A - B),
        (lambda a, b: -a, -A),
        (lambda a, b: 2 * a - b * 0.5, 2 * A - 0.5 * B),
        (lambda a, b: np.float64(3) * a + jnp.float32(0.1) * b, 3 * A + 0.1 * B),
        (lambda a, b: (a - b).T, (A - B).T),
        (lambda a, b: (a - 2 * b).symmetric, (A - 2 * B + (A - 2 * B).T) / 2),
    ],
)
def test_algebra_is_numpys(operator, matrix):
    for a, b in ((MatrixOperator(A), MatrixOperator(B)), (jm.from_matvec(lambda v: A @ v, D), jm.from_scipy(B))):
        found = operator(a, b)
        np.testing.assert_allclose(found @ V, matrix @ V, **close)
        np.testing.assert_allclose(found.to_scipy() @ V, matrix @ V, **close)
        np.testing.assert_allclose(found.to_scipy().rmatvec(V), matrix.T @ V, **close)
        np.testing.assert_allclose(found.T.to_dense(), matrix.T, **close)


def test_a_matrix_is_multiplied_by_columns():
    columns = np.stack([V, 2 * V], 1)
    np.testing.assert_allclose((2 * MatrixOperator(A)) @ columns, 2 * A @ columns, **close)


def test_a_difference_is_one_product_with_each_and_rounds_as_one():
    a, b = MatrixOperator(A), MatrixOperator(B)
    assert (a - b).products_per_mv == (a + b).products_per_mv == 2
    assert (3 * a).products_per_mv == a.T.products_per_mv == 1
    assert (a - b).symmetric.products_per_mv == 4
    np.testing.assert_array_equal((a - b) @ V, a @ V - b @ V)
    assert jm.spectrum(a - b).num_products == 2 * (D + 1)


def test_what_is_made_of_symmetric_ones_is_symmetric():
    a, b = (MatrixOperator(m + m.T, symmetric=True) for m in (A, B))
    made = 2 * a - b
    assert made.is_symmetric
    assert made.symmetric is made is made.T
    assert not (a - MatrixOperator(B)).is_symmetric


SYMMETRIC = (A + A.T) / 2


@pytest.mark.parametrize(
    "operator",
    [
        MatrixOperator(SYMMETRIC, symmetric=True),
        MatrixOperator(A).symmetric,
        jm.from_matvec(lambda v: jnp.asarray(SYMMETRIC) @ v, size=D, symmetric=True),
        jm.from_scipy(
            scipy.sparse.linalg.LinearOperator((D, D), lambda v: SYMMETRIC @ v, dtype=np.float32), symmetric=True
        ),
    ],
)
def test_scipy_finds_the_same_eigenvalues(operator):
    exact = np.linalg.eigvalsh(SYMMETRIC.astype(np.float64))[::-1]
    peer = scipy.sparse.linalg.eigsh(operator.to_scipy(), k=3, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(peer)[::-1], exact[:3], atol=1e-4)
    ours = jm.spectrum(operator, jm.Extreme(3, max_products=2 * D + 4, rtol=1e-5), key=KEY)
    np.testing.assert_allclose(ours.eigenvalues, exact[:3], atol=1e-4)
    np.testing.assert_allclose(jm.spectrum(operator).eigenvalues, exact, atol=1e-4)


def test_a_hessian_goes_to_scipy():
    data = jnp.asarray(RNG.normal(size=(8, 100)), jnp.float32)
    hessian = jm.score_jacobian(EmpiricalScore(jm.NoiseSchedule()), data, data[0], 500)
    exact = np.sort(EmpiricalScore(jm.NoiseSchedule()).spectrum(data, data[0], 500))
    peer = scipy.sparse.linalg.eigsh(hessian.symmetric.to_scipy(), k=2, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(peer), exact[-2:], atol=1e-4 * np.abs(exact).max())


def test_arrays_of_a_function_are_arguments_of_its_programs():
    # 1 MB: closed over by a compiled function it would be a warning, which fails here (see conftest).
    large = jnp.asarray(np.random.default_rng(0).normal(size=(512, 512)), jnp.float32)
    operator = jm.from_matvec(lambda v: large @ v, 512)
    assert any(leaf.shape == (512, 512) for leaf in jax.tree.leaves(operator))
    found = jm.spectrum(operator, jm.Arnoldi(3), key=KEY)
    assert found.num_products == 3 + 3
    np.testing.assert_allclose(operator.T @ jnp.ones(512), large.T @ jnp.ones(512), atol=1e-3)


def test_a_given_transpose_is_taken():
    def forward(v):
        return jax.pure_callback(lambda v: A @ np.asarray(v), jax.ShapeDtypeStruct((D,), jnp.float32), v)

    def back(v):
        return jax.pure_callback(lambda v: A.T @ np.asarray(v), jax.ShapeDtypeStruct((D,), jnp.float32), v)

    operator = jm.from_matvec(forward, D, transposed=back)
    np.testing.assert_allclose(operator.T @ V, A.T @ V, **close)
    with pytest.raises(ValueError, match="transposed: expected v ↦ Aᵀ v, because JAX cannot transpose `fn`"):
        jm.from_matvec(forward, D)


@pytest.fixture
def x64_everywhere():
    """As a setting of the process: products on the host run in a thread of their own, which sees no context."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def test_double_precision(x64_everywhere):
    wide = A.astype(np.float64)
    for operator in (jm.from_matvec(lambda v: wide @ v, D, dtype=jnp.float64), jm.from_scipy(wide)):
        assert operator.dtype == jnp.float64
        np.testing.assert_allclose(np.sort_complex(jm.spectrum(operator, jm.Dense(symmetric=False)).eigenvalues),
                                   np.sort_complex(np.linalg.eigvals(wide)), atol=1e-11)  # fmt: skip


class Cursed(MatrixOperator):
    def check(self):
        raise ValueError("cursed: expected none")


jax.tree_util.register_pytree_node_class(Cursed)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda a: a @ np.ones(3), r"operator: expected a vector of length 40, or a matrix .*, got shape \(3,\)"),
        (lambda a: a + MatrixOperator(jnp.eye(3)), r"operator: expected two of one size and dtype for a sum"),
        (lambda a: np.ones(D) * a, r"factor: expected a number, got shape \(40,\)"),
        (lambda a: jm.from_matvec(lambda v: v[:3], 5), r"fn: expected a result of shape \(5,\) and float32, got"),
        (lambda a: jm.from_matvec(lambda v: v, 0), "size, dtype: expected at least 1 and a floating-point type, got 0"),
        (lambda a: jm.from_matvec(lambda v: v, 2, dtype=int), "size, dtype: expected .*, got 2 and int"),
        (lambda a: jm.from_scipy(np.ones((2, 3))), r"linear_operator: expected a real square one, got shape \(2, 3\)"),
        (lambda a: jm.from_scipy(1j * np.eye(2)), "linear_operator: expected a real square one, got .* of complex128"),
        (
            lambda a: jm.from_scipy(scipy.sparse.linalg.LinearOperator((2, 2), lambda v: v, dtype=float)),
            "linear_operator: expected one with `rmatvec`, got one without",
        ),
        # An operator's own check is heard, also within others.
        (lambda a: jm.spectrum(a - 2 * Cursed(A).T), "cursed: expected none"),
        (lambda a: jm.spectrum(Cursed(A).symmetric), "cursed: expected none"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call(MatrixOperator(A))


def test_only_operators_and_numbers_combine():
    a = MatrixOperator(A)
    for call in (lambda: a + 1, lambda: a - "a", lambda: a * a):
        with pytest.raises(TypeError):
            call()
    assert issubclass(jm.Operator, Operator)


@pytest.mark.usefixtures("unchecked")
def test_complex_vectors_texts_and_matrices_are_refused():
    a = MatrixOperator(A)
    with pytest.raises(ValueError, match="operator: expected a real vector, got complex64"):
        a @ (V + 1j * V).astype(np.complex64)
    with pytest.raises(ValueError, match="factor: expected a number, got '2'"):
        "2" * a
    with pytest.raises(ValueError, match=r"operator: expected an operator, got ndarray; make one with score_jacobian"):
        jm.spectrum(A)


def test_a_quotient_and_a_sum_of_many():
    a, b = MatrixOperator(A), MatrixOperator(B)
    np.testing.assert_allclose((a / 4) @ V, A @ V / 4, **close)
    np.testing.assert_allclose(sum([a, b, a]) @ V, (2 * A + B) @ V, **close)


def test_combined_operators_are_pytrees_that_stack():
    a, b = MatrixOperator(A), MatrixOperator(B)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), a - b, b - a)
    found = jax.vmap(lambda operator: operator.mv(jnp.asarray(V)))(stacked)
    np.testing.assert_allclose(found, [(A - B) @ V, (B - A) @ V], **close)
    scaled = jax.vmap(lambda c: c * a)(jnp.arange(3.0))
    np.testing.assert_allclose(jax.vmap(lambda operator: operator.mv(jnp.asarray(V)))(scaled)[2], 2 * A @ V, **close)


def test_a_folder_is_not_taken_for_the_symmetric_part(tmp_path):
    with pytest.raises(TypeError, match="positional"):
        jm.Dense(tmp_path)
