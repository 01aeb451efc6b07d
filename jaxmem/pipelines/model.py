"""A diffusers pipeline as a model: its network in JAX, its text encoders and its autoencoder in torch."""

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem import first_step
from jaxmem.bridge.numbers import arrays_of
from jaxmem.bridge.score import from_torch
from jaxmem.bridge.skeleton import unwrapped
from jaxmem.diffusion import Schedule
from jaxmem.model import Model, fingerprint
from jaxmem.pictures import from_pictures, to_pictures
from jaxmem.pipelines.schedulers import Sampling, read_scheduler
from jaxmem.samplers import Sampler
from jaxmem.stable_diffusion.configs.scheduler import PREDICTION_TYPES
from jaxmem.stable_diffusion.settings import Reading


class PipelineModel(Model):
    """A model of a live pipeline, whose parameters are copied now; a subclass knows one family of pipelines.

    Samples are (channels, rows, columns), as in torch. Conditions are what the pipeline's own `encode_prompt` gives.

    Args:
        pipeline: the pipeline; it is not changed.
        reading: what the user decided about its files; ``height`` and ``width`` of pictures among it.

    Raises:
        ValueError: sizes that cannot be, another scheduler than can be read, or a network that is not the same in JAX.
    """

    call: ClassVar[Any]  #: how the network is called, a function of `jaxmem.pipelines.calls`
    part: ClassVar[str] = "unet"  #: where the pipeline has it
    flow: ClassVar[bool] = False  #: it was trained by flow matching
    in_pixels: ClassVar[bool] = False  #: it works on pixels, not on latents
    skips_layers: ClassVar[bool] = False  #: its pipeline knows ``clip_skip``

    def __init__(self, pipeline: Any, reading: Reading | None = None) -> None:
        self.pipeline, self.reading = pipeline, Reading() if reading is None else reading
        if self.reading.clip_skip and not self.skips_layers:
            raise ValueError(f"clip_skip: expected 0 for a {type(pipeline).__name__}, got {self.reading.clip_skip}")
        network = unwrapped(getattr(pipeline, self.part))
        self._settings = _own_settings(network)
        self.shape = self._shape(self.reading.height, self.reading.width)
        self._sampling: Sampling = read_scheduler(
            pipeline, self.reading, flow=self.flow, in_pixels=self.in_pixels, set_timesteps=self.set_timesteps
        )
        self.schedule: Schedule = self._sampling.schedule
        self.prediction = self._sampling.prediction
        self._encoded: dict[str, Any] = {}
        example = self.conditions([self.an_example()])
        first = None if example is None else jax.tree.map(lambda leaf: leaf[0], example)
        point = jax.ShapeDtypeStruct(self.shape, jnp.float32)
        call = type(self).call
        self.score, self.state = from_torch(
            network,
            self.schedule,
            self.prediction,
            call=call,
            x=point,
            cond=first,
            parameters=jnp.bfloat16 if self.reading.parameters == "bfloat16" else None,
        )
        self.warnings = self.reading.warnings

    def give_up_network(self) -> None:
        """Let the pipeline's network go, whose parameters are copied: its memory is wanted."""
        setattr(self.pipeline, self.part, None)

    def an_example(self) -> str:
        """A prompt that the model knows."""
        return ""

    def side(self) -> int:
        """Rows and columns of x by default."""
        side = self._settings["sample_size"]
        if not isinstance(side, int):
            raise ValueError(f"{self.part}: expected sample_size to be one number, got {side!r}")
        return side

    @property
    def pixels_each(self) -> int:
        """Pixels of a picture along one of x."""
        return 1 if self.in_pixels else int(self.pipeline.vae_scale_factor)

    @property
    def multiple(self) -> int:
        """Number that rows and columns of x are multiples of: the side of a transformer's patches."""
        return int(self._settings.get("patch_size", 1))

    def _shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        each, sides = self.pixels_each, []
        for name, pixels in (("height", height), ("width", width)):
            step = each * self.multiple
            if pixels is not None and (pixels < step or pixels % step):
                raise ValueError(f"{name}: expected a multiple of {step} pixels, got {pixels}")
            sides.append(self.side() if pixels is None else pixels // each)
        return (self.channels(), *sides)

    def channels(self) -> int:
        return int(self._settings["in_channels"])

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of pictures, in pixels."""
        return self.shape[1] * self.pixels_each, self.shape[2] * self.pixels_each

    def set_timesteps(self, scheduler: Any, num_steps: int) -> None:
        """Set a scheduler's timesteps as the pipeline does."""
        scheduler.set_timesteps(num_steps)

    def sampler(self, num_steps: int = 50) -> Sampler:
        """DDIM, or Euler steps at the scheduler's own sigmas."""
        return self._sampling.sampler(num_steps)

    @abstractmethod
    def embed(self, prompt: str) -> Any:
        """The condition of one prompt: a pytree of arrays, without a leading axis."""

    def conditions(self, prompts: Sequence[str]) -> Any:
        """Conditions of prompts, each of which is encoded once, alone."""
        for prompt in prompts:
            if prompt not in self._encoded:
                self._encoded[prompt] = self.embed(prompt)
        return jax.tree.map(lambda *leaves: np.stack(leaves), *(self._encoded[prompt] for prompt in prompts))

    def decode(self, x: Any) -> np.ndarray:
        """Pictures by the pipeline's autoencoder, in torch, one after another."""
        images = [self._picture(one) for one in np.asarray(x)]
        return to_pictures(np.stack(images))

    def _picture(self, x: np.ndarray) -> np.ndarray:
        if self.in_pixels:
            return x.transpose(1, 2, 0)
        import torch

        vae, (mean, deviation) = self._vae, self._latent_scale
        with torch.no_grad():
            given = torch.as_tensor(np.asarray(x * deviation + mean, np.float32), device=vae.device)
            return vae.decode(given[None]).sample[0].cpu().numpy().transpose(1, 2, 0)

    def encode(self, images: np.ndarray) -> Any:
        """Samples x_0 of pictures, one after another: the means that the pipeline's autoencoder gives, in torch."""
        values = from_pictures(images, (*self.picture_size, 3)).transpose(0, 3, 1, 2)
        if self.in_pixels:
            channels = self.channels()
            return jnp.asarray(values if channels == values.shape[1] else values.mean(1, keepdims=True))
        import torch

        vae, (mean, deviation) = self._vae, self._latent_scale
        with torch.no_grad():
            given = (torch.as_tensor(one, device=vae.device)[None] for one in values)
            latents = [vae.encode(one).latent_dist.mode()[0].cpu().numpy() for one in given]
        return jnp.asarray((np.stack(latents) - mean) / deviation, jnp.float32)

    @property
    def _latent_scale(self) -> tuple[Any, Any]:
        """Mean and deviation of the autoencoder's latents, of which x is the standardised form."""
        settings = self._vae.config
        mean, deviation = settings.get("latents_mean"), settings.get("latents_std")
        if mean is None or deviation is None:
            return settings.get("shift_factor") or 0.0, 1 / settings.scaling_factor
        # each channel has its own scale
        return np.reshape(mean, (-1, 1, 1)), np.reshape(deviation, (-1, 1, 1)) / settings.scaling_factor

    @cached_property
    def _vae(self) -> Any:
        """The autoencoder in float32: in half precision some give NaN."""
        import torch

        vae = self.pipeline.vae
        return vae if vae.dtype == torch.float32 else copy.deepcopy(vae).float()

    def identity(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Hashes of parameters and conditions, and the settings of network and scheduler."""
        texts = [*prompts, ""] if self.has_pairs else list(prompts)
        return {
            "pipeline": type(self.pipeline).__name__,
            "network": {name: _plain(value) for name, value in self._settings.items()},
            "sha256": fingerprint(self.state),
            "score": repr(self.score),
            "vae": {} if self.in_pixels else _plain(_own_settings(self.pipeline.vae)),
            "vae_sha256": None if self.in_pixels else fingerprint(arrays_of(self.pipeline.vae)),
            "conditions_sha256": fingerprint(self.conditions(texts)),
            # what was read of the scheduler, whatever the pipeline has now
            "sampler": str(self.sampler(10)),
            "shape": list(self.shape),
            "prediction": self.prediction,
        } | self.reading.decisions

    def contradiction(self, share: float | None) -> str | None:
        """What to tell the user if the first step contradicts the prediction type, in diffusers' words."""
        if self.prediction not in PREDICTION_TYPES:
            return super().contradiction(share)
        return first_step.contradiction(self.prediction, share, "prediction_type", PREDICTION_TYPES)


def encoded(pipeline: Any, **arguments: Any) -> tuple[np.ndarray | None, ...]:
    """What a pipeline's `encode_prompt` gives for one prompt, as arrays without their batch axis."""
    import torch

    with torch.no_grad():
        found = pipeline.encode_prompt(device=pipeline.device, **arguments)
    return tuple(None if one is None else one[0].float().cpu().numpy() for one in found)


def cut(tokenizer: Any, prompt: str, length: int) -> bool:
    """Whether a tokenizer gives a prompt more tokens than ``length``."""
    return len(tokenizer(prompt).input_ids) > length


def _own_settings(module: Any) -> dict[str, Any]:
    """The settings of a network of diffusers, without what diffusers notes for itself, such as where it lay."""
    return {name: value for name, value in dict(module.config).items() if not name.startswith("_")}


def _plain(value: Any) -> Any:
    """A setting as the manifest can have it."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
