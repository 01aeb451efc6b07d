"""The figures of a finished run, whichever experiment wrote it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxmem.report import dimension, finetune, mnist, stable_diffusion, toy2d, verbatim
from jaxmem.runs.directory import Run

DRAWERS = {
    "toy2d": toy2d.draw,
    "mnist": mnist.draw,
    "verbatim": verbatim.draw,
    "finetune": finetune.draw,
    "dimension": dimension.draw,
    "generate": stable_diffusion.draw_images,
    "spectrum": stable_diffusion.draw_spectrum,
}


def draw(directory: str | Path) -> list[Path]:
    """Draw all figures of a run into its ``figures/`` folder and return their paths.

    Raises:
        ValueError: if there is no finished run in the folder, its files are damaged, or no figures are known for it.
    """
    run = Run.read(directory)
    experiment = run.manifest.get("experiment")
    if experiment not in DRAWERS:
        raise ValueError(
            f"{directory}: expected a run of one of {sorted(DRAWERS)}, got {experiment!r} as the experiment of its"
            f" manifest"
        )
    with of_this_version(run):
        return DRAWERS[experiment](run.spectra(), run.metrics(), run.directory / "figures")


@contextmanager
def of_this_version(run: Run) -> Iterator[None]:
    """A result that the block looks for in vain is one that another version did not write."""
    try:
        yield
    except KeyError as error:
        raise ValueError(
            f"{run.directory}: expected {error} among the results of a {run.manifest.get('experiment')} run, got none;"
            f" it was written by another version: draw it with that one, or run the experiment again in a new folder"
        ) from error
