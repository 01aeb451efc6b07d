"""What `jaxmem.experiments.verbatim` finds: the audits of its model beside what its training set says exactly."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmem.audit import Audit, read_audit
from jaxmem.audit.result import read_points
from jaxmem.data.captions import CATEGORIES, CaptionedImages
from jaxmem.experiments.autoencoder import encode_all
from jaxmem.memorization.bootstrap import mean_interval
from jaxmem.memorization.distances import nearest_training
from jaxmem.memorization.evaluation import evaluate_categories
from jaxmem.memorization.sharpness import positive_count, tangent_count
from jaxmem.memorization.standing import End
from jaxmem.oracles import EmpiricalScore
from jaxmem.runs.directory import Run
from jaxmem.runs.progress import Progress
from jaxmem.stable_diffusion.pipeline import StableDiffusion


def compare(model: StableDiffusion, data: CaptionedImages, audit: Run, progress: Progress) -> dict[str, np.ndarray]:
    """What each caption's own training set says at the audited points, and how near the generated images come to it.

    ``oracle``, shape (captions, noises, timesteps, d): the eigenvalues of the Hessian of the noised training set of
    that caption (`jaxmem.oracles.EmpiricalScore`): of a model that had learned it by heart. ``distance`` and
    ``own_distance``, shape (captions, noises): from the generated image to the nearest of all training images and to
    the nearest of its caption's, ‖·‖₂ of grey values in [-1, 1]; ``returned``, of the matching captions only: the
    nearest of all is the caption's.
    """
    found = read_audit(audit)
    count, noises = len(data.captions), found.scores.shape[1]
    points = read_points(audit)[:count]
    graphdef, state = model.network("vae")
    latents = encode_all(graphdef, state, data.images).reshape(len(data.images), -1).astype(np.float64)
    empirical = EmpiricalScore(model.scheduler.schedule)
    oracle = np.zeros((*points.shape[:3], latents.shape[1]), np.float32)
    for c in range(count):
        own = latents[data.of(c)]
        for j in range(noises):
            for k, t in enumerate(found.spectral_timesteps):
                oracle[c, j, k] = empirical.spectrum(own, points[c, j, k].reshape(-1), int(t))
        progress("spectra of the training set", c + 1, count)

    assert found.images is not None  # sampling went to the end
    generated = found.images[:count].mean(-1).reshape(count * noises, -1) / 127.5 - 1
    training = data.images.reshape(len(data.images), -1) / np.float32(127.5) - 1
    nearest = nearest_training(jnp.asarray(generated, jnp.float32), jnp.asarray(training))
    of_caption = data.caption[np.asarray(nearest.index)].reshape(count, noises)
    own_distance = np.zeros((count, noises))
    for c in range(count):
        part = jnp.asarray(generated.reshape(count, noises, -1)[c], jnp.float32)
        own_distance[c] = nearest_training(part, jnp.asarray(training[data.of(c)])).distance
    matching = np.flatnonzero(np.array(data.categories) == "matching")
    return {
        "oracle": oracle,
        "distance": np.asarray(nearest.distance).reshape(count, noises),
        "own_distance": own_distance,
        "returned": of_caption[matching] == matching[:, None],
        "timestep": found.spectral_timesteps,
        "example": data.images[[data.of(c)[0] for c in range(count)]],
    }


def mean_counts(found: Audit, arrays: dict[str, np.ndarray], categories: Sequence[str]) -> dict[str, Any]:
    """By timestep and category: mean counts with 95 % intervals over captions, of the model and the training sets."""
    kinds, table = np.array(categories), {}
    measured, oracle = found.eigenvalues[: len(kinds)], arrays["oracle"].astype(np.float64)
    sigma = found.spectral_sigma
    for k, t in enumerate(found.spectral_timesteps):
        row: dict[str, Any] = {}
        for name in CATEGORIES:
            mine, theirs = measured[kinds == name, :, k], oracle[kinds == name, :, k]
            noise = found.noise[: len(kinds)][kinds == name, :, k]
            row[name] = {
                "positive": mean_interval(positive_count(mine, noise)),
                "tangent": mean_interval(tangent_count(mine, sigma[k])),
                "positive_of_training_set": mean_interval(positive_count(theirs)),
                "tangent_of_training_set": mean_interval(tangent_count(theirs, sigma[k])),
            }
        table[str(t)] = row
    return table


def distances(distance: np.ndarray, categories: Sequence[str]) -> dict[str, dict[str, float]]:
    """By category: the median and the largest distance from a generated image to the nearest training image."""
    kinds = np.array(categories)
    return {
        name: {"median": float(np.median(distance[kinds == name])), "largest": float(distance[kinds == name].max())}
        for name in CATEGORIES
    }


def apart(found: Audit, categories: Sequence[str]) -> dict[str, float]:
    """Median ‖·‖₂ between generated images of two *general* captions: from one noise, and from two."""
    assert found.images is not None  # sampling went to the end
    general = found.images[: len(categories)][np.array(categories) == "none"]
    grey = (general.mean(-1) / 127.5 - 1).reshape(*general.shape[:2], -1)
    first, second = np.triu_indices(len(grey), 1)
    one_noise = np.linalg.norm(grey[first] - grey[second], axis=-1)
    noise, other = np.triu_indices(grey.shape[1], 1)
    two_noises = np.linalg.norm(grey[first][:, noise] - grey[second][:, other], axis=-1)
    return {"one_noise": float(np.median(one_noise)), "two_noises": float(np.median(two_noises))}


def lowest_over_bound(found: Audit) -> dict[str, float]:
    """By timestep: the lowest of all eigenvalues over -1/σ², below which no true one is."""
    ratios = -found.eigenvalues.min((0, 1, 3)) * found.spectral_sigma**2
    return {str(t): float(ratio) for t, ratio in zip(found.spectral_timesteps, ratios, strict=True)}


def areas(audit: Run) -> dict[str, Any]:
    """Of each detector and memorized category against *none*: AUC, its interval and the rates at few false alarms."""
    names = ("auc", "auc_interval", "tpr_at_1", "tpr_at_3", "num_negative")
    return {
        detector: {kind: {name: row[name] for name in names} for kind, row in kinds.items()}
        for detector, kinds in audit.metrics()["evaluation"].items()
    }


def areas_over_time(course: Audit) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """AUC of each statistic at each timestep it was taken at, from the first: by statistic and memorized category.

    Spectral statistics at the timesteps with a spectrum, ‖eps_c - eps_u‖ at all sampling steps.
    """
    labels = [prompt.label for prompt in course.prompts]
    categories = [prompt.category for prompt in course.prompts]
    scores: dict[str, list[tuple[int, np.ndarray, End]]] = {}
    for d, detector in enumerate(course.detectors):
        if detector.timestep is not None:
            column = (detector.timestep, course.scores[..., d], detector.memorized_is)
            scores.setdefault(detector.statistic, []).append(column)
    scores["eps-difference"] = [(int(t), course.eps_difference[..., s], "high") for s, t in enumerate(course.timesteps)]
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, columns in scores.items():
        found[name] = {kind: [] for kind in CATEGORIES[1:]}
        for t, values, memorized_is in sorted(columns, key=lambda column: -column[0]):
            rates = evaluate_categories(values, labels, categories, memorized_is=memorized_is, num_resamples=1)
            for kind in CATEGORIES[1:]:
                area = rates[kind].auc
                assert area is not None  # finished audits have all scores
                found[name][kind].append((t, area))
    return found


def earliest(course: dict[str, Any], level: float = 0.95) -> dict[str, dict[str, int | None]]:
    """The first timestep at which each statistic of `areas_over_time` has this AUC; None if it never has."""
    return {
        name: {kind: next((t for t, area in rows if area >= level), None) for kind, rows in kinds.items()}
        for name, kinds in course.items()
    }
