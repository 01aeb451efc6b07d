"""The scores of an audit as one table, computed from its finished arrays."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmem.memorization.detectors import tiled_l2, wen
from jaxmem.memorization.registry import Detector
from jaxmem.memorization.sharpness import negative_trace_of_cube, positive_count, sum_of_largest, tangent_count


def score_table(
    chosen: Sequence[Detector],
    *,
    eps_difference: np.ndarray,
    timesteps: Any = (),
    sigma: Any = (),
    spectral_timesteps: Any = (),
    eigenvalues: np.ndarray | None = None,
    noise: np.ndarray | None = None,
    columns: Mapping[str, np.ndarray] | None = None,
    images: np.ndarray | None = None,
    sampled: np.ndarray | None = None,
) -> np.ndarray:
    """The scores of N prompts × M noises by D detectors, shape (N, M, D), float64, NaN where not done.

    Args:
        chosen: the detectors, see `detectors`.
        eps_difference: (N, M, S).
        timesteps: (S,) of the sampler's steps.
        sigma: (S,) their noise levels.
        spectral_timesteps: (K,) some of ``timesteps``.
        eigenvalues: (N, M, K, L), NaN padded.
        noise: (N, M, K).
        columns: (N, M) by name for what is computed where the scores are: ``"jeon"``, ``"score-evolution"``,
            ``"anisotropy"``; and counts of `jaxmem.count_positive`, which take the place of a spectrum's:
            ``"positive-count@t281"`` its ``estimate``, ``"tangent-count@t281"`` its ``tangent.estimate``.
        images: (N, M, h, w, channels).
        sampled: (N, M): the image is there. The distances of a prompt's images wait for the last of them.

    Raises:
        ValueError: a detector's arrays are missing or of another shape.
    """
    if np.ndim(eps_difference) != 3:
        raise ValueError(f"eps_difference: expected shape (N, M, S), got {np.shape(eps_difference)}")
    shape = np.shape(eps_difference)[:2]
    columns = {} if columns is None else columns
    table = np.full((*shape, len(chosen)), np.nan)
    for i, one in enumerate(chosen):
        if one.name in columns:
            table[..., i] = _checked(one.name, columns[one.name], shape)
        elif one.statistic == "wen":
            table[..., i] = wen(eps_difference, one.number or 1)
        elif one.statistic == "tiled-l2" and images is not None and sampled is not None:
            images = _checked("images", images, (*shape, *images.shape[2:]))
            for j in np.flatnonzero(_checked("sampled", sampled, shape).all(1)):
                table[j, :, i] = tiled_l2(images[j])
        elif one.statistic in _OF_SPECTRA and eigenvalues is not None and noise is not None:
            number = len(spectral_timesteps)
            if one.timestep not in spectral_timesteps or one.timestep not in timesteps:
                raise ValueError(
                    f"{one.name!r}: expected its timestep among {np.asarray(timesteps).tolist()} and"
                    f" {np.asarray(spectral_timesteps).tolist()}"
                )
            where = list(spectral_timesteps).index(one.timestep)
            values = _checked("eigenvalues", eigenvalues, (*shape, number, eigenvalues.shape[-1]))[:, :, where].real
            level = float(np.asarray(sigma)[list(timesteps).index(one.timestep)])
            spectra = _Spectra(values, _checked("noise", noise, (*shape, number))[:, :, where], level)
            table[..., i] = _OF_SPECTRA[one.statistic](spectra, one.number or 1)
        else:
            raise ValueError(f"score_table: the arrays of {one.name!r} are missing; see its arguments")
    return table


def _checked(name: str, array: Any, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(array)
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
    return array


class _Spectra(NamedTuple):
    """The spectra of all points at one timestep."""

    eigenvalues: np.ndarray  # (N, M, L), real, NaN padded
    noise: np.ndarray  # (N, M)
    sigma: float


def _complete(compute: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> np.ndarray:
    """A statistic of whole spectra: NaN where an eigenvalue is missing."""
    there = ~np.isnan(values).any(-1)
    return np.where(there, compute(np.where(there[..., None], values, 0.0)), np.nan)


def _smallest(values: np.ndarray) -> np.ndarray:
    smallest = np.where(np.isnan(values), np.inf, values).min(-1)
    return np.where(np.isfinite(smallest), smallest, np.nan)


_OF_SPECTRA: dict[str, Callable[[_Spectra, int], np.ndarray]] = {
    "positive-count": lambda s, _: np.where(
        np.isnan(s.noise), np.nan, _complete(lambda values: positive_count(values, s.noise), s.eigenvalues)
    ),
    "tangent-count": lambda s, _: _complete(
        lambda values: tangent_count(values, np.full(values.shape[:-1], s.sigma)), s.eigenvalues
    ),
    "largest-sum": lambda s, k: sum_of_largest(s.eigenvalues, k),
    "largest": lambda s, _: sum_of_largest(s.eigenvalues, 1),
    "smallest": lambda s, _: _smallest(s.eigenvalues),
    "trace": lambda s, _: _complete(lambda values: values.sum(-1), s.eigenvalues),
    "cubed-trace": lambda s, _: _complete(negative_trace_of_cube, s.eigenvalues),
}
