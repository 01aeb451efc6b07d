"""The training images of an audit as they were given, and as the model sees them: pixels, conditions, duplicates."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from jaxmem.audit.training.records import ImageRecord
from jaxmem.config.checks import at_least, whole_in_range
from jaxmem.model import Model
from jaxmem.pictures import thumbnail_size, thumbnails
from jaxmem.prompts import NO_PROMPT, Prompt
from jaxmem.runs import memory
from jaxmem.runs.progress import Progress, silent
from jaxmem.training_images import Descriptor, Preparation, TrainingImage, TrainingImages
from jaxmem.training_images.area import Reduced, reduced, reduced_size
from jaxmem.training_images.duplicates import groups

_BLOCKS = 2**28  # bytes of products and differences while images are compared, block by block
_BYTES_OF_A_BLOCK = 2 * 64 + 50 * 4  # for each value of an image: a block that is read, its stack, and its reduction


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
        self._check_types()
        at_least("image_noises", self.image_noises, 1)
        if self.image_limit is not None:
            at_least("image_limit", self.image_limit, 1)
        for timestep in self.image_timesteps:
            whole_in_range("image_timesteps", timestep, 0, 1_000_000)

    def _check_types(self) -> None:
        kinds: tuple[tuple[str, Any, str], ...] = (
            ("images", TrainingImages, "what `jaxmem.read_training_images` gives"),
            ("held_out", TrainingImages | None, "what `jaxmem.read_training_images` gives, or None"),
            ("preparation", Preparation, "a `jaxmem.training_images.Preparation`"),
            ("descriptor", Descriptor | None, "what `jaxmem.training_images.load_descriptor` gives, or None"),
            ("image_timesteps", tuple | list, "a list of timesteps"),
            ("show", bool, "True or False"),
        )
        for name, kind, expected in kinds:
            if not isinstance(value := getattr(self, name), kind):
                raise ValueError(f"{name}: expected {expected}, got {type(value).__name__}")

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

    def prompts(self, model: Model, limit: int | None = None) -> list[Prompt]:
        """The captions, each once, in the order of the images: the first variant of each image; then no prompt.

        Args:
            model: what is asked: one without a condition has no prompt but the empty one.
            limit: of the captions.
        """
        captions = dict.fromkeys(caption_of(image, model) for image in self.images.images)
        texts = [*list(captions)[:limit], *([""] if model.has_pairs else [])]
        return [Prompt(text) if text else NO_PROMPT for text in dict.fromkeys(texts)]


def caption_of(image: TrainingImage, model: Model) -> str:
    """The caption that an image is looked at with: its first; the empty one where it, or the model, has none."""
    return image.captions[0] if image.captions and model.condition != "none" else ""


def _digest(images: tuple[TrainingImage, ...]) -> str:
    digest = hashlib.sha256()
    for image in images:
        digest.update("\0".join([image.sha256, *image.captions]).encode() + b"\n")
    return digest.hexdigest()


class Pictures:
    """All images, training images first, as a model of this size sees them.

    They are read some after the others, and what is kept of each is what it is compared by, and its thumbnail; those
    that are looked at are read again.

    Args:
        data: the images as they were given.
        model: for which they are prepared.
        progress: told how many were read.

    Raises:
        ValueError: a held-out image is, or nearly is, a training image, or has no caption where those have one; or too
            little memory to compare the images.
    """

    def __init__(self, data: TrainingData, model: Model, progress: Progress = silent) -> None:
        self.data = data
        height, width = self.size = model.picture_size[0], model.picture_size[1]
        self.parts = parts = [data.images, *([] if data.held_out is None else [data.held_out])]
        if model.condition != "none":
            _refuse_unlike(data)
        number = sum(len(part) for part in parts)
        values, thumbnail = reduced_size(*self.size), (*thumbnail_size(*self.size), 3)
        #: Bytes for these images: of what is compared also a centred copy and that of a device, and parts of it.
        self.bytes = number * (4 * 4 * values + data.show * math.prod(thumbnail)) + _BLOCKS
        self.bytes += _BYTES_OF_A_BLOCK * 3 * math.prod(self.size)
        memory.require(self.bytes, f"comparing {number:,} images", "give fewer images", of_host=True)
        self.images = Reduced(np.empty((number, values), np.float32), [], self.size)
        self.thumbnails = np.empty((number, *thumbnail), np.uint8) if data.show else None
        vectors, done = [], 0
        for pixels in (block for part in parts for block in part.blocks(height, width, data.preparation)):
            progress("read training images", done, number)
            small, there = reduced(pixels), slice(done, done + len(pixels))
            self.images.values[there] = small.values
            self.images.digests.extend(small.digests)
            if self.thumbnails is not None:
                self.thumbnails[there] = thumbnails(pixels)
            vectors += [] if data.descriptor is None else [data.descriptor(pixels)]
            done += len(pixels)
        progress("read training images", number, number)
        self.descriptors = np.concatenate(vectors) if vectors else None
        found = groups(self.images, descriptors=self.descriptors)
        self._files = [(part.source, image) for part in parts for image in part.images]
        given = [(image, place > 0) for place, part in enumerate(parts) for image in part.images]
        self.captions = [caption_of(image, model) for image, _ in given]
        self.looked, look_of = _looked(given, self.captions, self.images.digests, data.image_limit)
        known = lambda image: () if model.condition == "none" else image.captions  # noqa: E731
        self.records = [
            ImageRecord(image.name, known(image), image.sha256, held_out, int(group), image.repeats, look)
            for (image, held_out), group, look in zip(given, found, look_of, strict=True)
        ]
        _refuse_trained(self.records)
        self.number = len(data.images)  #: of training images, which come first
        self.group = np.array([record.group for record in self.records])  #: (I,) number of the group of duplicates

    def pixels(self, places: Sequence[int]) -> np.ndarray:
        """Some of the images at the model's size, uint8, read again."""
        chosen = [TrainingImages(source, (image,)) for source, image in (self._files[place] for place in places)]
        height, width = self.size
        return np.concatenate([image.pixels(height, width, self.data.preparation) for image in chosen])


def _looked(
    given: Sequence[tuple[TrainingImage, bool]], captions: Sequence[str], digests: Sequence[bytes], limit: int | None
) -> tuple[list[int], list[int]]:
    """Images that are looked at, and for each image its place among them, -1 for those that are not.

    Equal pictures with one caption are looked at once. Of more than ``limit`` of a kind, those with the smallest hashes
    are: a choice at random that does not depend on names.
    """
    known: dict[Any, int] = {}
    first = [known.setdefault((digests[i], captions[i], held_out), i) for i, (_, held_out) in enumerate(given)]
    chosen: list[int] = []
    for kind in (False, True):
        members = sorted({i for i in first if given[i][1] is kind}, key=lambda i: given[i][0].sha256)
        chosen += sorted(members[:limit])
    place = {i: number for number, i in enumerate(chosen)}
    return chosen, [place.get(i, -1) for i in first]


def _refuse_unlike(data: TrainingData) -> None:
    """Refuse captions on one side alone: the two would be looked at in different densities, and differ by that."""
    if data.held_out is None:
        return
    trained, others = (sum(not image.captions for image in part.images) for part in (data.images, data.held_out))
    shares = trained / max(len(data.images), 1), others / max(len(data.held_out), 1)
    if len(data.held_out) and (min(shares) == 0) != (max(shares) == 0):
        raise ValueError(
            f"held_out: expected images with captions where the training images have them, got {others} of"
            f" {len(data.held_out)} held-out images without, and {trained} of {len(data.images)} training images; give"
            f" both captions of the same kind, or none"
        )


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
