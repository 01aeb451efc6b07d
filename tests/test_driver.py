"""Krylov methods driven from the host against the same methods in one compiled loop, and dense LAPACK."""

import signal
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import command_environment
from killing import Stopped, signal_when
from operators import skewed

from jaxmem import Arnoldi, Lanczos, NoiseSchedule, Status, score_jacobian, spectrum
from jaxmem.function_operators import MatrixOperator
from jaxmem.krylov import absorb, arnoldi, begin, lanczos, next_vector
from jaxmem.oracles import GaussianMixture, GaussianMixtureScore
from jaxmem.runs.memory import available_bytes, gigabytes, require
from jaxmem.spectra import driver
from jaxmem.spectra.driver import drive
from jaxmem.spectra.programs import compile_programs, measure
from jaxmem.spectra.ritz import ritz_pairs


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
    f = drive(programs.step(operators), f, lambda f: seen.append(f.num_steps.tolist()))
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


@pytest.mark.parametrize("method", [Lanczos(40), Arnoldi(40)])
def test_a_spectrum_goes_on_to_the_same_bits(method, tmp_path, monkeypatch, getkey):
    monkeypatch.setattr(driver, "_SAVING_SHARE", np.inf)  # whatever is done is saved
    operator, key = MatrixOperator(skewed(150)), getkey()
    whole = spectrum(operator, method, key=key, vectors=True)
    reports = []

    def progress(task, done, total):
        reports.append(done)
        if len(reports) > 1 and reports[-2] < done < total:
            raise Stopped

    starts, found = 0, None
    while found is None:
        starts += 1
        try:
            found = spectrum(operator, method, key=key, vectors=True, folder=tmp_path, progress=progress)
        except Stopped:
            continue
    assert starts == 40  # a segment begins with one step
    assert reports == sorted(reports)
    assert reports[-1] == whole.num_products == 3 + 40 * (2 if method.symmetric else 1)
    for one, other in zip(whole, found, strict=True):
        np.testing.assert_array_equal(one, other)
    again = spectrum(operator, method, key=key, vectors=True, folder=tmp_path)
    np.testing.assert_array_equal(again.vectors, whole.vectors)
    with pytest.raises(ValueError, match=r"krylov.npz: expected the state of the same call.*method: there .*now"):
        spectrum(operator, Lanczos(3), key=key, folder=tmp_path)
    with pytest.raises(ValueError, match=r"expected the state of the same call.*seed: there"):
        spectrum(operator, method, key=getkey(), folder=tmp_path)
    with pytest.raises(ValueError, match="expected the state of the same operator, got one whose product differs"):
        spectrum(2 * operator, method, key=key, folder=tmp_path)


SCRIPT = """
import sys, time
import jax
import numpy as np
from jaxmem import Lanczos, from_matvec, spectrum

matrix = np.random.default_rng(0).normal(size=(400, 400)).astype(np.float32)
operator = from_matvec(lambda v: matrix @ v, 400)
slowly = lambda *call: time.sleep(float(sys.argv[2]))
found = spectrum(operator, Lanczos(300), key=jax.random.key(0), folder=sys.argv[1], progress=slowly)
np.save(sys.argv[1] + ".npy", np.stack([found.eigenvalues, found.residuals]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_killed_process_is_gone_on_with(tmp_path):
    def start(name, pause):
        arguments = [sys.executable, "-c", SCRIPT, str(tmp_path / name), str(pause)]
        return subprocess.Popen(arguments, env=command_environment())

    child, path = start("killed", 0.5), tmp_path / "killed" / "krylov.npz"
    signal_when(child, path.exists)
    assert child.wait() == -signal.SIGKILL
    with np.load(path) as kept:
        assert 1 <= kept["num_steps"] < 300
    assert [start(name, 0).wait(600) for name in ("killed", "whole")] == [0, 0]
    np.testing.assert_array_equal(np.load(tmp_path / "killed.npy"), np.load(tmp_path / "whole.npy"))


def test_a_large_state_is_not_saved_after_every_step(tmp_path, monkeypatch):
    clock, saved = [0.0], []

    def save(path, arrays, options):
        clock[0] += 1.0  # a second each
        saved.append(int(arrays["num_steps"]))

    monkeypatch.setattr(driver.resume, "save", save)
    monkeypatch.setattr(driver.time, "monotonic", lambda: clock[0])
    kept = driver.Kept(tmp_path / "a.npz", np.zeros(1), 0.0, {})
    f = begin(jnp.ones(4), 100)
    for steps in range(1, 101):
        clock[0] += 4.0  # seconds of a step
        kept.save(f._replace(num_steps=jnp.int32(steps)))
    # A twentieth of the time is for saving: every fifth step, and the last.
    assert saved == [*range(1, 101, 5), 100]


def test_a_start_that_is_not_finite_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"operator: product \d+ was NaN or infinite"):
        spectrum(MatrixOperator(jnp.eye(4).at[1, 2].set(jnp.nan)), Lanczos(3), key=jax.random.key(0), folder=tmp_path)
