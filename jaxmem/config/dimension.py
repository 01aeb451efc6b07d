"""Estimators of local dimension on manifolds of known dimension, and their sizes."""

from dataclasses import dataclass

from jaxmem.config.checks import LAST_SEED, at_least, whole_in_range

FIRST = 5  # timestep: grids that stand for manifolds are as dense as half of its σ/α, 0.030


@dataclass(frozen=True)
class DimensionConfig:
    """Twelve manifolds, points of each, and the noise at which scores are looked at."""

    num_points: int = 8  # of each manifold, drawn from its data
    timestep: int = 10  # σ/α = 0.047 on the DDPM schedule; the manifolds have sizes of about 1
    regression: tuple[int, ...] = (5, 10, 15)  # timesteps of FPRegress, σ/α from 0.030 on; the paper's δ go from 0.01
    num_samples: int = 1000  # of the data, which the classical estimators see
    neighbours: int = 100  # of a point, for these: scikit-dimension's default
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("num_points", self.num_points, 2)
        at_least("neighbours", self.neighbours, 10)
        at_least("num_samples", self.num_samples, self.neighbours + self.num_points)
        whole_in_range("seed", self.seed, 0, LAST_SEED)
        for t in (self.timestep, *self.regression):
            whole_in_range("timestep", t, FIRST, 999)
        if len(set(self.regression)) < 2:
            raise ValueError(f"regression: expected two timesteps or more that differ, got {self.regression}")
