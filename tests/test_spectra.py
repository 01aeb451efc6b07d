from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
from operators import PRODUCTS, Counted, Unregistered, nan_score, skewed
from parity import MULTIPLE, rounded

from jaxmem import (
    Arnoldi,
    Dense,
    Extreme,
    Lanczos,
    Status,
    batch_spectra,
    count_positive,
    score_jacobian,
    spectrum,
)
from jaxmem.diffusion import NoiseSchedule
from jaxmem.function_operators import MatrixOperator
from jaxmem.operators import Operator
from jaxmem.oracles import EmpiricalScore, GaussianMixture, GaussianMixtureScore, Separable, SeparableScore
from jaxmem.spectra.batch import _one_ahead, _tridiagonal_elsewhere, _tridiagonal_on_cpu

SCHEDULE = NoiseSchedule()
KEY = jax.random.key(0)


def mixture(d, seed=0, rank=4):
    rng = np.random.default_rng(seed)
    return GaussianMixture(
        jnp.log(jnp.array([0.5, 0.3, 0.2])),
        jnp.asarray(rng.normal(size=(3, d)), jnp.float32),
        jnp.asarray(rng.normal(size=(3, d, rank)), jnp.float32),
        jnp.array([0.1, 0.3, 0.0]),
    )


@pytest.mark.parametrize("t", [0, 30, 300, 900])
@pytest.mark.parametrize("d", [2, 50])
def test_exact_spectra_of_oracles(d, t):
    rng = np.random.default_rng(t)
    x = jnp.asarray(rng.normal(size=d) * 0.7, jnp.float32)
    cases = [
        (GaussianMixtureScore(SCHEDULE), mixture(d)),
        (EmpiricalScore(SCHEDULE), jnp.asarray(rng.normal(size=(8, d)), jnp.float32)),
        (SeparableScore(SCHEDULE), Separable(jnp.linspace(0.1, 2, d), jnp.where(jnp.arange(d) % 3 == 0, -1.0, 1.0))),
    ]
    for score, state in cases:
        exact = score.spectrum(state, x, t)
        result = spectrum(score_jacobian(score, state, x, t))
        # Relative to the largest eigenvalue float32 products give about 1e-6; where 1/sigma² is 1e4, the rounding of x
        # and of the data is multiplied by up to that: by as much as the closed form itself says.
        moved = np.abs(score.spectrum(*rounded((state, x)), t) - exact).max()
        atol = max(2e-5 * np.abs(exact).max(), MULTIPLE * moved)
        np.testing.assert_allclose(result.eigenvalues, exact, rtol=0, atol=atol)
        assert result.status is Status.CONVERGED
        assert type(result.num_products) is int
        assert result.num_products == d + 1
        assert result.method == Dense()
        assert result.asymmetry < 1e-4
        assert result.dtype == jnp.float32
        batch = batch_spectra(score, state, x[None], t)
        np.testing.assert_allclose(batch.eigenvalues[0], exact, rtol=0, atol=atol)


def test_dense_methods_are_lapacks():
    matrix = skewed(60)
    operator = MatrixOperator(matrix)
    result = spectrum(operator, vectors=True)
    np.testing.assert_allclose(result.eigenvalues, np.linalg.eigvalsh((matrix + matrix.T) / 2.0)[::-1], atol=1e-4)
    residual = result.vectors @ ((matrix + matrix.T) / 2) - result.eigenvalues[:, None] * result.vectors
    assert np.linalg.norm(residual, axis=1).max() < 1e-4
    result = spectrum(operator, Dense(symmetric=False), vectors=True)
    exact = np.linalg.eigvals(matrix.astype(np.float64))
    np.testing.assert_allclose(np.sort_complex(result.eigenvalues), np.sort_complex(exact), atol=1e-4)
    assert (np.diff(result.eigenvalues.real) <= 0).all()
    residual = result.vectors @ matrix.T - result.eigenvalues[:, None] * result.vectors
    assert np.linalg.norm(residual, axis=1).max() < 1e-4
    np.testing.assert_allclose(result.asymmetry, np.linalg.norm(matrix - matrix.T) / np.linalg.norm(matrix), rtol=1e-5)


@pytest.mark.parametrize("method", [Arnoldi, Lanczos])
def test_ritz_residuals_are_true_and_converged_values_are_eigenvalues(method):
    d, steps = 200, 60
    matrix = skewed(d) + np.diag(np.linspace(0, 80, d)).astype(np.float32)
    result = spectrum(MatrixOperator(matrix), method(steps), key=KEY, vectors=True)
    target = matrix.astype(np.float64) if method is Arnoldi else (matrix + matrix.T) / 2.0
    np.testing.assert_allclose(np.linalg.norm(result.vectors, axis=1), 1, atol=1e-5)
    true = np.linalg.norm(result.vectors @ target.T - result.eigenvalues[:, None] * result.vectors, axis=1)
    # The reported residual is the true one, up to the measured rounding.
    np.testing.assert_allclose(result.residuals, true, atol=2 * result.noise, rtol=1e-3)
    converged = result.converged(1e-4)
    assert 3 <= converged.sum() < steps
    if method is Lanczos:
        exact = np.linalg.eigvalsh(target)
        distance = np.abs(result.eigenvalues[:, None] - exact[None]).min(1)
        assert (distance <= result.residuals).all()  # true of every Ritz pair of a symmetric matrix, converged or not
    assert result.num_products == steps * (2 if method is Lanczos else 1) + 3


def test_extreme_eigenvalues_are_arpacks():
    d = 400
    matrix = np.diag(np.linspace(-50, 0, d)).astype(np.float32) + 0.01 * skewed(d)
    symmetric = (matrix + matrix.T) / 2.0
    peer = scipy.sparse.linalg.eigsh(symmetric.astype(np.float64), k=3, which="LA", return_eigenvectors=False)
    ours = spectrum(MatrixOperator(matrix), Lanczos(150), key=KEY)
    np.testing.assert_allclose(ours.eigenvalues[:3], np.sort(peer)[::-1], atol=1e-4)
    nonsymmetric = scipy.sparse.linalg.eigs(matrix.astype(np.float64), k=3, which="LM", return_eigenvectors=False)
    ours = spectrum(MatrixOperator(matrix), Arnoldi(150), key=KEY)
    np.testing.assert_allclose(np.sort(ours.eigenvalues.real)[:3], np.sort(nonsymmetric.real), atol=1e-4)


def test_arnoldi_to_the_end_is_dense_eig():
    matrix = skewed(80)
    result = spectrum(MatrixOperator(matrix), Arnoldi(80), key=KEY)
    dense = spectrum(MatrixOperator(matrix), Dense(symmetric=False))
    assert len(result.eigenvalues) == 80
    distance = np.abs(result.eigenvalues[:, None] - dense.eigenvalues[None])
    assert distance.min(1).max() < 1e-4 * np.linalg.norm(matrix, 2)
    assert distance.min(0).max() < 1e-4 * np.linalg.norm(matrix, 2)


def test_low_rank_score_ends_invariant():
    factor = np.linalg.qr(np.random.default_rng(0).normal(size=(300, 5)))[0]
    factor *= np.sqrt([900.0, 30.0, 5.0, 1.0, 0.3])
    result = spectrum(MatrixOperator((factor @ factor.T).astype(np.float32)), Lanczos(50), key=KEY)
    assert result.status == Status.INVARIANT
    assert len(result.eigenvalues) == 6
    assert np.isfinite(result.eigenvalues).all()


@pytest.mark.parametrize("method", [Dense(), Lanczos(12), Arnoldi(12)])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_batches_equal_single_points(method, batch):
    d, n = 20, 7
    # Of full rank, and not so late that all eigenvalues are nearly -1: at which step a Krylov space closes that nearly
    # does is a matter of rounding, and so of the batch.
    score, state = GaussianMixtureScore(SCHEDULE), mixture(d, rank=d)
    rng = np.random.default_rng(4)
    x, t = jnp.asarray(rng.normal(size=(n, d)), jnp.float32), jnp.asarray(rng.integers(0, 400, n))
    seen = []
    many = batch_spectra(
        score, state, x, t, method=method, key=KEY, batch=batch, progress=lambda *call: seen.append(call)
    )
    assert (seen[0], seen[-1]) == (("points", 0, n), ("points", n, n))
    assert many.eigenvalues.shape == (n, d if method == Dense() else method.num_steps)
    for i in range(n):
        one = spectrum(score_jacobian(score, state, x[i], t[i]), method, key=jax.random.fold_in(KEY, i))
        found = many.point(i)
        # Same products in another batching: a few float32 roundings of the largest eigenvalue.
        np.testing.assert_allclose(found.eigenvalues, one.eigenvalues, atol=1e-4 * np.abs(one.eigenvalues).max())
        assert (found.num_products, found.method) == (one.num_products, one.method)
        assert found.status is one.status
    assert many.seed is None if method == Dense() else many.seed is not None


@pytest.mark.parametrize("reduce", [_tridiagonal_on_cpu, _tridiagonal_elsewhere])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_tridiagonal_matrices_keep_the_eigenvalues(reduce, scale):
    matrices = np.stack([skewed(60, seed) for seed in range(3)])
    matrices = ((matrices + matrices.transpose(0, 2, 1)) / 2 * scale).astype(np.float32)
    exact = np.linalg.eigvalsh(matrices.astype(np.float64))
    diagonals, off_diagonals = jax.jit(reduce)(matrices)
    pairs = zip(np.asarray(diagonals, np.float64), np.asarray(off_diagonals, np.float64), strict=True)
    found = np.stack([np.linalg.eigvalsh(np.diag(d) + np.diag(e, 1) + np.diag(e, -1)) for d, e in pairs])
    # The bound that `batch_spectra` reports for the solver: sqrt(d) roundings of the largest eigenvalue.
    atol = 60**0.5 * np.finfo(np.float32).eps * np.abs(exact / scale).max()
    np.testing.assert_allclose(found / scale, exact / scale, rtol=0, atol=atol)


@pytest.mark.parametrize("size", [1, 2, 3, 60, 300])
def test_batched_eigenvalues_are_as_good_as_their_noise_says(size):
    for matrix in (skewed(size, seed) for seed in range(4)):
        found = batch_spectra(_linear_score, jnp.asarray(matrix), jnp.zeros((1, size)), 0)
        wide = matrix.astype(np.float64)
        exact = np.linalg.eigvalsh((wide + wide.T) / 2)[::-1]
        np.testing.assert_array_less(np.abs(found.eigenvalues[0] - exact), found.noise[0])


def test_batched_eigenvalues_in_double_precision(x64):
    matrix = np.asarray(skewed(40), np.float64)
    found = batch_spectra(_linear_score, jnp.asarray(matrix), jnp.zeros((2, 40)), 0, batch=2)
    exact = np.linalg.eigvalsh((matrix + matrix.T) / 2)[::-1]
    # What is reported as the solver's error, and as much for LAPACK's own; float32 anywhere would give 1e-7.
    atol = 2 * 40**0.5 * np.finfo(np.float64).eps * np.abs(exact).max()
    np.testing.assert_allclose(found.eigenvalues, [exact, exact], rtol=0, atol=atol)


def test_one_trace_for_many_points():
    traces = []

    def score(state, x, t, cond):
        traces.append(None)
        return state * jnp.tanh(x) * cond

    x = jnp.linspace(0, 1, 33).reshape(11, 3)
    result = batch_spectra(score, jnp.float32(-2.0), x, jnp.arange(11), jnp.ones(11), batch=4)
    np.testing.assert_allclose(
        result.eigenvalues, -np.sort(2 / np.cosh(np.asarray(x, np.float64)) ** 2, axis=1), rtol=1e-5
    )
    assert len(traces) <= 3  # two checks of the contract by shapes, one linearisation
    batch_spectra(score, jnp.float32(-3.0), x + 1, jnp.arange(11), jnp.ones(11), batch=4)
    assert len(traces) <= 4


def _nan_slope(state, x, t, cond):
    return jnp.sqrt(x)  # finite at 0, its derivative is not


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e33])
def test_no_scale_of_operator_or_start_changes_what_is_found(scale):
    # Squares of such numbers are 0 or infinite in float32: norms must not be taken of them as they are. 1e-4: scaling
    # by no power of two rounds every product anew, and Ritz values that have not converged magnify that.
    matrix = np.diag(np.linspace(1, 20, 30)).astype(np.float32) + 0.1 * skewed(30)
    unit, scaled = MatrixOperator(matrix), MatrixOperator(jnp.asarray(matrix * np.float32(scale)))
    for method in (Dense(), Lanczos(10), Arnoldi(10)):
        expected, found = spectrum(unit, method, key=KEY), spectrum(scaled, method, key=KEY)
        np.testing.assert_allclose(found.eigenvalues / scale, expected.eigenvalues, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found.asymmetry, expected.asymmetry, rtol=1e-4)
        assert found.status == expected.status
        assert 0 < found.noise / scale < 1e-3
    antisymmetric = jnp.asarray((matrix - matrix.T) * np.float32(scale))
    assert count_positive(MatrixOperator(antisymmetric), max_products=28, key=KEY, steps_per_probe=4).lower == 0
    start = np.linspace(1, 2, 30)
    expected = spectrum(unit, Lanczos(10), start=start)
    found = spectrum(unit, Lanczos(10), start=start * scale)
    np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, rtol=1e-4, atol=1e-4)
    batch = batch_spectra(_linear_score, jnp.asarray(matrix * np.float32(scale)), jnp.zeros((1, 30)), 0)
    np.testing.assert_allclose(batch.asymmetry[0], spectrum(unit).asymmetry, rtol=1e-4)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", [Dense(), Lanczos(7), Arnoldi(7)])
def test_products_are_counted(method, symmetric):
    operator = Counted(jnp.diag(jnp.linspace(1.0, 2.0, 20)))
    PRODUCTS.clear()
    result = spectrum(operator.symmetric if symmetric else operator, method, key=KEY)
    jax.effects_barrier()
    assert result.num_products == len(PRODUCTS)


def test_budgets_hold_for_symmetric_parts():
    operator = Counted(jnp.diag(jnp.linspace(1.0, 2.0, 60))).symmetric
    PRODUCTS.clear()
    count = count_positive(operator, max_products=50, key=KEY, steps_per_probe=5)
    jax.effects_barrier()
    assert count.num_products == len(PRODUCTS) <= 50


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Minus(Operator):
    """An operator without arrays."""

    size = 3
    dtype = jnp.dtype(jnp.float32)

    def mv(self, vector):
        return -vector

    rmv = mv


def test_operators_without_arrays_have_spectra():
    np.testing.assert_array_equal(spectrum(Minus()).eigenvalues, -1)


def _linear_score(state, x, t, cond):
    return state @ x


def _zero_score(state, x, t, cond):
    return 0 * x


def _ok_score(state, x, t, cond):
    return -x


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda op: spectrum(op, "eigh"), r"method: expected Dense\(\), Lanczos\(num_steps\), .*, got 'eigh'"),
        (lambda op: spectrum(op, start=jnp.ones(4)), "start: expected none with Dense, got one"),
        (lambda op: spectrum(op, Extreme(1, max_products=9), start=jnp.ones(4)), "start: expected none with Extreme"),
        (lambda op: spectrum(op, Dense(symmetric=False), folder="a"), "folder: expected none for the eigenvalues of A"),
        (lambda op: Dense(symmetric=False, folder="a"), "folder: expected none for the eigenvalues of A"),
        (
            lambda op: spectrum(op, Dense(folder="a"), folder="b"),
            "folder: expected that of the method, a, or none, got",
        ),
        (lambda op: spectrum(op, folder="a", vectors=True), "vectors: expected False with a folder"),
        (lambda op: Lanczos(0), "num_steps: expected at least 1, got 0"),
        (lambda op: Arnoldi(0), "num_steps: expected at least 1, got 0"),
        (lambda op: Lanczos(2, -1.0), r"tolerance: expected 0 or a positive number, got -1\.0"),
        (lambda op: spectrum(op).point(0), "spectrum: expected that of a batch, got that of one operator"),
        (lambda op: spectrum(op, Lanczos(5), key=KEY), "num_steps: expected 1 to 4"),
        (lambda op: spectrum(op, Lanczos(2)), "key: Krylov methods need a random key"),
        (lambda op: spectrum(op, Lanczos(2), start=jnp.zeros(4)), "the start vector is zero"),
        (
            lambda op: spectrum(op, Lanczos(2), start=jnp.ones(3)),
            r"start: expected shape \(4,\), got \(3,\)",
        ),
        (lambda op: spectrum(op, Lanczos(2), start=jnp.full(4, jnp.nan)), "start vector holds NaN"),
        (lambda _: spectrum(score_jacobian(nan_score, None, jnp.full(4, 6.0))), "score: 4 of 4 entries are NaN"),
        (lambda _: spectrum(score_jacobian(_nan_slope, None, jnp.zeros(4))), "operator: its matrix holds NaN"),
        (
            lambda _: spectrum(score_jacobian(_nan_slope, None, jnp.zeros(4)), Lanczos(2), key=KEY),
            "operator: product 1 was NaN",
        ),
        (
            lambda _: spectrum(score_jacobian(_ok_score, None, jnp.zeros(5000))),
            r"Dense\(\) holds a matrix of 5000 × 5000.*`folder`",
        ),
        (lambda _: batch_spectra(_ok_score, None, jnp.zeros((0, 4)), 0), "expected at least one point"),
        (
            lambda _: batch_spectra(_ok_score, None, jnp.zeros((2, 4)), jnp.zeros(3, int)),
            "t: expected one timestep or 2",
        ),
        (lambda _: batch_spectra(_ok_score, None, jnp.zeros((2, 4)), 0, jnp.zeros(3)), "cond: expected leaves with"),
        (lambda _: batch_spectra(_ok_score, None, jnp.zeros((2, 4)), 0, {"text": 3}), "cond: expected leaves with"),
        (lambda op: jax.jit(lambda op: spectrum(op).eigenvalues)(op), "cannot be traced; for many points use batch"),
        *[
            (
                lambda _, method=method: batch_spectra(_ok_score, None, jnp.zeros((2, 4)), 0, method=method),
                r"method: expected Dense\(\), Lanczos or Arnoldi, got .* which is not batched",
            )
            for method in (Dense(symmetric=False), Dense(folder="a"), Extreme(1, max_products=5))
        ],
        (lambda _: batch_spectra(_ok_score, None, jnp.zeros((2, 4)), 0, batch=0), "expected at least 1"),
        (lambda _: batch_spectra(_ok_score, None, jnp.zeros((2, 4)), 0, Dense()), r"got the method .*; write method="),
        (
            lambda _: batch_spectra(_ok_score, None, jnp.zeros((2, 4)), 0, method=Lanczos(2)),
            "key: Krylov methods need",
        ),
        (
            lambda _: batch_spectra(_nan_slope, None, jnp.ones((3, 4)).at[2].set(0.0), 0, batch=2),
            "the score or its Jacobian at point 2 holds NaN",
        ),
        *[
            (
                lambda _, options=options: batch_spectra(
                    nan_score, None, jnp.ones((3, 4)).at[1].set(6.0), 0, key=KEY, **options
                ),
                "the score or its Jacobian at point 1 holds NaN",
            )
            for options in ({}, {"method": Lanczos(2)})
        ],
        (
            lambda _: count_positive(score_jacobian(nan_score, None, jnp.full(300, 6.0)), max_products=100, key=KEY),
            "score: 300 of 300 entries are NaN",
        ),
        (
            lambda op: spectrum(op - score_jacobian(nan_score, None, jnp.full(4, 6.0))),
            "score: 4 of 4 entries are NaN",
        ),
        (
            lambda _: batch_spectra(_ok_score, None, jnp.zeros((2, 4)), 0, method=Lanczos(2), key=0),
            "got int",
        ),
        (lambda op: count_positive(op, max_products=3), "max_products: expected at least"),
        (
            lambda op: count_positive(op, max_products=3, steps_per_probe=0),
            "steps_per_probe: expected at least 1, got 0",
        ),
        (lambda op: spectrum(op, chunk=0), "chunk: expected at least 1, got 0"),
        (lambda _: batch_spectra(_ok_score, None, jnp.zeros((2, 0)), 0), "operator: expected at least one dimension"),
        (lambda _: spectrum(Unregistered()), "operator: expected a pytree, got Unregistered"),
        (
            lambda _: count_positive(MatrixOperator(jnp.eye(300)), max_products=250, steps_per_probe=20),
            "key: an estimate needs",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call(MatrixOperator(jnp.eye(4)))


def test_a_score_of_zero_has_a_spectrum_of_zeros():
    batch = batch_spectra(_zero_score, None, jnp.ones((2, 4)), 0)
    for result in (batch, spectrum(score_jacobian(_zero_score, None, jnp.ones(4)))):
        np.testing.assert_array_equal(result.eigenvalues, 0)
        np.testing.assert_array_equal(result.asymmetry, 0)


def test_exact_count_knows_what_rounding_hides():
    # 40 negative eigenvalues and an exact null space: float32 turns zeros into positive numbers; none is certified.
    d = 500
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(d, 40)).astype(np.float32)
    count = count_positive(MatrixOperator(-(factor @ factor.T)))
    assert count.lower == 0
    assert count.estimate > 10  # the trap: the paper's threshold counts these
    assert count.interval == (0, d - 40)
    # Sums of 256 equal entries are exact for a vector of equal ±1: the measured noise must not be that of such a one.
    assert count_positive(MatrixOperator(-jnp.ones((256, 256)))).lower == 0
    assert count_positive(MatrixOperator(-jnp.eye(256))).threshold > 0
    rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
    values = np.concatenate([np.full(7, 0.5), np.full(d - 7, -3.0)])
    clear = count_positive(MatrixOperator(((rotation * values) @ rotation.T).astype(np.float32)))
    assert clear[:3] == (7, 7.0, (7.0, 7.0))
    assert clear.num_products == d + 1


def test_one_group_is_begun_ahead_and_no_more():
    events = []

    def begun():
        for i in range(3):
            events.append(f"begin {i}")
            yield i

    events.extend(f"finish {i}" for i in _one_ahead(begun()))
    assert events == ["begin 0", "begin 1", "finish 0", "begin 2", "finish 1", "finish 2"]


def _stop_at_four(task, done, total):
    if done >= 4:
        raise StopIteration


def test_what_a_callback_raises_is_not_taken_for_the_end():
    with pytest.raises(StopIteration):
        batch_spectra(_ok_score, None, jnp.zeros((10, 4)), 0, batch=2, progress=_stop_at_four)
