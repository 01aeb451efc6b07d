"""The layers that are written out by hand against JAX's and torch's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import in_double

from jaxmem.stable_diffusion.layers import Downsample, LayerNorm, gelu_gate, silu
from jaxmem.stable_diffusion.text_encoder import quick_gelu
from jaxmem.stable_diffusion.unet import sinusoids


def derivatives(f, *arrays):
    yield f(*arrays)
    yield jax.jvp(f, arrays, tuple(map(jnp.cos, arrays)))[1]
    yield jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), tuple(range(len(arrays))))(*arrays)

    def second(*a):
        return jnp.sum(jnp.sin(jax.jvp(f, a, tuple(map(jnp.cos, arrays)))[1]))

    yield jax.grad(second, tuple(range(len(arrays))))(*arrays)


@pytest.mark.parametrize(
    ("ours", "theirs", "count"),
    [(silu, jax.nn.silu, 1), (gelu_gate, lambda a, g: a * jax.nn.gelu(g, approximate=False), 2)],
)
def test_activations_and_their_slopes(ours, theirs, count, x64):
    points = jnp.concatenate([jnp.linspace(-30, 30, 121), jnp.array([-1e3, 1e3, 0.0])])
    arrays = (points, jnp.roll(points, 7))[:count]
    for a, b in zip(derivatives(ours, *arrays), derivatives(theirs, *arrays), strict=True):
        for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-12, atol=1e-12)  # float64, the same function


@pytest.mark.parametrize(("f", "arguments", "kept"), [(silu, 1, 1), (gelu_gate, 2, 2)])
def test_a_linearised_activation_keeps_one_array_per_input(f, arguments, kept):
    arrays = [jnp.linspace(-1.0, 1.0, 50) for _ in range(arguments)]
    linear = jax.jit(lambda *a: jax.linearize(f, *a)[1])(*arrays)
    assert [leaf.size for leaf in jax.tree.leaves(linear)] == [50] * kept


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("sides", [(8, 6), (2, 4)])
def test_downsampling_is_torchs_strided_convolution(before, sides, torch, parity):
    layer = Downsample(5, before=before, rngs=nnx.Rngs(0))
    layer.conv.bias = nnx.Param(jnp.arange(5.0))
    x = jax.random.normal(jax.random.key(1), (*sides, 5))

    def strided(dtype):
        image = torch.tensor(np.array(x), dtype=dtype).permute(2, 0, 1)[None]
        padded = torch.nn.functional.pad(image, (before, 1, before, 1))
        kernel = torch.tensor(np.array(layer.conv.weight[...]), dtype=dtype).permute(3, 2, 0, 1)
        bias = torch.arange(5.0, dtype=dtype)
        return torch.nn.functional.conv2d(padded, kernel, bias, stride=2)[0].permute(1, 2, 0)

    exact = in_double(lambda layer, x: layer(x), layer, x)
    parity.check("Downsample", layer(x), strided(torch.float32), strided(torch.float64), exact)


def test_layer_norm_is_exact_far_from_zero(x64):
    x = 1e4 + jax.random.normal(jax.random.key(0), (3, 64), jnp.float32)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(1, keepdims=True)) / np.sqrt(exact.var(1, keepdims=True) + 1e-5)
    # The mean's rounding is left, at most 64 · 6e-8 · 1e4 = 0.04 in any order of summation; a variance in one pass
    # would be off by 1e8 · 6e-8 = 6.
    np.testing.assert_allclose(LayerNorm(64)(x), exact, atol=4e-2)


@pytest.mark.parametrize(("flip", "shift"), [(True, 0), (False, 1)])
def test_timestep_features_are_diffusers(flip, shift, torch, diffusers, parity):
    from diffusers.models.embeddings import get_timestep_embedding

    t = np.array([0, 1, 500, 999])
    peer = get_timestep_embedding(torch.tensor(t), 32, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    angles = t[:, None] * 10_000.0 ** (-np.arange(16) / (16 - shift))
    truth = np.concatenate([np.cos(angles), np.sin(angles)][:: 1 if flip else -1], 1)

    def ours(dtype):
        return jax.vmap(lambda t: sinusoids(t, 32, flip=flip, shift=shift, dtype=dtype))(jnp.asarray(t))

    # The largest angles are 999, whose rounding in float32 is 6e-5: of theirs and of ours.
    parity.check("timestep features", ours(jnp.float32), peer, truth, in_double(lambda: ours(jnp.float64)))


def test_quick_gelu_is_transformers(torch, parity):
    x = np.linspace(-8, 8, 33, dtype=np.float32)
    peer, truth = (y * torch.sigmoid(1.702 * y) for y in (torch.tensor(x), torch.tensor(x).double()))
    parity.check("quick GELU", quick_gelu(jnp.asarray(x)), peer, truth, in_double(quick_gelu, x))
