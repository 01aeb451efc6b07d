"""Scores of data on manifolds of known dimension, for estimators of dimension to be checked against.

Each is a score by the contract (``score(state, x, t, cond)``); ``cond`` is ignored. Spheres and products of them are
in closed form; a manifold that has none is a grid of points on it, twice as dense as the noise at least
(`jaxmem.oracles.EmpiricalScore`); `EmbeddedScore` puts either into a larger space, exactly.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmem.diffusion import Schedule
from jaxmem.score import Score

_TERMS = 400  # of the continued fraction of Bessel functions


@dataclass(frozen=True)
class SpheresScore:
    """Noised uniform data on a product of spheres: the state is their radii, shape (m,), x has m · ``ambient`` values.

    One sphere has dimension ``ambient - 1``; m circles, of ambient 2, are a flat torus of dimension m. In the factor
    y of x with radius r: ``s = (αr A(κ) y/‖y‖ - y) / σ²``, ``κ = αr ‖y‖/σ²``, with A the ratio of Bessel functions
    ``I_{n/2}(κ) / I_{n/2-1}(κ)``, n = ``ambient``.
    """

    schedule: Schedule
    ambient: int

    def __call__(
        self, state: Float[Array, " m"], x: Float[Array, " d"], t: Any, cond: Any = None
    ) -> Float[Array, " d"]:
        alpha, sigma = self.schedule.at(t, x.dtype)

        def factor(radius: Array, y: Array) -> Array:
            length = jnp.linalg.norm(y)
            ratio = bessel_ratio(self.ambient, alpha * radius * length / sigma**2)
            return (alpha * radius * ratio / length - 1) * y / sigma**2

        return jax.vmap(factor)(state, x.reshape(-1, self.ambient)).reshape(-1)


def bessel_ratio(ambient: int, kappa: Float[Array, ""]) -> Float[Array, ""]:
    """``I_{n/2}(κ) / I_{n/2-1}(κ)``: the mean of a von Mises-Fisher distribution on the sphere in n dimensions.

    By the recurrence ``r_ν = 1 / (2(ν + 1)/κ + r_{ν+1})`` downwards, from a bound of Amos' (1974), which is
    close already.
    """
    order = ambient / 2 - 1
    last = order + _TERMS
    begin = kappa / (last + 0.5 + jnp.sqrt(kappa**2 + (last + 1.5) ** 2))

    def step(i: Array, ratio: Array) -> Array:
        return 1 / (2 * (last - i) / kappa + ratio)

    return jax.lax.fori_loop(0, _TERMS, step, begin)


@dataclass(frozen=True)
class EmbeddedScore:
    """Data of a score in k dimensions, in a subspace of D: the state is the inner one's and an isometry B, (D, k).

    ``s(x) = B s_k(Bᵀx) - (x - BBᵀx)/σ²``: the manifold keeps its dimension.
    """

    inner: Score
    schedule: Schedule

    def __call__(
        self, state: tuple[Any, Float[Array, "d k"]], x: Float[Array, " d"], t: Any, cond: Any = None
    ) -> Float[Array, " d"]:
        inner, basis = state
        _, sigma = self.schedule.at(t, x.dtype)
        within = jnp.matmul(basis.T, x, precision="highest")
        outside = x - jnp.matmul(basis, within, precision="highest")
        return jnp.matmul(basis, self.inner(inner, within, t, cond), precision="highest") - outside / sigma**2


def isometry(size: int, inner: int, seed: int = 0) -> np.ndarray:
    """A random isometry of ``inner`` into ``size`` dimensions, (size, inner), float64."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, inner)))[0]


def swiss_roll(spacing: float) -> np.ndarray:
    """A grid on the Swiss roll ``(θ cos θ, 10 h, θ sin θ)/10``, θ from 1.5π to 4.5π and h from 0 to 1, (N, 3).

    Neighbours are ``spacing`` apart, along the roll and across it.
    """
    angle = np.linspace(1.5 * np.pi, 4.5 * np.pi, 100_001)
    length = np.append(0, np.cumsum(np.hypot(*np.diff([angle * np.cos(angle), angle * np.sin(angle)])))) / 10
    places = np.interp(np.arange(0, length[-1], spacing), length, angle)
    heights = np.arange(0, 1, spacing)
    angles, across = (grid.reshape(-1) for grid in np.meshgrid(places, heights, indexing="ij"))
    return np.stack([angles * np.cos(angles) / 10, across, angles * np.sin(angles) / 10], -1)


def lollipop(spacing: float) -> np.ndarray:
    """A disk of radius 1 about the origin, half of the points, and a stick from 1 to 3 along the first axis, (N, 2)."""
    axis = np.arange(-1, 1, spacing)
    disk = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    disk = disk[np.linalg.norm(disk, axis=1) <= 1]
    stick = np.linspace(1, 3, len(disk))
    return np.concatenate([disk, np.stack([stick, np.zeros(len(stick))], -1)])
