"""The autoencoder between images and latents (diffusers' ``AutoencoderKL``), for one image, channels last."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxmem.stable_diffusion.configs import VAEConfig
from jaxmem.stable_diffusion.layers import (
    Attention,
    Conv,
    Downsample,
    GroupNorm,
    Pointwise,
    ResnetBlock,
    Upsample,
    silu,
)

_EPSILON = 1e-6  # of every group norm here; the UNet's differ


def _resnet(config: VAEConfig, in_features: int, features: int, *, rngs: nnx.Rngs) -> ResnetBlock:
    return ResnetBlock(
        in_features, features, time_features=None, groups=config.norm_num_groups, epsilon=_EPSILON, rngs=rngs
    )


class PixelAttention(Attention):
    """Self-attention with one head over all pixels, on a group norm, added."""

    def __init__(self, config: VAEConfig, features: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(features, features, 1, bias=True, rngs=rngs)
        self.group_norm = GroupNorm(features, config.norm_num_groups, _EPSILON)

    def __call__(self, x: Float[Array, "rows columns features"]) -> Array:  # type: ignore[override]
        pixels = self.group_norm(x).reshape(-1, x.shape[2])
        return super().__call__(pixels, pixels).reshape(x.shape) + x


class MidBlock(nnx.Module):
    """A ResNet block, attention, a ResNet block."""

    def __init__(self, config: VAEConfig, features: int, *, rngs: nnx.Rngs) -> None:
        self.resnets = nnx.List([_resnet(config, features, features, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([PixelAttention(config, features, rngs=rngs)])

    def __call__(self, x: Float[Array, "rows columns features"]) -> Float[Array, "rows columns features"]:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nnx.Module):
    """ResNet blocks of one resolution, then half the size (on the way in) or twice (on the way out)."""

    def __init__(
        self, config: VAEConfig, in_features: int, features: int, *, num_blocks: int, resize: str, rngs: nnx.Rngs
    ) -> None:
        widths = [in_features] + [features] * (num_blocks - 1)
        self.resnets = nnx.List([_resnet(config, width, features, rngs=rngs) for width in widths])
        down, up = resize == "down", resize == "up"
        self.downsamplers = nnx.List([Downsample(features, before=0, rngs=rngs)] if down else [])
        self.upsamplers = nnx.List([Upsample(features, rngs=rngs)] if up else [])

    def __call__(self, x: Float[Array, "rows columns features"]) -> Array:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nnx.Module):
    """An image to the moments of its latents, before the last 1×1 convolution."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs) -> None:
        widths = config.block_out_channels
        self.conv_in = Conv(config.in_channels, widths[0], rngs=rngs)
        self.down_blocks = nnx.List(
            [
                Level(
                    config,
                    widths[max(level - 1, 0)],
                    width,
                    num_blocks=config.layers_per_block,
                    resize="down" if level < len(widths) - 1 else "keep",
                    rngs=rngs,
                )
                for level, width in enumerate(widths)
            ]
        )
        self.mid_block = MidBlock(config, widths[-1], rngs=rngs)
        self.conv_norm_out = GroupNorm(widths[-1], config.norm_num_groups, _EPSILON)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, rngs=rngs)

    def __call__(self, image: Float[Array, "height width channels"]) -> Array:
        x = self.conv_in(image)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents to an image, after the first 1×1 convolution."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs) -> None:
        widths = config.block_out_channels[::-1]
        self.conv_in = Conv(config.latent_channels, widths[0], rngs=rngs)
        self.mid_block = MidBlock(config, widths[0], rngs=rngs)
        self.up_blocks = nnx.List(
            [
                Level(
                    config,
                    widths[max(i - 1, 0)],
                    width,
                    num_blocks=config.layers_per_block + 1,
                    resize="up" if i < len(widths) - 1 else "keep",
                    rngs=rngs,
                )
                for i, width in enumerate(widths)
            ]
        )
        self.conv_norm_out = GroupNorm(widths[-1], config.norm_num_groups, _EPSILON)
        self.conv_out = Conv(widths[-1], config.out_channels, rngs=rngs)

    def __call__(self, latents: Float[Array, "rows columns channels"]) -> Array:
        x = self.mid_block(self.conv_in(latents))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(silu(self.conv_norm_out(x)))


class VAE(nnx.Module):
    """Encode and decode; images are in [-1, 1], latents at the scale of the diffusion model (``scaling_factor``)."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.quant_conv = Pointwise(2 * channels, 2 * channels, rngs=rngs)
        self.post_quant_conv = Pointwise(channels, channels, rngs=rngs)

    def encode(
        self, image: Float[Array, "height width channels"]
    ) -> tuple[Float[Array, "rows columns latents"], Float[Array, "rows columns latents"]]:
        """Mean and standard deviation of the latents' Gaussian; log variances are cut to [-30, 20] as in diffusers.

        Raises:
            ValueError: for an image whose channels do not fit or whose sides do not fold.
        """
        side = self.config.downscale
        if (
            image.ndim != 3
            or image.shape[2] != self.config.in_channels
            or image.shape[0] % side
            or image.shape[1] % side
        ):
            raise ValueError(
                f"image: expected (height, width, {self.config.in_channels}) with sides that are multiples of {side},"
                f" got shape {image.shape}"
            )
        mean, log_variance = jnp.split(self.quant_conv(self.encoder(image)), 2, axis=-1)
        deviation = jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))
        return self.config.scaling_factor * mean, self.config.scaling_factor * deviation

    def decode(self, latents: Float[Array, "rows columns latents"]) -> Float[Array, "height width channels"]:
        """The image of latents; mostly within [-1, 1], clip before showing.

        Raises:
            ValueError: for latents whose channels do not fit.
        """
        if latents.ndim != 3 or latents.shape[2] != self.config.latent_channels:
            raise ValueError(
                f"latents: expected (rows, columns, {self.config.latent_channels}), got shape {latents.shape}"
            )
        return self.decoder(self.post_quant_conv(latents / self.config.scaling_factor))


@partial(jax.jit, static_argnums=0)
def decode_latents(graphdef: nnx.GraphDef, state: nnx.State, latents: Array) -> Array:
    """`VAE.decode` of a network in parts, compiled."""
    return nnx.merge(graphdef, state).decode(latents)


@partial(jax.jit, static_argnums=0)
def mean_latents(graphdef: nnx.GraphDef, state: nnx.State, image: Array) -> Array:
    """The mean that `VAE.encode` of a network in parts gives, compiled."""
    return nnx.merge(graphdef, state).encode(image)[0]
