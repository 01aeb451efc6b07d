"""Figures of generated images and of their spectra."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxmem.report.style import GENERAL, MEMORIZED, NEUTRAL, REFERENCE, figure, plain, residual_bars

_MARKERS = "osD^v<>pX*"
_NO_WORDS = "(no words)"


def draw_images(spectra: dict[str, np.ndarray], metrics: dict[str, Any], directory: Path) -> list[Path]:
    """All images of a run beside each other, and each as a file of its own size."""
    from matplotlib.image import imsave

    images, prompts = spectra["images"], metrics["prompts"]
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, image in enumerate(images):
        paths.append(directory / f"image-{i:03d}.png")
        imsave(paths[-1], image)
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    overview = directory / "images.png"
    with figure(overview, 2.6 * columns, 2.9 * rows) as canvas:
        axes = np.atleast_1d(canvas.subplots(rows, columns)).ravel()
        for axis in axes:
            axis.axis("off")
        for axis, image, prompt in zip(axes, images, prompts, strict=False):
            axis.imshow(image)
            axis.set_title(plain(prompt) or _NO_WORDS, fontsize=8)
    return [overview, *paths]


def draw_spectrum(spectra: dict[str, np.ndarray], metrics: dict[str, Any], directory: Path) -> list[Path]:
    """Real parts of the Ritz values of every point, sorted, with their residuals as bars."""
    path = directory / "spectrum.png"
    points = metrics["points"]
    with figure(path, 7.2, 4.2) as canvas:
        axis = canvas.subplots()
        for i, point in enumerate(points):
            values, residuals = spectra["eigenvalues"][i].real, spectra["residuals"][i]
            color = GENERAL if point["kind"] == "conditional" else MEMORIZED
            residual_bars(
                axis,
                values,
                residuals,
                color=color,
                marker=_MARKERS[point["image"] % len(_MARKERS)],
                filled=point["image"] < len(_MARKERS),
                label=plain(point["prompt"]) or _NO_WORDS
                if point["kind"] == "conditional"
                else f"image {point['image']}, no prompt",
            )
        axis.axhline(0, color=NEUTRAL, linewidth=0.8)
        bound = metrics["lower_bound"]
        axis.axhline(bound, color=REFERENCE, linestyle="--", linewidth=1, label=f"$-1/\\sigma^2$ = {bound:.3g}")
        axis.set_xlabel("Ritz value, from the largest")
        axis.set_ylabel(r"eigenvalue of $\nabla^2\log p_t(x\,|\,c)$ (per squared latent unit)")
        name = {"arnoldi": "Arnoldi", "lanczos": "Lanczos"}[metrics["method"]]
        axis.set_title(
            f"{name}, {spectra['eigenvalues'].shape[1]} steps, t = {metrics['timestep']}, d = {metrics['dimension']:,};"
            " bars are residuals"
        )
        if len(points) <= 10:
            axis.legend()
    return [path]
