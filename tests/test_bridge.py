"""Torch modules in JAX, and in torch as operators, against torch in float64."""

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
if find_spec("torchax") is None:  # the package imports it, after what that needs
    pytest.skip("torchax is not installed", allow_module_level=True)

import jaxmem as jm  # noqa: E402
from jaxmem.bridge.score import from_torch  # noqa: E402
from jaxmem.bridge.skeleton import Skeleton  # noqa: E402

nn, functional = torch.nn, torch.nn.functional
SHAPE, T = (3, 8, 8), 500


class Network(nn.Module):
    """What users write: norms, attention, resizing, einsum, buffers, a tensor that is no buffer, classes."""

    def __init__(self, width=16, groups=4):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.GroupNorm(groups, width)
        self.layer_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(width, width, 5, padding="same", groups=4)
        self.up = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)
        self.last = nn.Conv2d(width, 3, 1)
        self.classes = nn.Embedding(10, width)
        self.time = nn.Linear(16, width)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, -6, 8)))
        self.plain = torch.linspace(-1, 1, width)

    def forward(self, x, t, cond=None):
        angles = t[:, None].to(x.dtype) * self.frequencies
        embedded = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        if cond is not None:
            embedded = embedded + self.classes(cond)
        h = self.first(x) + embedded[:, :, None, None] + self.plain.to(x.dtype)[None, :, None, None]
        h = self.dropout(functional.silu(self.norm(h)))
        d = self.grouped(self.down(h))
        batch, width, rows, columns = d.shape
        tokens = self.layer_norm(d.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(tokens).chunk(3, -1)
        a = functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        a = torch.einsum("bnc,cd->bnd", a, torch.eye(width, dtype=x.dtype))
        d = a.transpose(1, 2).reshape(batch, width, rows, columns) + torch.arange(columns).to(x.dtype) / columns
        h = h + functional.interpolate(d, scale_factor=2, mode="nearest") + self.up(d)
        return self.last(h)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Network().eval()


@pytest.fixture(scope="module")
def point():
    return np.array(jax.random.normal(jax.random.key(0), SHAPE))


def _hessian(network, x, t=T, cond=3):
    """The score of an eps-network and its Jacobian, by torch's reverse mode in float64."""
    network, sigma = copy.deepcopy(network).double(), float(jm.NoiseSchedule().sigma[t])

    def score(x):
        return -network(x[None], torch.tensor([t]), torch.tensor([cond]))[0] / sigma

    x = torch.tensor(x).double()
    return score(x).detach().numpy(), torch.autograd.functional.jacobian(score, x).reshape(x.numel(), -1).numpy()


def test_from_torch_is_the_module(network, point):
    score, state = from_torch(network, jm.NoiseSchedule(), "eps")
    assert set(state) == {*network.state_dict(), "plain"}
    value, hessian = _hessian(network, point)
    operator = jm.score_jacobian(score, state, point, T, jnp.int32(3))
    # float32 rounds sums of a few hundred terms: some 1e-6 of the largest entry
    np.testing.assert_allclose(operator.value, value, rtol=0, atol=1e-5 * np.abs(value).max())
    np.testing.assert_allclose(operator.to_dense(), hessian, rtol=0, atol=1e-5 * np.abs(hessian).max())
    v = np.random.default_rng(0).standard_normal(point.size)
    np.testing.assert_allclose(operator.T @ v, hessian.T @ v, rtol=0, atol=1e-5 * np.abs(hessian.T @ v).max())
    expected = np.linalg.eigvalsh((hessian + hessian.T) / 2)
    np.testing.assert_allclose(
        np.sort(jm.spectrum(operator).eigenvalues), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


def test_points_in_a_batch(network):
    """`jax.vmap` over points, timesteps and classes, under `jax.jit`."""
    score, state = from_torch(network, jm.NoiseSchedule(), "eps", x=jax.ShapeDtypeStruct(SHAPE, jnp.float32))
    x, t, cond = np.random.default_rng(0).standard_normal((4, *SHAPE), np.float32), np.arange(4) * 200 + 9, np.arange(4)
    found = jax.jit(jax.vmap(score, (None, 0, 0, 0)))(state, x, t.astype(np.int32), cond.astype(np.int32))
    with torch.no_grad():
        output = network(torch.tensor(x), torch.tensor(t), torch.tensor(cond)).numpy()
    expected = -output / jm.NoiseSchedule().sigma[t][:, None, None, None]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_double_precision(network, point):
    with jax.enable_x64(True):
        score, state = from_torch(network, jm.NoiseSchedule(), "eps")
        assert all(array.dtype == jnp.float64 for array in state.values())
        found = np.asarray(score(state, jnp.asarray(point, jnp.float64), T, jnp.int32(3)))
    expected, _ = _hessian(network, point)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_half_precision_is_computed_in_single(network, point):
    half = copy.deepcopy(network).to(torch.bfloat16)
    score, state = from_torch(half, jm.NoiseSchedule(), "eps")
    found = score(state, jnp.asarray(point), T, jnp.int32(3))
    expected, _ = _hessian(half, point)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_equal_modules_share_a_program(network):
    one, other = (from_torch(module, jm.NoiseSchedule(), "eps")[0] for module in (network, Network()))
    assert one == other
    assert hash(one) == hash(other)
    different = [
        from_torch(Network(groups=8), jm.NoiseSchedule(), "eps")[0],
        from_torch(Network(width=32), jm.NoiseSchedule(), "eps")[0],
        from_torch(network, jm.NoiseSchedule("cosine"), "eps")[0],
        from_torch(network, jm.NoiseSchedule(), "v")[0],
        from_torch(network, jm.NoiseSchedule(), "eps", call=_call_otherwise)[0],
    ]
    assert all(score != one for score in different)
    changed = Network()
    changed.dropout = nn.Dropout(0.25)
    assert from_torch(changed, jm.NoiseSchedule(), "eps")[0] != one


def test_a_class_that_is_defined_again_is_another():
    """As in a notebook: the name is the same, and what it computes is not."""

    def define(factor):
        class Scaled(nn.Module):
            def forward(self, x, t):
                return factor * x

        Scaled.__qualname__ = "Scaled"
        return Scaled()

    x = jnp.ones(SHAPE)
    for factor in (2.0, 3.0):
        score, state = from_torch(define(factor), jm.NoiseSchedule(), "score")
        assert np.allclose(jax.jit(score)(state, x, T, None), factor)
        assert np.allclose(jm.score_jacobian(score, state, x, T).value, factor)


@pytest.mark.parametrize("attribute", [lambda x: 2 * x, functional.silu])
def test_functions_among_the_attributes_are_compared(attribute):
    class Activated(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.act = act

        def forward(self, x, t):
            return self.act(x)

    one, same, other = (from_torch(Activated(act), jm.NoiseSchedule(), "eps")[0] for act in (attribute,) * 2 + (abs,))
    assert one == same
    assert one != other


def _call_otherwise(module, x, t, cond):
    return module(x, t, cond)


def test_changes_afterwards_do_not_reach_the_score(point):
    torch.manual_seed(0)
    network = Network().eval()
    score, state = from_torch(network, jm.NoiseSchedule(), "eps", x=point, cond=np.int32(3))
    before = np.asarray(score(state, jnp.asarray(point), T, jnp.int32(3)))
    network.forward = lambda *_: torch.zeros(1)
    with torch.no_grad():
        network.first.weight.zero_()
    assert np.array_equal(score(state, jnp.asarray(point), T, jnp.int32(3)), before)


def test_the_module_is_left_as_it_was(point):
    network = Network().train()
    parameters = {name: (id(one), one.requires_grad) for name, one in network.named_parameters()}
    from_torch(network, jm.NoiseSchedule(), "eps", x=point, cond=np.int32(3))
    jm.TorchOperator(network, point, T, np.int64(3))
    assert network.training
    assert {name: (id(one), one.requires_grad) for name, one in network.named_parameters()} == parameters
    assert isinstance(vars(network)["plain"], torch.Tensor)


def test_a_call_of_ones_own(network, point):
    @dataclasses.dataclass(frozen=True)
    class Doubled:
        factor: float

        def __call__(self, module, x, t, cond):
            return self.factor * module(x, t, cond["class"])

    score, state = from_torch(network, jm.NoiseSchedule(), "eps", call=Doubled(2.0))
    found = score(state, jnp.asarray(point), T, {"class": jnp.int32(3)})
    expected, _ = _hessian(network, point)
    np.testing.assert_allclose(found, 2 * expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_a_module_of_one_example():
    """One that takes no batch is called with the example itself."""

    class Vector(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 5)

        def forward(self, x, t):
            return torch.tanh(self.layer(torch.cat([x, t.float()[None] / 1000])))

    module, x = Vector(), np.linspace(-1, 1, 5, dtype=np.float32)
    score, state = from_torch(module, jm.NoiseSchedule(), "score")
    with torch.no_grad():
        expected = module(torch.tensor(x), torch.tensor(T)).numpy()
    np.testing.assert_allclose(score(state, jnp.asarray(x), T, None), expected, atol=1e-6)
    np.testing.assert_allclose(jm.TorchOperator(module, x, T).value.reshape(-1), expected, atol=1e-6)


class Random(nn.Module):
    def forward(self, x, t):
        return x + torch.randn_like(x)


class Noisy(nn.Module):
    """Random by an amount that a comparison with itself does not see."""

    def forward(self, x, t):
        return x + 1e-6 * torch.randn_like(x)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, t):
        self.calls += 1
        return x + 0 * self.calls


class Branching(nn.Module):
    def forward(self, x, t):
        return x if x.sum() > 0 else 2 * x


class Remembering(nn.Module):
    """Another output at each call."""

    calls = 0

    def forward(self, x, t):
        self.calls += 1
        return self.calls * x


class Flat(nn.Module):
    def forward(self, x, t):
        return x.flatten()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Random(), "same finite output for the same input"),
        (Noisy(), "draws random numbers"),
        (Counting(), "changes its own calls"),
        (Branching(), "does not depend on values"),
        (Remembering(), "another output at the second call"),
        (Flat(), "expected an output like x"),
    ],
)
def test_what_cannot_be_a_score_is_refused(module, message):
    with pytest.raises(ValueError, match=message):
        from_torch(module, jm.NoiseSchedule(), "eps", x=np.zeros(SHAPE, np.float32))


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_refused(network):
    with pytest.raises(ValueError, match=r"module: expected a torch\.nn\.Module, got str"):
        from_torch("unet", jm.NoiseSchedule(), "eps")
    with pytest.raises(ValueError, match="prediction: expected one of"):
        from_torch(network, jm.NoiseSchedule(), "epsilon")
    with pytest.raises(ValueError, match=r"parameters: expected None or jnp\.bfloat16"):
        from_torch(network, jm.NoiseSchedule(), "eps", parameters=jnp.float16)
    with pytest.raises(ValueError, match="schedule: expected the noise schedule"):
        jm.TorchOperator(network, np.zeros(SHAPE, np.float32), T, prediction="eps")


def test_a_bridge_that_is_wrong_is_noticed(network, point, monkeypatch):
    """Both numbers are told: of the output, and of the derivative where the output alone is right."""
    monkeypatch.setattr(Skeleton, "run", _dropping_a_buffer(Skeleton.run))
    with pytest.raises(ValueError, match=r"an output that differs by .* and a derivative that differs by"):
        from_torch(network, jm.NoiseSchedule(), "eps", x=point, cond=np.int32(3))
    monkeypatch.undo()
    monkeypatch.setattr(Skeleton, "run", _without_derivative(Skeleton.run))
    with pytest.raises(ValueError, match="derivative that differs by"):
        from_torch(network, jm.NoiseSchedule(), "eps", x=point, cond=np.int32(3))


def _dropping_a_buffer(run):
    def wrong(self, call, batched, state, x, t, cond):
        return run(self, call, batched, state | {"plain": 0 * state["plain"]}, x, t, cond)

    return wrong


def _without_derivative(run):
    def wrong(self, call, batched, state, x, t, cond):
        return run(self, call, batched, state, jax.lax.stop_gradient(x), t, cond)

    return wrong


@pytest.mark.parametrize("forward_mode", [True, False])
def test_operator_in_torch(network, point, forward_mode, monkeypatch):
    if not forward_mode:

        def missing(*_):
            raise NotImplementedError("no forward mode")

        monkeypatch.setattr(torch.func, "jvp", missing)
    operator = jm.TorchOperator(network, point, T, np.int64(3), schedule=jm.NoiseSchedule(), prediction="eps")
    assert operator.forward_mode is forward_mode
    value, hessian = _hessian(network, point)
    np.testing.assert_allclose(operator.value.reshape(SHAPE), value, rtol=0, atol=1e-5 * np.abs(value).max())
    v = np.random.default_rng(0).standard_normal(point.size)
    for found, expected in ((operator @ v, hessian @ v), (operator.T @ v, hessian.T @ v)):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_operator_in_torch_in_every_driven_method(network, point, tmp_path):
    operator = jm.TorchOperator(network, point, T, np.int64(3), schedule=jm.NoiseSchedule(), prediction="eps")
    _, hessian = _hessian(network, point)
    expected = np.linalg.eigvalsh((hessian + hessian.T) / 2)
    scale = np.abs(expected).max()
    key = jax.random.key(0)
    dense = jm.spectrum(operator, jm.Dense(folder=tmp_path / "dense"))
    np.testing.assert_allclose(np.sort(dense.eigenvalues), expected, rtol=0, atol=1e-5 * scale)
    largest = jm.spectrum(
        operator, jm.Extreme(2, "largest", max_products=400, rtol=1e-4), key=key, folder=tmp_path / "extreme"
    )
    np.testing.assert_allclose(np.sort(largest.eigenvalues), expected[-2:], rtol=0, atol=1e-3 * scale)
    ritz = jm.spectrum(operator, jm.Lanczos(30), key=key, folder=tmp_path / "lanczos").eigenvalues
    assert expected[0] - 1e-4 * scale <= np.min(ritz) <= np.max(ritz) <= expected[-1] + 1e-4 * scale
    assert jm.count_positive(operator, max_products=point.size + 1, key=key).estimate == (expected > 0).sum()


def _with_rounded_parameters(network):
    rounded = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in rounded.parameters():  # the buffers keep their digits
            parameter.copy_(parameter.to(torch.bfloat16).float())
    return rounded


def test_parameters_in_bfloat16_are_computed_with_in_single(network, point):
    score, state = from_torch(network, jm.NoiseSchedule(), "eps", x=point, cond=np.int32(3), parameters=jnp.bfloat16)
    parameters = {name for name, _ in network.named_parameters()}
    assert {name for name, array in state.items() if array.dtype == jnp.bfloat16} == parameters
    value, hessian = _hessian(_with_rounded_parameters(network), point)
    unrounded, _ = _hessian(network, point)
    size = np.abs(value).max()
    assert np.abs(value - unrounded).max() > 1e-3 * size  # another model
    operator = jm.score_jacobian(score, state, point, T, jnp.int32(3))
    # as in float32 above: nothing is computed in bfloat16
    for found in (operator.value, score(state, jnp.asarray(point), T, jnp.int32(3))):
        np.testing.assert_allclose(found, value, rtol=0, atol=1e-5 * size)
    np.testing.assert_allclose(operator.to_dense(), hessian, rtol=0, atol=1e-5 * np.abs(hessian).max())
    v = np.random.default_rng(0).standard_normal(point.size)
    np.testing.assert_allclose(operator.T @ v, hessian.T @ v, rtol=0, atol=1e-5 * np.abs(hessian.T @ v).max())


def test_a_linearisation_keeps_no_wide_copy_of_parameters(network, point):
    score, state = from_torch(network, jm.NoiseSchedule(), "eps", parameters=jnp.bfloat16)
    operator = jm.score_jacobian(score, state, point, T, jnp.int32(3))
    kept = {tuple(sorted(array.shape)) for array in operator._residuals}
    weights = {name: array for name, array in state.items() if name.endswith("weight") and array.ndim > 1}
    # Kernels of convolutions are turned anew in each product. That of the transposed convolution is kept, as torchax
    # flips it in a function of its own; and 16×16 is the shape of attention's weights, too.
    assert {name for name, array in weights.items() if tuple(sorted(array.shape)) in kept} == {
        "up.weight",
        "time.weight",
    }


def test_the_modules_own_parameters_are_not_rounded(point):
    network = Network().eval()
    before = copy.deepcopy(network.state_dict())
    from_torch(network, jm.NoiseSchedule(), "eps", x=point, cond=np.int32(3), parameters=jnp.bfloat16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_wrong_bridge_of_rounded_parameters_is_noticed(network, point, monkeypatch):
    monkeypatch.setattr(Skeleton, "run", _dropping_a_buffer(Skeleton.run))
    with pytest.raises(ValueError, match="an output that differs by"):
        from_torch(network, jm.NoiseSchedule(), "eps", x=point, cond=np.int32(3), parameters=jnp.bfloat16)


class Tied(nn.Module):
    """The third layer has the tensors of one of the other two."""

    def __init__(self, first):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.c.weight, self.c.bias = (self.a if first else self.b).weight, (self.a if first else self.b).bias

    def forward(self, x, t):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Listed(nn.Module):
    """A number of torch that is in no state."""

    def __init__(self, factor):
        super().__init__()
        self.factors = [torch.tensor(factor)]

    def forward(self, x, t):
        return self.factors[0] * x


class OfClass(nn.Module):
    factor = 2.0

    def forward(self, x, t):
        return self.factor * x


def _different_of_class(factor):
    OfClass.factor = factor
    return OfClass()


@pytest.mark.parametrize(
    ("make", "values"), [(Tied, (True, False)), (Listed, (2.0, 3.0)), (_different_of_class, (2.0, 3.0))]
)
def test_modules_that_compute_other_things_are_not_equal(make, values):
    """Each through one compiled function: a program of the first for the second would give its numbers."""
    x = jnp.linspace(-1.0, 1.0, 8)
    for value in values:
        module = make(value)
        score, state = from_torch(module, jm.NoiseSchedule(), "score")
        with torch.no_grad():
            expected = module(torch.tensor(np.array(x)), torch.tensor(T)).numpy()
        np.testing.assert_allclose(jm.score_jacobian(score, state, x, T).value, expected, atol=1e-6)


def test_settings_are_part_of_what_a_run_knows():
    def closure(factor):
        def call(module, x, t, cond):
            return factor * module(x, t)

        return call

    shown = [repr(from_torch(nn.Dropout(p), jm.NoiseSchedule(), "eps")[0]) for p in (0.25, 0.5)]
    shown += [repr(from_torch(OfClass(), jm.NoiseSchedule(), "eps", call=closure(k))[0]) for k in (2, 3)]
    assert len(set(shown)) == 4


def test_two_threads():
    """Two states of one score, at once."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    score, state = from_torch(module, jm.NoiseSchedule(), "score", call=_alone, x=np.zeros(4, np.float32))
    other, x = jax.tree.map(lambda leaf: 2 * leaf, state), jnp.ones(4)
    expected = [np.asarray(score(one, x, T, None)) for one in (state, other)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda i: np.asarray(score((state, other)[i % 2], x, T, None)), range(20)))
    for i, value in enumerate(found):
        np.testing.assert_allclose(value, expected[i % 2], atol=1e-6)


def _alone(module, x, t, cond):
    return module(x)


class ZeroAtFirst(nn.Module):
    """As networks are before a training; of the layer after, a comparison sees nothing."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, 8)
        nn.init.zeros_(self.last.weight), nn.init.zeros_(self.last.bias)

    def forward(self, x, t):
        return self.last(torch.tanh(x))


def test_a_module_that_gives_zero_is_compared(monkeypatch):
    score, _ = from_torch(ZeroAtFirst(), jm.NoiseSchedule(), "score", x=np.zeros(8, np.float32))
    assert score._batched
    run = Skeleton.run
    monkeypatch.setattr(Skeleton, "run", lambda self, *arguments: 2 * run(self, *arguments))
    with pytest.raises(ValueError, match="an output that differs by"):
        from_torch(ZeroAtFirst(), jm.NoiseSchedule(), "score", x=np.zeros(8, np.float32))


class ShortTable(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.ones(600))

    def forward(self, x, t):
        return x * self.table[t]


def test_a_table_shorter_than_the_schedule_is_refused():
    with pytest.raises(ValueError, match="every timestep of its schedule"):
        from_torch(ShortTable(), jm.NoiseSchedule(), "score", x=np.zeros(8, np.float32))


@pytest.mark.usefixtures("unchecked")
def test_timesteps_of_an_operator_are_checked(network, point):
    for t in (-1, 1000, 0.5):
        with pytest.raises(ValueError, match="t: expected"):
            jm.TorchOperator(network, point, t, np.int64(3), schedule=jm.NoiseSchedule(), prediction="eps")

    class OfTime(nn.Module):
        def forward(self, x, t):
            return t * x

    x = np.ones(4, np.float32)
    np.testing.assert_allclose(jm.TorchOperator(OfTime(), x, 0.5).value.reshape(-1), 0.5)
