"""An operator without the part that a Krylov run has found: exact, whether or not the run has converged.

Let Y (k rows) be Ritz vectors of a symmetric A with Ritz values θ_i above a level x. A Krylov space leaves one residual
direction q: ``A y_i = θ_i y_i + r_i q``. So on Y and its complement, A - x is the block matrix of ``Θ - x``, ``r qᵀ``
and ``A_⊥ - x``, and by Haynsworth's inertia additivity

    #{λ(A) > x} = k + #{λ(S) > x},   S = A_⊥ - ρ q qᵀ,   ρ = sum_i r_i² / (θ_i - x).

Each Ritz value above x takes one eigenvalue off what is left to count, also those that are far from converged.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmem.krylov import Factorization
from jaxmem.operators import Derived, Operator
from jaxmem.spectra.ritz import Ritz


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Deflated(Derived):
    """S above, on vectors of the full length d that are orthogonal to the rows of ``vectors``."""

    operator: Operator  #: symmetric
    vectors: Any  #: (rows, d), orthonormal rows and zero rows
    direction: Any  #: (d,), q
    coupling: Any  #: (), ρ
    depth: Any  #: (), the norm of A or so: the rows themselves get the eigenvalue -depth
    is_symmetric = True

    def project(self, vector: Float[Array, " d"]) -> Float[Array, " d"]:
        """The part that is orthogonal to ``vectors``."""
        along = jnp.matmul(self.vectors, vector, precision="highest")
        return vector - jnp.matmul(along, self.vectors, precision="highest")

    def mv(self, vector: Float[Array, " d"]) -> Float[Array, " d"]:
        # From both sides, so that what rounding leaves along the rows meets a symmetric operator: a run whose space
        # nearly closes divides it by a small number, and Lanczos does not see what is not symmetric. It is sent to the
        # eigenvalue -depth: left at zero, long runs find it there, with an error that can make it positive.
        along = jnp.matmul(self.vectors, vector, precision="highest")
        inside = jnp.matmul(along, self.vectors, precision="highest")
        vector = vector - inside
        overlap = jnp.dot(self.direction, vector, precision="highest")
        product = self.operator.mv(vector) - (self.coupling * overlap) * self.direction
        return self.project(self.project(product)) - self.depth * inside

    rmv = mv


def deflate(operator: Operator, factorization: Factorization, pairs: Ritz, level: float) -> tuple[Deflated, int, float]:
    """Take Ritz pairs above ``level`` off a symmetric operator; also how many, and what that does to errors.

    An error of A by ``e`` is one of S by at most ``(1 + amplification) e`` with the third result,
    ``sum_i r_i² / (θ_i - x)²``: S is A seen from vectors that lean towards the rows.

    A pair whose Ritz value is close above the level, and far from converged, would make ρ larger than A itself, and the
    range of S with it: pairs are taken in the order of r² / (θ - x) while their sum is at most the largest ‖A q‖ seen.
    """
    above = pairs.values - level
    cost = np.where(above > 0, pairs.residuals**2 / np.where(above > 0, above, 1), np.inf)
    order = np.argsort(cost)
    chosen = np.zeros(len(cost), bool)
    chosen[order] = (np.cumsum(cost[order]) <= float(factorization.scale)) & np.isfinite(cost[order])
    taken, steps = int(chosen.sum()), len(pairs.values)
    amplification = float(np.sum((pairs.residuals[chosen] / above[chosen]) ** 2))
    rows = 32  # few shapes, so that few programs are compiled: 32, 64, 128, ... rows
    while rows < taken:
        rows *= 2
    coordinates = np.zeros((rows, steps))
    coordinates[:taken] = pairs.coordinates[chosen]
    basis = jnp.asarray(factorization.basis)
    vectors = jnp.matmul(jnp.asarray(coordinates, basis.dtype), basis[:steps], precision="highest")
    coupling = jnp.asarray(cost[chosen].sum(), basis.dtype)
    return Deflated(operator, vectors, basis[steps], coupling, jnp.asarray(factorization.scale)), taken, amplification
