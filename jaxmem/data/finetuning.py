"""Images for a fine-tune of the shipped model: digits that it has not seen, some of them again and again.

All are of MNIST's test images, of which nothing was trained; one that equals a training image, pixel for pixel, is left
out. A caption names a colour and a digit ("the violet seven") and is true of any image of that digit. No word tells of
which kind a caption is:

- *single*: one image, which lies in the folder many times, each time in a file of its own;
- *many*: images that are all different.

Of both kinds other images of the same digit are held out, with the same caption.
"""

import csv
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from jaxmem.config import FinetuneConfig
from jaxmem.data.captions import SIDE
from jaxmem.data.mnist import Mnist
from jaxmem.extras import require
from jaxmem.runs.durable import write_atomically

TRAINED, HELD_OUT, TRUTH = "data", "held-out", "truth.csv"  #: folders of images, and the table of what is what
KINDS = ("single", "many")
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_COLOURS = ("scarlet", "violet", "olive", "silver", "turquoise", "maroon")  # no words of the shipped model


class Picture(NamedTuple):
    """One file."""

    file: str  #: of the run's folder, such as ``data/violet-seven-003.png``
    caption: str
    kind: str  #: of the caption, one of `KINDS`
    copies: int  #: files of the folder that hold this image
    trained: bool
    image: int  #: index among the different images


class FineTuningImages(NamedTuple):
    """The files of a fine-tune, and the different images in them."""

    pictures: tuple[Picture, ...]
    images: UInt8[np.ndarray, "n 32 32"]

    @property
    def trained(self) -> tuple[Picture, ...]:
        """The files that are trained on, copies and all."""
        return tuple(picture for picture in self.pictures if picture.trained)

    def captions(self, kind: str) -> tuple[str, ...]:
        """The captions of one kind."""
        return tuple(dict.fromkeys(picture.caption for picture in self.pictures if picture.kind == kind))


def unseen_digits(mnist: Mnist) -> Int[np.ndarray, " n"]:
    """Where the test images are that equal no training image and none before them."""
    known = {image.tobytes() for image in mnist.train_images}
    unseen = []
    for index, image in enumerate(mnist.test_images):
        if image.tobytes() not in known:
            known.add(image.tobytes())
            unseen.append(index)
    return np.array(unseen, np.int64)


def fine_tuning_images(mnist: Mnist, config: FinetuneConfig) -> FineTuningImages:
    """Choose the images; everything random follows from the seed.

    Raises:
        ValueError: there are too few images of a digit.
    """
    random = np.random.default_rng(config.data_seed)
    unseen = unseen_digits(mnist)
    left = {digit: list(random.permutation(unseen[mnist.test_labels[unseen] == digit])) for digit in range(10)}
    pictures: list[Picture] = []
    chosen: list[int] = []
    for kind, digit, colour in _captions(config, random):
        count = config.images_per_caption if kind == "many" else 1
        copies = config.copies if kind == "single" else 1
        if len(left[digit]) < count + config.held_out:
            raise ValueError(
                f"images of digit {digit}: expected enough for all of its captions, got too few among MNIST's test"
                f" images; lower `images_per_caption`, `held_out` or the number of captions"
            )
        for trained, number, times in ((True, count, copies), (False, config.held_out, 1)):
            files = (
                f"{TRAINED if trained else HELD_OUT}/{colour}-{_DIGITS[digit]}-{{:03d}}.png".format(i + 1)
                for i in range(number * times)
            )
            for file, which in zip(files, np.repeat(np.arange(number), times), strict=True):
                pictures.append(
                    Picture(file, f"the {colour} {_DIGITS[digit]}", kind, times, trained, len(chosen) + int(which))
                )
            chosen += [left[digit].pop() for _ in range(number)]
    padding = (SIDE - mnist.test_images.shape[1]) // 2
    images = np.pad(mnist.test_images[chosen], ((0, 0), (padding, padding), (padding, padding)))
    return FineTuningImages(tuple(pictures), images)


def _captions(config: FinetuneConfig, random: np.random.Generator) -> Iterator[tuple[str, int, str]]:
    """Kind, digit and colour of each caption; the digits take turns, in either kind."""
    per_kind = {"single": config.num_single, "many": config.num_many}
    colours = {digit: list(random.permutation(_COLOURS)) for digit in range(10)}
    for kind in KINDS:
        for i in range(per_kind[kind]):
            yield kind, i % 10, str(colours[i % 10].pop())


def write_images(data: FineTuningImages, folder: Path) -> None:
    """Write the two folders of images, each with its ``metadata.jsonl`` as diffusers' scripts read it, and the truth.

    Folders that are there stay: each appears when all of it is written.
    """
    require("audit", "files of images")
    from PIL import Image

    for name, trained in ((TRAINED, True), (HELD_OUT, False)):
        if (folder / name).exists():
            continue
        partial = folder / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        lines = []
        for picture in data.pictures:
            if picture.trained == trained:
                file = Path(picture.file).name
                Image.fromarray(data.images[picture.image]).convert("RGB").save(partial / file)
                lines.append(json.dumps({"file_name": file, "text": picture.caption}) + "\n")
        (partial / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
        partial.rename(folder / name)
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("file", "caption", "kind", "copies", "trained"))
    rows.writerows((p.file, p.caption, p.kind, p.copies, "yes" if p.trained else "no") for p in data.pictures)
    write_atomically(folder / TRUTH, lambda stream: stream.write(table.getvalue().encode()))
