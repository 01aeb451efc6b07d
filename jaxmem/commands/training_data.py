"""The flags of ``jaxmem audit`` about training images."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class TrainingFlags:
    """Which images the model was trained on, and how they are looked at."""

    training_data: Path | None = None
    """Images that the model was trained on: a folder, with captions in metadata.jsonl or .csv, in a .txt beside each
    image, or in kohya's folder names; or a file that lists paths and captions. Their captions are then the prompts,
    unless others are given, and each image gets a verdict. Images never leave the machine."""
    held_out: Path | None = None
    """Images like them that the model has not seen, in the same forms: what training images are compared with."""
    descriptor: Path | None = None
    """A descriptor of images, such as SSCD's, as .onnx or TorchScript: similar images count as copies, too."""
    image_timesteps: tuple[int, ...] = ()
    """Timesteps at which images are noised and looked at; by default near 281 and 41."""
    image_noises: int = 2
    """Noises of each image and timestep."""
    image_limit: int | None = None
    """Look at so many training images and held-out ones, chosen by their hashes; by default at all. Nearest images are
    searched among all."""
    resize: Literal["shorter", "stretch", "none"] = "shorter"
    """How images get the model's size, as in the training: by the shorter side, both sides each, or not at all."""
    crop: Literal["center", "none"] = "center"
    """What is cut from an image that is larger then."""
    interpolation: Literal["lanczos", "bicubic", "bilinear", "box", "nearest"] = "lanczos"
    """Interpolation of the resizing; lanczos is the default of diffusers' training scripts."""
    show_training_images: bool = True
    """Keep thumbnails of the images in the run and its page. What is computed with, arrays/ and at-images/ of the run,
    holds the images encoded in any case: keep these folders to yourself."""

    def read(self) -> Any:
        """The training data as `jaxmem.audit` takes it; None without any.

        Raises:
            ValueError: images that cannot be read, or flags that mean nothing without training images.
        """
        if self.training_data is None:
            given = [one.name for one in fields(self) if getattr(self, one.name) != one.default]
            if given:
                raise ValueError(f"{given[0]}: expected `training_data` with it, got none")
            return None
        from jaxmem.audit.training.given import TrainingData
        from jaxmem.training_images import Preparation, load_descriptor, read_training_images

        return TrainingData(
            images=read_training_images(self.training_data),
            held_out=None if self.held_out is None else read_training_images(self.held_out),
            preparation=Preparation(self.resize, self.crop, self.interpolation),
            descriptor=None if self.descriptor is None else load_descriptor(self.descriptor),
            image_timesteps=self.image_timesteps,
            image_noises=self.image_noises,
            image_limit=self.image_limit,
            show=self.show_training_images,
        )
