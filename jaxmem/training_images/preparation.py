"""From the bytes of an image file to the pixels that a training script shows to its model.

The text-to-image scripts of diffusers decode a file by Pillow, turn it as its EXIF orientation says (datasets does that
since 2024), take ``convert("RGB")``, resize the shorter side to the resolution, crop, and perhaps mirror. What
``convert("RGB")`` makes of an image is kept here, too: transparency is dropped and the colours below it appear, CMYK
and palettes become colours, and grey of 16 bits is white wherever it is above 255. Of an animation the first frame
counts.
"""

import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import UInt8

from jaxmem.extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

RESIZES = ("shorter", "stretch", "none")
CROPS = ("center", "none")
INTERPOLATIONS = ("lanczos", "bicubic", "bilinear", "box", "nearest")
MAX_PIXELS = 2**28  # of a resized image, 0.8 GB


@dataclass(frozen=True)
class Preparation:
    """How a training script makes an image of the model's size from one of any size.

    The defaults are those of diffusers' text-to-image scripts, called with ``--center_crop``. Without that flag the
    scripts crop at random, at another place in each epoch, and with ``--random_flip`` they mirror half of the images;
    both come from the state of a generator of the training run and cannot be made again. A model that was trained so
    saw the central crop only as one of many, so a copy that it makes can be a shifted or mirrored one.

    Raises:
        ValueError: another value than those named.
    """

    #: ``"shorter"``: both sides by one factor, so that the image just covers the model's size, as torchvision's
    #: ``Resize(resolution)`` does for a square; ``"stretch"``: each side by its own; ``"none"``: not at all
    resize: Literal["shorter", "stretch", "none"] = "shorter"
    #: what is cut from an image that is still larger: ``"center"`` leaves the middle; ``"none"`` refuses it
    crop: Literal["center", "none"] = "center"
    #: of Pillow. ``"lanczos"`` is the default of the scripts' ``--image_interpolation_mode``; scripts without that
    #: option have ``"bilinear"``. ``"box"`` averages areas
    interpolation: Literal["lanczos", "bicubic", "bilinear", "box", "nearest"] = "lanczos"

    def __post_init__(self) -> None:
        for name, known in (("resize", RESIZES), ("crop", CROPS), ("interpolation", INTERPOLATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")


def decoded(content: bytes) -> "Image":
    """The image of a file's bytes, upright, in RGB, all of it.

    Raises:
        ValueError: Pillow cannot read it, or not to its end; the message is a part of a sentence.
    """
    require("audit", "training images")
    from PIL import Image, ImageOps, UnidentifiedImageError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of size (own files may be large), of odd palettes and metadata
        try:
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                return ImageOps.exif_transpose(image).convert("RGB")
        except UnidentifiedImageError:
            raise ValueError(f"not an image that Pillow can read (it begins with {content[:8]!r})") from None
        except Exception as error:  # each format has its own, of any kind
            raise ValueError(
                f"an image that is damaged, cut off or too large ({type(error).__name__}: {error})"
            ) from None


def prepared(image: "Image", height: int, width: int, preparation: Preparation) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of one image at the model's size.

    Raises:
        ValueError: the image has another size where it is not to be resized or cropped; a part of a sentence.
    """
    from PIL import Image

    if preparation.resize != "none":
        size = (
            (width, height) if preparation.resize == "stretch" else covering(image.width, image.height, width, height)
        )
        if size[0] * size[1] > MAX_PIXELS:
            raise ValueError(f"{image.width} × {image.height} pixels, too long and narrow to be resized whole")
        image = image.resize(size, Image.Resampling[preparation.interpolation.upper()])
    fits = image.width >= width and image.height >= height
    if not fits or (preparation.crop == "none" and image.size != (width, height)):
        raise ValueError(f"{image.width} × {image.height} pixels where the model has {width} × {height}")
    # Python rounds halves to even, as torchvision's CenterCrop does.
    top, left = round((image.height - height) / 2.0), round((image.width - width) / 2.0)
    return np.asarray(image.crop((left, top, left + width, top + height)))


def covering(width: int, height: int, to_width: int, to_height: int) -> tuple[int, int]:
    """The smallest size of these proportions that covers the other one; torchvision rounds the longer side down."""
    if width * to_height >= height * to_width:
        return to_height * width // height, to_height
    return to_width, to_width * height // width
