"""What `test_sharding.py` runs in a process of its own, where XLA pretends that the CPU is eight devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem import batch_spectra, score_jacobian, spectrum
from jaxmem.diffusion import NoiseSchedule
from jaxmem.kernels.attention import attention
from jaxmem.kernels.convolution import conv3x3
from jaxmem.operators import MatrixOperator
from jaxmem.oracles import Separable, SeparableScore
from jaxmem.spectra import batch, sharding, single

SCHEDULE = NoiseSchedule()
KEY = jax.random.key(0)
COLLECTIVES = re.compile(r"= (.*) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)[\w-]*\(")


def line():
    return jax.make_mesh((8,), ("points",))


def separable(d):
    """A state of distinct eigenvalues of both signs: no Krylov space closes early."""
    return Separable(jnp.linspace(0.2, 2, d), jnp.where(jnp.arange(d) % 3 == 0, -1.0, 1.0))


def network(state, x, t, cond):
    """A score with our primitives: attention folds points into heads, which it loops over."""
    hidden = conv3x3(x[..., None], state["first"]).reshape(-1, 8)
    q, k, v = (hidden @ state[name] for name in "qkv")
    mixed = attention(q[None], k[None], v[None], block=16)[0]
    return conv3x3(jnp.tanh(mixed + cond).reshape(*x.shape, 8), state["last"])[..., 0] - x


def network_state():
    rng = np.random.default_rng(1)
    shapes = {"first": (3, 3, 1, 8), "q": (8, 8), "k": (8, 8), "v": (8, 8), "last": (3, 3, 8, 1)}
    return {name: jnp.asarray(rng.normal(size=shape) / 3, jnp.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("method", "shape"), [("eigh", (8,)), ("lanczos", (8,)), ("arnoldi", (8,)), ("eigh", (4, 2)), ("eigh", (3,))]
)
def test_points_on_many_devices_are_points_on_one(method, shape):
    d, n = 24, 11  # eleven points fill up no group
    score, state, rng = SeparableScore(SCHEDULE), separable(d), np.random.default_rng(4)
    # Near the ridge and at middle timesteps, where eigenvalues lie apart: elsewhere many are nearly -1/sigma², and
    # rounding decides at which step a Krylov space closes.
    x, t = jnp.asarray(0.1 * rng.normal(size=(n, d)), jnp.float32), jnp.asarray(rng.integers(100, 400, n))
    # All d steps: Ritz values that have converged move by what rounding moves eigenvalues.
    options = {} if method == "eigh" else dict(num_steps=d, key=KEY)
    mesh = jax.make_mesh(shape, ("a", "b")[: len(shape)], devices=jax.devices()[: int(np.prod(shape))])
    one = batch_spectra(score, state, x, t, method=method, **options)
    seen = []
    many = batch_spectra(
        score, state, x, t, method=method, mesh=mesh, on_points=lambda *a: seen.append(a), points=2, **options
    )
    largest = np.abs(one.eigenvalues).max(1, keepdims=True)
    np.testing.assert_array_less(np.abs(many.eigenvalues - one.eigenvalues) / largest, 1e-5)
    np.testing.assert_array_equal(many.num_products, one.num_products)
    np.testing.assert_array_equal(many.status, one.status)
    together = min(2 * mesh.size, -(-n // mesh.size) * mesh.size)
    assert seen == [(min(done, n), n) for done in range(together, n + together, together)]
    if method == "eigh":
        exact = np.stack([score.spectrum(state, x[i], int(t[i])) for i in range(n)])
        np.testing.assert_array_less(np.abs(many.eigenvalues - exact) / largest, 1e-4)  # float32 products


def test_points_taken_together_by_devices_that_share_threads():
    """jaxlib's call for several matrices waits for threads that all devices share: at this size for ever."""
    matrix = np.random.default_rng(0).normal(size=(300, 300)).astype(np.float32)
    found = batch_spectra(
        lambda state, x, t, cond: state @ x, jnp.asarray(matrix), jnp.zeros((16, 300)), 0, mesh=line(), points=2
    )
    exact = np.linalg.eigvalsh((matrix + matrix.T).astype(np.float64) / 2)[::-1]
    atol = 2 * 300**0.5 * np.finfo(np.float32).eps * np.abs(exact).max()  # roundings of the solver, and of products
    np.testing.assert_allclose(found.eigenvalues, np.tile(exact, (16, 1)), rtol=0, atol=atol)


@pytest.mark.parametrize("method", ["dense", "krylov"])
def test_each_device_holds_and_does_its_share_alone(method):
    state, mesh, n = network_state(), line(), 8
    x = jax.random.normal(KEY, (n, 8, 8))
    t, cond = jnp.zeros(n, int), jnp.linspace(-1, 1, n)

    def program(count, mesh):
        points = (x[:count], t[:count], cond[:count], jax.random.split(KEY, count))
        if mesh is not None:
            points = jax.device_put(points, jax.NamedSharding(mesh, jax.P("points")))
        if method == "dense":
            return batch._dense_group.lower(network, state, *points[:3], 8, mesh).compile()
        return batch._krylov_group.lower(network, state, *points, 8, True, mesh).compile()

    alone, together, shared = program(1, None), program(8, None), program(8, mesh)
    assert not COLLECTIVES.findall(shared.as_text())
    scratch = [p.memory_analysis().temp_size_in_bytes for p in (alone, together, shared)]
    results = [p.memory_analysis().output_size_in_bytes for p in (alone, together, shared)]
    print(f"{method}: scratch of 1 point, 8 points, 8 points on 8 devices: {scratch}; results {results}")
    # What one device holds for its one of eight points is what it would hold for one: XLA may fuse a little otherwise.
    assert scratch[2] < 1.2 * scratch[0] < 0.4 * scratch[1]
    assert results[2] < 1.2 * results[0]


def test_spectra_of_a_network_with_our_primitives():
    state, n = network_state(), 9
    x, cond = jax.random.normal(KEY, (n, 8, 8)), jnp.linspace(-1, 1, n)
    one = batch_spectra(network, state, x, 0, cond)
    many = batch_spectra(network, state, x, 0, cond, mesh=line())
    np.testing.assert_array_less(np.abs(many.eigenvalues - one.eigenvalues), 1e-5 * np.abs(one.eigenvalues).max())
    np.testing.assert_allclose(many.asymmetry, one.asymmetry, rtol=1e-4)  # a difference of nearly equal matrices


@pytest.mark.parametrize("shape", [(8,), (4, 2)])
def test_columns_of_one_point(shape):
    mesh = jax.make_mesh(shape, ("a", "b")[: len(shape)])
    operator = score_jacobian(network, network_state(), jax.random.normal(KEY, (8, 8)), 0, jnp.float32(0.3))
    dense = operator.to_dense()
    columns = sharding.sharded_columns(operator, mesh, chunk=3)
    assert {shard.data.shape for shard in columns.addressable_shards} == {(64, 8)}
    np.testing.assert_allclose(columns, dense, atol=1e-6)  # roundings of entries of order 1

    exact = np.linalg.eigvalsh((np.asarray(dense, np.float64) + np.asarray(dense.T, np.float64)) / 2)[::-1]
    found = spectrum(MatrixOperator(columns), "lanczos", num_steps=64, key=KEY, tolerance=0.0)
    np.testing.assert_allclose(found.eigenvalues, exact, atol=1e-5 * np.abs(exact).max())


def test_columns_are_never_together():
    d, state = 256, network_state()
    operator = score_jacobian(network, state, jax.random.normal(KEY, (16, 16)), 0, jnp.float32(0.3))
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("columns",))
    program = sharding._columns.lower(operator, mesh, 4).compile()
    assert not COLLECTIVES.findall(program.as_text())
    assert program.memory_analysis().output_size_in_bytes == d * d * 4 // 8
    chunk = jax.jit(jax.vmap(operator.mv)).lower(jnp.zeros((4, d))).compile().memory_analysis()
    # Its share twice over (columns are computed as rows), and a chunk.
    limit = 2 * d * d * 4 // 8 + 1.2 * (chunk.temp_size_in_bytes + chunk.output_size_in_bytes)
    print(f"columns: scratch {program.memory_analysis().temp_size_in_bytes}, limit {limit}, matrix {d * d * 4}")
    assert program.memory_analysis().temp_size_in_bytes < limit

    # Products with the matrix exchange vectors and Krylov's small matrices, at most its basis; not the matrix.
    columns = sharding.sharded_columns(operator, mesh)
    krylov = single.run_krylov.lower(MatrixOperator(columns), jnp.ones(d), 8, symmetric=True).compile()
    exchanged = COLLECTIVES.findall(krylov.as_text())
    sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for text, _ in exchanged
             for shape in re.findall(r"\[([\d,]*)\]", text)]  # fmt: skip
    print(f"products exchange arrays of {sorted(set(sizes))} numbers")
    assert sizes
    assert max(sizes) <= 9 * d < d * d // 8


def _minus(state, x, t, cond):
    return -x


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: sharding.sharded_columns(MatrixOperator(jnp.eye(12)), line()),
            r"divides the operator's size 12, got 8",
        ),
        (lambda: sharding.sharded_columns(MatrixOperator(jnp.eye(8)), line(), chunk=0), r"chunk: expected at least 1"),
        (
            lambda: batch_spectra(
                _minus, None, jnp.zeros((3, 4)), 0, method="lanczos", num_steps=2, key=jax.random.split(KEY, 2)
            ),
            r"key: expected one random key .* or 3 of them, got shape \(2,\)",
        ),
    ],
)
def test_bad_input_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_n_keys_are_one_for_each_point():
    x = jax.random.normal(KEY, (5, 6))
    options = dict(method="lanczos", num_steps=3)
    state = separable(6)
    whole = batch_spectra(SeparableScore(SCHEDULE), state, x, 50, key=KEY, mesh=line(), **options)
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(5))
    part = batch_spectra(SeparableScore(SCHEDULE), state, x[2:], 50, key=keys[2:], mesh=line(), **options)
    np.testing.assert_array_equal(part.eigenvalues, whole.eigenvalues[2:])
