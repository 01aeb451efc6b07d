"""The command line: parse, call one function, print. JAX loads only when there is work."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxmem import __version__
from jaxmem.config import (
    MNIST_PRESETS,
    SD_PRESETS,
    TOY2D_PRESETS,
    AuditConfig,
    GenerateConfig,
    MnistConfig,
    SpectrumConfig,
    Toy2dConfig,
    VerbatimConfig,
)

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
        from jaxmem.progress import show_progress

        with show_progress() as progress:
            run_toy2d(self.config, self.out, progress)
        _show(self.out)


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
        from jaxmem.progress import show_progress

        with show_progress() as progress:
            run_mnist(self.config, self.out, progress)
        _show(self.out)


@dataclass(frozen=True)
class Verbatim:
    """A small Stable Diffusion on digits that memorized captions, trained from nothing and audited (section 5.3)."""

    config: Annotated[VerbatimConfig, tyro.conf.arg(name="")]
    out: Path
    """Folder of the run; an unfinished run of the same configuration in it is continued."""

    def __call__(self) -> None:
        from jaxmem.experiments.verbatim import run_verbatim
        from jaxmem.progress import show_progress

        with show_progress() as progress:
            run_verbatim(self.config, self.out, progress, _say)
        for name in ("audit", "course"):
            _write_page(self.out / name)
        _show(self.out)


@dataclass(frozen=True)
class PaperFigures:
    """The paper's Figures 6 and 7 and Appendix A of any Stable Diffusion model, from labelled prompts (section 5.3)."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A diffusers folder, or a hub id such as CompVis/stable-diffusion-v1-4."""
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

    def __call__(self) -> None:
        from jaxmem.prompts import NO_PROMPT, first_of_each, gather

        if self.out is None and not self.dry_run:
            raise ValueError("--out: expected a folder for the run, got none; or ask what it takes with --dry-run")
        prompts = [*first_of_each(gather([(self.prompts, None)], merge_duplicates=True), self.per_category), NO_PROMPT]

        from jaxmem.audit import read_audit, run_audit
        from jaxmem.progress import show_progress
        from jaxmem.runs import Run
        from jaxmem.stable_diffusion.pipeline import StableDiffusion

        out = None if self.dry_run else self.out
        with show_progress() as progress:
            run_audit(StableDiffusion.load(self.model), prompts, self.config, out, progress=progress, say=_say)
        if out is not None:
            from jaxmem.report.paper import draw

            _write_page(out)
            for path in draw(read_audit(Run.read(out)), out / "figures"):
                print(path)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Figures:
    """Draw the figures of a finished run again, and print its table."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""

    def __call__(self) -> None:
        _show(self.run)


@dataclass(frozen=True)
class Generate:
    """Draw images with a Stable Diffusion model, by guided DDIM sampling."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A diffusers folder, or a hub id such as CompVis/stable-diffusion-v1-4."""
    config: Annotated[GenerateConfig, tyro.conf.arg(name="")]
    out: Path
    """Folder of the run; an unfinished run of the same configuration in it is continued."""

    def __call__(self) -> None:
        from jaxmem.experiments.stable_diffusion import run_generate
        from jaxmem.progress import show_progress
        from jaxmem.stable_diffusion.pipeline import StableDiffusion

        with show_progress() as progress:
            run_generate(StableDiffusion.load(self.model), self.config, self.out, progress)
        _show(self.out)


@dataclass(frozen=True)
class Spectrum:
    """Extreme eigenvalues of the Hessian of log p_t of a Stable Diffusion model, by Arnoldi or Lanczos."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A diffusers folder, or a hub id such as CompVis/stable-diffusion-v1-4."""
    config: Annotated[SpectrumConfig, tyro.conf.arg(name="")]
    out: Path
    """Folder of the run; an unfinished run of the same configuration in it is continued."""

    def __call__(self) -> None:
        from jaxmem.experiments.stable_diffusion import run_spectrum
        from jaxmem.progress import show_progress
        from jaxmem.stable_diffusion.pipeline import StableDiffusion

        def say(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        with show_progress() as progress:
            run_spectrum(StableDiffusion.load(self.model), self.config, self.out, progress, say)
        _show(self.out)


@dataclass(frozen=True)
class Audit:
    """Which prompts has a model memorized? Runs every detector over prompts × starting noises.

    Exit codes: 0 done, 2 bad input or a folder that cannot be written, 130 interrupted. The run's folder gets
    results.csv (one row per prompt, for pandas.read_csv) and report.html; jaxmem report makes the page again.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")] = ""
    """A diffusers folder, or a hub id such as CompVis/stable-diffusion-v1-4; by default the small model shipped."""
    prompts: tuple[Path, ...] = ()
    """Files of prompts (.txt, .csv with any separator, .jsonl), with labels and categories or without."""
    memorized: tuple[Path, ...] = ()
    """More files, of prompts that are known to be memorized where they have no label."""
    not_memorized: tuple[Path, ...] = ()
    """More files, of prompts that are known not to be memorized where they have no label."""
    reference: Path | None = None
    """A file of neutral prompts: every prompt gets its percentile among them. They are measured as well."""
    neutral: int = 0
    """Take so many of the 60 neutral captions that ship as reference, in place of a file."""
    limit: int | None = None
    """Take the first so many prompts of each file."""
    merge_duplicates: bool = False
    """Take a prompt that comes several times once, instead of refusing it."""
    out: Path | None = None
    """Folder of the run; an unfinished run of the same configuration in it is continued."""
    dry_run: bool = False
    """Say what it would take (products, hours, gigabytes; one batch is timed) and write nothing."""
    device: Literal["cpu", "gpu", "tpu"] | None = None
    """What to compute on; by default JAX's choice."""
    config: Annotated[AuditConfig, tyro.conf.arg(name="")] = field(default_factory=AuditConfig)

    def __call__(self) -> None:
        from jaxmem.prompts import gather

        if self.out is None and not self.dry_run:
            raise ValueError("--out: expected a folder for the run, got none; or ask what it takes with --dry-run")
        model, files = self.model, [*self.prompts, *self.memorized, *self.not_memorized]
        prompts = self.prompts
        if not model:
            from jaxmem.data import verbatim_model

            shipped, shipped_prompts = verbatim_model()
            model, prompts = str(shipped), prompts if files else (shipped_prompts,)
        elif not files:
            raise ValueError("--prompts: expected a file of prompts, got none; one prompt per line will do")
        options: dict[str, Any] = dict(limit=self.limit, merge_duplicates=self.merge_duplicates)
        found = gather([(prompts, None), (self.memorized, True), (self.not_memorized, False)], **options)
        neutral = self._reference(options)
        _compute_on(self.device)

        from jaxmem.audit import run_audit
        from jaxmem.progress import show_progress
        from jaxmem.stable_diffusion.pipeline import StableDiffusion

        def say(line: str) -> None:
            print(line, file=sys.stdout if self.dry_run else sys.stderr, flush=True)

        opened, out = StableDiffusion.load(model), None if self.dry_run else self.out
        with show_progress() as progress:
            run_audit(opened, found, self.config, out, neutral=neutral, progress=progress, say=say)
        if out is not None:
            from rich.console import Console

            from jaxmem.report.tables import print_audit

            print_audit(out, Console())
            _write_page(out)

    def _reference(self, options: dict[str, Any]) -> Any:
        from jaxmem.data import NEUTRAL_CAPTIONS
        from jaxmem.prompts import read_prompts

        if not self.neutral:
            return [] if self.reference is None else read_prompts(self.reference, **options)
        if self.reference is not None:
            raise ValueError("--reference and --neutral: expected one of them, got both; a file has its own prompts")
        captions = read_prompts(NEUTRAL_CAPTIONS)
        if not 1 <= self.neutral <= len(captions):
            raise ValueError(f"--neutral: expected 0 to {len(captions)} captions, got {self.neutral}")
        return captions[: self.neutral]


def _compute_on(device: str | None) -> None:
    """Choose JAX's platform, before anything is computed."""
    if device is None:
        return
    import jax

    jax.config.update("jax_platforms", device)
    try:
        there = jax.devices()[0].platform
    except RuntimeError as error:
        raise ValueError(
            f"--device: expected a {device} that JAX can use, got none ({error}); see jax.devices()"
        ) from None
    if there != device:
        raise ValueError(f"--device: expected {device}, got {there}, which JAX has begun to use in this process")


@dataclass(frozen=True)
class Report:
    """Write the page of an audit, finished or not: one HTML file that needs no network."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    out: Path | None = None
    """The file to write; report.html in the folder of the run by default."""

    def __call__(self) -> None:
        _write_page(self.run, self.out)


def _write_page(run: Path, out: Path | None = None) -> None:
    from jaxmem.report.html import write_report

    path = write_report(run, out)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


def _show(directory: Path) -> None:
    from rich.console import Console

    from jaxmem.report.figures import draw
    from jaxmem.report.tables import print_summary

    print_summary(directory, draw(directory), Console())


def _parse(arguments: Sequence[str]) -> Any:
    preset = _preset(arguments)
    # A preset decides the defaults of all other flags, so it is looked up before they are parsed.
    toy2d = TOY2D_PRESETS.get(preset, TOY2D_PRESETS["small"])
    mnist = MNIST_PRESETS.get(preset, MNIST_PRESETS["small"])

    @dataclass(frozen=True)
    class Reproduce:
        """Reproduce an experiment of the paper: train, sample, take spectra, draw its figures."""

        experiment: (
            Annotated[Toy2d, tyro.conf.subcommand("toy2d", default=_without_out(Toy2d, toy2d))]
            | Annotated[Mnist, tyro.conf.subcommand("mnist", default=_without_out(Mnist, mnist))]
            | Annotated[Verbatim, tyro.conf.subcommand("verbatim")]
            | Annotated[PaperFigures, tyro.conf.subcommand("sd", default=_paper_figures(SD_PRESETS.get(preset)))]
        )

    command = tyro.cli(
        tyro.conf.OmitSubcommandPrefixes[  # type: ignore[misc]
            Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
            | Annotated[Generate, tyro.conf.subcommand("generate")]
            | Annotated[Spectrum, tyro.conf.subcommand("spectrum")]
            | Annotated[Audit, tyro.conf.subcommand("audit")]
            | Annotated[Figures, tyro.conf.subcommand("figures")]
            | Annotated[Report, tyro.conf.subcommand("report")]
        ],
        prog="jaxmem",
        args=list(arguments),
        description="Memorization in diffusion models, by the eigenvalues of the Hessian of the learned log density.",
    )
    return command.experiment if isinstance(command, Reproduce) else command


def _keep_compiled_programs() -> None:
    """Keep what JAX compiles on disk: the next start of a command finds it (JAX_COMPILATION_CACHE_DIR says where)."""
    # XLA logs an error for each program it loads whose tuning hints are no processor features; it says nothing else
    # there that Python does not raise.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "jaxmem" / "compiled"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def _without_out(command: type[Any], config: Any) -> Any:
    """A command whose ``out`` is still to be given: made without ``__init__``, which may check that it is a path."""
    made = object.__new__(command)
    for name, value in (("config", config), ("out", tyro.MISSING), ("preset", "small")):
        object.__setattr__(made, name, value)
    return made


def _paper_figures(config: AuditConfig | None) -> Any:
    """`PaperFigures` of a preset, with MODEL and prompts still to be given."""
    made = object.__new__(PaperFigures)
    config = SD_PRESETS["small"] if config is None else config
    values = {"model": tyro.MISSING, "config": config, "prompts": tyro.MISSING, "preset": "small"}
    values |= {"out": None, "per_category": 30, "dry_run": False}
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


def _preset(arguments: Sequence[str]) -> str:
    found = "small"  # the last one holds, as for every flag
    for i, argument in enumerate(arguments):
        if argument == "--preset" and i + 1 < len(arguments):
            found = arguments[i + 1]
        if argument.startswith("--preset="):
            found = argument.removeprefix("--preset=")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 done, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) == ["--version"]:
        print(f"jaxmem {__version__}")
        return 0
    try:
        command = _parse(arguments)
        _keep_compiled_programs()
        command()
    except KeyboardInterrupt:
        print("\nInterrupted. Nothing finished is lost: the same command continues the run.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0  # the reader of our output has seen enough
    except (ValueError, OSError) as error:
        print(f"jaxmem: {error}", file=sys.stderr)
        return 2
    return 0
