"""What `test_sharding.py` runs in a process of its own, where XLA pretends that the CPU is eight devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem import Arnoldi, Dense, Lanczos, batch_spectra, score_jacobian, spectrum
from jaxmem.diffusion import NoiseSchedule
from jaxmem.kernels.attention import attention
from jaxmem.kernels.convolution import conv3x3
from jaxmem.oracles import Separable, SeparableScore
from jaxmem.parameters import sharded
from jaxmem.spectra import batch

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
    ("method", "shape"),
    [(Dense(), (8,)), (Lanczos(24), (8,)), (Arnoldi(24), (8,)), (Dense(), (4, 2)), (Dense(), (3,))],
)
def test_points_on_many_devices_are_points_on_one(method, shape):
    d, n = 24, 11  # eleven points fill up no group
    score, state, rng = SeparableScore(SCHEDULE), separable(d), np.random.default_rng(4)
    # Near the ridge and at middle timesteps, where eigenvalues lie apart: elsewhere many are nearly -1/sigma², and
    # rounding decides at which step a Krylov space closes.
    x, t = jnp.asarray(0.1 * rng.normal(size=(n, d)), jnp.float32), jnp.asarray(rng.integers(100, 400, n))
    # Ritz values of all d steps, which have converged, move by what rounding moves eigenvalues.
    mesh = jax.make_mesh(shape, ("a", "b")[: len(shape)], devices=jax.devices()[: int(np.prod(shape))])
    one = batch_spectra(score, state, x, t, method=method, key=KEY)
    seen = []
    many = batch_spectra(
        score, state, x, t, method=method, key=KEY, mesh=mesh, progress=lambda *a: seen.append(a[1:]), batch=2
    )
    largest = np.abs(one.eigenvalues).max(1, keepdims=True)
    np.testing.assert_array_less(np.abs(many.eigenvalues - one.eigenvalues) / largest, 1e-5)
    np.testing.assert_array_equal(many.num_products, one.num_products)
    np.testing.assert_array_equal(many.status, one.status)
    together = min(2 * mesh.size, -(-n // mesh.size) * mesh.size)
    assert seen == [(0, n)] + [(min(done, n), n) for done in range(together, n + together, together)]
    if method == Dense():
        exact = np.stack([score.spectrum(state, x[i], int(t[i])) for i in range(n)])
        np.testing.assert_array_less(np.abs(many.eigenvalues - exact) / largest, 1e-4)  # float32 products


def test_points_taken_together_by_devices_that_share_threads():
    """jaxlib's call for several matrices waits for threads that all devices share: at this size for ever."""
    matrix = np.random.default_rng(0).normal(size=(300, 300)).astype(np.float32)
    found = batch_spectra(
        lambda state, x, t, cond: state @ x, jnp.asarray(matrix), jnp.zeros((16, 300)), 0, mesh=line(), batch=2
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
        return batch._krylov_group.lower(network, state, *points, Lanczos(8), mesh).compile()

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


def _minus(state, x, t, cond):
    return -x


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: batch_spectra(_minus, None, jnp.zeros((3, 4)), 0, method=Lanczos(2), key=jax.random.split(KEY, 2)),
            r"key: expected one random key .* or 3 of them, got shape \(2,\)",
        ),
    ],
)
def test_bad_input_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_n_keys_are_one_for_each_point():
    x = jax.random.normal(KEY, (5, 6))
    options = dict(method=Lanczos(3))
    state = separable(6)
    whole = batch_spectra(SeparableScore(SCHEDULE), state, x, 50, key=KEY, mesh=line(), **options)
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(5))
    part = batch_spectra(SeparableScore(SCHEDULE), state, x[2:], 50, key=keys[2:], mesh=line(), **options)
    np.testing.assert_array_equal(part.eigenvalues, whole.eigenvalues[2:])


WIDTH = 256


def wide_network(state, x, t, cond):
    """A convolution, attention and equal layers, whose parameters take more than the features between them."""
    hidden = conv3x3(x[..., None], state["first"]).reshape(-1, WIDTH)
    q, k, v = (hidden @ state[name] for name in "qkv")
    hidden = attention(q[None], k[None], v[None], block=16)[0] + state["bias"]
    for weight in state["layers"]:
        hidden = jnp.tanh(hidden @ weight)
    return conv3x3(hidden.reshape(*x.shape, WIDTH), state["last"])[..., 0] - x


def wide_state():
    rng = np.random.default_rng(2)
    shapes = {"first": (3, 3, 1, WIDTH), "last": (3, 3, WIDTH, 1)} | {name: (WIDTH, WIDTH) for name in "qkv"}
    state = {name: rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])) for name, shape in shapes.items()}
    state |= {"bias": rng.normal(size=(1, WIDTH)), "odd": np.ones(7)}
    state["layers"] = [rng.normal(size=(WIDTH, WIDTH)) / np.sqrt(WIDTH) for _ in range(12)]
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), state)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_spread_over_devices(dtype):
    state = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), wide_state())
    x, v = jax.random.normal(KEY, (6, 6)), jax.random.normal(jax.random.key(1), (36,))
    spread = sharded(state)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    on_each = {device: 0 for device in jax.devices()}
    for leaf in jax.tree.leaves(spread):
        for shard in leaf.addressable_shards:
            on_each[shard.device] += shard.data.nbytes
    whole = state["odd"].nbytes  # seven numbers are no multiple of eight
    assert set(on_each.values()) == {(total - whole) // 8 + whole}
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), spread, state))

    one = score_jacobian(wide_network, jax.tree.map(jnp.asarray, state), x)
    many = score_jacobian(wide_network, spread, x)
    product, transposed = (jax.jit(lambda A, v, name=name: getattr(A, name)(v)) for name in ("mv", "rmv"))
    # Sums of 256 terms in another order, through 15 layers: some 1e-6 of the largest entry.
    for found, expected in (
        (many.value, one.value),
        (product(many, v), product(one, v)),
        (transposed(many, v), transposed(one, v)),
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert len(product(many, v).devices()) == 8
    eigenvalues = [np.asarray(spectrum(operator).eigenvalues) for operator in (one, many)]
    np.testing.assert_allclose(*eigenvalues, rtol=0, atol=1e-5 * np.abs(eigenvalues[0]).max())

    programs = [program.lower(many, v).compile() for program in (product, transposed)]
    exchanged = [shapes for program in programs for shapes, _ in COLLECTIVES.findall(program.as_text())]
    assert exchanged
    assert not [shapes for shapes in exchanged if f"[{WIDTH},{WIDTH}]" in shapes]  # features, and no parameters
    needed = [program.memory_analysis() for program in programs]
    # Arguments and scratch of one device: its share of the parameters, and of their wide copies, beside the features.
    wide = sum(4 * leaf.size for leaf in jax.tree.leaves(state))
    assert all(n.argument_size_in_bytes + n.temp_size_in_bytes < wide / 2 for n in needed)


def test_parameters_on_some_devices():
    spread = sharded({"even": np.zeros((4, 6)), "odd": np.zeros((3, 5)), "number": np.float32(1)}, jax.devices()[:2])
    assert [leaf.sharding.spec for leaf in (spread["even"], spread["odd"])] == [
        jax.P(None, "parameters"),
        jax.P(None, None),
    ]
    assert all(leaf.devices() == set(jax.devices()[:2]) for leaf in jax.tree.leaves(spread))
