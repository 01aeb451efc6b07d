import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.krylov import Status, arnoldi, begin, extend, lanczos, orthogonalise

# What two Gram-Schmidt passes leave: a few eps per entry, sums over d entries in the checks below.
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def random_matrix(d, dtype, *, symmetric, seed=0):
    matrix = np.random.default_rng(seed).normal(size=(d, d))
    return jnp.asarray(matrix + matrix.T if symmetric else matrix, dtype)


@pytest.mark.parametrize(("run", "symmetric"), [(arnoldi, False), (lanczos, True)])
@pytest.mark.parametrize("steps", [1, 7, 30])
def test_defining_identities(run, symmetric, steps, dtype):
    d = 40
    matrix = random_matrix(d, dtype, symmetric=symmetric)
    start = jnp.asarray(np.random.default_rng(1).normal(size=d), dtype)
    f = jax.jit(lambda start: run(lambda v: matrix @ v, start, steps))(start)
    basis, hessenberg = np.asarray(f.basis), np.asarray(f.hessenberg)
    tolerance = TOLERANCE[dtype] * float(jnp.linalg.norm(matrix, 2))
    np.testing.assert_allclose(basis @ basis.T, np.eye(steps + 1), atol=TOLERANCE[dtype])
    np.testing.assert_allclose(basis[0], start / np.linalg.norm(start), atol=TOLERANCE[dtype])
    # A Q_mᵀ = Q_{m+1}ᵀ H
    np.testing.assert_allclose(np.asarray(matrix) @ basis[:steps].T, basis.T @ hessenberg, atol=tolerance)
    np.testing.assert_array_equal(np.tril(hessenberg, -2), 0)
    if symmetric:
        np.testing.assert_array_equal(np.triu(hessenberg, 2), 0)
    assert f.num_steps == steps
    assert f.status == Status.BUDGET
    assert f.scale <= np.linalg.norm(matrix, 2) * (1 + TOLERANCE[dtype])


def test_float32_lanczos_has_no_ghosts():
    # One isolated large eigenvalue converges first; without reorthogonalisation rounding brings copies of it.
    d, steps = 300, 120
    values = np.concatenate([[1000.0], np.linspace(0, 1, d - 1)])
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(d, d)))[0]
    matrix = jnp.asarray((rotation * values) @ rotation.T, jnp.float32)
    f = lanczos(lambda v: matrix @ v, jnp.ones(d), steps)
    small = np.asarray(f.hessenberg[:steps, :steps], np.float64)
    assert (np.linalg.eigvalsh((small + small.T) / 2) > 500).sum() == 1


@pytest.mark.parametrize("run", [arnoldi, lanczos])
def test_rank_five_ends_invariant_also_beside_full_rank(run):
    d, steps = 16_384, 20
    rng = np.random.default_rng(2)
    low = jnp.asarray(np.linalg.qr(rng.normal(size=(d, 5)))[0] * np.sqrt([900.0, 30.0, 5.0, 1.0, 0.3]), jnp.float32)
    diagonal = jnp.asarray(rng.normal(size=d), jnp.float32)
    start = jax.random.normal(jax.random.key(0), (d,))

    def factorize(full, low, diagonal, start):
        return run(lambda v: jnp.where(full, diagonal * v, low @ (low.T @ v)), start, steps)

    alone = jax.jit(factorize)(False, low, diagonal, start)
    both = jax.jit(jax.vmap(factorize, (0, None, None, None)))(jnp.array([False, True]), low, diagonal, start)
    one, other = (jax.tree.map(lambda leaf, i=i: leaf[i], both) for i in (0, 1))
    for f in (alone, one):
        # The space of a rank-5 matrix and a general start vector has dimension 6.
        assert f.status == Status.INVARIANT
        assert f.num_steps == 6
        small = np.asarray(f.hessenberg[:6, :6], np.float64)
        found = np.sort(np.linalg.eigvals(small).real)[::-1]
        # 1e-5 of the norm, 900: float32 products over 16,384 entries.
        np.testing.assert_allclose(found, [900, 30, 5, 1, 0.3, 0], atol=9e-3)
        np.testing.assert_array_equal(np.asarray(f.basis[6:]), 0)
    assert other.status == Status.BUDGET
    assert other.num_steps == steps
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(both))


def test_full_space_is_invariant():
    matrix = random_matrix(12, "float32", symmetric=True)
    f = lanczos(lambda v: matrix @ v, jnp.ones(12), 12)
    exact = np.linalg.eigvalsh(np.asarray(matrix, np.float64))
    small = np.asarray(f.hessenberg[:12], np.float64)
    np.testing.assert_allclose(np.linalg.eigvalsh((small + small.T) / 2), exact, atol=1e-5 * np.abs(exact).max())


def test_an_eigenvector_start_stops_after_one_step(dtype):
    f = arnoldi(lambda v: jnp.arange(1.0, 9.0, dtype=dtype) * v, jnp.zeros(8, dtype).at[3].set(5), 6)
    assert f.num_steps == 1
    assert f.status == Status.INVARIANT
    assert f.hessenberg[0, 0] == 4


def test_zero_operator_is_invariant():
    f = lanczos(lambda v: 0 * v, jnp.ones(8), 5)
    assert f.status == Status.INVARIANT
    assert f.num_steps == 1


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_nonfinite_products_stop_without_spreading(bad):
    # The third product is bad: the two steps before it stay.
    matrix = random_matrix(10, "float32", symmetric=False)

    def mv(v):
        return jnp.where(jnp.abs(v @ third) > 0.5, bad, 1.0) * (matrix @ v)

    third = arnoldi(lambda v: matrix @ v, jnp.ones(10), 3).basis[2]
    f = arnoldi(mv, jnp.ones(10), 6)
    assert f.status == Status.NONFINITE
    assert f.num_steps == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(f))


@pytest.mark.parametrize("start", [jnp.zeros(6), jnp.full(6, jnp.nan)])
def test_unusable_start_is_a_status(start):
    f = arnoldi(lambda v: v, start, 3)
    assert f.status == Status.NONFINITE
    assert f.num_steps == 0


@pytest.mark.parametrize("length", [1e-30, 1e30])
def test_start_vectors_of_any_length(length):
    matrix = random_matrix(10, "float32", symmetric=True)
    reference = lanczos(lambda v: matrix @ v, jnp.ones(10), 4)
    f = lanczos(lambda v: matrix @ v, jnp.full(10, length), 4)
    np.testing.assert_allclose(f.hessenberg, reference.hessenberg, rtol=1e-4, atol=1e-4)


def test_segments_equal_one_run():
    # A traced number of steps: one program serves every segment.
    matrix = random_matrix(30, "float32", symmetric=True)

    @jax.jit
    def go_on(f, n):
        return extend(lambda v: matrix @ v, f, n, symmetric=True)

    whole = go_on(begin(jnp.ones(30), 12), 12)
    parts = begin(jnp.ones(30), 12)
    for n in (5, 4, 3, 2):  # the last finds no room and does nothing
        parts = go_on(parts, n)
    assert go_on._cache_size() == 1
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("last", [0, 1, 31, 32, 68])
@pytest.mark.parametrize("inside", [0.0, 1.0, 1e6])
def test_orthogonalise_against_qr(last, inside):
    # 70 rows of 16,384 float32 numbers are three blocks, the last overlapping the second.
    d, rng = 16_384, np.random.default_rng(last)
    basis = np.zeros((70, d), np.float32)
    basis[: last + 1] = np.linalg.qr(rng.normal(size=(d, last + 1)))[0].T
    vector = (rng.normal(size=d) + inside * 100 * rng.normal(size=last + 1) @ basis[: last + 1]).astype(np.float32)
    column, length, direction = map(np.asarray, jax.jit(orthogonalise)(basis, last, vector))
    exact, upper = np.linalg.qr(np.vstack([basis[: last + 1], vector]).T.astype(np.float64))
    # eps of the vector's own length (each number is rounded so): that much of the rest is noise where `inside` is 1e6.
    lost = 2e-6 * np.linalg.norm(vector) / abs(upper[-1, -1])
    assert np.abs(basis @ direction).max() < 1e-6
    np.testing.assert_allclose(np.linalg.norm(direction), 1, atol=1e-6)
    np.testing.assert_allclose(length, abs(upper[-1, -1]), rtol=lost + 1e-5)
    assert abs(exact[:, -1] @ direction) > 1 - min(lost, 0.9)
    np.testing.assert_allclose(column[: last + 1], basis[: last + 1].astype(np.float64) @ vector, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(column[last + 1 :], 0)


def test_one_orthogonalisation_under_vmap_is_the_same():
    # Batched, the blocks that a single one skips are multiplied, and each goes on until the last has finished.
    d, rng = 16_384, np.random.default_rng(0)
    basis = np.zeros((2, 70, d), np.float32)
    basis[0, :3] = np.linalg.qr(rng.normal(size=(d, 3)))[0].T
    basis[1, :60] = np.linalg.qr(rng.normal(size=(d, 60)))[0].T
    vectors = rng.normal(size=(2, d)).astype(np.float32)
    vectors[1] += 1e4 * basis[1, 40]
    together = jax.jit(jax.vmap(orthogonalise))(basis, np.array([2, 59]), vectors)
    for i, last in enumerate((2, 59)):
        alone = jax.jit(orthogonalise)(basis[i], last, vectors[i])
        # float32 of a vector of length 1e4, of which 128 remain.
        for one, other, atol in zip(alone, together, (1e-2, 1e-2, 1e-5), strict=True):
            np.testing.assert_allclose(other[i], one, rtol=1e-5, atol=atol)
