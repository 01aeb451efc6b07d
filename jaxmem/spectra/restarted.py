"""Block Krylov spaces that can be restarted: pure, jitted, no decision in them (those are `jaxmem.spectra.extreme`'s).

A state after k steps holds ``A Qᵀ[:, :k] = Qᵀ T`` (rows of Q are orthonormal) with ``T`` of shape (k + b, k): product k
with ``q_k`` brings row k + b, so that b products at a time are independent and go through `jax.vmap` together. With
b = 1 this is Arnoldi's relation. A restart keeps it, with the wanted part of the space as first rows.

A run may begin again from a random vector in the complement of what is there, and that more than once. Each start with
what grows from it is a chain; its width is the number of its newest rows, those without a product. When another begins
(`begin_chain`), the newest rows of the one before leave the basis: they would hide an eigenvector that lies along them.
They are kept outside, with what products had along them, and `settle` finds their share in the rows that follow.

A vector that is missing may lie partly in Ritz vectors that have not converged, so what is left of A beside the basis
does not tell of it. With T - x and the complement's share of A as blocks of A - x, Haynsworth's inertia additivity
does: ``#{λ(A) > x} = #{λ(T) > x} + #{λ(S) > x}`` with the Schur complement S. A chain is of that S: each of its
products leaves ``Rᵀ L (Q A q)`` outside (`lean`), which is known and booked, so that the relation to A stays exact.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Bool, Float, Int

from jaxmem.krylov import orthogonalise, scaled_norm
from jaxmem.operators import Operator


class KrylovState(NamedTuple):
    """Everything that the next step depends on, but the operator and the key."""

    basis: Float[Array, "m+b d"]  #: orthonormal rows, zero from ``num_steps + b`` on and from row d on
    projected: Float[Array, "m+b m"]  #: T
    num_steps: Int[Array, ""]  #: columns of T that are there
    scale: Float[Array, ""]  #: largest ‖A q‖ seen
    dropped: Float[Array, ""]  #: largest rest that counted as zero
    num_drawn: Int[Array, ""]  #: directions drawn at random so far
    num_fresh: Int[Array, ""]  #: newest rows drawn in place of such rests: with b of them the space has closed
    finite: Bool[Array, ""]  #: no product was NaN or infinite


@partial(jax.jit, static_argnames=("size", "room", "block", "dtype"))
def begin_block(key: Array, size: int, room: int, block: int, dtype: Any) -> KrylovState:
    """An empty state with room for ``room`` steps, and ``block`` random orthonormal rows."""
    zero = jnp.zeros((), dtype)
    count = jnp.zeros((), jnp.int32)
    basis = jnp.zeros((room + block, size), dtype)
    for i in range(min(block, size)):
        vector = jax.random.normal(jax.random.fold_in(key, i), (size,), dtype)
        basis = basis.at[i].set(orthogonalise(basis, max(i - 1, 0), vector)[2])
    projected = jnp.zeros((room + block, room), dtype)
    return KrylovState(basis, projected, count, zero, zero, count + block, count, jnp.array(True))


class Lean(NamedTuple):
    """What a chain leaves outside of each product: ``Rᵀ L (Q A q)``; rows of zeros where there are fewer."""

    rows: Float[Array, "p d"]  #: R
    weights: Float[Array, "p m+b"]  #: L


@partial(jax.jit, static_argnames="block", donate_argnames="state")
def advance_block(
    operator: Operator, state: KrylovState, stop: Any, key: Array, block: int, left: Lean | None = None
) -> KrylovState:
    """Steps in blocks until ``stop`` of them are done, the space has closed or a product is not finite."""

    def going(s: KrylovState) -> Array:
        return (s.num_steps < stop) & (s.num_fresh < block) & s.finite

    return jax.lax.while_loop(going, partial(_step, operator, key, block, left), state)


def _step(operator: Operator, key: Array, block: int, left: Lean | None, state: KrylovState) -> KrylovState:
    rows = jax.lax.dynamic_slice_in_dim(state.basis, state.num_steps, block)
    products = multiply(operator, rows)
    if left is not None:
        coefficients = jnp.matmul(products, state.basis.T, precision="highest")
        outside = jnp.matmul(coefficients, left.weights.T, precision="highest")
        products = products - jnp.matmul(outside, left.rows, precision="highest")
    return absorb_block(state, products, key, block)


@jax.jit
def multiply(operator: Operator, rows: Float[Array, "b d"]) -> Float[Array, "b d"]:
    """Products with the rows, together."""
    return operator.mv(rows[0])[None] if len(rows) == 1 else jax.vmap(operator.mv)(rows)


@partial(jax.jit, static_argnames="block", donate_argnames="state")
def absorb_block(state: KrylovState, products: Float[Array, "b d"], key: Array, block: int) -> KrylovState:
    """One step in a block, given the products with the newest ``block`` rows."""
    finite = jnp.all(jnp.isfinite(products))
    after = jax.lax.fori_loop(0, block, lambda i, s: _absorb(s, products[i], key, block), state)
    return after._replace(finite=finite, num_steps=jnp.where(finite, after.num_steps, state.num_steps))


def _absorb(s: KrylovState, product: Array, key: Array, block: int) -> KrylovState:
    k = s.num_steps
    new, size, dtype = k + block, s.basis.shape[1], s.basis.dtype
    scale = jnp.maximum(s.scale, scaled_norm(product))
    column, length, direction = orthogonalise(s.basis, new - 1, product)
    # 20 eps as in `jaxmem.krylov.extend`. In d dimensions there is no row d.
    closed = (length <= 20 * jnp.finfo(dtype).eps * scale) | (new >= size)

    def draw(basis: Array) -> Array:
        return _draw(basis, new, key, s.num_drawn)

    direction = jax.lax.cond(closed & (new < size), draw, lambda _: direction, s.basis)
    return KrylovState(
        basis=s.basis.at[new].set(jnp.where(new < size, direction, 0)),
        projected=s.projected.at[:, k].set(column.at[new].set(jnp.where(closed, 0, length))),
        num_steps=k + 1,
        scale=scale,
        dropped=jnp.where(closed, jnp.maximum(s.dropped, length), s.dropped),
        num_drawn=s.num_drawn + closed,
        num_fresh=jnp.where(closed, s.num_fresh + 1, 0),
        finite=s.finite,
    )


def _draw(basis: Array, row: Any, key: Array, number: Any) -> Array:
    """Random direction ``number``, orthogonal to the rows before ``row``."""
    vector = jax.random.normal(jax.random.fold_in(key, number), (basis.shape[1],), basis.dtype)
    return orthogonalise(basis, row - 1, vector)[2]


class Outside(NamedTuple):
    """What products had outside the basis: ``A Qᵀ[:, :k] = Qᵀ T + Rᵀ S``, the rows of R orthogonal to those of Q."""

    rows: Float[Array, "p d"]  #: R
    parts: np.ndarray  #: S, (p, columns of T)
    settled: int  #: so many rows of Q are orthogonal to R
    booked: int  #: so many columns of S are there
    weights: np.ndarray  #: L, (p, rows of T): column k of S is L T[:, k] in the chain (see `lean`)


def nothing_outside(state: KrylovState) -> Outside:
    """As it is before the first chain ends."""
    after, room = state.projected.shape
    return Outside(state.basis[:0], np.zeros((0, room)), 0, 0, np.zeros((0, after)))


def lean(state: KrylovState, outside: Outside, level: float, *, symmetric: bool) -> Outside:
    """From here on the chain is of the Schur complement at x = ``level``: ``L = S (T - x)⁻¹`` of today's rows."""
    steps = min(int(state.num_steps), state.basis.shape[1])
    weights = np.zeros((len(outside.rows), len(state.projected)))
    shifted = leading_square(state, symmetric) - level * np.eye(steps)
    weights[:, :steps] = np.linalg.solve(shifted.T, outside.parts[:, :steps].T).T
    return outside._replace(weights=weights)


def left_out(state: KrylovState, outside: Outside) -> Lean:
    """For the device; four rows at a time, so that few programs are compiled."""
    missing, dtype = -len(outside.rows) % 4 if len(outside.rows) else 4, state.basis.dtype
    weights = np.pad(outside.weights, ((0, missing), (0, 0)))
    return Lean(jnp.pad(outside.rows, ((0, missing), (0, 0))), jnp.asarray(weights, dtype))


def leading_square(state: KrylovState, symmetric: bool) -> np.ndarray:
    """T without its newest rows, in float64; of a symmetric operator what steps and restarts have written."""
    steps = min(int(state.num_steps), state.basis.shape[1])  # steps past d were with zeros
    square = np.asarray(state.projected, np.float64)[:steps, :steps]
    return np.tril(square) + np.tril(square, -1).T if symmetric else square


def begin_chain(state: KrylovState, outside: Outside, key: Array, width: int) -> tuple[KrylovState, Outside]:
    """Take the ``width`` newest rows out, and go on from one random row."""
    first = int(state.num_steps)
    newest = slice(first, first + width)
    rows = jnp.concatenate([outside.rows, state.basis[newest]])
    parts = np.concatenate([outside.parts, np.asarray(state.projected[newest], np.float64)])
    weights = np.pad(outside.weights, ((0, width), (0, 0)))
    return _begin_chain(state, key, width), Outside(rows, parts, first, first, weights)


@partial(jax.jit, static_argnames="width", donate_argnames="state")
def _begin_chain(state: KrylovState, key: Array, width: int) -> KrylovState:
    row = state.num_steps
    rows = row + jnp.arange(width)
    basis = state.basis.at[rows].set(0)
    return state._replace(
        basis=basis.at[row].set(_draw(basis, row, key, state.num_drawn)),
        projected=state.projected.at[rows].set(0),
        num_drawn=state.num_drawn + 1,
        num_fresh=jnp.zeros_like(state.num_fresh),
    )


def settle(state: KrylovState, outside: Outside, width: int) -> tuple[KrylovState, Outside]:
    """Move what the rows outside share with the rows since the last time into T."""
    steps, last = int(state.num_steps), min(int(state.num_steps) + width, len(state.basis))
    columns = slice(outside.booked, steps)
    outside.parts[:, columns] = outside.weights @ np.asarray(state.projected[:, columns], np.float64)
    outside = outside._replace(booked=steps)
    if not len(outside.rows) or outside.settled >= last:
        return state, outside._replace(settled=last)
    since = slice(outside.settled, last)
    new = state.basis[since]
    shared = jnp.matmul(new, outside.rows.T, precision="highest")
    rows = outside.rows - jnp.matmul(shared.T, new, precision="highest")
    added = jnp.asarray(np.asarray(shared, np.float64) @ outside.parts, state.projected.dtype)
    state = state._replace(projected=state.projected.at[since].add(added))
    return state, outside._replace(rows=rows, settled=last)


@partial(jax.jit, static_argnames="width", donate_argnames="state")
def _replace_basis(state: KrylovState, kept: Array, projected: Array, width: int) -> KrylovState:
    first = jnp.matmul(kept, state.basis[: kept.shape[1]], precision="highest")
    last = jax.lax.dynamic_slice_in_dim(state.basis, state.num_steps, width)
    basis = jnp.zeros_like(state.basis).at[: len(kept)].set(first).at[len(kept) : len(kept) + width].set(last)
    return state._replace(basis=basis, projected=projected, num_steps=jnp.int32(len(kept)))


def restart(
    state: KrylovState, outside: Outside, top: int, bottom: int, width: int, *, symmetric: bool
) -> tuple[KrylovState, Outside]:
    """Keep the invariant subspace of T's square part for its ``top`` largest and ``bottom`` smallest eigenvalues.

    For a symmetric operator that is thick-restart Lanczos (Wu and Simon 2000), else Krylov-Schur (Stewart 2001), by
    real part; there one more is kept where a conjugate pair would be cut. Twice the basis is held meanwhile.
    """
    steps, room = int(state.num_steps), state.projected.shape[1]
    projected = np.asarray(state.projected, np.float64)
    square = projected[:steps, :steps]
    keep = top + bottom
    if symmetric:
        values, columns = np.linalg.eigh(square)  # reads the lower triangle: what steps and restarts have written
        chosen = np.r_[:bottom, steps - top : steps]
        small, columns = np.diag(values[chosen]), columns[:, chosen]
    else:
        real = np.sort(np.linalg.eigvals(square).real)
        low, high = (real[bottom - 1] if bottom else -np.inf), (real[steps - top] if top else np.inf)
        # Real Schur form, the chosen first. SciPy's own function refuses where rounding moves an eigenvalue across the
        # bound, which is harmless: any leading part that cuts no 2 × 2 block is an invariant subspace.
        small, *_, columns, _, _ = scipy.linalg.lapack.dgees(lambda re, _: re <= low or re >= high, square, sort_t=1)
        keep += int(small[keep, keep - 1] != 0)
        small, columns = small[:keep, :keep], columns[:, :keep]
    after = np.zeros_like(projected)
    after[:keep, :keep] = small
    after[keep : keep + width, :keep] = projected[steps : steps + width, :steps] @ columns
    kept = np.zeros((keep, room))
    kept[:, :steps] = columns.T
    parts = np.zeros_like(outside.parts)
    parts[:, :keep] = outside.parts[:, :steps] @ columns
    dtype = state.basis.dtype
    state = _replace_basis(state, jnp.asarray(kept, dtype), jnp.asarray(after, dtype), width)
    return state, outside._replace(parts=parts, settled=keep + width, booked=keep)


def wake(state: KrylovState, outside: Outside, coordinates: np.ndarray, width: int) -> tuple[KrylovState, Outside]:
    """Add a row after the ``width`` newest: where the products with a vector of these coordinates lie outside."""
    row = min(int(state.num_steps), state.basis.shape[1]) + width
    weights = outside.parts[:, : len(coordinates)] @ coordinates
    # Of a complex pair the larger part; the other follows if it is needed.
    weights = max((weights.real, weights.imag), key=np.linalg.norm)
    weights = weights / np.linalg.norm(weights)
    vector = jnp.matmul(jnp.asarray(weights, state.basis.dtype), outside.rows, precision="highest")
    direction = orthogonalise(state.basis, row - 1, vector)[2]
    # One more row without a product, and two more with: a restart keeps half, and must leave room for all the newest.
    state, outside = widen(state, outside, 2, 3)
    return settle(state._replace(basis=state.basis.at[row].set(direction)), outside, width + 1)


def widen(state: KrylovState, outside: Outside, steps: int, rows: int) -> tuple[KrylovState, Outside]:
    """Room for so many more steps, and rows of the basis."""
    basis, projected = (jnp.pad(array, ((0, rows), (0, n))) for array, n in zip(state[:2], (0, steps), strict=True))
    parts = np.pad(outside.parts, ((0, 0), (0, steps)))
    weights = np.pad(outside.weights, ((0, 0), (0, rows)))
    return state._replace(basis=basis, projected=projected), outside._replace(parts=parts, weights=weights)
