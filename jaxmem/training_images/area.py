"""Images at most 64 pixels wide and high, by averages over areas: what distances between pictures are taken of."""

import hashlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

LARGEST = 64  #: pixels of a side; larger images are reduced to it


class Reduced(NamedTuple):
    """Images of one size as they are compared with each other: at most 49 kB each, however large they are."""

    values: Float[np.ndarray, "n d"]  #: in [0, 1], float32, sides above 64 pixels averaged down to 64
    digests: list[bytes]  #: n, of all pixels of an image: equal for equal images only
    size: tuple[int, int]  #: height and width before


def reduced(pixels: UInt8[np.ndarray, "n h w 3"], block: int = 4) -> Reduced:
    """The images as they are compared: sides above 64 pixels are averaged down to 64, each by itself.

    A reduced pixel is the average of the area that it covers, with the shares of the pixels at its edges. Sides of up
    to 64 pixels stay as they are. Averaging leaves what a picture shows and takes what a codec or a sampler adds.

    Args:
        pixels: the images.
        block: images that are reduced at once, which takes up to 50 bytes for each of their values.
    """
    n, height, width, _ = pixels.shape
    down, across = (_averages(side, min(side, LARGEST)) for side in (height, width))
    values = np.empty((n, len(down) * len(across) * 3), np.float32)
    for start in range(0, n, block):
        images = pixels[start : start + block].astype(np.float32) / np.float32(255)
        if height > LARGEST or width > LARGEST:
            images = np.einsum("ih,nhwc,jw->nijc", down, images, across, optimize=True)
        values[start : start + block] = images.reshape(len(images), -1)
    digests = [hashlib.sha256(image.tobytes()).digest() for image in pixels]
    return Reduced(values, digests, (height, width))


def reduced_size(height: int, width: int) -> int:
    """Number of values of one image of this size as it is compared."""
    return 3 * min(height, LARGEST) * min(width, LARGEST)


def _averages(side: int, to: int) -> Float[np.ndarray, "to side"]:
    """The share of each pixel in each reduced one: the length of their overlap on a line, rows summing to 1."""
    edges = np.linspace(0, side, to + 1)
    pixels = np.arange(side)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (np.clip(overlap, 0, None) * to / side).astype(np.float32)
