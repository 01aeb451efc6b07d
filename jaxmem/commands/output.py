"""What a command shows when its work is done, and while it is going on."""

import sys
import warnings
from pathlib import Path
from typing import Any

from jaxmem.commands.flags import in_flags
from jaxmem.config import FilesConfig
from jaxmem.terminal import visible


def say(line: str) -> None:
    """One line for whoever waits, beside the results."""
    print(visible(in_flags(line)), file=sys.stderr, flush=True)


def say_result(line: str) -> None:
    """One line that is the result of a command, such as what an audit would take."""
    print(visible(in_flags(line)))


def is_run(source: str) -> bool:
    """Whether a source of a model is the folder of a run, not of a diffusers model."""
    return (Path(source) / "manifest.json").is_file()


def open_model(source: str, files: FilesConfig) -> Any:
    """Open a Stable Diffusion model as the flags say; its warnings and what may surprise come first."""
    if is_run(source):
        raise ValueError(
            f"MODEL: expected a diffusers folder or a hub id, got a run of jaxmem ({source}), which jaxmem audit takes"
        )
    from jaxmem.stable_diffusion.pipeline import StableDiffusion

    with warnings.catch_warnings(action="ignore", category=UserWarning):  # said below, as lines
        model = StableDiffusion.load(
            source, ignore_settings=files.ignore_setting, prediction_type=files.prediction_type
        )
    for note in model.reading.notes:
        say(note)
    for warning in model.reading.warnings:
        say(f"warning: {warning}")
    return model


def open_trained(source: str, files: FilesConfig) -> Any:
    """Open the network that a run trained; flags about a model's files have no meaning there."""
    from jaxmem.experiments.mnist import load_model

    if files != FilesConfig():
        raise ValueError(
            f"files: expected no `ignore_setting` and no `prediction_type` for a run of jaxmem ({source}), which has"
            f" no files of diffusers"
        )
    return load_model(source)


def model_name(source: str) -> str:
    """What a model is called in a run: a hub id, or of a folder its name; where it lies stays here."""
    path = Path(source)
    return path.resolve().name if path.exists() else source


def write_page(run: Path, out: Path | None = None) -> None:
    """Write the page of an audit, and say where it is."""
    from jaxmem.report.audit.page import write_report

    path = write_report(run, out)
    print(f"{visible(str(path))} ({path.stat().st_size / 1e6:.1f} MB)")


def show_run(directory: Path) -> None:
    """Draw the figures of a finished run, print its table."""
    from rich.console import Console

    from jaxmem.report.figures import draw
    from jaxmem.report.tables import print_summary

    print_summary(directory, draw(directory), Console(), in_flags)
