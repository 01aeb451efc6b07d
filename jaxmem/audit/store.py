"""The arrays that each unit of an audit keeps: their keys and names, spelt here only, and how they are read.

``B`` points of a batch (the last batch may have fewer), ``S`` steps of a segment, ``L`` eigenvalues:

==============================  ======================================================================================
key                             arrays
==============================  ======================================================================================
``start-<t>``                   ``uncond`` (noises, *latent): the unconditional score of the starting noises
``path-<batch>-<segment>``      ``end`` (B, *latent): x after the last step; ``x-<t>`` (B, *latent) at timesteps of
                                spectra; of models with pairs of scores ``norms`` (B, S): ‖ε_c − ε_u‖, and in the first
                                segment ``difference`` (B, *latent): s_c − s_u at the first step, and scores. Of noised
                                images ``x-<t>``, ``error-<t>`` (B,) and, where they are denoised without captions,
                                too, ``plain-error-<t>`` (B,)
``products-<batch>``            scores
``pairs-<batch>-<t>``           scores
``image-<batch>``               ``images`` (B, h, w, 3) uint8
``spectrum-<batch>-<t>``        ``eigenvalues`` (B, L) descending, NaN padded; ``noise`` (B,)
``count-<point>-<t>``           ``lower``, ``estimate``, ``interval`` (2,), ``threshold``, and the same of the tangent
                                count but the threshold: ``tangent_lower`` …
``clean-<image>``               ``clean`` (B, *latent): x_0 of training and held-out images, from this one on
``training-images``             its row says what they are; ``thumbnails`` (I, h, w, 3) uint8, where they are shown
``nearest``                     ``index``, ``distance``, ``calibrated``, ``similarity``, ``similar`` (points,): the
                                training image that is the nearest to each generation, and the most similar one
``first-step``                  no arrays; its row has what there is to be warned of (`FIRST_STEP`)
``directions``                  ``eigenvalues`` (2, k); ``base`` (2, h, w, 3); ``moved`` (2, k, 2, h, w, 3)
==============================  ======================================================================================

Scores are of detectors whose evidence is too large to keep: ``score:<name>`` (B,).
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxmem.audit.plan import Plan
from jaxmem.runs.directory import Run

DIRECTIONS = "directions"
TRAINING_IMAGES = "training-images"  #: its row says what the images are
NEAREST = "nearest"
FIRST_STEP = "first-step"  #: its row says what the first step says of the model; no arrays
COUNTS = ("lower", "estimate", "interval", "threshold", "tangent_lower", "tangent_estimate", "tangent_interval")


def start(t: int) -> str:
    return f"start-{t:04d}"


def path(batch: int, segment: int) -> str:
    return f"path-{batch:05d}-{segment:03d}"


def products(batch: int) -> str:
    return f"products-{batch:05d}"


def pairs(batch: int, t: int) -> str:
    return f"pairs-{batch:05d}-{t:04d}"


def clean(first: int) -> str:
    return f"clean-{first:06d}"


def image(batch: int) -> str:
    return f"image-{batch:05d}"


def spectrum(batch: int, t: int) -> str:
    return f"spectrum-{batch:05d}-{t:04d}"


def count(point: int, t: int) -> str:
    return f"count-{point:06d}-{t:04d}"


def x_at(t: int) -> str:
    return f"x-{t:04d}"


def error_at(t: int) -> str:
    return f"error-{t:04d}"


def plain_error_at(t: int) -> str:
    return f"plain-error-{t:04d}"


def score_of(detector: str) -> str:
    return f"score:{detector}"


def segment_of(plan: Plan, t: int) -> int:
    """The segment of sampling steps that visits a timestep."""
    step = plan.timesteps.index(t)
    return next(i for i, steps in enumerate(plan.segments) if step in steps)


def latents(run: Run, plan: Plan, batch: int, t: int) -> np.ndarray:
    """x_t of a batch at a timestep of spectra, (B, *latent)."""
    return run.load(path(batch, segment_of(plan, t)), x_at(t))[x_at(t)]


def first_difference(run: Run, batch: int) -> np.ndarray:
    """s_c − s_u of a batch at the first step, (B, *latent)."""
    return run.load(path(batch, 0), "difference")["difference"]


def gather(run: Run, plan: Plan, key: Callable[[int], str], arrays: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Named arrays of all batches whose unit is done, (points, *shape), NaN elsewhere.

    Args:
        run: the audit's.
        plan: of the run.
        key: of the unit of a batch.
        arrays: names, and the shape that belongs to one point.

    Raises:
        ValueError: an array is missing or of another shape.
    """
    found = {name: np.full((plan.num_points, *shape), np.nan) for name, shape in arrays.items()}
    for batch in plan.batches():
        if arrays and run.done(key(batch)):
            points = plan.points(batch)
            for name, array in run.load(key(batch), *arrays).items():
                expected = (len(points), *arrays[name])
                if array.shape != expected:
                    raise ValueError(
                        f"{run.directory}: expected {name} of shape {expected} in arrays/{key(batch)}.npz, got"
                        f" {array.shape}; the run is damaged, start it again in a new folder"
                    )
                found[name][points] = array
    return found


def gather_images(run: Run, plan: Plan) -> tuple[np.ndarray | None, np.ndarray]:
    """Images of all points, zeros where they are not decoded yet, and where they are; None if there is not one."""
    images, sampled = None, np.zeros(plan.num_points, bool)
    for batch in plan.batches():
        if run.done(image(batch)):
            found, points = run.load(image(batch))["images"], plan.points(batch)
            if images is None:
                images = np.zeros((plan.num_points, *found.shape[1:]), np.uint8)
            images[points], sampled[points] = found, True
    return images, sampled


def gather_counts(run: Run, plan: Plan) -> dict[str, np.ndarray]:
    """The arrays of `COUNTS` of all points and timesteps, (points, K) or (points, K, 2), NaN where not done."""
    shape = plan.num_points, len(plan.spectral_timesteps)
    found = {name: np.full((*shape, 2) if "interval" in name else shape, np.nan) for name in COUNTS}
    for point in range(plan.num_points if plan.count_budget is not None else 0):
        for k, t in enumerate(plan.spectral_timesteps):
            if run.done(count(point, t)):
                for name, array in run.load(count(point, t), *COUNTS).items():
                    found[name][point, k] = array
    return found
