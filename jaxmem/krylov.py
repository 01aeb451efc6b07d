"""Arnoldi and Lanczos as jitted loops over a matrix-vector product: no score, no Flax, no eigenvalues.

The loops only build the factorisation ``A Qᵀ = Qᵀ H + h q_{m+1} e_mᵀ`` (rows of Q are the basis vectors); the small
eigenproblem is `jaxmem.spectra.ritz`'s and runs on the host. Both run under `jax.jit` and `jax.vmap`, in float32 or
float64, and stop cleanly (masked, without NaN) when the Krylov space closes.
"""

from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Status(IntEnum):
    """Why a factorisation or a spectrum ended."""

    CONVERGED = 0  #: everything asked for is there
    BUDGET = 1  #: the steps were used up
    INVARIANT = 2  #: the Krylov space closed: its Ritz values are eigenvalues, each seen once, whatever its copies
    NONFINITE = 3  #: a product was NaN or infinite; the steps before it are kept
    ROUNDING = 4  #: residuals fell to the measured rounding, which is above the tolerance asked for


class Factorization(NamedTuple):
    """A Krylov factorisation of up to m steps; entries past ``num_steps`` are zero.

    Where the space closed, what was left of the last product counts as zero; `reopened` puts it back.
    """

    basis: Float[Array, "m+1 d"]  #: orthonormal rows q_1 ... q_{m+1}
    hessenberg: Float[Array, "m+1 m"]  #: upper Hessenberg (Arnoldi) or tridiagonal (Lanczos)
    num_steps: Int[Array, ""]  #: steps done, each one application of the operator
    scale: Float[Array, ""]  #: largest ‖A q‖ seen, a lower bound of ‖A‖₂
    status: Int[Array, ""]  #: a `Status`; BUDGET while it may go on
    dropped: Float[Array, " d"]  #: what was left of the last product where the space counted as closed, else zero


def scaled_norm(array: Float[Array, "..."]) -> Float[Array, ""]:
    """The Euclidean (Frobenius) norm without squaring small or large numbers to zero or infinity."""
    peak = jnp.max(jnp.abs(array))
    return peak * jnp.linalg.norm(array.reshape(-1) / jnp.where(peak > 0, peak, 1))


def begin(start: Float[Array, " d"], max_steps: int) -> Factorization:
    """An empty factorisation with room for ``max_steps`` steps from a start vector of any non-zero length."""
    size, dtype = start.shape[0], start.dtype
    peak = jnp.max(jnp.abs(start))
    usable = jnp.isfinite(peak) & (peak > 0)
    start = start / jnp.where(usable, peak, 1)  # tiny and huge start vectors would under- or overflow
    norm = jnp.linalg.norm(start)
    first = start / jnp.where(norm > 0, norm, 1)
    return Factorization(
        basis=jnp.zeros((max_steps + 1, size), dtype).at[0].set(jnp.where(usable, first, 0)),
        hessenberg=jnp.zeros((max_steps + 1, max_steps), dtype),
        num_steps=jnp.zeros((), jnp.int32),
        scale=jnp.zeros((), dtype),
        status=jnp.where(usable, jnp.int32(Status.BUDGET), jnp.int32(Status.NONFINITE)),
        dropped=jnp.zeros(size, dtype),
    )


def next_vector(factorization: Factorization) -> Float[Array, " d"]:
    """The basis vector that the next step multiplies."""
    return factorization.basis[factorization.num_steps]


def absorb(
    factorization: Factorization,
    product: Float[Array, " d"],
    *,
    symmetric: bool,
    tolerance: float | None = None,
) -> Factorization:
    """One step, given ``A next_vector(factorization)``: for loops on the host, with products of their own.

    ``tolerance`` is that of `extend`, and so is what happens; a factorisation that is full or closed stays as it is.
    """
    tolerance = _tolerance(factorization, tolerance)
    going = may_go_on(factorization, factorization.hessenberg.shape[1])
    after = _absorb(factorization, product, symmetric, tolerance)
    return jax.tree.map(lambda new, old: jnp.where(going, new, old), after, factorization)


def _tolerance(factorization: Factorization, tolerance: float | None) -> float:
    return 20 * float(jnp.finfo(factorization.basis.dtype).eps) if tolerance is None else tolerance


def orthogonalise(
    basis: Float[Array, "n d"], last: Any, vector: Float[Array, " d"]
) -> tuple[Float[Array, " n"], Float[Array, ""], Float[Array, " d"]]:
    """``vector = coefficients @ basis + length * direction``: a unit direction orthogonal to the rows 0 to ``last``.

    Gram-Schmidt, repeated until a pass leaves 0.7 of the length or for the third time: what is left is then as
    orthogonal as rounding allows, and nearly always the first pass is the only one (Daniel, Gragg, Kaufman and Stewart
    1976; ARPACK's constant is 0.717). The two newest rows go first, alone: in Lanczos they hold all but rounding.
    Rows come in blocks of 2 MB, that a block is read from memory once and used twice, and blocks past ``last`` are
    skipped (under `jax.vmap` they are multiplied, and change nothing: rows past ``last`` are zero).
    """
    rows, size = basis.shape
    height = min(rows, max(1, 2**21 // (size * basis.dtype.itemsize)))

    def remove(first: Any, count: int, used: Array | bool, vector: Array, column: Array) -> tuple[Array, Array]:
        block = jax.lax.dynamic_slice_in_dim(basis, first, count)
        found = jnp.where(used, jnp.matmul(block, vector, precision="highest"), 0)
        before = jax.lax.dynamic_slice_in_dim(column, first, count)
        column = jax.lax.dynamic_update_slice_in_dim(column, before + found, first, 0)
        return vector - jnp.matmul(found, block, precision="highest"), column

    def one_block(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        first = jnp.minimum(i * height, rows - height)  # the last block overlaps the one before it
        used = first + jnp.arange(height) >= i * height
        return jax.lax.cond(i * height <= last, partial(remove, first, height, used), lambda *same: same, *carry)

    def normalised(vector: Array) -> tuple[Array, Array]:
        norm = jnp.linalg.norm(vector)
        return norm, vector / jnp.where(norm > 0, norm, 1)

    def one_pass(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        count, _, column, length, vector = carry
        vector, found = jax.lax.fori_loop(0, -(-rows // height), one_block, (vector, jnp.zeros_like(column)))
        left, vector = normalised(vector)
        return count + 1, left, column + length * found, length * left, vector

    length = scaled_norm(vector)
    two = min(2, rows)
    vector, column = remove(
        jnp.maximum(last - 1, 0), two, True, vector / jnp.where(length > 0, length, 1), jnp.zeros(rows, basis.dtype)
    )
    left, vector = normalised(vector)
    carry: tuple[Array, ...] = (jnp.int32(0), jnp.zeros_like(left), length * column, length * left, vector)
    *_, column, length, vector = jax.lax.while_loop(lambda carry: (carry[0] < 3) & (carry[1] < 0.7), one_pass, carry)
    return column, length, vector


def _absorb(f: Factorization, product: Array, symmetric: bool, tolerance: float) -> Factorization:
    k = f.num_steps
    scale = jnp.maximum(f.scale, scaled_norm(product))
    column, norm, following = orthogonalise(f.basis, k, product)
    finite = jnp.isfinite(norm) & jnp.all(jnp.isfinite(column))
    closed = norm <= tolerance * scale
    going = finite & ~closed
    if symmetric:
        rows = jnp.arange(column.shape[0])
        # Above the diagonal the exact entry is the previous norm; the computed one differs from it by rounding only.
        above = f.hessenberg[k, jnp.maximum(k - 1, 0)]
        column = jnp.where(rows == k, column, jnp.where((rows == k - 1) & (k > 0), above, 0))
    column = column.at[k + 1].set(jnp.where(going, norm, 0))
    return Factorization(
        basis=f.basis.at[k + 1].set(jnp.where(going, following, 0)),
        hessenberg=f.hessenberg.at[:, k].set(jnp.where(finite, column, 0)),
        num_steps=jnp.where(finite, k + 1, k),
        scale=jnp.where(finite, scale, f.scale),
        status=jnp.where(finite, jnp.where(closed, jnp.int32(Status.INVARIANT), f.status), jnp.int32(Status.NONFINITE)),
        dropped=jnp.where(finite & closed, norm * following, f.dropped),
    )


def reopened(factorization: Factorization, rounding: float) -> Factorization:
    """As if it had used up its steps, if it closed with more left than ``rounding``; for an unbatched one.

    `extend` closes a space by the largest ‖A q‖: where the other eigenvalues are below 20 eps of it, they are what is
    left, and not rounding.
    """
    norm = float(scaled_norm(jnp.asarray(factorization.dropped)))
    if norm <= rounding:
        return factorization
    steps = int(factorization.num_steps)
    return factorization._replace(
        basis=jnp.asarray(factorization.basis).at[steps].set(factorization.dropped / norm),
        hessenberg=jnp.asarray(factorization.hessenberg).at[steps, steps - 1].set(norm),
        status=jnp.int32(Status.BUDGET),
    )


def extend(
    mv: Callable[[Array], Array],
    factorization: Factorization,
    num_steps: Any,
    *,
    symmetric: bool,
    tolerance: float | None = None,
) -> Factorization:
    """Run up to ``num_steps`` more steps (a traced number is fine; never past the room that `begin` made).

    ``tolerance``: the space counts as closed when the next norm is at most ``tolerance`` times the largest ‖A q‖.
    Default ``20 eps``: after reorthogonalisation what is left of a closed space is the rounding of one product, 0.6
    to 7 eps for rank-5 operators at d = 300 and 16,384 (the paper's Algorithm 1 leaves the threshold open). With 0 a
    closed space goes on into the direction that rounding left, which is as good as random: the way to all d
    eigenvalues, multiplicities included, with d steps.
    """
    tolerance = _tolerance(factorization, tolerance)
    room = factorization.hessenberg.shape[1]

    def going(carry: tuple[Any, Factorization]) -> Array:
        return (carry[0] < num_steps) & may_go_on(carry[1], room)

    def step(carry: tuple[Any, Factorization]) -> tuple[Any, Factorization]:
        f = carry[1]
        return carry[0] + 1, _absorb(f, mv(next_vector(f)), symmetric, tolerance)

    # Under vmap the loop goes on until all have finished; the steps of those that have are masked.
    return jax.lax.while_loop(going, step, (0, factorization))[1]


def may_go_on(factorization: Factorization, room: int) -> Bool[Array, ""]:
    """Whether a further step has room and something to do."""
    return (factorization.status == Status.BUDGET) & (factorization.num_steps < room)


def arnoldi(
    mv: Callable[[Array], Array], start: Float[Array, " d"], num_steps: int, *, tolerance: float | None = None
) -> Factorization:
    """Arnoldi iteration (the paper's Algorithm 1) with full reorthogonalisation, ``num_steps`` applications of ``mv``.

    Memory ``(num_steps + 1) d``; work beyond the products ``num_steps² d`` multiply-adds, up to three times that where
    a product lies nearly in the space already. Real operators only.
    """
    return extend(mv, begin(start, num_steps), num_steps, symmetric=False, tolerance=tolerance)


def lanczos(
    mv: Callable[[Array], Array], start: Float[Array, " d"], num_steps: int, *, tolerance: float | None = None
) -> Factorization:
    """Lanczos iteration with full reorthogonalisation for a *symmetric* ``mv``: the Hessenberg matrix is tridiagonal.

    Without reorthogonalisation float32 Lanczos repeats converged eigenvalues ("ghosts"), which would count twice.
    """
    return extend(mv, begin(start, num_steps), num_steps, symmetric=True, tolerance=tolerance)
