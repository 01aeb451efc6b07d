"""The training image that is the nearest to each generation: in pixels and, with a descriptor, in what it describes."""

import numpy as np

from jaxmem.audit import store
from jaxmem.audit.training.given import Pictures
from jaxmem.audit.training.records import NearestImages
from jaxmem.audit.work import Work
from jaxmem.training_images.area import Reduced, reduced
from jaxmem.training_images.duplicates import first_of_groups
from jaxmem.training_images.nearest import nearest_images


def run_records(work: Work, pictures: Pictures) -> None:
    """Record what the images are, and their thumbnails where they are shown."""
    if work.run.done(store.TRAINING_IMAGES):
        return
    with work.unit(store.TRAINING_IMAGES, "training images") as row:
        row["images"] = [record._asdict() for record in pictures.records]
        if pictures.data.show:
            work.run.save(store.TRAINING_IMAGES, thumbnails=pictures.thumbnails)


def run_nearest(work: Work, pictures: Pictures) -> None:
    """Find the nearest training images of all generations."""
    plan, run = work.plan, work.run
    if not plan.with_images or run.done(store.NEAREST):
        return
    work.progress("nearest training images", 0, 1)
    trained, images = slice(pictures.number), pictures.images
    others = first_of_groups(pictures.group)
    others = others[others >= pictures.number]
    with work.unit(store.NEAREST, "nearest"):
        drawn, _ = store.gather_images(run, plan)
        assert drawn is not None  # `run_images` comes before
        known = Reduced(images.values[trained], images.digests[trained], images.size)  # a slice copies nothing
        found = nearest_images(reduced(drawn), known, pictures.group[trained], images.values[others])
        similarity, similar = np.full(len(drawn), np.nan), np.full(len(drawn), -1)
        if pictures.descriptors is not None and pictures.data.descriptor is not None:
            table = pictures.data.descriptor(drawn) @ pictures.descriptors[trained].T
            similarity, similar = table.max(1), table.argmax(1)
        nearest = NearestImages(found.index, found.distance, found.calibrated, similarity, similar)
        run.save(store.NEAREST, **{name: np.asarray(array) for name, array in nearest._asdict().items()})
    work.progress("nearest training images", 1, 1)
