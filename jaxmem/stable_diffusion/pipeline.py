"""A Stable Diffusion model as functions: prompts to embeddings, latents to scores, latents to images."""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxmem import first_step
from jaxmem.model import Model, require_finite
from jaxmem.runs import memory
from jaxmem.runs.progress import Say, quiet
from jaxmem.samplers import DDIM
from jaxmem.sampling import sample_path
from jaxmem.score import NetworkScore, with_guidance
from jaxmem.stable_diffusion import weights
from jaxmem.stable_diffusion.components import Component, Configs, Maker, check_fit, check_skip, latent_shape
from jaxmem.stable_diffusion.configs import SchedulerConfig
from jaxmem.stable_diffusion.configs.scheduler import PREDICTION_TYPES
from jaxmem.stable_diffusion.folder import read_folder, write_folder
from jaxmem.stable_diffusion.live import read_live
from jaxmem.stable_diffusion.live_comparison import unproven
from jaxmem.stable_diffusion.settings import Reading, as_list
from jaxmem.stable_diffusion.text_encoder import TextEncoder, encode_text
from jaxmem.stable_diffusion.tokenizer import rows_of_words, tokenize, whole_tokens
from jaxmem.stable_diffusion.unet import UNet
from jaxmem.stable_diffusion.vae import VAE, decode_latents, mean_latents


class StableDiffusion(Model):
    """A model of the Stable Diffusion 1.x or 2.x architecture, made by `StableDiffusion.load`.

    Everything was checked when it was made; the weights of each network are read when it is first used. Latents are
    (rows, columns, channels), channels last: diffusers' latents are ``transpose(2, 0, 1)`` of them.
    """

    has_pairs = True  # the empty prompt is the absence of one
    guidance = 7.5  # diffusers' default

    def __init__(
        self,
        configs: Configs,
        components: Mapping[str, Component],
        make_tokenizer: Callable[[], Any],
        reading: Reading | None = None,
    ) -> None:
        self.reading = Reading() if reading is None else reading  #: what was decided about its files, and what to say
        self.unet_config, self.text_encoder_config, self.vae_config, self.scheduler = configs
        self.components = dict(components)
        self._make_tokenizer = make_tokenizer
        self._loaded: dict[str, tuple[nnx.GraphDef, nnx.State]] = {}
        #: shape of one latent, (64, 64, 4) for 1.x where no other size of pictures was asked for
        self.shape = latent_shape(self.unet_config, self.vae_config, self.reading)
        check_skip(self.reading.clip_skip, self.text_encoder_config)
        self.schedule, self.prediction = self.scheduler.schedule, self.scheduler.prediction
        self.warnings = self.reading.warnings  #: what may be wrong with the model as it was read
        check_fit(*configs[:3])

    @classmethod
    def load(
        cls,
        source: Any,
        *,
        ignore_settings: Sequence[str] = (),
        prediction_type: str | None = None,
        say: Say = quiet,
    ) -> "StableDiffusion":
        """Open a diffusers model: a folder, a hub id such as ``"CompVis/stable-diffusion-v1-4"``, or a live pipeline.

        Configurations and the names, shapes and types of all tensors are checked now, before anything large is read.
        PyTorch is not imported.

        Of a live pipeline, UNet and text encoder are copied now, the autoencoder at its first use, and each is compared
        with the pipeline's own network at random points (`live_comparison.compare`): what was hooked into a network or
        put in its place is in no list of settings. That takes two forward passes of each in PyTorch and JAX.

        Args:
            source: the model. A `Path`, and a text that looks like one, is never looked up on the hub.
            ignore_settings: names of settings that would be refused and cannot change what the model computes, as the
                user knows; each is read as if it were not in its file, with a warning, and recorded in runs.
            prediction_type: "epsilon", "v_prediction" or "sample", in place of what the scheduler's file says or does
                not say; recorded in runs.
            say: told of each comparison of a live pipeline.

        Raises:
            ValueError: it is not there, not of this architecture, incomplete, damaged, or beside or inside it lies what
                changes its function and is not read (LoRA, ControlNets, replaced forwards); the message lists all that
                is wrong with one file.
            OSError: the hub cannot be reached.

        Warns:
            UserWarning: the model may not be what its files make of it (`Reading.warnings`).
        """
        model = cls.read(source, Reading(as_list("ignore_settings", ignore_settings), prediction_type), say)
        for text in model.warnings:
            warnings.warn(text, stacklevel=2)
        return model

    @classmethod
    def read(cls, source: Any, reading: Reading, say: Say = quiet) -> "StableDiffusion":
        """`load` with all that can be decided, which raises the same; warns of nothing, ``warnings`` has it."""
        if isinstance(source, str | Path):
            model = cls(*read_folder(source, reading), reading)
        else:
            model = cls(*read_live(source, reading, say), reading)
            model.require_memory()
            for part in ("unet", "text_encoder"):
                model.network(part)
            reading.warnings += unproven(source)
        reading.finish()
        return model

    @classmethod
    def from_modules(
        cls, unet: UNet, text_encoder: TextEncoder, vae: VAE, tokenizer: Any, scheduler: SchedulerConfig
    ) -> "StableDiffusion":
        """A model of networks that exist already, such as trained ones, for instance to `export` it.

        Raises:
            ValueError: the networks do not fit together.
        """
        networks: dict[str, Any] = {"unet": unet, "text_encoder": text_encoder, "vae": vae}
        components = {
            part: Component(Maker(type(network), network.config), partial(nnx.split, network))
            for part, network in networks.items()
        }
        configs = (unet.config, text_encoder.config, vae.config, scheduler)
        return cls(configs, components, lambda: tokenizer)

    def settle(self) -> None:
        """Read all networks and the tokenizer now, and let go of where they came from."""
        for part, component in self.components.items():
            self.network(part)
            self.components[part] = component._replace(load=partial(self._loaded.__getitem__, part))
        self._make_tokenizer = partial({"tokenizer": self.tokenizer}.__getitem__, "tokenizer")

    @property
    def bytes_to_read(self) -> int:
        """Of the parameters, in float32, that are not in memory yet."""
        return sum(component.float32_bytes for part, component in self.components.items() if part not in self._loaded)

    def require_memory(self) -> None:
        """Raise a ValueError, before anything is read, if the parameters that are still to be read do not fit."""
        memory.require(
            self.bytes_to_read, "the parameters of the model", "close other programs, or use a larger machine"
        )

    def network(self, part: str) -> tuple[nnx.GraphDef, nnx.State]:
        """A network, ``"unet"``, ``"text_encoder"`` or ``"vae"``, and its parameters; read at first use and kept."""
        if part not in self._loaded:
            self._loaded[part] = self.components[part].load()
        return self._loaded[part]

    @cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return self._make_tokenizer()

    @cached_property
    def score(self) -> NetworkScore:  # type: ignore[override]
        """``s(x, t, c) = ∇ log p_t(x | c)`` of one latent; ``c`` is one prompt's embedding (`embed`)."""
        graphdef, _ = weights.shapes(self.components["unet"].make)
        return NetworkScore(graphdef, self.scheduler.schedule, self.scheduler.prediction)

    @property
    def state(self) -> nnx.State:
        """The UNet's parameters, the score's first argument; read at first use."""
        return self.network("unet")[1]

    def conditions(self, prompts: Sequence[str], batch: int = 16) -> Float[np.ndarray, "n tokens features"]:
        """The embeddings of `embed`, on the host, ``batch`` at a time by one program; what is cut is not warned of."""
        parts = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            for first in range(0, len(prompts), batch):
                part = list(prompts[first : first + batch])
                filled = part + part[-1:] * (batch - len(part))
                parts.append(np.asarray(self.embed(filled))[: len(part)])
        return np.concatenate(parts)

    def embed(self, prompts: Sequence[str]) -> Float[Array, "n tokens features"]:
        """The text encoder's last hidden states; the empty prompt's is the unconditional one.

        With ``clip_skip`` those of an earlier layer, after the final layer norm, as in diffusers.

        Raises:
            ValueError: the tokenizer gives a token that the text encoder does not know.
        """
        tokens = self.tokenize(prompts)
        graphdef, state = self.network("text_encoder")
        return encode_text(graphdef, state, tokens, self.reading.clip_skip)

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids, shape (n, tokens): padded to the encoder's length, or cut to it, with a warning."""
        return tokenize(self.tokenizer, self.text_encoder_config, prompts)

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """Which prompts have more tokens than the text encoder takes, so that `tokenize` cuts them."""
        length = self.text_encoder_config.max_position_embeddings
        return [len(ids) > length for ids in self.whole_tokens(prompts)]

    def whole_tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt, neither cut nor padded, with all vectors of its textual inversions."""
        return whole_tokens(self.tokenizer, prompts)

    def token_rows(self, prompt: str) -> list[slice] | None:
        return rows_of_words(self.tokenizer, prompt, self.text_encoder_config.max_position_embeddings)

    def sampler(self, num_steps: int = 50) -> DDIM:
        """DDIM as diffusers runs it for this model; 50 steps are its default and the paper's."""
        config = self.scheduler
        return DDIM(config.schedule, num_steps, config.steps_offset, config.final_alpha_one, spacing=config.spacing)

    def path(
        self,
        noise: Float[Array, "n rows columns channels"],
        prompts: Sequence[str],
        *,
        guidance: float | None = None,
        negative: str = "",
        num_steps: int = 50,
    ) -> Iterator[tuple[int, Float[Array, "n rows columns channels"]]]:
        """Yield ``(t, x_t)`` of guided DDIM sampling before each step, and ``(-1, x_0)`` at the end.

        The score is ``s(x, ∅) + guidance (s(x, c) - s(x, ∅))``; without a scale it is 7.5, diffusers' default. Memory
        is that of ``2 n`` forward passes at once, of ``n`` with a scale of 1.
        """
        embedded = self.embed([*prompts, negative])
        scale = self.guidance if guidance is None else guidance
        if scale == 1:
            return sample_path(self.score, self.state, noise, embedded[:-1], sampler=self.sampler(num_steps))
        score, cond = with_guidance(self.score, embedded[:-1], scale, embedded[-1])
        return sample_path(score, self.state, noise, cond, sampler=self.sampler(num_steps))

    def decode(self, latents: Float[Array, "n rows columns channels"]) -> np.ndarray:
        """Images of latents, uint8, shape (n, height, width, 3); one after another, to bound memory."""
        graphdef, state = self.network("vae")
        images = [np.asarray(decode_latents(graphdef, state, latent)) for latent in latents]
        return np.round(255 * np.clip(np.stack(images) / 2 + 0.5, 0, 1)).astype(np.uint8)

    @property
    def picture_size(self) -> tuple[int, int]:
        each = 2 ** (len(self.vae_config.block_out_channels) - 1)
        return self.shape[0] * each, self.shape[1] * each

    def encode(self, images: np.ndarray) -> Float[Array, "n rows columns channels"]:
        """The mean latents of uint8 images, shape (n, height, width, 3)."""
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(f"images: expected uint8 (n, height, width, 3), got {images.dtype} {images.shape}")
        graphdef, state = self.network("vae")
        return jnp.stack([mean_latents(graphdef, state, image.astype(np.float32) / 127.5 - 1) for image in images])

    def identity(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Hashes of weights and tokens, and all settings; not where the model lies, nor its tokenizer's files."""
        tokens = hashlib.sha256()
        for ids in self.whole_tokens(prompts):
            tokens.update(np.asarray(ids, np.int32).tobytes())
        tokens.update(self.tokenize([""]).tobytes())  # with the padding
        return {
            "sha256": self.fingerprint(),
            "tokens_sha256": tokens.hexdigest(),
            "unet": asdict(self.unet_config),
            "text_encoder": asdict(self.text_encoder_config),
            "vae": asdict(self.vae_config),
            "scheduler": asdict(self.scheduler),
        } | self.reading.decisions

    def check(self) -> None:
        """Read all three networks; raise a ValueError if they do not fit into memory or are not finite."""
        self.require_memory()
        require_finite(
            (f"{part}: {'.'.join(map(str, path))}", variable.get_value())
            for part in ("unet", "text_encoder", "vae")
            for path, variable in nnx.to_flat_state(self.network(part)[1])
        )

    def contradiction(self, share: float | None) -> str | None:
        """What to tell the user if the first step contradicts the prediction type, in diffusers' words."""
        return first_step.contradiction(self.prediction, share, "prediction_type", PREDICTION_TYPES)

    def fingerprint(self, parts: Sequence[str] = ("unet", "text_encoder", "vae")) -> str:
        """SHA-256 over the parameters of these parts, as float32, in the order of keys; settings are not in it."""
        return weights.fingerprint(self.network(part)[1] for part in parts)

    def export(self, folder: str | Path, dtype: Any = np.float32) -> Path:
        """Write the model as a diffusers folder, which diffusers and `load` read; float32 loses nothing.

        A folder has no place for ``clip_skip`` and the size of pictures: give them again.

        Raises:
            ValueError: the folder exists and is not empty, or a parameter does not fit into ``dtype``.
            OSError: it cannot be written.
        """
        configs = (self.unet_config, self.text_encoder_config, self.vae_config, self.scheduler)
        return write_folder(Path(folder), configs, self.network, self.tokenizer, dtype)
