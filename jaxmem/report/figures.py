"""The figures of a finished run, whichever experiment wrote it."""

from pathlib import Path

from jaxmem.report import mnist, stable_diffusion, toy2d, verbatim
from jaxmem.runs import Run

DRAWERS = {
    "toy2d": toy2d.draw,
    "mnist": mnist.draw,
    "verbatim": verbatim.draw,
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
    try:
        return DRAWERS[experiment](run.spectra(), run.metrics(), run.directory / "figures")
    except KeyError as error:
        raise ValueError(
            f"{directory}: expected {error} among the results of a {experiment} run, got none; it was written by"
            f" another version: draw it with that one, or run the experiment again in a new --out"
        ) from error
