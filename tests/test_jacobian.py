import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.diffusion import NoiseSchedule
from jaxmem.function_operators import MatrixOperator
from jaxmem.jacobian import score_jacobian
from jaxmem.score import bind

TRACES = []


class Net(nnx.Module):
    """A network whose Jacobian is not symmetric; it records each trace."""

    def __init__(self, size, *, rngs):
        self.first = nnx.Linear(size, 32, rngs=rngs)
        self.second = nnx.Linear(32, size, rngs=rngs)

    def __call__(self, x, t, cond):
        TRACES.append(None)
        hidden = self.first(x.reshape(-1)) * jnp.cos(t.astype(x.dtype)) + cond
        return self.second(jnp.tanh(hidden)).reshape(x.shape)


def make(seed=0, size=12):
    return bind(Net(size, rngs=nnx.Rngs(seed)), NoiseSchedule(), "eps")


def test_products_and_dense_agree_with_jacfwd():
    score, state = make()
    x = jax.random.normal(jax.random.key(0), (3, 4))
    cond = jnp.float32(0.3)
    exact = jax.jacfwd(lambda x: score(state, x, jnp.int32(50), cond))(x).reshape(12, 12)
    operator = score_jacobian(score, state, x, 50, cond)
    v = jax.random.normal(jax.random.key(1), (12,))
    tolerance = dict(rtol=1e-5, atol=1e-5 * float(jnp.abs(exact).max()))  # float32 sums of 32 terms
    value = score(state, x, jnp.int32(50), cond)
    # Of the largest: a sum that cancels keeps the rounding of its terms, whose order is the compiler's. Two programs of
    # two layers, sums of 32 and 12 terms: at most 2 · 44 · 6e-8.
    np.testing.assert_allclose(operator.value, value, rtol=0, atol=5e-6 * float(jnp.abs(value).max()))
    np.testing.assert_allclose(operator.mv(v), exact @ v, **tolerance)
    np.testing.assert_allclose(operator.rmv(v), exact.T @ v, **tolerance)
    np.testing.assert_allclose(operator.symmetric.mv(v), 0.5 * (exact + exact.T) @ v, **tolerance)
    for chunk in (1, 5, 12, 100):
        np.testing.assert_allclose(operator.to_dense(chunk), exact, **tolerance)
    np.testing.assert_allclose(operator.symmetric.to_dense(), 0.5 * (exact + exact.T), **tolerance)
    symmetric = operator.symmetric
    assert symmetric.symmetric is symmetric
    assert (operator.size, operator.dtype, operator.symmetric.products_per_mv) == (12, jnp.float32, 2)


def test_one_trace_for_two_binds_and_ten_points():
    apply = jax.jit(lambda operator, v: operator.mv(v) + operator.rmv(v))
    v = jnp.ones(12)
    for seed in (0, 1):
        score, state = make(seed)
        before = len(TRACES)
        for i in range(5):
            x = jax.random.normal(jax.random.key(i), (3, 4))
            t = np.int64(10 * i) if i % 2 else 10 * i  # a Python number is no other program than an array
            apply(score_jacobian(score, state, x, t, jnp.float32(i)), v)
        if seed == 0:
            # eval_shape of the contract check and one linearisation; a new point, timestep or condition traces nothing.
            assert len(TRACES) - before <= 2
        else:
            assert len(TRACES) == before
    assert apply._cache_size() == 1


def test_works_under_vmap():
    score, state = make()
    x = jax.random.normal(jax.random.key(2), (5, 3, 4))
    t = jnp.arange(5) * 100
    cond = jnp.linspace(0, 1, 5)
    v = jnp.ones(12)
    batched = jax.vmap(lambda x, t, c: score_jacobian(score, state, x, t, c).symmetric.mv(v))(x, t, cond)
    for i in range(5):
        alone = score_jacobian(score, state, x[i], t[i], cond[i]).symmetric.mv(v)
        np.testing.assert_allclose(
            batched[i], alone, rtol=0, atol=1e-5 * float(jnp.abs(alone).max())
        )  # as above, twice


def test_parameters_are_not_copied():
    # A linear layer's kernel is itself a residual of the linear map: it must be the caller's array, held once.
    size = 512

    def score(state, x, t, cond):
        return jnp.tanh(x) @ state["kernel"]

    state = {"kernel": jax.random.normal(jax.random.key(0), (size, size))}
    gc.collect()
    operator = score_jacobian(score, state, jnp.ones(size))
    extra = sum(leaf.size for leaf in jax.tree.leaves(operator) if leaf is not state["kernel"])
    assert extra < 10 * size
    np.testing.assert_allclose(
        operator.mv(jnp.ones(size)), (1 - jnp.tanh(1.0) ** 2) * state["kernel"].sum(0), rtol=1e-4, atol=1e-3
    )


def test_products_run_at_full_precision():
    # CPUs ignore it, so it is read off the program: every matrix product says HIGHEST, whatever the ambient default.
    score, state = make()
    x = jnp.ones((3, 4))

    def products(precision=None):
        options = {} if precision is None else {"precision": precision}
        with jax.default_matmul_precision("bfloat16"):
            text = str(
                jax.make_jaxpr(lambda v: score_jacobian(score, state, x, 5, jnp.float32(0), **options).mv(v))(
                    jnp.ones(12)
                )
            )
        return text.count("dot_general"), text.count("Precision.HIGHEST")

    total, highest = products()
    assert total >= 4
    assert highest >= total
    assert products("default")[1] == 0


def test_parameters_are_arguments_not_constants():
    score, state = make()
    program = jax.jit(lambda state, x: score_jacobian(score, state, x, 5, jnp.float32(0)).mv(jnp.ones(12)))
    jaxpr = jax.make_jaxpr(program)(state, jnp.ones((3, 4)))
    assert sum(np.size(c) for c in jaxpr.consts) <= 2 * 1000  # the two tables of the schedule


def _constant(state, x, t, cond):
    return jnp.zeros(3)


def _tuple(state, x, t, cond):
    return x, x


class Unhashable:
    __hash__ = None

    def __call__(self, state, x, t, cond):
        return x


@pytest.mark.parametrize(
    ("score", "x", "match"),
    [
        (_constant, jnp.ones(4), r"expected an output like x, shape \(4,\) of float32, got shape \(3,\)"),
        (_tuple, jnp.ones(4), "got tuple"),
        (Unhashable(), jnp.ones(4), "expected a hashable callable"),
        (_constant, jnp.ones(3, jnp.int32), "x: expected a floating-point array, got int32"),
    ],
)
def test_bad_scores_are_named(score, x, match):
    with pytest.raises(ValueError, match=match):
        score_jacobian(score, None, x)


@pytest.mark.parametrize("matrix", [np.ones((2, 3)), np.ones(3), np.ones((2, 2), np.int32)])
def test_bad_matrices_are_named(matrix):
    with pytest.raises(ValueError, match="matrix: expected a square floating-point array"):
        MatrixOperator(matrix)


def test_matrix_operator_round_trips():
    matrix = np.random.default_rng(0).normal(size=(7, 7)).astype(np.float32)
    operator = MatrixOperator(matrix)
    np.testing.assert_allclose(jax.jit(lambda o: o.to_dense(3))(operator), matrix, rtol=1e-6)
    np.testing.assert_allclose(operator.rmv(jnp.ones(7)), matrix.sum(0), rtol=1e-5, atol=1e-5)
    declared = MatrixOperator(matrix + matrix.T, symmetric=True)
    assert declared.symmetric is declared
