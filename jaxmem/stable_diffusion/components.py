"""Parts of a model, checked and not loaded yet, whether they lie in a folder or in a live pipeline."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from flax import nnx

from jaxmem.runs import memory
from jaxmem.stable_diffusion import weights
from jaxmem.stable_diffusion.configs import SchedulerConfig, TextEncoderConfig, UNetConfig, VAEConfig
from jaxmem.stable_diffusion.settings import Reading, is_size, is_whole
from jaxmem.stable_diffusion.tensors import Tensor
from jaxmem.stable_diffusion.text_encoder import TextEncoder
from jaxmem.stable_diffusion.unet import UNet
from jaxmem.stable_diffusion.vae import VAE

NETWORKS = ("unet", "text_encoder", "vae")
#: of diffusers, whose function is that of UNet, text encoder and autoencoder
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
_PIXELS = 8  # sides of pictures are multiples of it in diffusers' pipelines, whatever their autoencoder
Configs = tuple[UNetConfig, TextEncoderConfig, VAEConfig, SchedulerConfig]


@dataclass(frozen=True)
class Maker:
    """Makes a network; two of one class and configuration are equal, and `weights.shapes` traces them once."""

    network: Callable[..., nnx.Module]
    config: Any

    def __call__(self) -> nnx.Module:
        return self.network(self.config, rngs=nnx.Rngs(0))


class Component(NamedTuple):
    """A network whose parameters are not there yet: how it is made, and how they are had."""

    make: Callable[[], nnx.Module]
    load: Callable[[], tuple[nnx.GraphDef, nnx.State]]

    @property
    def float32_bytes(self) -> int:
        """Of the parameters once they are loaded."""
        return memory.tree_bytes(weights.shapes(self.make)[1])


class Parts(NamedTuple):
    """What a model is made of."""

    configs: Configs
    components: dict[str, Component]
    make_tokenizer: Callable[[], Any]


def read_parts(
    config: Callable[..., dict[str, Any]],
    tensors: Callable[[str, weights.Layout], list[Tensor]],
    make_tokenizer: Callable[[], Any],
    reading: Reading,
) -> Parts:
    """Read the settings of all parts, and check the tensors of the networks against them."""
    if reading.parameters != "float32":
        raise ValueError(
            f"parameters: expected float32 for Stable Diffusion 1 and 2, whose networks take 4 GB, got"
            f" {reading.parameters!r}; leave it out"
        )
    configs = (
        UNetConfig.from_diffusers(config("unet"), reading=reading),
        TextEncoderConfig.from_diffusers(config("text_encoder"), reading=reading),
        VAEConfig.from_diffusers(config("vae"), reading=reading),
        SchedulerConfig.from_diffusers(config("scheduler", "scheduler_config.json"), reading=reading),
    )
    components = {}
    for part, network, settings, layout in (
        ("unet", UNet, configs[0], weights.UNET),
        ("text_encoder", TextEncoder, configs[1], weights.TEXT_ENCODER),
        ("vae", VAE, configs[2], weights.VAE),
    ):
        make, found = Maker(network, settings), tensors(part, layout)
        weights.check(make, found, layout, part)
        component = Component(make, partial(weights.load_state, make, found, layout, part))
        components[part] = component
    return Parts(configs, components, make_tokenizer)


def check_class(name: Any, where: str, remedy: str) -> None:
    """Refuse pipelines whose function is more than that of UNet, text encoder and autoencoder.

    Raises:
        ValueError: ``name`` is not of a text-to-image pipeline of Stable Diffusion 1.x or 2.x.
    """
    if name not in PIPELINES:
        raise ValueError(
            f"{where}: expected a {' or '.join(PIPELINES)}, got {name!r}; jaxmem reads Stable Diffusion 1.x and 2.x"
            f" from text to image, and the function that it would audit is not the one that this pipeline runs; where"
            f" such a model is in it, {remedy} is the model alone"
        )


def check_fit(unet: UNetConfig, text: TextEncoderConfig, vae: VAEConfig) -> None:
    if text.hidden_size != unet.cross_attention_dim:
        raise ValueError(
            f"text_encoder and unet: expected hidden_size equal to cross_attention_dim, got {text.hidden_size} and"
            f" {unet.cross_attention_dim}; they are of different models"
        )
    if vae.latent_channels != unet.in_channels:
        raise ValueError(
            f"vae and unet: expected latent_channels equal to in_channels, got {vae.latent_channels} and"
            f" {unet.in_channels}; they are of different models"
        )


def check_skip(skip: Any, text: TextEncoderConfig) -> None:
    if not is_whole(skip) or not 0 <= skip <= text.num_hidden_layers:
        raise ValueError(
            f"clip_skip: expected a whole number from 0 to {text.num_hidden_layers}, the layers of the text encoder,"
            f" got {skip!r}"
        )


def latent_shape(unet: UNetConfig, vae: VAEConfig, reading: Reading) -> tuple[int, int, int]:
    """The shape of one latent, (rows, columns, channels), of the UNet's settings or of pictures of a given size.

    Raises:
        ValueError: the size is no multiple of 8, as diffusers wants it, or of what a latent's pixel covers.
    """
    multiple, sides = math.lcm(_PIXELS, vae.downscale), []
    for name, pixels in (("height", reading.height), ("width", reading.width)):
        if pixels is not None and (not is_size(pixels) or pixels % multiple):
            raise ValueError(f"{name}: expected a multiple of {multiple} pixels, as in diffusers, got {pixels!r}")
        sides.append(unet.sample_size if pixels is None else pixels // vae.downscale)
    rows, columns = sides
    if rows != unet.sample_size or columns != unet.sample_size:
        reading.chosen["latent_shape"] = [rows, columns, unet.in_channels]
    return rows, columns, unet.in_channels
