"""Pictures, uint8 with three channels, and samples in [-1, 1]: the way there and back."""

from typing import Any

import numpy as np

THUMBNAIL = 112  #: pixels of the longer side of an image that a run keeps for its page


def to_pictures(x: Any) -> np.ndarray:
    """Images of [-1, 1], shape (n, height, width, 1 or 3) or (n, height, width), as uint8 of three channels.

    Raises:
        ValueError: another shape.
    """
    images = np.asarray(x, np.float32)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"decode: expected samples of shape (height, width), (height, width, 1) or (height, width, 3), got"
            f" {images.shape[1:]}; give the model a `decode` of its own"
        )
    pixels = np.round(255 * np.clip(images / 2 + 0.5, 0, 1)).astype(np.uint8)
    return np.broadcast_to(pixels, (*pixels.shape[:3], 3))


def from_pictures(images: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Pictures as samples in [-1, 1]: the way back of `to_pictures`; of one channel the mean of the three.

    Args:
        images: uint8, shape (n, height, width, 3).
        shape: shape of one sample: (height, width), (height, width, 1) or (height, width, 3).

    Raises:
        ValueError: other images, or a shape that is no picture's.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images: expected uint8 (n, height, width, 3), got {images.dtype} {images.shape}")
    channels = shape[2] if len(shape) == 3 else 1
    if len(shape) not in (2, 3) or channels not in (1, 3) or images.shape[1:3] != tuple(shape[:2]):
        raise ValueError(
            f"images: expected pictures of the shape of a sample, {tuple(shape)}, got {images.shape[1:]}; give the"
            f" model an `encode` and a `picture_size` of its own"
        )
    values = images.astype(np.float32) / np.float32(127.5) - 1
    if channels == 1:
        values = values.mean(-1, keepdims=True)
    return values.reshape(len(images), *shape)


def thumbnails(pixels: np.ndarray) -> np.ndarray:
    """Images of at most `THUMBNAIL` pixels a side, by area averages."""
    from PIL import Image

    height, width = thumbnail_size(*pixels.shape[1:3])
    if (height, width) == pixels.shape[1:3]:
        return pixels
    resized = (Image.fromarray(one).resize((width, height), Image.Resampling.BOX) for one in pixels)
    return np.stack([np.asarray(one) for one in resized])


def thumbnail_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of the thumbnail of an image of this size."""
    scale = min(1.0, THUMBNAIL / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
