"""The images that a model was trained on: which files they are, what the model saw of them, how near a picture is.

`read_training_images` reads a folder, or a table of paths, of any of the usual layouts, and names everything that is
wrong with it at once. `duplicates`, `nearest` and `descriptor` compare pictures with these images.
"""

from jaxmem.training_images.descriptor import Descriptor, load_descriptor
from jaxmem.training_images.images import TrainingImage, TrainingImages
from jaxmem.training_images.preparation import Preparation
from jaxmem.training_images.read import read_training_images

__all__ = [
    "Descriptor",
    "Preparation",
    "TrainingImage",
    "TrainingImages",
    "load_descriptor",
    "read_training_images",
]
