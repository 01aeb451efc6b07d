"""Programs for GPUs and TPUs, made on this CPU by `jax.export`: all of the batch path, with nothing of the CPU's.

What is looked at is the StableHLO that JAX hands to a device's compiler, which is not here.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_diffusion
from flax import nnx

from jaxmem.diffusion import NoiseSchedule
from jaxmem.function_operators import MatrixOperator
from jaxmem.jacobian import assemble, linearise_points, score_jacobian
from jaxmem.kernels.attention import attention
from jaxmem.krylov import begin
from jaxmem.networks.mlp import MLP
from jaxmem.networks.unet import UNet
from jaxmem.oracles import Separable, SeparableScore
from jaxmem.score import GuidedScore, bind
from jaxmem.spectra import batch, counting, driver, measure, programs
from jaxmem.spectra.deflation import Deflated
from jaxmem.spectra.methods import Lanczos
from jaxmem.stable_diffusion import unet as stable_diffusion
from jaxmem.stable_diffusion.configs import UNetConfig

SCHEDULE = NoiseSchedule()
KEYS = jax.random.split(jax.random.key(0), 2)
# The one solver that is no plain StableHLO, by its name on each platform: of symmetric matrices. The CPU's makes them
# tridiagonal.
SOLVER = {"cpu": "lapack_ssytrd_ffi", "cuda": "cusolver_syevd_ffi", "tpu": "Eigh"}


def mlp():
    return *bind(MLP(3, width=16, depth=1, rngs=nnx.Rngs(0)), SCHEDULE, "eps"), jnp.ones((2, 3)), None


def unet():
    module = UNet((12, 8, 1), features=(8, 16), num_blocks=(1, 1), embedding=16, groups=4, rngs=nnx.Rngs(0))
    return *bind(module, SCHEDULE, "eps"), jnp.ones((2, 12, 8, 1)), jnp.zeros(2, jnp.int32)


def tiny_stable_diffusion():
    """Attention over 64 and 16 tokens, with a prompt and without, under guidance."""
    config = UNetConfig.from_diffusers(tiny_diffusion.unet_config("sd1") | {"layers_per_block": 1})
    score, state = bind(stable_diffusion.UNet(config, rngs=nnx.Rngs(0)), SCHEDULE, "eps")
    return GuidedScore(score, 7.5), state, jnp.ones((2, 8, 8, 4)), jnp.ones((2, 2, 7, 32))


def oracle():
    return SeparableScore(SCHEDULE), Separable(jnp.linspace(0.2, 2, 12), jnp.ones(12)), jnp.ones((2, 12)), None


NETWORKS = {"mlp": mlp, "unet": unet, "stable diffusion": tiny_stable_diffusion, "oracle": oracle}


def lowered(f, *args, platform):
    return jax.export.export(jax.jit(f), platforms=[platform])(*args).mlir_module()


def custom_calls(text):
    return set(re.findall(r"stablehlo\.custom_call @([\w$.]+)", text))


def assert_full_precision(text):
    """Products with fewer bits are what accelerators take by default."""
    products = [line for line in text.splitlines() if re.search(r"stablehlo\.(dot_general|convolution)", line)]
    assert products
    low = [line for line in products if line.count("HIGHEST") != 2]
    assert not low, low[0]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("network", NETWORKS)
def test_batches(network, platform):
    score, state, x, cond = NETWORKS[network]()
    t = jnp.full(2, 50)
    text = lowered(lambda *a: batch._dense_group(score, *a, 8), state, x, t, cond, platform=platform)
    assert custom_calls(text) == {SOLVER[platform]}
    assert_full_precision(text)
    text = lowered(lambda *a: batch._krylov_group(score, *a, Lanczos(3)), state, x, t, cond, KEYS, platform=platform)
    assert custom_calls(text) == set()
    assert_full_precision(text)
    text = lowered(jax.vmap(score, (None, 0, 0, 0)), state, x, t, cond, platform=platform)
    assert custom_calls(text) == set()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("network", ["unet", "stable diffusion"])
def test_one_product_at_a_time(network, platform):
    score, state, x, cond = NETWORKS[network]()
    t, size = jnp.full(2, 50), x[0].size
    factorizations = jax.vmap(lambda start: begin(start, 3))(jnp.ones((2, size)))

    def linear(product):
        def both(state, x, t, cond, vectors):
            operators = assemble(state, *linearise_points(score, state, x, t, cond))
            return jax.vmap(product, (operators.axes, 0))(operators, vectors)

        return both, state, x, t, cond, jnp.ones((2, size))

    lowerings = {
        "linearise_points": (lambda *a: linearise_points(score, *a), state, x, t, cond),
        "products": linear(lambda A, v: A.mv(v)),
        "transposed products": linear(lambda A, v: A.rmv(v)),
        "absorb": (lambda *a: programs._absorb(*a, symmetric=True), factorizations, jnp.ones((2, size))),
        "next vectors": (programs._next, factorizations),
    }
    for name, (f, *args) in lowerings.items():
        text = lowered(f, *args, platform=platform)
        assert custom_calls(text) == set(), name
        if name != "next vectors":
            assert_full_precision(text)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_attention_and_its_derivatives(platform):
    q, k, v = jnp.ones((2, 70, 4)), jnp.ones((2, 9, 4)), jnp.ones((2, 9, 5))

    def value(q, k, v):
        with jax.default_matmul_precision("highest"):
            return attention(q, k, v, block=32)

    def linear(q, k, v):
        return jax.linearize(value, q, k, v)[1](q, k, v)

    def transposed(q, k, v):
        y, pull = jax.vjp(value, q, k, v)
        return pull(y)

    def curvature(q, k, v):
        return jax.jvp(transposed, (q, k, v), (q, k, v))[1]

    for f in (value, linear, transposed, curvature):
        text = lowered(f, q, k, v, platform=platform)
        assert custom_calls(text) == set()
        assert_full_precision(text)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("kind", ["matrix", "jacobian"])
def test_one_operator(kind, platform):
    """Non-symmetric eigenproblems included: what is on the device is Arnoldi, the small problem is the host's."""
    score, state, x, cond = unet()
    operator = MatrixOperator(jnp.eye(8)) if kind == "matrix" else score_jacobian(score, state, x[0], 50, cond[0])
    for f, *args in (
        (lambda A: measure.dense_and_noise(A, 8), operator),
        (lambda A: measure.dense_and_noise(A.symmetric, 8), operator),
        (lambda A, v: measure.run_krylov(A, v, 3, symmetric=False), operator, jnp.ones(operator.size)),
    ):
        text = lowered(f, *args, platform=platform)
        assert custom_calls(text) == set()
        assert_full_precision(text)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_shares_of_a_mesh(platform):
    """A mesh of one device here; a mesh of more is more of the same program."""
    score, state, x, cond = unet()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("points",))
    t = jnp.full(2, 50)
    text = lowered(lambda *a: batch._dense_group(score, *a, 8, mesh), state, x, t, cond, platform=platform)
    assert custom_calls(text) - {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"} == {SOLVER[platform]}


def test_the_check_sees_what_it_forbids():
    score, state, x, cond = mlp()
    text = lowered(lambda *a: batch._dense_group(score, *a, 8), state, x, jnp.full(2, 50), cond, platform="cpu")
    assert custom_calls(text) == {SOLVER["cpu"]}
    # One matrix at a time: for several, devices that share the CPU's threads would wait for each other.
    (call,) = [line for line in text.splitlines() if SOLVER["cpu"] in line]
    assert "(tensor<3x3xf32>)" in call
    with pytest.raises(AssertionError, match="dot_general"):
        assert_full_precision(lowered(jnp.matmul, jnp.eye(2), jnp.eye(2), platform="tpu"))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_counts(platform):
    score, state, x, cond = unet()
    operator = score_jacobian(score, state, x[0], 50, cond[0]).symmetric
    deflated = Deflated(operator, jnp.zeros((32, operator.size)), x[0].reshape(-1), jnp.float32(0), jnp.float32(1))
    start = begin(x[0].reshape(-1), 3)
    for program in (
        lowered(lambda *a: driver._extend(*a, True, None), operator, start, 3, platform=platform),
        lowered(lambda *a: counting._probe_runs(*a, 3), deflated, KEYS, 3, platform=platform),
    ):
        assert custom_calls(program) == set()
        assert_full_precision(program)
