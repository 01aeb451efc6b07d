"""Descriptors of images from a network that the user has, such as SSCD: pictures are alike if their descriptors are.

What SSCD's own README says is done: the shorter side is resized to 288 (Pillow's bilinear, as torchvision's
``Resize``), values in [0, 1] are normalised by the mean and deviation of ImageNet, and the similarity of two images is
the product of their unit descriptors. A file that fixes the size of its input gets images that are stretched to that
size, the second way of the README. Papers on memorization prepare images otherwise (256 and a crop of 224, other
means), so their numbers are not comparable with these.
"""

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from jaxmem.extras import require, require_package

SHORTER_SIDE = 288
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  #: of ImageNet, red, green and blue
#: Similarity from which papers on diffusion models call an image a replica. A convention, not a property of a network.
REPLICA_SIMILARITY = 0.5
#: Similarity from which 90 % of the pairs of the DISC images are copies, by SSCD's README, for ``sscd_disc_mixup``.
COPY_SIMILARITY = 0.75
TORCHSCRIPT = (".pt", ".pth", ".torchscript")


@dataclass(frozen=True)
class Descriptor:
    """A network that makes a unit vector of an image; `load_descriptor` opens one."""

    path: Path  #: its file
    sha256: str  #: of the file's bytes
    size: tuple[int, int] | None  #: height and width of its input where the file fixes them
    run: Callable[[np.ndarray], Any]  #: one prepared image, of shape (1, 3, h, w), to its output

    def __call__(self, pixels: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n k"]:
        """Unit vectors of images, float32, one image after the other: many files fix a batch of 1.

        Raises:
            ValueError: the network fails, or gives something else than one finite vector for an image, or zeros.
        """
        if not len(pixels):
            raise ValueError(f"{self.path}: expected at least one image, got none")
        return np.concatenate([self._of_one(image) for image in pixels])

    def _of_one(self, image: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "1 k"]:
        x = preprocess(image, self.size)
        try:
            vector: np.ndarray = np.asarray(self.run(x), np.float32)
        except Exception as error:  # each runtime has its own
            raise ValueError(
                f"{self.path}: expected a network that takes images of shape {x.shape}, got {error!s:.200}"
            ) from None
        if vector.ndim != 2 or len(vector) != 1:
            raise ValueError(
                f"{self.path}: expected a vector for each image, an output of shape (1, k), got {vector.shape}; export"
                f" the network with its pooling"
            )
        norm = float(np.linalg.norm(vector))
        if not (np.isfinite(norm) and norm > 0):
            raise ValueError(f"{self.path}: expected a finite vector other than zero, got one of norm {norm}")
        return vector / np.float32(norm)


def load_descriptor(path: str | Path) -> Descriptor:
    """The network of a file: ``.onnx``, run by onnxruntime, or TorchScript (``.pt``, ``.torchscript``), run by torch.

    It runs on the CPU, in float32. Of several outputs the first counts.

    Raises:
        ValueError: the file is not there, of another kind, not readable, or takes no single image of three channels.
        ImportError: onnxruntime, or torch, is missing.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".onnx", *TORCHSCRIPT):
        raise ValueError(f"{path}: expected a descriptor named .onnx, {', '.join(TORCHSCRIPT)}, got {suffix!r}")
    if not path.is_file():
        raise ValueError(f"{path}: expected a descriptor, got no such file")
    size, run = _onnx(path) if suffix == ".onnx" else (None, _torchscript(path))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Descriptor(path, digest, size, run)


def preprocess(image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int] | None = None) -> Float[np.ndarray, "1 3 H W"]:
    """One image as SSCD takes it: the shorter side 288, or a fixed height and width; channels first, normalised."""
    require("audit", "descriptors")
    from PIL import Image

    height, width = image.shape[:2]
    shorter = min(height, width)
    to = size or (SHORTER_SIDE * height // shorter, SHORTER_SIDE * width // shorter)
    resized = Image.fromarray(np.ascontiguousarray(image)).resize(to[::-1], Image.Resampling.BILINEAR)
    values = (np.asarray(resized, np.float32) / np.float32(255) - np.array(MEAN, np.float32)) / np.array(
        STD, np.float32
    )
    return np.ascontiguousarray(values.transpose(2, 0, 1))[None]


def _onnx(path: Path) -> tuple[tuple[int, int] | None, Callable[[np.ndarray], Any]]:
    require("descriptor", f"the descriptor {path.name}")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; warnings would go to the terminal
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has many, without a common base
        raise ValueError(f"{path}: expected an ONNX model, got a file that onnxruntime cannot open ({error})") from None
    inputs = session.get_inputs()
    first = inputs[0]
    # A symbolic size is a name, one that is not known is None.
    shape = [side if isinstance(side, int) else None for side in first.shape]
    images = len(shape) == 4 and shape[0] in (1, None) and shape[1] in (3, None)
    if len(inputs) != 1 or first.type != "tensor(float)" or not images:
        raise ValueError(
            f"{path}: expected one input of float32 images (1 or any number, 3, height, width), got"
            f" {', '.join(f'{i.name} of {i.type} {i.shape}' for i in inputs)}; export it so"
        )
    height, width = shape[2:]
    fixed = None if height is None or width is None else (height, width)
    return fixed, lambda x: session.run(None, {first.name: x})[0]


def _torchscript(path: Path) -> Callable[[np.ndarray], Any]:
    require_package("torch", f"the descriptor {path.name}")
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated; SSCD's files are in it
            module = torch.jit.load(str(path), map_location="cpu").eval().float()
    except Exception as error:
        raise ValueError(
            f"{path}: expected TorchScript, got a file that torch.jit cannot open ({str(error).splitlines()[0]:.120});"
            f" files of weights alone, such as .classy.pt and .torchvision.pt of SSCD, are none: take .torchscript.pt"
        ) from None

    def run(x: np.ndarray) -> Any:
        with torch.inference_mode():
            return module(torch.from_numpy(x)).numpy()

    return run
