"""Spectra that counts are tried on: what a dozen Lanczos steps resolve, and what they do not."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

LEARNED = Path(__file__).parent / "results" / "learned_spectra.json"


def half(rng: np.random.Generator, scale: float, count: int) -> np.ndarray:
    return np.abs(rng.normal(0, scale, count))


def _few(size: int, share: float) -> int:
    return max(3, round(share * size))


def gap(size: int, rng: np.random.Generator) -> np.ndarray:
    few = _few(size, 0.018)
    return np.r_[rng.uniform(5, 200, few), rng.uniform(-1000, -50, size - few)]


def no_gap(size: int, rng: np.random.Generator) -> np.ndarray:
    few = _few(size, 0.018)
    return np.r_[half(rng, 0.15, few), -half(rng, 1, size - few)]


def few(size: int, rng: np.random.Generator) -> np.ndarray:
    count = _few(size, 0.0015)
    return np.r_[half(rng, 50, count), -half(rng, 300, size - count)]


def ten_above_a_gap(size: int, rng: np.random.Generator) -> np.ndarray:
    return np.r_[rng.uniform(1e-3, 1e-2, 10), -1 - half(rng, 1, size - 10)]


def student_t(size: int, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_t(3, size) - 3


def cauchy(size: int, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_cauchy(size) - 3


def outlier(size: int, rng: np.random.Generator) -> np.ndarray:
    few = _few(size, 0.025)
    return np.r_[100.0, half(rng, 0.2, few), -half(rng, 1, size - few - 1)]


def density_through_zero(size: int, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(-0.5, 1, size)


def plateau(size: int, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(-1, 0.05, size)


def null_space(size: int, rng: np.random.Generator) -> np.ndarray:
    few, zeros = _few(size, 0.018), size // 4
    return np.r_[rng.uniform(5, 200, few), np.zeros(zeros), rng.uniform(-1000, -50, size - few - zeros)]


def null_space_no_gap(size: int, rng: np.random.Generator) -> np.ndarray:
    few, zeros = _few(size, 0.018), size // 4
    return np.r_[half(rng, 50, few), np.zeros(zeros), -half(rng, 300, size - few - zeros)]


def clusters_on_both_sides(size: int, rng: np.random.Generator) -> np.ndarray:
    few, cluster = _few(size, 0.018), size // 32
    bulk = rng.uniform(-1000, -50, size - few - 2 * cluster)
    return np.r_[rng.uniform(5, 200, few), np.repeat([0.5, -0.5], cluster), bulk]


def cluster_just_above(size: int, rng: np.random.Generator) -> np.ndarray:
    cluster = _few(size, 0.02)
    return np.r_[np.full(cluster, 1e-3), -half(rng, 1, size - cluster)]


def cluster_just_below(size: int, rng: np.random.Generator) -> np.ndarray:
    cluster = _few(size, 0.02)
    return np.r_[half(rng, 0.2, cluster), np.full(cluster, -1e-3), -half(rng, 1, size - 2 * cluster)]


def cluster_at_the_resolution(size: int, rng: np.random.Generator) -> np.ndarray:
    # a Lanczos run of m steps tells about 1/m of the range apart: somewhere between 10 and 300 steps
    cluster = _few(size, 0.02)
    return np.r_[np.full(cluster, 10 ** rng.uniform(-2.5, -1)), -half(rng, 1, size - cluster)]


def gap_with_a_jump_above(size: int, rng: np.random.Generator) -> np.ndarray:
    few = size // 20
    return np.r_[rng.uniform(0.02, 0.5, few), rng.uniform(-1, 0.02, size - few)]


def none_positive(size: int, rng: np.random.Generator) -> np.ndarray:
    return -half(rng, 1, size)


def all_positive(size: int, rng: np.random.Generator) -> np.ndarray:
    return 1e-3 + half(rng, 1, size)


def power_law(size: int, rng: np.random.Generator) -> np.ndarray:
    # a Gaussian's Hessian with variances that fall as of natural images, and directions between its modes
    variances = 200 * np.arange(1.0, size + 1) ** -1.5
    free = np.arange(size) < _few(size, 0.016)
    return np.where(free, 0.3 * rng.exponential(1, size), -1 / (1 + variances))


def learned(size: int, rng: np.random.Generator) -> np.ndarray:
    # of one point of a small network, drawn from its distribution function
    points = json.loads(LEARNED.read_text())["eigenvalues"]
    values = np.sort(points[rng.integers(len(points))])
    return np.interp(rng.uniform(0, len(values) - 1, size), np.arange(len(values)), values)


FAMILIES: dict[str, tuple[Callable[[int, np.random.Generator], np.ndarray], str]] = {
    "gap": (gap, "1.8 % in [5, 200], the rest in [-1000, -50]"),
    "no gap": (no_gap, "1.8 % half-normal of scale 0.15, the rest minus half-normal of scale 1"),
    "few, no gap": (few, "0.15 % half-normal of scale 50, the rest minus half-normal of scale 300"),
    "ten above a gap": (ten_above_a_gap, "10 in [1e-3, 1e-2], the rest -1 minus half-normal"),
    "Student-t": (student_t, "3 degrees of freedom, shifted by -3"),
    "Cauchy": (cauchy, "shifted by -3"),
    "outlier": (outlier, "one at 100, 2.5 % half-normal of scale 0.2, the rest minus half-normal of scale 1"),
    "density through zero": (density_through_zero, "normal, shifted by -0.5"),
    "plateau": (plateau, "uniform in [-1, 0.05]"),
    "null space": (null_space, "as gap, a quarter zeros"),
    "null space, no gap": (
        null_space_no_gap,
        "1.8 % half-normal of scale 50, a quarter zeros, minus half-normal of 300",
    ),
    "clusters on both sides": (clusters_on_both_sides, "as gap, 3 % at 0.5 and 3 % at -0.5"),
    "cluster just above": (cluster_just_above, "2 % at 0.001, the rest minus half-normal of scale 1"),
    "cluster just below": (cluster_just_below, "2 % half-normal of scale 0.2, 2 % at -0.001, minus half-normal of 1"),
    "cluster at the resolution": (cluster_at_the_resolution, "2 % at one of 0.003 to 0.1, minus half-normal of 1"),
    "a jump near zero": (gap_with_a_jump_above, "5 % in [0.02, 0.5], the rest in [-1, 0.02]"),
    "none positive": (none_positive, "minus half-normal of scale 1"),
    "all positive": (all_positive, "0.001 and half-normal of scale 1"),
    "power law": (power_law, "1.6 % exponential of scale 0.3, the rest -1/(1 + 200 k^-1.5)"),
    "learned": (learned, "drawn from those of the model that ships, t = 281 and 41"),
}
