"""Duplicates and near duplicates among training images, as groups: copies of one picture are not several pictures."""

from collections.abc import Callable

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int
from scipy.sparse.csgraph import connected_components

from jaxmem.training_images.area import Reduced
from jaxmem.training_images.descriptor import COPY_SIMILARITY

#: Root of the mean squared difference of pixels in [0, 1] up to which two images are one picture: 13 of 255 grey
#: levels. Encoding an image again, or resizing it and back, changes it by less (the tests measure it).
PIXEL_THRESHOLD = 0.05
#: Images are one picture only if they also differ by at most this part of their own contrast, the standard deviation
#: of their values. Unrelated images of one mean and one contrast differ by √2 of it, however dark or pale they are.
CONTRAST_PART = 0.5
_BLOCK = 1024
# Which pairs of two blocks are one picture: of their products, the blocks, and the places of these.
Link = Callable[[np.ndarray, np.ndarray, np.ndarray, slice, slice], np.ndarray]


def groups(
    images: Reduced,
    *,
    threshold: float = PIXEL_THRESHOLD,
    descriptors: Float[np.ndarray, "n k"] | None = None,
    similarity: float = COPY_SIMILARITY,
) -> Int[np.ndarray, " n"]:
    """The group of each image, numbered from 0 in the order of their first images.

    Two images are in one group if their pixels are equal; or if their root mean squared difference, after sides above
    64 were reduced to 64, is at most ``threshold`` and at most half the contrast of each; or, given descriptors, if
    these are similar. So is an image that is linked to a member of the group, though it may be far from another one.

    All pairs are compared, 1,024 by 1,024, by one matrix product of each block: n² D / 2 multiplications for D values
    of an image, and 4 n D bytes for these in float32. 10,000 images of 64 × 64 took 63 seconds and 0.5 GB on two cores
    that were busy with other work. Squared differences come out of ‖x‖² + ‖y‖² - 2 xᵀy with an error of about 1e-6, far
    below the square of the threshold; equal images are found by the hashes of their pixels.

    Args:
        images: the images, from `jaxmem.training_images.area.reduced`.
        threshold: of the difference, pixels being in [0, 1]; 0 for equal images only.
        descriptors: unit vectors, from `jaxmem.training_images.load_descriptor`.
        similarity: the least product of two descriptors that are one picture; the default is that of copies in SSCD's
            own README.

    Raises:
        ValueError: not one descriptor for each image, or a threshold below 0.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold: expected a number of at least 0, got {threshold}")
    n = len(images.values)
    if descriptors is not None and len(descriptors) != n:
        raise ValueError(f"descriptors: expected one for each of {n} images, got {len(descriptors)}")
    if not n:
        return np.zeros(0, np.int64)
    known: dict[bytes, int] = {}
    label = np.array([known.setdefault(digest, len(known)) for digest in images.digests])
    if threshold > 0:
        label = _linked(label, images.values - np.float32(0.5), _near(threshold, _contrasts(images.values)))
    if descriptors is not None:
        label = _linked(label, descriptors.astype(np.float32), lambda products, *_: products >= similarity)
    return label


def first_of_groups(group: Int[np.ndarray, " n"]) -> Int[np.ndarray, " g"]:
    """Where the first image of each group is, ascending."""
    return np.sort(np.unique(group, return_index=True)[1])


def _contrasts(values: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    """The standard deviation of each image about its mean colour, as it is compared: after the reduction."""
    return np.array([np.sqrt(image.reshape(-1, 3).var(0).mean()) for image in values], np.float32)


def _near(threshold: float, contrasts: Float[np.ndarray, " n"]) -> Link:
    """Whether pairs of images differ by at most the threshold and half the contrast of each."""

    def near(products: np.ndarray, x: np.ndarray, y: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
        squares = (x * x).sum(1)[:, None] + (y * y).sum(1)[None] - 2 * products
        contrast = np.minimum(contrasts[rows][:, None], contrasts[columns][None])
        return squares <= x.shape[1] * np.minimum(threshold, CONTRAST_PART * contrast) ** 2

    return near


def _linked(label: Int[np.ndarray, " n"], x: Float[np.ndarray, "n d"], link: Link) -> Int[np.ndarray, " n"]:
    """The groups after those were joined that have a pair which ``link`` joins, block by block."""
    blocks = [slice(start, start + _BLOCK) for start in range(0, len(x), _BLOCK)]
    for number, rows in enumerate(blocks):
        for columns in blocks[number:]:
            joined = link(x[rows] @ x[columns].T, x[rows], x[columns], rows, columns)
            label = _joined(label, *(np.nonzero(joined)[side] + part.start for side, part in ((0, rows), (1, columns))))
    return label


def _joined(
    label: Int[np.ndarray, " n"], rows: Int[np.ndarray, " m"], columns: Int[np.ndarray, " m"]
) -> Int[np.ndarray, " n"]:
    """Connected components of the groups with these pairs linked, numbered by their first images."""
    size = int(label.max()) + 1
    pairs = scipy.sparse.coo_array((np.ones(len(rows), bool), (label[rows], label[columns])), shape=(size, size))
    _, component = connected_components(pairs, directed=False)
    _, first, inverse = np.unique(component[label], return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]
