"""The training images of an audit as they were given, and as the model sees them: pixels, conditions, duplicates."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from jaxmem.audit.training.records import ImageRecord
from jaxmem.config.checks import at_least, whole_in_range
from jaxmem.prompts import NO_PROMPT, Prompt
from jaxmem.training_images import Descriptor, Preparation, TrainingImage, TrainingImages
from jaxmem.training_images.duplicates import groups


@dataclass(frozen=True)
class TrainingData:
    """Training images for an audit (its argument ``training``), and how they are looked at.

    Raises:
        ValueError: no noises, or a timestep that is none.
    """

    images: TrainingImages
    held_out: TrainingImages | None = None  #: images that the model has not seen, to compare with
    preparation: Preparation = field(default_factory=Preparation)
    descriptor: Descriptor | None = None  #: for similarities, such as SSCD's
    image_timesteps: tuple[int, ...] = ()  #: at which images are noised; by default near 281 and 41 on the usual scale
    image_noises: int = 2  #: noises of each image and timestep, the same for all images
    image_limit: int | None = None  #: images that are looked at, and as many held-out ones: chosen by their hashes
    show: bool = True  #: whether the run and its page keep thumbnails of the images

    def __post_init__(self) -> None:
        at_least("image_noises", self.image_noises, 1)
        if self.image_limit is not None:
            at_least("image_limit", self.image_limit, 1)
        for timestep in self.image_timesteps:
            whole_in_range("image_timesteps", timestep, 0, 1_000_000)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the numbers: contents by hash in their order, no names and no places of files."""
        return {
            "images": len(self.images),
            "images_sha256": _digest(self.images.images),
            "held_out": 0 if self.held_out is None else len(self.held_out),
            "held_out_sha256": None if self.held_out is None else _digest(self.held_out.images),
            "preparation": asdict(self.preparation),
            "descriptor_sha256": None if self.descriptor is None else self.descriptor.sha256,
            "noises": self.image_noises,
            "limit": self.image_limit,
            "show": self.show,
        }

    def prompts(self) -> list[Prompt]:
        """The captions, each once, in the order of the images: the first variant of each image."""
        texts = dict.fromkeys(caption_of(image) for image in self.images.images)
        return [Prompt(text) if text else NO_PROMPT for text in texts]


def caption_of(image: TrainingImage) -> str:
    """The caption that an image is looked at with: its first; the empty one where it has none."""
    return image.captions[0] if image.captions else ""


def _digest(images: tuple[TrainingImage, ...]) -> str:
    digest = hashlib.sha256()
    for image in images:
        digest.update("\0".join([image.sha256, *image.captions]).encode() + b"\n")
    return digest.hexdigest()


class Pictures:
    """All images, training images first, at the size of a model's pictures.

    Raises:
        ValueError: a held-out image is, or nearly is, a training image.
    """

    def __init__(self, data: TrainingData, height: int, width: int) -> None:
        parts = [data.images, *([] if data.held_out is None else [data.held_out])]
        self.data = data
        self.pixels = np.concatenate([part.pixels(height, width, data.preparation) for part in parts])
        self.descriptors = None if data.descriptor is None else data.descriptor(self.pixels)
        found = groups(self.pixels, descriptors=self.descriptors)
        given = [(image, place > 0) for place, part in enumerate(parts) for image in part.images]
        self.looked, look_of = _looked(given, self.pixels, data.image_limit)
        self.records = [
            ImageRecord(image.name, image.captions, image.sha256, held_out, int(group), image.repeats, look)
            for (image, held_out), group, look in zip(given, found, look_of, strict=True)
        ]
        _refuse_trained(self.records)

    @cached_property
    def held_out(self) -> np.ndarray:
        """(I,) bool: the model was not trained on the image."""
        return np.array([record.held_out for record in self.records])

    @cached_property
    def group(self) -> np.ndarray:
        """(I,) number of the group of duplicates."""
        return np.array([record.group for record in self.records])

    @cached_property
    def captions(self) -> list[str]:
        """Caption of each image that it is looked at with."""
        return [record.captions[0] if record.captions else "" for record in self.records]


def _looked(
    given: Sequence[tuple[TrainingImage, bool]], pixels: np.ndarray, limit: int | None
) -> tuple[list[int], list[int]]:
    """Images that are looked at, and for each image its place among them, -1 for those that are not.

    Equal pictures with one caption are looked at once. Of more than ``limit`` of a kind, those with the smallest hashes
    are: a choice at random that does not depend on names.
    """
    known: dict[Any, int] = {}
    first = [
        known.setdefault((hashlib.sha256(pixels[i].tobytes()).digest(), caption_of(image), held_out), i)
        for i, (image, held_out) in enumerate(given)
    ]
    chosen: list[int] = []
    for kind in (False, True):
        members = sorted({i for i in first if given[i][1] is kind}, key=lambda i: given[i][0].sha256)
        chosen += sorted(members[:limit])
    place = {i: number for number, i in enumerate(chosen)}
    return chosen, [place.get(i, -1) for i in first]


def _refuse_trained(records: list[ImageRecord]) -> None:
    trained = {record.group: record.name for record in records if not record.held_out}
    leaked = [(record.name, trained[record.group]) for record in records if record.held_out and record.group in trained]
    if leaked:
        named = "; ".join(f"{one} as {other}" for one, other in leaked[:3])
        more = f" and {len(leaked) - 3} more" if len(leaked) > 3 else ""
        raise ValueError(
            f"held_out: expected images that are not among the training images, got {len(leaked)} that are, or nearly"
            f" ({named}{more}); take them out"
        )
