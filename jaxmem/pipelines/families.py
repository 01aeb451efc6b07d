"""The families of pipelines: how each encodes prompts, and what of its network is known."""

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from jaxmem.pipelines import calls
from jaxmem.pipelines.model import PipelineModel, cut, encoded
from jaxmem.prompts import NO_PROMPT, Prompt


class StableDiffusionXL(PipelineModel):
    """Stable Diffusion XL: two text encoders, whose pooled output and the picture's size are conditions too."""

    call = staticmethod(calls.unet_xl)
    has_pairs = True
    guidance = 5.0  # diffusers' default
    skips_layers = True

    def embed(self, prompt: str) -> dict[str, Any]:
        pipeline = self.pipeline
        tokens, absent, pooled, pooled_absent = encoded(
            pipeline,
            prompt=prompt,
            do_classifier_free_guidance=not prompt,
            clip_skip=self.reading.clip_skip or None,
        )
        if not prompt:  # its absence, which is zeros where the pipeline was trained so
            tokens, pooled = absent, pooled_absent
        height, width = self.picture_size
        return {
            "tokens": tokens,
            "pooled": pooled,
            "time_ids": np.array([height, width, 0, 0, height, width], np.float32),
        }

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        tokenizer = self.pipeline.tokenizer or self.pipeline.tokenizer_2
        return [cut(tokenizer, prompt, tokenizer.model_max_length) for prompt in prompts]


class StableDiffusion3(PipelineModel):
    """Stable Diffusion 3: flow matching with two CLIP encoders and T5."""

    call = staticmethod(calls.transformer_3)
    part = "transformer"
    flow = True
    has_pairs = True
    guidance = 7.0  # diffusers' default
    skips_layers = True

    def set_timesteps(self, scheduler: Any, num_steps: int) -> None:
        patch = self.multiple
        _shift(scheduler, num_steps, (self.shape[1] // patch) * (self.shape[2] // patch), 1.16)

    def embed(self, prompt: str) -> dict[str, Any]:
        tokens, _, pooled, _ = encoded(
            self.pipeline,
            prompt=prompt,
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            clip_skip=(self.reading.clip_skip or None) if prompt else None,  # as diffusers does without a prompt
        )
        return {"tokens": tokens, "pooled": pooled}

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        tokenizer = self.pipeline.tokenizer
        return [cut(tokenizer, prompt, tokenizer.model_max_length) for prompt in prompts]


class Flux(PipelineModel):
    """FLUX: flow matching, with the scale of guidance as an input of the network: there is no unconditional score."""

    call = staticmethod(calls.flux)
    part = "transformer"
    flow = True
    embedded_guidance: ClassVar[float] = 3.5  # diffusers' default

    @property
    def multiple(self) -> int:
        return 2  # the pipeline, not the network, cuts latents into patches

    def side(self) -> int:
        return int(self.pipeline.default_sample_size)

    def channels(self) -> int:
        return int(self._settings["in_channels"]) // 4

    def set_timesteps(self, scheduler: Any, num_steps: int) -> None:
        tokens = (self.shape[1] // 2) * (self.shape[2] // 2)
        _shift(scheduler, num_steps, tokens, 1.15, np.linspace(1.0, 1 / num_steps, num_steps))

    def embed(self, prompt: str) -> dict[str, Any]:
        tokens, pooled, _ = encoded(self.pipeline, prompt=prompt)
        guidance = (
            {"guidance": np.array(self.embedded_guidance, np.float32)} if self._settings["guidance_embeds"] else {}
        )
        return {"tokens": tokens, "pooled": pooled} | guidance

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        return [cut(self.pipeline.tokenizer_2, prompt, 512) for prompt in prompts]


class PixArt(PipelineModel):
    """PixArt-α and -Σ: a transformer with the tokens of T5."""

    call = staticmethod(calls.pixart)
    part = "transformer"
    has_pairs = True
    guidance = 4.5  # diffusers' default

    @property
    def _length(self) -> int:
        return 300 if "Sigma" in type(self.pipeline).__name__ else 120  # of tokens, in the pipelines' calls

    def embed(self, prompt: str) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokens, mask, _, _ = encoded(
                self.pipeline,
                prompt=prompt,
                do_classifier_free_guidance=False,
                clean_caption=True,
                max_sequence_length=self._length,
            )
        height, width = self.picture_size
        found = {"tokens": tokens, "mask": mask}
        if self._settings["sample_size"] == 128 and self._length == 120:
            found |= {
                "resolution": np.array([height, width], np.float32),
                "aspect_ratio": np.array([height / width], np.float32),
            }
        return found

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        return [cut(self.pipeline.tokenizer, prompt, self._length) for prompt in prompts]


class _OfClasses(PipelineModel):
    """A model whose prompts are classes: their numbers, or the pipeline's names of them."""

    condition = "class"

    @abstractmethod
    def number_of_classes(self) -> int:
        """Number of classes, without the one that stands for none."""

    def names(self) -> dict[str, int]:
        """Numbers of classes by name."""
        return {}

    def an_example(self) -> str:
        return "0"

    def embed(self, prompt: str) -> np.ndarray:
        number, known = self.number_of_classes(), self.names()
        if prompt in known:
            return np.array(known[prompt], np.int32)
        if prompt.isascii() and prompt.isdecimal() and int(prompt) < number:
            return np.array(int(prompt), np.int32)
        named = " or their names" if known else ""
        raise ValueError(f"prompts: expected classes of this model, 0 to {number - 1}{named}, got {prompt!r:.60}")

    def prompts(self) -> list[Prompt]:
        return [Prompt(str(number)) for number in range(self.number_of_classes())]


class DiT(_OfClasses):
    """Diffusion transformers of classes; the class after the last stands for none."""

    call = staticmethod(calls.dit)
    part = "transformer"
    has_pairs = True
    guidance = 4.0  # diffusers' default

    @property
    def pixels_each(self) -> int:
        return 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)

    def number_of_classes(self) -> int:
        return int(self._settings["num_embeds_ada_norm"])

    def names(self) -> dict[str, int]:
        return dict(getattr(self.pipeline, "labels", None) or {})

    def embed(self, prompt: str) -> np.ndarray:
        return super().embed(prompt) if prompt else np.array(self.number_of_classes(), np.int32)


class PixelUNet(PipelineModel):
    """DDPM and DDIM pipelines of a `UNet2DModel` without a condition, on pixels."""

    call = staticmethod(calls.unet_of_pixels)
    in_pixels = True
    condition = "none"

    def embed(self, prompt: str) -> None:
        if prompt:
            raise ValueError(f"prompts: expected the empty one, as this model has no condition, got {prompt!r:.60}")

    def conditions(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            self.embed(prompt)

    def prompts(self) -> list[Prompt]:
        return [NO_PROMPT]


class PixelUNetOfClasses(_OfClasses):
    """The same with class labels (``num_class_embeds``)."""

    call = staticmethod(calls.unet_of_pixels)
    in_pixels = True

    def number_of_classes(self) -> int:
        return int(self._settings["num_class_embeds"])


def _shift(scheduler: Any, num_steps: int, tokens: int, max_shift: float, sigmas: Any = None) -> None:
    """Set the sigmas of flow matching; with dynamic shifting they depend on the number of image tokens."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    settings, shift = scheduler.config, {}
    if settings.get("use_dynamic_shifting"):
        shift["mu"] = calculate_shift(
            tokens,
            settings.get("base_image_seq_len", 256),
            settings.get("max_image_seq_len", 4096),
            settings.get("base_shift", 0.5),
            settings.get("max_shift", max_shift),
        )
    given = {} if sigmas is None else {"sigmas": list(sigmas)}
    scheduler.set_timesteps(num_steps if sigmas is None else None, **given, **shift)
