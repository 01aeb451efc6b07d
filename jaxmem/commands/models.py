"""``jaxmem generate`` and ``jaxmem spectrum``: one Stable Diffusion model, a few prompts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from jaxmem.commands.output import open_model, say, show_run
from jaxmem.config import FilesConfig, GenerateConfig, SpectrumConfig


@dataclass(frozen=True)
class Generate:
    """Draw images with a Stable Diffusion model, by guided DDIM sampling."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A diffusers folder, or a hub id such as CompVis/stable-diffusion-v1-4."""
    config: Annotated[GenerateConfig, tyro.conf.arg(name="")]
    out: Path
    """Folder of the run; an unfinished run of the same configuration in it is continued."""
    files: Annotated[FilesConfig, tyro.conf.arg(name="")] = field(default_factory=FilesConfig)

    def __call__(self) -> None:
        from jaxmem.audit.generate import run_generate
        from jaxmem.runs.progress import show_progress

        with show_progress() as progress:
            run_generate(open_model(self.model, self.files), self.config, self.out, progress, say)
        show_run(self.out)


@dataclass(frozen=True)
class Spectrum:
    """Extreme eigenvalues of the Hessian of log p_t of a Stable Diffusion model, by Arnoldi or Lanczos."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A diffusers folder, or a hub id such as CompVis/stable-diffusion-v1-4."""
    config: Annotated[SpectrumConfig, tyro.conf.arg(name="")]
    out: Path
    """Folder of the run; an unfinished run of the same configuration in it is continued."""
    files: Annotated[FilesConfig, tyro.conf.arg(name="")] = field(default_factory=FilesConfig)

    def __call__(self) -> None:
        from jaxmem.audit.spectrum import run_spectrum
        from jaxmem.runs.progress import show_progress

        with show_progress() as progress:
            run_spectrum(open_model(self.model, self.files), self.config, self.out, progress, say)
        show_run(self.out)
