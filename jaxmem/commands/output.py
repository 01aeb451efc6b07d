"""What a command shows when its work is done, and while it is going on."""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmem.commands.flags import in_flags
from jaxmem.config import FilesConfig, PartsConfig
from jaxmem.runs.manifest import is_run
from jaxmem.terminal import visible


def say(line: str) -> None:
    """One line for whoever waits, beside the results."""
    print(visible(in_flags(line)), file=sys.stderr, flush=True)


def say_result(line: str) -> None:
    """One line that is the result of a command, such as what an audit would take."""
    print(visible(in_flags(line)))


def open_model(source: str, files: FilesConfig, parts: PartsConfig) -> Any:
    """Open a model as the flags say; its warnings and what may surprise come first."""
    from jaxmem.sources.load import load

    with warnings.catch_warnings(action="ignore", category=UserWarning):  # said below, as lines
        model = load(
            source,
            ignore_settings=files.ignore_setting,
            prediction_type=files.prediction_type,
            say=say,
            **vars(parts),
        )
    for warning in model.warnings:
        say(f"warning: {warning}")
    return model


def open_stable_diffusion(source: str, files: FilesConfig, parts: PartsConfig) -> Any:
    """As `open_model`, for commands that Stable Diffusion 1 and 2 have alone."""
    from jaxmem.stable_diffusion.pipeline import StableDiffusion

    model = None if is_run(source) else open_model(source, files, parts)
    if isinstance(model, StableDiffusion):
        return model
    what = f"a run of jaxmem ({source})" if model is None else f"a {type(model).__name__}"
    raise ValueError(f"MODEL: expected a Stable Diffusion 1 or 2 model, got {what}, which jaxmem audit takes")


def model_name(source: str, lora: Sequence[str] = ()) -> str:
    """What a model is called in a run: a hub id, or of a folder its name; of LoRA the last two names of the path.

    Where files lie stays here. Training keeps checkpoints of LoRA under one name, in folders that have the step.
    """
    path = Path(source)
    name = path.resolve().name if path.exists() else source
    return ", ".join([name, *("LoRA " + "/".join(Path(one).absolute().parts[-2:]) for one in lora)])


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
