"""What is asked of a model: to read its files, images and spectra of prompts, an audit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxmem.config.checks import LAST_SEED, at_least, in_range, whole_in_range


@dataclass(frozen=True)
class FilesConfig:
    """How a model's files are read, where they are not clear or not known."""

    ignore_setting: tuple[str, ...] = ()
    """Names of settings that are refused and, as you know, cannot change what the model computes. Recorded."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the network predicts, in place of what the scheduler's file says. Recorded."""


@dataclass(frozen=True)
class PartsConfig:
    """What is put into a model, or in place of its parts. Recorded."""

    lora: tuple[str, ...] = ()
    """A LoRA that is fused into the model, FILE or FILE:SCALE; once for each."""
    embedding: tuple[Path, ...] = ()
    """A .safetensors file of a textual inversion, whose word prompts may then have; once for each."""
    unet: Path | None = None
    """Folder of another UNet for this model, as training leaves it: checkpoint-500/unet, or checkpoint-500."""
    clip_skip: int | None = None
    """Last layers of the text encoder that are left out, as diffusers counts them."""
    height: int | None = None
    """Of pictures, in pixels; by default the model's own."""
    width: int | None = None
    """Of pictures, in pixels; by default the model's own."""
    parameters: Literal["float32", "bfloat16"] = "float32"
    """Type in which the network's parameters are kept. bfloat16 takes half the memory and rounds them, which makes
    another model; what is computed is computed in float32. Not for Stable Diffusion 1 and 2."""


@dataclass(frozen=True)
class GenerateConfig:
    """Images of prompts by guided DDIM sampling."""

    prompt: tuple[str, ...]  # one or more; each is one image
    negative_prompt: str = ""  # what guidance leads away from
    guidance: float = 7.5  # diffusers' default
    ddim_steps: int = 50  # diffusers' default, and the paper's
    seed: int = 0  # of the starting noise: image i starts from fold_in(key(seed), i)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("prompt: expected at least one text, got none")
        for text in (*self.prompt, self.negative_prompt):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ValueError(f"prompt: expected text in UTF-8, got other bytes in {text!r}") from None
        in_range("guidance", self.guidance, 1, 1000)  # 1 is no guidance; below, diffusers turns it off
        whole_in_range("ddim_steps", self.ddim_steps, 1, 1000)
        whole_in_range("seed", self.seed, 0, LAST_SEED)


@dataclass(frozen=True)
class SpectrumConfig(GenerateConfig):
    """Extreme eigenvalues of the Hessian of log p_t(x_t | prompt), at the x_t of guided DDIM sampling."""

    timestep: int | None = None  # one that the DDIM steps visit; by default the first, where x_t is the noise itself
    unconditional: bool = False  # also of log p_t(x_t), without a prompt, at the same points
    method: Literal["arnoldi", "lanczos"] = "arnoldi"  # of J, one product a step; of its symmetric part, two
    num_steps: int = 20  # Krylov steps
    batch: int = 1  # points whose products go through the network together

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in ("arnoldi", "lanczos"):
            raise ValueError(f"method: expected 'arnoldi' or 'lanczos', got {self.method!r}")
        at_least("num_steps", self.num_steps, 1)
        at_least("batch", self.batch, 1)
        if self.timestep is not None:
            whole_in_range("timestep", self.timestep, 0, 999)


@dataclass(frozen=True)
class AuditConfig:
    """How each prompt is looked at: from the same starting noises, along guided sampling."""

    noises: int = 4
    """Starting noises, the same for all prompts: noise j is drawn with fold_in(key(seed), j). Wen et al. took 4."""
    ddim_steps: int = 50  # diffusers' default, and the paper's
    steps_run: int | None = None
    """How many of these steps are made, from the first; by default all, and only then there is an image."""
    guidance: float | None = None
    """By default diffusers' 7.5; 1 is none, and the default without a MODEL: the shipped one was examined so."""
    seed: int = 0
    timesteps: tuple[int, ...] = ()
    """Timesteps of spectra, that the steps visit. By default the first; for exact ones also near 481, 281 and 41, or
    where another schedule than Stable Diffusion's has as much noise for the signal (Schedule.usual_timestep)."""
    method: Literal["auto", "eigh", "lanczos", "none"] = "auto"
    """Of spectra. By default all eigenvalues (eigh) of latents of up to 2,048 numbers, else Ritz values (lanczos)."""
    num_steps: int = 20
    """Steps of Lanczos, two products each."""
    count_budget: int | None = None
    """Products per spectrum for an estimate of its positive count (jaxmem.count_positive), from d + 1 on for the exact
    one, through a file in the run's folder; by default neither."""
    directions: int | None = None
    """Directions decoded for the most and the least memorized point; by default 3 for exact spectra, else 0."""
    batch: int | None = None
    """Points that go through the network together; by default 16, or 1 of latents of more than 2,048 numbers."""

    def __post_init__(self) -> None:
        for name in ("noises", "num_steps"):
            at_least(name, getattr(self, name), 1)
        for name in ("batch", "count_budget"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        if self.directions is not None:
            whole_in_range("directions", self.directions, 0, 16)
        whole_in_range("ddim_steps", self.ddim_steps, 1, 1000)
        if self.steps_run is not None:
            whole_in_range("steps_run", self.steps_run, 1, self.ddim_steps)
        if self.guidance is not None:
            in_range("guidance", self.guidance, 1, 1000)  # 1 is no guidance; below, diffusers turns it off
        whole_in_range("seed", self.seed, 0, LAST_SEED)
        if not isinstance(self.timesteps, tuple | list):
            raise ValueError(f"timesteps: expected a list of them, got {self.timesteps!r}")
        for timestep in self.timesteps:
            whole_in_range("timesteps", timestep, 0, 1_000_000)  # millionths of sigma, of flow models
        if len(set(self.timesteps)) != len(self.timesteps):
            raise ValueError(f"timesteps: expected each once, got {self.timesteps}")
        if self.method not in ("auto", "eigh", "lanczos", "none"):
            raise ValueError(f"method: expected 'auto', 'eigh', 'lanczos' or 'none', got {self.method!r}")
