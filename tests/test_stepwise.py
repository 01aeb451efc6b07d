"""Krylov methods driven from the host against the same methods in one compiled loop, and dense LAPACK."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem import NoiseSchedule, score_jacobian
from jaxmem.krylov import Status, absorb, arnoldi, begin, lanczos, next_vector
from jaxmem.oracles import GaussianMixture, GaussianMixtureScore
from jaxmem.runs.memory import available_bytes, gigabytes, require
from jaxmem.spectra.ritz import ritz_pairs
from jaxmem.spectra.stepwise import advance, compile_programs, measure


@pytest.mark.parametrize("symmetric", [True, False])
def test_absorbing_products_is_the_compiled_loop(symmetric, getkey):
    matrix = jax.random.normal(getkey(), (30, 30))
    matrix = matrix + matrix.T if symmetric else matrix
    start = jax.random.normal(getkey(), (30,))
    f = begin(start, 12)
    for _ in range(15):  # three more than there is room for: they change nothing
        f = absorb(f, matrix @ next_vector(f), symmetric=symmetric)
    together = (lanczos if symmetric else arnoldi)(lambda v: matrix @ v, start, 12)
    assert int(f.num_steps) == 12
    np.testing.assert_allclose(f.hessenberg, together.hessenberg, atol=2e-4)  # float32, 12 steps, ‖A‖ about 15
    np.testing.assert_allclose(f.basis @ f.basis.T, np.eye(13), atol=1e-5)


def test_a_closed_space_stays_closed():
    f = begin(jnp.array([1.0, 0, 0]), 3)
    for _ in range(3):
        f = absorb(f, 2 * next_vector(f), symmetric=True)
    assert (int(f.num_steps), int(f.status)) == (1, Status.INVARIANT)
    assert float(f.hessenberg[0, 0]) == 2


@pytest.fixture
def problem(getkey):
    schedule = NoiseSchedule()
    mixture = GaussianMixture(
        log_weights=jnp.log(jnp.array([0.6, 0.4])),
        means=jax.random.normal(getkey(), (2, 6)),
        factors=0.5 * jax.random.normal(getkey(), (2, 6, 6)),
        variances=jnp.array([0.3, 0.1]),
    )
    return GaussianMixtureScore(schedule), mixture, jax.random.normal(getkey(), (3, 6))


@pytest.mark.parametrize("symmetric", [True, False])
def test_all_steps_give_the_exact_spectrum(problem, symmetric, getkey):
    score, state, x = problem
    t = jnp.array([10, 300, 900])
    programs = compile_programs(score, state, x, t, None, symmetric=symmetric)
    assert (programs.transposed is None) is not symmetric
    operators = programs.operators(state, x, t, None)
    seen = []
    f = jax.vmap(partial(begin, max_steps=6))(jax.random.normal(getkey(), (3, 6)))
    f = advance(programs, operators, f, lambda f: seen.append(f.num_steps.tolist()))
    assert seen == [[step] * 3 for step in range(1, 7)]
    for i in range(3):
        exact = np.linalg.eigvalsh(np.asarray(score_jacobian(score, state, x[i], t[i]).to_dense(), np.float64))
        pairs = ritz_pairs(jax.tree.map(lambda leaf, i=i: leaf[i], f), symmetric=symmetric)
        np.testing.assert_allclose(pairs.values.real, exact[::-1], atol=1e-4 * np.abs(exact).max())


def test_measurements(problem, getkey):
    score, state, x = problem
    t = jnp.array([10, 300, 900])
    vectors = jax.random.normal(getkey(), (3, 6))
    for symmetric, products in ((True, 3), (False, 2)):
        programs = compile_programs(score, state, x, t, None, symmetric=symmetric)
        found = measure(programs, programs.operators(state, x, t, None), vectors)
        assert found.num_products == products
        norms = [np.linalg.norm(score_jacobian(score, state, x[i], t[i]).to_dense()) for i in range(3)]
        assert (found.noise > 0).all()
        assert (found.noise < 1e-5 * np.array(norms)).all()
        if symmetric:  # a Hessian
            assert (found.asymmetry < 1e-4).all()
        else:
            assert np.isnan(found.asymmetry).all()


def test_memory_is_known_before_anything_is_there(problem):
    score, state, x = problem
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (state, x, jnp.array([10, 300, 900])))
    programs = compile_programs(score, *shapes, None, symmetric=True)
    assert programs.parameter_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    operators = programs.operators(state, x, jnp.array([10, 300, 900]), None)
    held = sum(leaf.nbytes for leaf in (operators.value, *operators._residuals))
    assert held <= programs.peak_bytes < held + 100_000
    single = compile_programs(
        score, shapes[0], *(jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype) for a in shapes[1:]), None, symmetric=True
    )
    assert single.peak_bytes < programs.peak_bytes


def test_too_little_memory_is_said():
    require(available_bytes() // 2, "this", "do that")
    with pytest.raises(ValueError, match=r"the spectrum: needs about 1000000.0 GB, of which .* free; take less"):
        require(10**15, "the spectrum", "take less")
    assert (gigabytes(3_440_000_000), gigabytes(1_500_000)) == ("3.4 GB", "1.5 MB")
