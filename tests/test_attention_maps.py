"""Cross-attention maps against diffusers' own processors in float64, and the detectors made of them against loops."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_diffusion as tiny
from conftest import optional_import
from flax import nnx
from parity import double_module, in_double

from jaxmem.detectors.attention import (
    attention_entropy,
    bright_ending,
    entropy,
    layer_entropy,
    masked_difference,
    token_attention,
)
from jaxmem.stable_diffusion.attention_maps import attention_maps
from jaxmem.stable_diffusion.pipeline import StableDiffusion


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_maps_are_those_of_diffusers(family, torch, diffusers, tmp_path):
    from diffusers.models.attention_processor import AttnProcessor

    class Telling(AttnProcessor):
        """diffusers' processor, whose scores are read where it computes them."""

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **options):
            query = attn.head_to_batch_dim(attn.to_q(hidden_states))
            key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
            seen.append(attn.get_attention_scores(query, key).detach().numpy())
            return super().__call__(attn, hidden_states, encoder_hidden_states, **options)

    transformers = optional_import("transformers")
    pipeline, folder = tiny.make_pipeline(torch, diffusers, transformers, tmp_path, family)
    model = StableDiffusion.load(folder)
    unet, seen = double_module(torch, pipeline.unet), []
    processors = {n: Telling() if n.endswith("attn2.processor") else p for n, p in unet.attn_processors.items()}
    unet.set_attn_processor(processors)
    generator = torch.Generator().manual_seed(4)
    x, cond = (torch.randn(shape, generator=generator).double() for shape in ((1, 4, 8, 8), (1, 77, 32)))
    with torch.no_grad():
        unet(x, torch.tensor(301), cond)
    graphdef, state = model.network("unet")
    arguments = (
        state,
        jnp.asarray(x[0].permute(1, 2, 0).numpy(), jnp.float32),
        301,
        jnp.asarray(cond[0].numpy(), jnp.float32),
    )
    ours = jax.jit(partial(attention_maps, graphdef))(*arguments)
    exact = in_double(partial(attention_maps, graphdef), *arguments)
    assert [len(part) for part in ours] == [2, 1, 3]
    assert len(seen) == len(ours.layers)
    for found, double, peer in zip(ours.layers, exact.layers, seen, strict=True):
        assert found.shape == peer.shape
        assert np.abs(found - peer).max() <= 1e-5
        assert np.abs(double - peer).max() <= 1e-7  # the inputs were rounded to float32
        np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)


def test_who_does_not_ask_for_maps_has_the_network_as_it_was(torch, diffusers, tmp_path):
    transformers = optional_import("transformers")
    _, folder = tiny.make_pipeline(torch, diffusers, transformers, tmp_path, **tiny.SMALLEST)
    model = StableDiffusion.load(folder)
    graphdef, state = model.network("unet")
    x, cond = jnp.ones((4, 4, 4)), jnp.ones((77, 32))
    before = str(jax.make_jaxpr(lambda state: nnx.merge(graphdef, state)(x, 1, cond))(state))
    attention_maps(graphdef, state, x, 1, cond)
    assert str(jax.make_jaxpr(lambda state: nnx.merge(graphdef, state)(x, 1, cond))(state)) == before


def _maps(seed, pixels=(16, 16, 4, 4), heads=3, tokens=7):
    logits = [np.random.default_rng(seed + i).normal(size=(heads, n, tokens)) for i, n in enumerate(pixels)]
    return [np.exp(one) / np.exp(one).sum(-1, keepdims=True) for one in logits]


def test_token_attention_is_the_mean_over_pixels_heads_and_layers():
    layers = _maps(0)
    expected = [np.mean([np.mean([layer[h, :, k].mean() for h in range(3)]) for layer in layers]) for k in range(7)]
    np.testing.assert_allclose(token_attention(layers), expected, rtol=1e-12)
    assert token_attention(layers).sum() == pytest.approx(1)


def test_entropies_are_their_sums():
    assert entropy(np.full(8, 1 / 8)) == pytest.approx(np.log(8))
    assert entropy(np.eye(5)[2]) == 0
    layers = _maps(1)
    weights = layers[3].mean((0, 1))
    assert layer_entropy(layers) == pytest.approx(-sum(a * np.log(a) for a in weights))
    assert layer_entropy(layers[:2]) == layer_entropy(layers[:2], 1)  # a network of two layers
    steps = np.stack([token_attention(_maps(10 * i)) for i in range(15)])
    late = [-sum(a * np.log(a) for a in row) for row in steps[5:]]
    ends = [-sum(a * np.log(a) for a in row[4:]) for row in steps]
    expected = np.mean(late) + abs(np.mean(ends[5:]) - ends[0])
    assert attention_entropy(steps, 4) == pytest.approx(expected)


def test_the_bright_ending_weighs_the_difference():
    layers = _maps(2)
    mask = bright_ending(layers, 5, (4, 4, 2))
    expected = [(layers[0][:, i, 5].mean() + layers[1][:, i, 5].mean()) / 2 for i in range(16)]
    np.testing.assert_allclose(mask.ravel(), expected, rtol=1e-12)
    difference = np.random.default_rng(3).normal(size=(4, 4, 2))
    total = sum((difference[i, j, c] * mask[i, j]) ** 2 for i in range(4) for j in range(4) for c in range(2))
    assert masked_difference(difference, mask) == pytest.approx(np.sqrt(total) / mask.mean())
    assert masked_difference(difference, np.full((4, 4), 0.3)) == pytest.approx(np.linalg.norm(difference))


@pytest.mark.usefixtures("unchecked")
def test_misuse_is_named():
    with pytest.raises(ValueError, match="layers: expected the map of at least one layer"):
        token_attention([])
    with pytest.raises(ValueError, match="attention, end: expected"):
        attention_entropy(np.ones((15, 7)), 7)
    with pytest.raises(ValueError, match=r"attention, end: expected .* of more than 10 steps"):
        attention_entropy(np.ones((10, 7)), 3)
    with pytest.raises(ValueError, match="layers: expected the map of at least one layer"):
        layer_entropy([])
    with pytest.raises(ValueError, match=r"down, end: expected a layer of 64 pixels.* got none and 3"):
        bright_ending(_maps(0), 3, (8, 8, 4))
    with pytest.raises(ValueError, match="got 7 tokens and 7"):
        bright_ending(_maps(0), 7, (4, 4, 4))
    with pytest.raises(ValueError, match="mask: expected a positive mean"):
        masked_difference(np.ones((4, 4, 2)), np.zeros((4, 4)))
