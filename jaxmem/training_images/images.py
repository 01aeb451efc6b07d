"""Training images as they lie in files, and their pixels at the size of a model."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from jaxmem.training_images.preparation import Preparation, decoded, prepared

DEFAULT = Preparation()
NUM_NAMED = 10  # problems that a message spells out
_BLOCK = 64  # images that are in memory at once, twice for a moment: 100 MB of 512 × 512


class TrainingImage(NamedTuple):
    """One image file of a training set, and what it was shown with."""

    name: str  #: path relative to the folder given, separated by "/"
    path: Path  #: where it lies
    captions: tuple[str, ...]  #: variants, in their order; none where the image has no caption
    repeats: int  #: how often an epoch shows it: the number of kohya's folder name, or the rows of a table
    sha256: str  #: of the file's bytes


@dataclass(frozen=True)
class TrainingImages:
    """The images of a training set, sorted by name, as `read_training_images` reads them.

    Files with equal bytes are all there: `jaxmem.training_images.duplicates` finds them.
    """

    source: Path  #: the folder or file that was given
    images: tuple[TrainingImage, ...]  #: sorted by name
    unused: tuple[str, ...] = ()  #: names of caption files that belong to none of these images, which were not read

    def __len__(self) -> int:
        return len(self.images)

    def pixels(
        self, height: int, width: int, preparation: Preparation = DEFAULT
    ) -> UInt8[np.ndarray, "n {height} {width} 3"]:
        """The images as a training script makes them for a model of this size, in the order of ``images``.

        They are in memory all at once, ``3 n height width`` bytes: 10,000 images of 512 × 512 are 7.9 GB. `blocks`
        takes the same arguments, and reads some after the others.

        Args:
            height: of the model, in pixels.
            width: of the model, in pixels.
            preparation: how images are resized and cropped.

        Raises:
            ValueError: a file is not the one any more that was read, or images do not have the model's size where they
                are not to be resized or cropped; all of them are named.
        """
        found, done = np.empty((len(self), max(height, 0), max(width, 0), 3), np.uint8), 0
        for block in self.blocks(height, width, preparation):
            found[done : done + len(block)] = block
            done += len(block)
        return found

    def blocks(
        self, height: int, width: int, preparation: Preparation = DEFAULT
    ) -> Iterator[UInt8[np.ndarray, "b {height} {width} 3"]]:
        """The same images, at most 64 at once; after one that is refused, the others are only looked through."""
        if height < 1 or width < 1:
            raise ValueError(f"height and width: expected at least 1 pixel each, got {height} and {width}")
        problems: list[str] = []
        for start in range(0, len(self), _BLOCK):
            block = []
            for image in self.images[start : start + _BLOCK]:
                try:
                    content = image.path.read_bytes()
                    if hashlib.sha256(content).hexdigest() != image.sha256:
                        raise ValueError("another content than when the folder was read")
                    block.append(prepared(decoded(content), height, width, preparation))
                except OSError as error:
                    problems.append(f"{image.name}: {error.strerror}")
                except ValueError as error:
                    problems.append(f"{image.name}: {error}")
            if not problems:
                yield np.stack(block)
        refuse(self.source, problems, "read the folder again, or choose another `resize` or `crop`")


def refuse(source: Path, problems: list[str], remedy: str) -> None:
    """One error for all problems, which begin with the names of their files, if there are any."""
    if not problems:
        return
    named = "; ".join(sorted(problems)[:NUM_NAMED])
    more = f"; and {len(problems) - NUM_NAMED} more" if len(problems) > NUM_NAMED else ""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise ValueError(
        f"{source}: expected images that can be read, and captions of them, got {count}: {named}{more}; {remedy}"
    )
