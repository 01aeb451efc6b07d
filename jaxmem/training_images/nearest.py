"""The training image that is nearest to each picture, and Carlini's calibrated distance: is the picture clearly new?"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxmem.memorization.distances import nearest_training
from jaxmem.training_images.area import Reduced
from jaxmem.training_images.duplicates import first_of_groups

NEIGHBOURS = 50  #: of the calibrated distance, as published
ALPHA = 0.5  #: of the calibrated distance, as published
#: Groups of training images below which no distance is calibrated. The nearest one is itself one of the k neighbours
#: whose mean distance it is divided by: of fewer than 10 it would be more than a tenth of what it is measured against.
FEWEST_GROUPS = 10
_MEMORY = 64 * 2**20  # of the differences that are in memory at once, in bytes


class Nearest(NamedTuple):
    """The nearest training image of each picture."""

    index: Int[np.ndarray, " g"]  # type: ignore[assignment]  #: its place among the training images
    distance: Float[np.ndarray, " g"]  #: root of the mean squared difference of pixels in [0, 1]: 0 is a copy
    calibrated: Float[np.ndarray, " g"]  #: by the neighbours: 0 is a copy, 2 as far as the others; NaN if these are few


def nearest_images(
    generated: Reduced,
    training: Reduced,
    groups: Int[np.ndarray, " n"],
    others: Float[np.ndarray, "m d"] | None = None,
) -> Nearest:
    """The nearest training image of each picture by pixels, and how near it is beside the other ones.

    The distance is ``d(x, y) = √(Σ (x - y)² / D)`` over the D values of pixels in [0, 1], Carlini's normalised ℓ2. The
    calibrated distance is ``d(x, y₁) / (0.5 · mean of d(x, y_i) over the 50 nearest y_i)``. Each group of duplicates
    counts once in the mean, by its first image, that of y₁ by y₁; so copies in the training set change nothing.

    What differs from Carlini et al. 2023, "Extracting training data from diffusion models": they calibrate images of 32
    × 32, all their pixels; here images with sides above 64 are first reduced to 64 by averages over areas. With fewer
    than 50 groups all of them are the neighbours, so that the mean is over the training set and not over what is near;
    with fewer than 10, ``others`` among them, there is no calibrated distance. Images of one size, in pixels, are
    compared as they lie: a shifted or mirrored copy is not near.

    Each picture is compared with all images by differences, which keep the distance of a near copy in float32, twice:
    for the nearest image, and for the neighbours.

    Args:
        generated: the pictures, from `jaxmem.training_images.area.reduced`.
        training: the training images, of the same size.
        groups: the group of duplicates that each training image is in, from `jaxmem.training_images.duplicates.groups`.
        others: the values of more images of the same kind, all different, that are neighbours too; no model was
            trained on them.

    Raises:
        ValueError: different sizes of pictures, no training image, or not one group for each.
    """
    if generated.size != training.size:
        raise ValueError(
            f"generated and training: expected images of one size, got {generated.size} and {training.size}; prepare"
            f" the training images at the size of the generated ones"
        )
    x, y = generated.values, training.values
    if not len(y) or len(groups) != len(y):
        raise ValueError(
            f"training and groups: expected at least 1 image and a group for each, got {len(y)} images and"
            f" {len(groups)} groups"
        )
    if not len(x):
        return Nearest(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.float32))
    places, distances = _search(x, y, 1)
    index, distance = places[:, 0], distances[:, 0]
    first = first_of_groups(groups)
    around = y[first] if others is None else np.concatenate([y[first], others])
    if len(around) < FEWEST_GROUPS:
        return Nearest(index, distance, np.full(len(x), np.nan, np.float32))
    places, distances = _search(x, around, min(NEIGHBOURS, len(around)))
    # The group of the nearest image is one of the neighbours: it takes the place that it has, or else the last one.
    group = np.concatenate([groups[first], np.full(len(around) - len(first), -1)])
    same = group[places] == groups[index][:, None]
    same[:, -1] |= ~same.any(1)
    mean = np.where(same, distance[:, None], distances).mean(1)
    calibrated = np.divide(distance, ALPHA * mean, out=np.zeros_like(distance), where=mean > 0)
    return Nearest(index, distance, calibrated)


def _search(
    x: Float[np.ndarray, "g d"], y: Float[np.ndarray, "n d"], k: int
) -> tuple[Int[np.ndarray, "g k"], Float[np.ndarray, "g k"]]:
    """Places and distances of the k nearest images, these as roots of the mean over the values of an image."""
    found = nearest_training(
        jnp.asarray(x), jnp.asarray(y), num_neighbours=k, chunk=max(1, _MEMORY // (4 * x.shape[1]))
    )
    return np.asarray(found.indices), np.asarray(found.distances) / np.sqrt(np.float32(x.shape[1]))
