"""``jaxmem reproduce``: the paper's experiments."""

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxmem.commands.output import model_name, open_stable_diffusion, say, say_result, show_run, write_page
from jaxmem.config import (
    AuditConfig,
    DimensionConfig,
    FilesConfig,
    FinetuneConfig,
    MnistConfig,
    PartsConfig,
    Toy2dConfig,
    VerbatimConfig,
)
from jaxmem.terminal import visible

Preset = Literal["small", "paper"]


@dataclass(frozen=True)
class Toy2d:
    """A Gaussian and one distant point, repeated: learned Hessians against the closed form (section 5.1)."""

    config: Annotated[Toy2dConfig, tyro.conf.arg(name="")]
    out: Path
    """Folder of the run; an unfinished run of the same configuration in it is continued."""
    preset: Preset = "small"
    """Sizes for two CPU cores, or the paper's. Other flags change single values of it."""

    def __call__(self) -> None:
        from jaxmem.experiments.toy2d import run_toy2d
        from jaxmem.runs.progress import show_progress

        with show_progress() as progress:
            run_toy2d(self.config, self.out, progress)
        show_run(self.out)


@dataclass(frozen=True)
class Mnist:
    """One handwritten nine memorized, threes not: spectra of ∂s/∂x along the sampling path (section 5.2)."""

    config: Annotated[MnistConfig, tyro.conf.arg(name="")]
    out: Path
    """Folder of the run; an unfinished run of the same configuration in it is continued."""
    preset: Preset = "small"
    """Sizes for two CPU cores, or the paper's. Other flags change single values of it."""

    def __call__(self) -> None:
        from jaxmem.experiments.mnist import run_mnist
        from jaxmem.runs.progress import show_progress

        with show_progress() as progress:
            run_mnist(self.config, self.out, progress)
        show_run(self.out)


@dataclass(frozen=True)
class Verbatim:
    """A small Stable Diffusion on digits that memorized captions, trained from nothing and audited (section 5.3)."""

    config: Annotated[VerbatimConfig, tyro.conf.arg(name="")]
    out: Path
    """Folder of the run; an unfinished run of the same configuration in it is continued."""

    def __call__(self) -> None:
        from jaxmem.experiments.verbatim import run_verbatim
        from jaxmem.runs.progress import show_progress

        with show_progress() as progress:
            run_verbatim(self.config, self.out, progress, say)
        for name in ("audit", "course"):
            write_page(self.out / name)
        show_run(self.out)


@dataclass(frozen=True)
class Finetune:
    """The shipped model fine-tuned on digits that it has not seen, some of them duplicated: all weights, and LoRA."""

    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")]
    out: Path
    """Folder of the run; an unfinished run of the same configuration in it is continued."""
    preset: Literal["small"] = "small"
    """Sizes for two CPU cores. Other flags change single values of it."""

    def __call__(self) -> None:
        _two_devices()
        from jaxmem.experiments.finetune import run_finetune
        from jaxmem.runs.progress import show_progress

        with show_progress() as progress:
            run_finetune(self.config, self.out, progress, say)
        show_run(self.out)


def _two_devices() -> None:
    """Two devices of a CPU's cores, a point on each, where nobody has chosen: faster for spectra of small networks."""
    import jax

    flags = os.environ.get("XLA_FLAGS", "")
    chosen = "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in flags
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if not chosen and (cores or 1) > 1:
        with suppress(RuntimeError):  # JAX runs already, as in a test
            jax.config.update("jax_num_cpu_devices", 2)


@dataclass(frozen=True)
class Dimension:
    """Estimators of local dimension on twelve manifolds whose dimension is known, beside classical ones."""

    config: Annotated[DimensionConfig, tyro.conf.arg(name="")]
    out: Path
    """Folder of the run; an unfinished run of the same configuration in it is continued."""

    def __call__(self) -> None:
        from jaxmem.experiments.dimension import run_dimension
        from jaxmem.runs.progress import show_progress

        with show_progress() as progress:
            run_dimension(self.config, self.out, progress)
        show_run(self.out)


@dataclass(frozen=True)
class PaperFigures:
    """The paper's Figures 6 and 7 and Appendix A of any Stable Diffusion model, from labelled prompts (section 5.3)."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A diffusers folder, a hub id such as CompVis/stable-diffusion-v1-4, or a single .safetensors file."""
    config: Annotated[AuditConfig, tyro.conf.arg(name="")]
    prompts: tuple[Path, ...]
    """Files of prompts with a column of categories, see jaxmem audit."""
    out: Path | None = None
    """Folder of the run; an unfinished run of the same configuration in it is continued."""
    per_category: int = 30
    """Prompts of each category, the first ones; the paper took 30. The empty prompt is added."""
    dry_run: bool = False
    """Say what it would take (products, hours, gigabytes; one batch is timed) and write nothing."""
    preset: Preset = "small"
    """A first look, or the paper's counts over timesteps. Other flags change single values of it."""
    files: Annotated[FilesConfig, tyro.conf.arg(name="")] = field(default_factory=FilesConfig)
    parts: Annotated[PartsConfig, tyro.conf.arg(name=""), tyro.conf.UseAppendAction] = field(
        default_factory=PartsConfig
    )

    def __call__(self) -> None:
        from jaxmem.prompts import NO_PROMPT, first_of_each, gather

        if self.out is None and not self.dry_run:
            raise ValueError("--out: expected a folder for the run, got none; or ask what it takes with --dry-run")
        if self.config.method == "none":
            raise ValueError("--method: expected spectra to draw (auto, eigh or lanczos), got none; see jaxmem audit")
        prompts = [*first_of_each(gather([(self.prompts, None)], merge_duplicates=True), self.per_category), NO_PROMPT]

        from jaxmem.audit import audit, audit_cost
        from jaxmem.runs.progress import show_progress

        model, name = open_stable_diffusion(self.model, self.files, self.parts), model_name(self.model)
        if self.dry_run or self.out is None:
            say_result(f"audited model: {name}")
            audit_cost(model, prompts, self.config, say=say_result)
            return
        with show_progress() as progress:
            found = audit(model, prompts, self.config, folder=self.out, name=name, progress=progress, say=say)

        from jaxmem.report.paper import draw

        write_page(self.out)
        for path in draw(found, self.out / "figures"):
            print(visible(str(path)))
