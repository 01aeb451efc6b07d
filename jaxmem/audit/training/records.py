"""What a run keeps of training images: its records, its looks and its nearest images; to read them takes no JAX."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxmem.detectors import Detector, choose
from jaxmem.runs.directory import Run

FOLDER = "at-images"  #: the folder of the looks, in that of the audit
WITH, WITHOUT = "with-captions", "without-captions"
#: Statistics that an image's p-value is made of; they are taken at images whatever detectors are chosen.
LEADS = ("tangent-count", "largest-sum", "trace", "denoising-error", "denoising-gain")


def with_leads(entries: Sequence[Detector]) -> tuple[Detector, ...]:
    """The detectors of a look: those of the audit, and the leads."""
    there = {entry.name for entry in entries}
    missing = [name for name in LEADS if name not in there]
    return (*entries, *(choose(missing) if missing else ()))


class ImageRecord(NamedTuple):
    """One image as a run knows it."""

    name: str  #: path of the file in its folder
    captions: tuple[str, ...]
    sha256: str  #: of the file
    held_out: bool  #: the model was not trained on it
    group: int  #: equal for duplicates and near-duplicates
    repeats: int  #: times that an epoch shows it
    look: int  #: its place among the images that were looked at, which an equal picture shares; -1 if it is not


class NearestImages(NamedTuple):
    """Of each point of an audit; NaN, and index -1, where there is no generation."""

    index: np.ndarray  # type: ignore[assignment]  #: (P,) among the training images
    distance: np.ndarray  #: (P,) see `jaxmem.training_images.nearest.Nearest`
    calibrated: np.ndarray  #: (P,) Carlini's calibrated ℓ2; NaN where there are too few images to calibrate by
    similarity: np.ndarray  #: (P,) of descriptors, to the training image that is the most similar; NaN without any
    similar: np.ndarray  #: (P,) which image that is


def look_runs(run: Run) -> list[Run]:
    """The runs of an audit's looks at images, those that were begun."""
    folders = [run.directory / FOLDER / name for name in (WITH, WITHOUT)]
    return [Run.read(folder) for folder in folders if (folder / "manifest.json").is_file()]
