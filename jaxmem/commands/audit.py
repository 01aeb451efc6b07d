"""``jaxmem audit``, and the page and figures of a run that is there."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxmem.commands.flags import command_line, in_flags
from jaxmem.commands.output import model_name, open_model, say, say_result, show_run, write_page
from jaxmem.commands.training_data import TrainingFlags
from jaxmem.config import AuditConfig, FilesConfig, PartsConfig, VerbatimConfig


@dataclass(frozen=True)
class Audit:
    """Which prompts has a model memorized? Runs every detector over prompts × starting noises.

    Exit codes: 0 done, 2 bad input or a folder that cannot be written, 130 interrupted. The run's folder gets
    results.csv (one row per prompt, for pandas.read_csv) and report.html; jaxmem report makes the page again.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")] = ""
    """A diffusers folder, a hub id such as CompVis/stable-diffusion-v1-4 (owner/name@revision for one of its
    revisions), a single .safetensors file, or a run of jaxmem reproduce mnist, whose prompts are its two digits; by
    default the small model shipped."""
    prompts: tuple[Path, ...] = ()
    """Files of prompts: .txt, .csv or .tsv with any separator, .json, .jsonl, .parquet; also .gz of the text ones, a
    folder with one caption per .txt file, or - for standard input. With labels and categories or without."""
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
    """Folder of the run; an unfinished run of the same configuration in it is continued, a finished one is extended by
    prompts and noises that it does not have."""
    dry_run: bool = False
    """Say what it would take (products, hours, gigabytes; one batch is timed) and write nothing. What is there in
    --out is not counted off."""
    device: Literal["cpu", "gpu", "tpu"] | None = None
    """What to compute on; by default JAX's choice."""
    config: Annotated[AuditConfig, tyro.conf.arg(name="")] = field(default_factory=AuditConfig)
    training: Annotated[TrainingFlags, tyro.conf.arg(name="")] = field(default_factory=TrainingFlags)
    files: Annotated[FilesConfig, tyro.conf.arg(name="")] = field(default_factory=FilesConfig)
    parts: Annotated[PartsConfig, tyro.conf.arg(name=""), tyro.conf.UseAppendAction] = field(
        default_factory=PartsConfig
    )

    def __call__(self) -> None:
        from jaxmem.prompts import gather

        if self.out is None and not self.dry_run:
            raise ValueError("--out: expected a folder for the run, got none; or ask what it takes with --dry-run")
        model, name, config = self.model, model_name(self.model, self.parts.lora), self.config
        files = [*self.prompts, *self.memorized, *self.not_memorized]
        prompts = self.prompts
        if not model:
            from jaxmem.data import verbatim_model

            shipped, shipped_prompts = verbatim_model()
            name = model_name("the small model of digits that ships with jaxmem", self.parts.lora)
            brings_none = files or self.training.training_data is not None
            model, prompts = str(shipped), prompts if brings_none else (shipped_prompts,)
            if config.guidance is None:
                config = replace(config, guidance=VerbatimConfig().audit.guidance)
        options: dict[str, Any] = dict(limit=self.limit, merge_duplicates=self.merge_duplicates)
        found = (
            gather([(prompts, None), (self.memorized, True), (self.not_memorized, False)], **options)
            if prompts or files
            else None
        )
        if "-" in map(str, files) and str(self.reference) == "-":
            raise ValueError("--reference: expected another source than the prompts, got standard input (-) twice")
        neutral, training, origin = self._reference(), self.training.read(), self._origin(prompts)
        _compute_on(self.device)

        from jaxmem.audit import audit, audit_cost
        from jaxmem.runs.progress import show_progress

        opened = open_model(model, self.files, self.parts)
        if found is None and training is None:  # its own classes, or none at all
            found = opened.prompts()[: self.limit]
            if not found:
                raise ValueError("--prompts: expected a file of prompts, got none; one prompt per line will do")
        elif found is None and self.limit is not None:
            found = training.prompts(opened, self.limit)
        if self.neutral:  # a list that ships may have a prompt of the user's
            texts = {one.text for one in (training.prompts(opened) if found is None else found)}
            neutral = [one for one in neutral if one.text not in texts]
        if self.dry_run or self.out is None:
            say_result(f"audited model: {name}")
            audit_cost(opened, found, config, neutral=neutral, training=training, say=say_result)
            return
        options = dict(neutral=neutral, training=training, name=name, say=say)
        with show_progress() as progress:
            audit(opened, found, config, folder=self.out, origin=origin, progress=progress, **options)

        from rich.console import Console

        from jaxmem.report.tables import print_audit

        print_audit(self.out, Console(), in_flags)
        write_page(self.out)

    def _reference(self) -> Any:
        from jaxmem.data import NEUTRAL_CAPTIONS
        from jaxmem.prompts import read_prompts

        if not self.neutral:
            return (
                [] if self.reference is None else read_prompts(self.reference, merge_duplicates=self.merge_duplicates)
            )
        if self.reference is not None:
            raise ValueError("--reference and --neutral: expected one of them, got both; a file has its own prompts")
        captions = read_prompts(NEUTRAL_CAPTIONS)
        if not 1 <= self.neutral <= len(captions):
            raise ValueError(f"--neutral: expected 0 to {len(captions)} captions, got {self.neutral}")
        return captions[: self.neutral]

    def _origin(self, prompts: tuple[Path, ...]) -> Any:
        """What the manifest says of this command line and of the files that were read."""
        from jaxmem.data import NEUTRAL_CAPTIONS
        from jaxmem.runs.origin import Origin, source_files, without_folders

        read = {"prompts": prompts, "memorized": self.memorized, "not_memorized": self.not_memorized}
        read["reference"] = () if self.reference is None else (self.reference,)
        read["neutral"] = (NEUTRAL_CAPTIONS,) if self.neutral else ()
        hub = "" if Path(self.model).exists() else self.model
        return Origin(without_folders(command_line(), hub), source_files(read.items()))


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
        write_page(self.run, self.out)


@dataclass(frozen=True)
class Figures:
    """Draw the figures of a finished run again, and print its table."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""

    def __call__(self) -> None:
        show_run(self.run)
