"""The CLIP text encoders of Stable Diffusion: ViT-L/14 (1.x) and OpenCLIP ViT-H (2.x)."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmem.stable_diffusion.configs import TextEncoderConfig
from jaxmem.stable_diffusion.layers import Embedding, LayerNorm, Linear


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x sigmoid(1.702 x)``, what CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact (erf) GELU, what OpenCLIP was trained with."""
    return jax.nn.gelu(x, approximate=False)


class Embeddings(nnx.Module):
    """A vector per token and one per position, added."""

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs) -> None:
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size, rngs=rngs)

    def __call__(self, tokens: Int[Array, " tokens"]) -> Float[Array, "tokens features"]:
        return self.token_embedding(tokens) + self.position_embedding(jnp.arange(tokens.shape[0]))


class CausalAttention(nnx.Module):
    """Multi-head attention of each token over itself and those before."""

    def __init__(self, features: int, num_heads: int, *, rngs: nnx.Rngs) -> None:
        self.num_heads = num_heads
        self.q_proj = Linear(features, features, rngs=rngs)
        self.k_proj = Linear(features, features, rngs=rngs)
        self.v_proj = Linear(features, features, rngs=rngs)
        self.out_proj = Linear(features, features, rngs=rngs)

    def __call__(self, x: Float[Array, "tokens features"]) -> Float[Array, "tokens features"]:
        q, k, v = (
            projection(x).reshape(x.shape[0], self.num_heads, -1)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        # 77 tokens: the plain formula, nothing to save
        logits = jnp.einsum("qhd,khd->hqk", q * q.shape[-1] ** -0.5, k)
        mask = np.tril(np.ones((x.shape[0], x.shape[0]), bool))[None]
        weights = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf), axis=-1)
        return self.out_proj(jnp.einsum("hqk,khd->qhd", weights, v).reshape(x.shape))


class MLP(nnx.Module):
    """Two linear layers with the config's activation between."""

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs) -> None:
        self.activation: Callable[[Array], Array] = {"quick_gelu": quick_gelu, "gelu": gelu}[config.hidden_act]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x: Float[Array, "tokens features"]) -> Float[Array, "tokens features"]:
        return self.fc2(self.activation(self.fc1(x)))


class EncoderLayer(nnx.Module):
    """Attention and MLP, each on a layer norm, each added."""

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs) -> None:
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = CausalAttention(config.hidden_size, config.num_attention_heads, rngs=rngs)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: Float[Array, "tokens features"]) -> Float[Array, "tokens features"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    """The layers, one after another."""

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([EncoderLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: Float[Array, "tokens features"], skip: int = 0) -> Float[Array, "tokens features"]:
        for layer in list(self.layers)[: len(self.layers) - skip]:
            x = layer(x)
        return x


class TextEncoder(nnx.Module):
    """The last hidden state of a prompt's tokens, after the final layer norm: what conditions the UNet.

    ``skip`` leaves out the last layers but not the norm: diffusers' ``clip_skip``.
    """

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embeddings = Embeddings(config, rngs=rngs)
        self.encoder = Encoder(config, rngs=rngs)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, tokens: Int[Array, " tokens"], skip: int = 0) -> Float[Array, "tokens features"]:
        return self.final_layer_norm(self.encoder(self.embeddings(tokens), skip))


@partial(jax.jit, static_argnums=(0, 3))
def encode_text(graphdef: nnx.GraphDef, state: nnx.State, tokens: Array, skip: int) -> Array:
    """What a network in parts gives for the tokens of each prompt, compiled."""
    return jax.vmap(partial(nnx.merge(graphdef, state), skip=skip))(tokens)
