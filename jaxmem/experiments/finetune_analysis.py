"""What the checkpoints of `jaxmem.experiments.finetune` give back: samples of each caption beside the images."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from jaxmem.config import FinetuneConfig
from jaxmem.data import verbatim_model
from jaxmem.data.finetuning import KINDS, FineTuningImages
from jaxmem.memorization.distances import calibrated_l2, nearest_training
from jaxmem.runs.progress import Progress
from jaxmem.sampling import sample
from jaxmem.sources.load import load
from jaxmem.stable_diffusion.pipeline import StableDiffusion

# Looser than the audit's rule (`jaxmem.memorization.verdicts.COPY`): here it is known which image it has to be.
RETURNED = 1.0  #: calibrated ℓ2 below which a sample is its nearest image: at half the mean distance of the 50 nearest


def see_returned(
    config: FinetuneConfig,
    model: StableDiffusion,
    data: FineTuningImages,
    checkpoints: dict[str, dict[int, Path]],
    progress: Progress,
) -> dict[str, np.ndarray]:
    """What every checkpoint draws for every caption, without guidance, from the same noises.

    ``caption`` and ``kind`` are of the captions, single ones first; ``example`` is an image of each that was trained
    on. For each way of training ``<way>_steps`` and, with leading axes (steps, captions, noises), ``<way>_drawn``, grey
    images; ``<way>_distance``, calibrated ℓ2 of pixels to the different images that were trained on; ``<way>_own``,
    whether the nearest of these is one of the caption's.
    """
    captions = [caption for kind in KINDS for caption in data.captions(kind)]
    owner = {picture.image: captions.index(picture.caption) for picture in data.trained}
    owners, images = np.array(list(owner.values())), data.images[list(owner)]
    shape = (len(captions), config.sampling_noises)
    noise = jax.random.normal(jax.random.key(config.sampling_seed), (config.sampling_noises, *model.shape))
    noise = jnp.tile(noise, (len(captions), 1, 1, 1))
    cond = jnp.asarray(np.repeat(model.conditions(captions), config.sampling_noises, 0))
    arrays: dict[str, np.ndarray] = {
        "caption": np.array(captions),
        "kind": np.array([kind for kind in KINDS for _ in data.captions(kind)]),
        "example": images[[int(np.argmax(owners == c)) for c in range(len(captions))]],
    }
    done, total = 0, sum(map(len, checkpoints.values()))
    for way, folders in checkpoints.items():
        columns = []
        for folder in folders.values():
            progress("see what is returned", done, total)
            tuned = load(verbatim_model()[0], unet=folder)
            latents = sample(model.score, tuned.state, noise, cond, sampler=model.sampler(config.ddim_steps))[0]
            drawn = np.round(model.decode(latents).mean(-1)).astype(np.uint8)
            distance, nearest = _compare(drawn, images)
            own = owners[nearest].reshape(shape) == np.arange(len(captions))[:, None]
            columns.append((drawn.reshape(*shape, *drawn.shape[1:]), distance.reshape(shape), own))
            done += 1
        named = zip(("drawn", "distance", "own"), zip(*columns, strict=True), strict=True)
        arrays |= {f"{way}_steps": np.array(list(folders))} | {f"{way}_{name}": np.stack(part) for name, part in named}
    progress("see what is returned", total, total)
    return arrays


def _compare(
    drawn: UInt8[np.ndarray, "n side side"], images: UInt8[np.ndarray, "m side side"]
) -> tuple[Float[np.ndarray, " n"], np.ndarray]:
    """Calibrated ℓ2, and the index of the nearest image."""
    x, y = (jnp.asarray(part.reshape(len(part), -1) / 127.5 - 1, jnp.float32) for part in (drawn, images))
    neighbours = min(50, len(y))
    return np.asarray(calibrated_l2(x, y, num_neighbours=neighbours)), np.asarray(nearest_training(x, y).index)


def is_returned(arrays: dict[str, np.ndarray], way: str) -> np.ndarray:
    """Which samples are images that were trained on, shape (steps, captions, noises).

    For a caption of a single image it has to be this one; for one of many, any.
    """
    single = (arrays["kind"] == "single")[:, None]
    return (arrays[f"{way}_distance"] < RETURNED) & (arrays[f"{way}_own"] | ~single)


def shares_returned(arrays: dict[str, np.ndarray], way: str) -> dict[str, dict[str, float]]:
    """By steps, the share of the samples of each kind of caption that are images which were trained on."""
    found = is_returned(arrays, way)
    return {
        str(step): {kind: found[k][arrays["kind"] == kind].mean() for kind in KINDS}
        for k, step in enumerate(arrays[f"{way}_steps"])
    }


def first_returned(arrays: dict[str, np.ndarray], way: str) -> dict[str, int | None]:
    """By caption of a single image, the first checkpoint that gives the image back from some noise; None for never."""
    found: np.ndarray = np.any(is_returned(arrays, way), axis=-1)
    steps = arrays[f"{way}_steps"]
    return {
        str(arrays["caption"][c]): int(steps[found[:, c].argmax()]) if found[:, c].any() else None
        for c in np.flatnonzero(arrays["kind"] == "single")
    }
