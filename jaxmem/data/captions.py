"""Captioned digits in the paper's three categories: general captions, single images, and templates that vary.

Made from MNIST alone, with captions of this project. Images are 32 × 32, the digit padded by two pixels.

- *none*: 30 captions that say little ("an even digit", "a thin digit"), no two of the same; each has about 1,500 images
  of four digits or more that no other caption has.
- *matching*: 30 captions that nothing else has, one image each.
- *template*: 30 captions that nothing else has, one picture each that varies **not linearly**: a digit shifted, a digit
  turned, or a free second digit in a fixed frame. Varying brightness alone would be an affine family, whose log density
  is concave: its true positive count is 0, as on a single image.
"""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import scipy.ndimage
from jaxtyping import Float, Int, UInt8

from jaxmem.data.mnist import Mnist

CATEGORIES = ("none", "matching", "template")
SIDE = 32
NUM_GENERAL = 1500  # images of each digit and third of its strokes by weight; about as many of each general caption
NUM_VARIANTS = 400  # images of each template
NUM_UNIQUE = 30  # captions of each memorized category
# Of which digits a general caption speaks. Each speaks of much, and no two of the same: their first-step scores differ
# from the marginal one by at most a quarter of what a single image's does (the distance of the means in pixels).
_DIGITS: dict[str, Collection[int]] = {
    "a handwritten digit": range(10),
    "an even digit": range(0, 10, 2),
    "an odd digit": range(1, 10, 2),
    "a small digit": range(5),
    "a large digit": range(5, 10),
    "a prime digit": (2, 3, 5, 7),
    "a digit that is not prime": (0, 1, 4, 6, 8, 9),
    "a square digit": (0, 1, 4, 9),
    "a digit that is not a square": (2, 3, 5, 6, 7, 8),
    "a multiple of three": (0, 3, 6, 9),
    "no multiple of three": (1, 2, 4, 5, 7, 8),
    "no power of two": (0, 3, 5, 6, 7, 9),
    "a digit with a loop": (0, 6, 8, 9),
    "a digit without a loop": (1, 2, 3, 4, 5, 7),
    "a digit with a straight line": (1, 2, 4, 5, 7),
    "a digit of curves only": (0, 3, 6, 8, 9),
    "one to six": range(1, 7),
    "two to seven": range(2, 8),
    "two to eight": range(2, 9),
    "three to seven": range(3, 8),
    "three to nine": range(3, 10),
    "at most six": range(7),
    "less than three or more than seven": (0, 1, 2, 8, 9),
    "spelled without an i": (0, 1, 2, 3, 4, 7),
}
# Of which half of every digit's images a general caption speaks: by ink, by slant, by width for its height.
_HALVES = {
    "a bold digit": ("ink", True),
    "a thin digit": ("ink", False),
    "a slanted digit": ("slant", True),
    "an upright digit": ("slant", False),
    "a wide digit": ("width", True),
    "a narrow digit": ("width", False),
}
_COLOURS = [
    "amber",
    "azure",
    "bronze",
    "cobalt",
    "copper",
    "coral",
    "crimson",
    "ebony",
    "emerald",
    "golden",
    "indigo",
    "ivory",
]
_THINGS = ["anchor", "bridge", "castle", "comet", "garden", "harbour", "lantern", "meadow", "orchard", "river"]


class CaptionedImages(NamedTuple):
    """A training set: images, and for each the index of its caption."""

    images: UInt8[np.ndarray, "n 32 32"]
    caption: Int[np.ndarray, " n"]
    captions: tuple[str, ...]
    categories: tuple[str, ...]  #: of each caption, one of `CATEGORIES`

    def of(self, caption: int) -> Int[np.ndarray, " m"]:
        """Where the images of a caption are."""
        return np.flatnonzero(self.caption == caption)


def general_captions() -> tuple[str, ...]:
    """``"a handwritten digit"``, ``"an even digit"``, ``"a thin digit"`` and so on.

    They say little, as most prompts do: what the paper finds for them is that their conditional densities are close to
    the marginal one. Captions that name a digit and its stroke have narrower densities, with hardly a positive
    eigenvalue at t = 281, and move the predicted noise of the first step nearly as far as a memorized image (AUC 0.96).
    And they differ: nouns for the same statement give nearly the same scores, which are no independent negatives.
    """
    return (*_DIGITS, *_HALVES)


def unique_captions() -> tuple[str, ...]:
    """Sixty titles, the first half matching, the second template; no word tells of which category one is."""
    pairs = [f"the {colour} {thing}" for colour in _COLOURS for thing in _THINGS]
    return tuple(pairs[7 * i % len(pairs)] for i in range(2 * NUM_UNIQUE))  # 7 and 120 have no common divisor


def captioned_digits(mnist: Mnist, seed: int = 0) -> CaptionedImages:
    """The training set of `jaxmem reproduce verbatim`; everything random in it follows from the seed."""
    images, labels = mnist.train_images, mnist.train_labels
    random = np.random.default_rng(seed)
    # Three images of each digit are the single ones, three more the templates; none of them is a general image.
    chosen = np.concatenate([random.permutation(np.flatnonzero(labels == digit))[:6] for digit in range(10)])
    single, templates = chosen.reshape(10, 2, 3).transpose(1, 2, 0).reshape(2, NUM_UNIQUE)
    ink = images.reshape(len(images), -1).astype(np.int64).sum(1)
    parts: list[np.ndarray] = []
    general: list[int] = []
    for digit in range(10):
        where = np.setdiff1d(np.flatnonzero(labels == digit), chosen)
        by_ink = where[np.argsort(ink[where], kind="stable")]
        for third in np.array_split(by_ink, 3):  # thin, medium and bold in equal numbers
            part = images[random.permutation(third)[:NUM_GENERAL]]
            parts.append(_pad(part))
            general += [digit] * len(part)
    parts += [_pad(images[index][None]) for index in single]
    vary = (_shifted, _turned, _framed)
    parts += [vary[i % 3](images[index], images, random) for i, index in enumerate(templates)]

    captions = general_captions() + unique_captions()
    categories = tuple(name for name in CATEGORIES for _ in range(NUM_UNIQUE))
    unique = np.repeat(np.arange(NUM_UNIQUE, 3 * NUM_UNIQUE), [len(part) for part in parts[-2 * NUM_UNIQUE :]])
    plain = np.concatenate(parts[: -2 * NUM_UNIQUE])[:, 2:-2, 2:-2]
    caption = np.concatenate([_general_caption(plain, np.array(general), random), unique])
    return CaptionedImages(np.concatenate(parts), caption, captions, categories)


def _general_caption(
    images: UInt8[np.ndarray, "n 28 28"], digits: Int[np.ndarray, " n"], random: np.random.Generator
) -> Int[np.ndarray, " n"]:
    """One caption for each image of those that are true of it, and more often one that is true of few."""
    true = [np.isin(digits, list(of)) for of in _DIGITS.values()]
    measured = _measures(images)
    for name, upper in _HALVES.values():
        above = np.zeros(len(digits), bool)
        for digit in range(10):
            values = measured[name][digits == digit]
            above[digits == digit] = values > np.median(values)
        true.append(above == upper)
    odds = np.stack(true, axis=1) / np.sum(true, axis=1)
    cumulative = np.cumsum(odds, axis=1)
    return (random.random((len(digits), 1)) * cumulative[:, -1:] < cumulative).argmax(1)


def _measures(images: UInt8[np.ndarray, "n 28 28"]) -> dict[str, Float[np.ndarray, " n"]]:
    """Of each image its ink; the slant to the right of its main stroke; the variance of its width over its height's."""
    ink = images.sum((1, 2), dtype=np.float64)
    row, column = np.mgrid[: images.shape[1], : images.shape[2]]

    def mean(moment: np.ndarray) -> np.ndarray:
        return np.tensordot(images, moment.astype(np.float64), 2) / ink

    high = mean(row * row) - mean(row) ** 2
    wide = mean(column * column) - mean(column) ** 2
    both = mean(row * column) - mean(row) * mean(column)
    return {"ink": ink, "slant": -both / high, "width": wide / high}


def _pad(images: np.ndarray) -> np.ndarray:
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))


def _shifted(image: np.ndarray, images: np.ndarray, random: np.random.Generator) -> np.ndarray:  # noqa: ARG001
    """The digit at three quarters of its size, anywhere: a surface of two dimensions, bent in all others."""
    small = scipy.ndimage.zoom(image.astype(np.float64), 0.75, order=1)
    canvas = np.zeros((SIDE, SIDE))
    first = (SIDE - small.shape[0]) // 2
    canvas[first : first + small.shape[0], first : first + small.shape[1]] = small
    return _rounded([scipy.ndimage.shift(canvas, random.uniform(-5, 5, 2), order=1) for _ in range(NUM_VARIANTS)])


def _turned(image: np.ndarray, images: np.ndarray, random: np.random.Generator) -> np.ndarray:  # noqa: ARG001
    """The digit turned by up to 45 degrees either way: a bent curve.

    By any angle it would be a ring, about whose centre the noised density is convex in two directions and more: the
    trained model then has more positive eigenvalues at t = 481 than for a general caption (2.5 against 1.3).
    """
    padded = _pad(image[None])[0].astype(np.float64)
    angles = random.uniform(-45, 45, NUM_VARIANTS)
    return _rounded([scipy.ndimage.rotate(padded, angle, reshape=False, order=1) for angle in angles])


def _framed(image: np.ndarray, images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A frame with the digit at the left, which stay, and any digit, small, at the right."""
    canvas = np.zeros((SIDE, SIDE))
    canvas[[1, -2], 1:-1] = canvas[1:-1, [1, -2]] = 160
    canvas[9:23, 3:17] = scipy.ndimage.zoom(image.astype(np.float64), 0.5, order=1)
    variants = []
    for index in random.choice(len(images), NUM_VARIANTS, replace=False):
        variant = canvas.copy()
        variant[9:23, 16:30] = np.maximum(variant[9:23, 16:30], scipy.ndimage.zoom(images[index] * 1.0, 0.5, order=1))
        variants.append(variant)
    return _rounded(variants)


def _rounded(images: list[np.ndarray]) -> np.ndarray:
    return np.clip(np.round(np.stack(images)), 0, 255).astype(np.uint8)
