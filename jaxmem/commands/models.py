"""``jaxmem generate`` and ``jaxmem spectrum``: one Stable Diffusion model, a few prompts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from jaxmem.commands.output import open_stable_diffusion, say, show_run
from jaxmem.config import FilesConfig, GenerateConfig, PartsConfig, SpectrumConfig


@dataclass(frozen=True)
class Generate:
    """Draw images with a Stable Diffusion model, by guided DDIM sampling."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A diffusers folder, a hub id such as CompVis/stable-diffusion-v1-4, or a single .safetensors file."""
    config: Annotated[GenerateConfig, tyro.conf.arg(name="")]
    out: Path
    """Folder of the run; an unfinished run of the same configuration in it is continued."""
    files: Annotated[FilesConfig, tyro.conf.arg(name="")] = field(default_factory=FilesConfig)
    parts: Annotated[PartsConfig, tyro.conf.arg(name=""), tyro.conf.UseAppendAction] = field(
        default_factory=PartsConfig
    )

    def __call__(self) -> None:
        from jaxmem.audit.generate import run_generate
        from jaxmem.runs.progress import show_progress

        with show_progress() as progress:
            run_generate(
                open_stable_diffusion(self.model, self.files, self.parts), self.config, self.out, progress, say
            )
        show_run(self.out)


@dataclass(frozen=True)
class Spectrum:
    """Extreme eigenvalues of the Hessian of log p_t of a Stable Diffusion model, by Arnoldi or Lanczos."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A diffusers folder, a hub id such as CompVis/stable-diffusion-v1-4, or a single .safetensors file."""
    config: Annotated[SpectrumConfig, tyro.conf.arg(name="")]
    out: Path
    """Folder of the run; an unfinished run of the same configuration in it is continued."""
    files: Annotated[FilesConfig, tyro.conf.arg(name="")] = field(default_factory=FilesConfig)
    parts: Annotated[PartsConfig, tyro.conf.arg(name=""), tyro.conf.UseAppendAction] = field(
        default_factory=PartsConfig
    )

    def __call__(self) -> None:
        from jaxmem.audit.spectrum import run_spectrum
        from jaxmem.runs.progress import show_progress

        with show_progress() as progress:
            run_spectrum(
                open_stable_diffusion(self.model, self.files, self.parts), self.config, self.out, progress, say
            )
        show_run(self.out)
