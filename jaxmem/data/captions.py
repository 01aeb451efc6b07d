"""Captioned digits in the paper's three categories: general captions, single images, and templates that vary.

Made from MNIST alone, with captions of this project. Images are 32 × 32, the digit padded by two pixels.

- *none*: 30 captions that say little ("an even digit"), each with about 1,500 different images of five digits or ten.
- *matching*: 30 captions that nothing else has, one image each.
- *template*: 30 captions that nothing else has, one picture each that varies **not linearly**: a digit shifted, a digit
  turned, or a free second digit in a fixed frame. Varying brightness alone would be an affine family, whose log density
  is concave: its true positive count is 0, as on a single image.
"""

from typing import NamedTuple

import numpy as np
import scipy.ndimage
from jaxtyping import Int, UInt8

from jaxmem.data.mnist import Mnist

CATEGORIES = ("none", "matching", "template")
SIDE = 32
NUM_GENERAL = 1500  # images of each digit and third of its strokes by weight; as many of each general caption
NUM_VARIANTS = 400  # images of each template
NUM_UNIQUE = 30  # captions of each memorized category
# Of which digits a caption speaks, and its share of the images of such a digit: all captions get equally many.
_GENERAL = {
    "a handwritten": (range(10), 0.2),
    "an even": (range(0, 10, 2), 0.4),
    "an odd": (range(1, 10, 2), 0.4),
    "a small": (range(5), 0.4),
    "a large": (range(5, 10), 0.4),
}
_NOUNS = ("digit", "number", "numeral", "figure", "character", "symbol")
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
    """``"a handwritten digit"``, ``"an even number"`` and so on.

    They say little, as most prompts do: what the paper finds for them is that their conditional densities are close to
    the marginal one. Captions that name a digit and its stroke have narrower densities, with hardly a positive
    eigenvalue at t = 281, and move the predicted noise of the first step nearly as far as a memorized image (AUC 0.96).
    """
    return tuple(f"{kind} {noun}" for kind in _GENERAL for noun in _NOUNS)


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
    caption = np.concatenate([_general_caption(np.array(general), random), unique])
    return CaptionedImages(np.concatenate(parts), caption, captions, categories)


def _general_caption(digits: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A general caption for each image of a digit, drawn from those that are true of it."""
    true_of = [[(k, share) for k, (of, share) in enumerate(_GENERAL.values()) if digit in of] for digit in range(10)]
    kinds = np.zeros(len(digits), int)
    for digit, options in enumerate(true_of):
        where = np.flatnonzero(digits == digit)
        numbers, shares = zip(*options, strict=True)
        kinds[where] = random.choice(numbers, len(where), p=shares)
    return kinds * len(_NOUNS) + random.integers(len(_NOUNS), size=len(digits))


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
    """The digit turned by any angle: a closed curve."""
    padded = _pad(image[None])[0].astype(np.float64)
    angles = random.uniform(0, 360, NUM_VARIANTS)
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
