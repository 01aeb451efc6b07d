"""How much of a random vector lies on eigenvalues above a level, from the tridiagonal matrix of its Lanczos run.

m Lanczos steps from a unit vector v give the 2m first moments of its spectral measure ``sum_i (v·u_i)² δ(λ - λ_i)``.
What they say about the mass above a level x is the content of the Chebyshev-Markov-Stieltjes inequalities: take the
Gauss-Radau rule with a node at x; the mass above x is at least that of the nodes above, and at most this plus the
weight of the node at x. Both ends are attained by measures with these moments, and nothing else is assumed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.linalg

from jaxmem.krylov import Factorization


class Tridiagonal(NamedTuple):
    """The projected matrix of m Lanczos steps, float64."""

    diagonal: np.ndarray  #: (m,)
    off_diagonal: np.ndarray  #: (m,); the last entry couples to the vector that a further step would multiply

    @classmethod
    def of(cls, factorization: Factorization) -> "Tridiagonal":
        """That of one (unbatched) Lanczos factorisation."""
        steps = int(factorization.num_steps)
        projected = np.asarray(factorization.hessenberg, np.float64)
        return cls(np.diagonal(projected)[:steps].copy(), np.diagonal(projected, -1)[:steps].copy())

    def first(self, steps: int) -> "Tridiagonal":
        """What the first ``steps`` steps gave."""
        return Tridiagonal(self.diagonal[:steps], self.off_diagonal[:steps])

    def values(self) -> np.ndarray:
        """Ritz values, ascending."""
        return scipy.linalg.eigvalsh_tridiagonal(self.diagonal, self.off_diagonal[:-1])


class Mass(NamedTuple):
    """The mass of a spectral measure of mass 1 above a level: between ``middle - width/2`` and ``middle + width/2``."""

    middle: float
    width: float


def mass_above(tridiagonal: Tridiagonal, level: float) -> Mass:
    """The mass above a level, by the Gauss-Radau rule with a node there.

    For a smooth density the true mass is near the middle already after few steps, much nearer than the sum of the Gauss
    weights above the level, which jumps by a whole weight whenever a node crosses it.
    """
    diagonal, off_diagonal = tridiagonal
    if len(diagonal) == 0:
        return Mass(0.5, 1.0)
    scale = np.abs(diagonal).max() + 2 * off_diagonal.max()
    if off_diagonal[-1] == 0:  # the Krylov space closed: the rule is the measure
        values, vectors = scipy.linalg.eigh_tridiagonal(diagonal, off_diagonal[:-1])
        return Mass(float(np.sum(vectors[0, values > level] ** 2)), 0.0)
    last = _entry_for(tridiagonal, level)
    if not np.isfinite(last):  # the level is a Ritz value, and no entry does: step aside
        last = _entry_for(tridiagonal, level + 1e-14 * scale)
    values, vectors = scipy.linalg.eigh_tridiagonal(np.r_[diagonal, last], off_diagonal)
    weights = vectors[0] ** 2
    here = int(np.argmin(np.abs(values - level)))
    return Mass(float(weights[here + 1 :].sum() + weights[here] / 2), float(weights[here]))


def _entry_for(tridiagonal: Tridiagonal, level: float) -> float:
    """The diagonal entry m + 1 with which the level is an eigenvalue."""
    diagonal, off_diagonal = tridiagonal
    banded = np.stack([np.r_[0, off_diagonal[:-1]], diagonal - level, np.r_[off_diagonal[:-1], 0]])
    right = np.r_[np.zeros(len(diagonal) - 1), off_diagonal[-1] ** 2]
    try:
        with np.errstate(divide="ignore"):
            return float(level + scipy.linalg.solve_banded((1, 1), banded, right)[-1])
    except scipy.linalg.LinAlgError:
        return np.inf


def top_pair(tridiagonal: Tridiagonal) -> tuple[float, float]:
    """The largest Ritz value and its residual."""
    last = len(tridiagonal.diagonal) - 1
    values, vectors = scipy.linalg.eigh_tridiagonal(
        tridiagonal.diagonal, tridiagonal.off_diagonal[:-1], select="i", select_range=(last, last)
    )
    return float(values[0]), float(tridiagonal.off_diagonal[-1] * abs(vectors[-1, 0]))


PACKED = ("lengths", *Tridiagonal._fields)  #: names of the arrays of `packed`


def packed(runs: Sequence[Tridiagonal]) -> dict[str, np.ndarray]:
    """Some runs as three arrays, for a file."""
    lengths = np.array([len(run.diagonal) for run in runs], int)
    fields = {
        name: np.concatenate([np.zeros(0), *(getattr(run, name) for run in runs)]) for name in Tridiagonal._fields
    }
    return {"lengths": lengths} | fields


def unpacked(arrays: dict[str, np.ndarray]) -> list[Tridiagonal]:
    """What `packed` was made of."""
    if not len(arrays["lengths"]):
        return []
    ends = np.cumsum(arrays["lengths"])[:-1]
    parts = (np.split(arrays[name], ends) for name in Tridiagonal._fields)
    return [Tridiagonal(*part) for part in zip(*parts, strict=True)]
