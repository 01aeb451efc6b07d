"""Stable Diffusion's conditional UNet (diffusers' ``UNet2DConditionModel``) for one latent, channels last."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxmem.stable_diffusion.configs import UNetConfig
from jaxmem.stable_diffusion.layers import (
    Attention,
    Conv,
    Downsample,
    GroupNorm,
    LayerNorm,
    Linear,
    Pointwise,
    ResnetBlock,
    Upsample,
    gelu_gate,
    silu,
)


def sinusoids(
    t: Array, features: int, *, flip: bool, shift: float | int, dtype: Any = jnp.float32
) -> Float[Array, " features"]:
    """``[sin(t w), cos(t w)]``, cosines first if flipped, with ``w_k = 10000^(-k / (features/2 - shift))``."""
    half = features // 2
    frequencies = 10_000.0 ** (-np.arange(half) / (half - shift))  # float64, rounded once: the same on every machine
    angles = t.astype(dtype) * jnp.asarray(frequencies, dtype)
    parts = [jnp.cos(angles), jnp.sin(angles)] if flip else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(parts)


class TimestepEmbedding(nnx.Module):
    """Two linear layers with a SiLU between."""

    def __init__(self, in_features: int, features: int, *, rngs: nnx.Rngs) -> None:
        self.linear_1 = Linear(in_features, features, rngs=rngs)
        self.linear_2 = Linear(features, features, rngs=rngs)

    def __call__(self, x: Float[Array, " in_features"]) -> Float[Array, " features"]:
        return self.linear_2(silu(self.linear_1(x)))


class GEGLU(nnx.Module):
    """``a gelu(b)`` with ``[a, b] = proj(x)`` and the exact (erf) GELU."""

    def __init__(self, features: int, hidden: int, *, rngs: nnx.Rngs) -> None:
        self.proj = Linear(features, 2 * hidden, rngs=rngs)

    def __call__(self, x: Float[Array, "tokens features"]) -> Float[Array, "tokens hidden"]:
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return gelu_gate(value, gate)


class FeedForward(nnx.Module):
    """GEGLU to four times the features and back; the dropout of training has no part in a score, but a place."""

    def __init__(self, features: int, *, rngs: nnx.Rngs) -> None:
        hidden = 4 * features
        self.net = nnx.List([GEGLU(features, hidden, rngs=rngs), nnx.Dropout(0.0), Linear(hidden, features, rngs=rngs)])

    def __call__(self, x: Float[Array, "tokens features"]) -> Float[Array, "tokens features"]:
        return self.net[2](self.net[0](x))


class TransformerBlock(nnx.Module):
    """Self-attention, cross-attention over the prompt, feed-forward; each on a layer norm, each added."""

    def __init__(self, features: int, context_features: int, num_heads: int, *, rngs: nnx.Rngs) -> None:
        self.norm1 = LayerNorm(features)
        self.attn1 = Attention(features, features, num_heads, rngs=rngs)
        self.norm2 = LayerNorm(features)
        self.attn2 = Attention(features, context_features, num_heads, rngs=rngs)
        self.norm3 = LayerNorm(features)
        self.ff = FeedForward(features, rngs=rngs)

    def __call__(self, x: Float[Array, "tokens features"], context: Float[Array, "_ _"]) -> Float[Array, "_ _"]:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nnx.Module):
    """Transformer blocks over the pixels of an image, between two projections, added to the image."""

    def __init__(self, config: UNetConfig, features: int, num_heads: int, *, rngs: nnx.Rngs) -> None:
        projection = Linear if config.use_linear_projection else Pointwise
        self.norm = GroupNorm(features, config.norm_num_groups, 1e-6)  # not norm_eps
        self.proj_in = projection(features, features, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [
                TransformerBlock(features, config.cross_attention_dim, num_heads, rngs=rngs)
                for _ in range(config.transformer_layers_per_block)
            ]
        )
        self.proj_out = projection(features, features, rngs=rngs)

    def __call__(self, x: Float[Array, "rows columns features"], context: Float[Array, "_ _"]) -> Array:
        hidden = self.proj_in(self.norm(x)).reshape(-1, x.shape[2])
        for block in self.transformer_blocks:
            hidden = block(hidden, context)
        return self.proj_out(hidden).reshape(x.shape) + x


class DownBlock(nnx.Module):
    """ResNet blocks, each with its transformer where the level has them, then half the size; keeps what it made."""

    def __init__(self, config: UNetConfig, level: int, *, rngs: nnx.Rngs) -> None:
        widths = config.block_out_channels
        features, heads = widths[level], config.num_heads[level]
        before = [widths[max(level - 1, 0)]] + [features] * (config.layers_per_block - 1)
        self.resnets = nnx.List([_resnet(config, width, features, rngs=rngs) for width in before])
        attentions = len(before) if config.down_attention[level] else 0
        self.attentions = nnx.List([Transformer(config, features, heads, rngs=rngs) for _ in range(attentions)])
        last = level == len(widths) - 1
        self.downsamplers = nnx.List([] if last else [Downsample(features, before=1, rngs=rngs)])

    def __call__(self, x: Array, time: Array, context: Array) -> tuple[Array, list[Array]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[i](x, context)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        return x, skips


class MidBlock(nnx.Module):
    """A ResNet block, a transformer, a ResNet block."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs) -> None:
        features, heads = config.block_out_channels[-1], config.num_heads[-1]
        self.resnets = nnx.List([_resnet(config, features, features, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([Transformer(config, features, heads, rngs=rngs)])

    def __call__(self, x: Array, time: Array, context: Array) -> Array:
        x = self.attentions[0](self.resnets[0](x, time), context)
        return self.resnets[1](x, time)


class UpBlock(nnx.Module):
    """As on the way down, one block more, each taking the last kept image beside its input; then twice the size.

    ``size`` is that of the level above, one less than twice where its side is odd.
    """

    def __init__(self, config: UNetConfig, level: int, *, rngs: nnx.Rngs) -> None:
        widths = config.block_out_channels
        features, heads = widths[level], config.num_heads[level]
        below = widths[min(level + 1, len(widths) - 1)]
        skip_widths = [features] * config.layers_per_block + [widths[max(level - 1, 0)]]
        before = [below] + [features] * config.layers_per_block
        self.resnets = nnx.List(
            [_resnet(config, a + b, features, rngs=rngs) for a, b in zip(before, skip_widths, strict=True)]
        )
        attentions = len(before) if config.up_attention[level] else 0
        self.attentions = nnx.List([Transformer(config, features, heads, rngs=rngs) for _ in range(attentions)])
        self.upsamplers = nnx.List([Upsample(features, rngs=rngs)] if level > 0 else [])

    def __call__(
        self, x: Array, skips: list[Array], time: Array, context: Array, size: tuple[int, ...] | None = None
    ) -> Array:
        for i, (resnet, skip) in enumerate(zip(self.resnets, reversed(skips), strict=True)):
            x = resnet(jnp.concatenate([x, skip], -1), time)
            if self.attentions:
                x = self.attentions[i](x, context)
        for upsampler in self.upsamplers:
            x = upsampler(x, size)
        return x


def _resnet(config: UNetConfig, in_features: int, features: int, *, rngs: nnx.Rngs) -> ResnetBlock:
    return ResnetBlock(
        in_features,
        features,
        time_features=config.time_features,
        groups=config.norm_num_groups,
        epsilon=config.norm_eps,
        rngs=rngs,
    )


class UNet(nnx.Module):
    """The noise (or v) predicted for one latent (rows, columns, channels) at a timestep, given a prompt's embedding.

    Bind it with `jaxmem.bind`; ``cond`` is the text encoder's output, shape (tokens, cross_attention_dim). Attribute
    names are diffusers' keys. Every operation is smooth, so all derivatives exist. Computes in the dtype of its
    parameters and input, meant to be float32; diffusers' ``upcast_attention`` is about half precision and says nothing
    here.

    Raises:
        ValueError: at a call, for a latent whose channels or embedding whose features do not fit.
    """

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        widths, levels = config.block_out_channels, range(len(config.block_out_channels))
        self.conv_in = Conv(config.in_channels, widths[0], rngs=rngs)
        self.time_embedding = TimestepEmbedding(widths[0], config.time_features, rngs=rngs)
        self.down_blocks = nnx.List([DownBlock(config, level, rngs=rngs) for level in levels])
        self.mid_block = MidBlock(config, rngs=rngs)
        self.up_blocks = nnx.List([UpBlock(config, level, rngs=rngs) for level in reversed(levels)])
        self.conv_norm_out = GroupNorm(widths[0], config.norm_num_groups, config.norm_eps)
        self.conv_out = Conv(widths[0], config.out_channels, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "..."],  # (rows, columns, channels)
        t: Array | int,
        cond: Float[Array, "..."] | None,  # (tokens, cross_attention_dim)
    ) -> Float[Array, "rows columns channels"]:
        cond = self._check(x, cond)
        time = self.embed_time(t, x.dtype)
        x = self.conv_in(x)
        skips = [x]
        for down in self.down_blocks:
            x, made = down(x, time, cond)
            skips += made
        x = self.mid_block(x, time, cond)
        for up in self.up_blocks:
            used, skips = skips[-len(up.resnets) :], skips[: -len(up.resnets)]
            x = up(x, used, time, cond, skips[-1].shape if skips else None)
        return self.conv_out(silu(self.conv_norm_out(x)))

    def embed_time(self, t: Array | int, dtype: Any) -> Float[Array, " time_features"]:
        """The embedding of a timestep that every ResNet block takes."""
        waves = sinusoids(
            jnp.asarray(t),
            self.config.block_out_channels[0],
            flip=self.config.flip_sin_to_cos,
            shift=self.config.freq_shift,
            dtype=jnp.promote_types(dtype, jnp.float32),  # of fewer bits, angles up to 999 would lose their fractions
        )
        return self.time_embedding(waves.astype(dtype))

    def _check(self, x: Array, cond: Array | None) -> Array:
        if x.ndim != 3 or x.shape[2] != self.config.in_channels:
            raise ValueError(
                f"x: expected one latent (rows, columns, {self.config.in_channels}), got shape {x.shape}; channels come"
                f" last, and jax.vmap makes batches"
            )
        if cond is None or cond.ndim != 2 or cond.shape[1] != self.config.cross_attention_dim:
            raise ValueError(
                f"cond: expected a prompt's embedding (tokens, {self.config.cross_attention_dim}), got"
                f" {None if cond is None else cond.shape}; the pipeline's embed() makes it"
            )
        return cond
