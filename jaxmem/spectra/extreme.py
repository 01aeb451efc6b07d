"""Extreme eigenpairs to a tolerance, with as few products as it takes, and a folder to go on from after a kill."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.krylov import Status
from jaxmem.operators import Operator
from jaxmem.runs import memory, resume
from jaxmem.runs.progress import Progress, silent
from jaxmem.spectra.methods import Extreme
from jaxmem.spectra.restarted import (
    KrylovState,
    Outside,
    absorb_block,
    advance_block,
    begin_block,
    begin_chain,
    block_ritz,
    crossings,
    growth,
    lean,
    left_out,
    multiply,
    nothing_outside,
    orthogonality_loss,
    probe_first,
    product_noise,
    restart,
    ritz_vectors,
    settle,
    wake,
    widen,
)
from jaxmem.spectra.result import Spectrum, rounding_noise
from jaxmem.spectra.stopping import Check, Course, Next, begin, demanded, judge, levels, moved, next_length

_KEPT = (*KrylovState._fields, *Outside._fields, *Course._fields)  # in a folder


def extreme_pairs(
    operator: Operator,
    method: Extreme,
    *,
    key: Any,
    vectors: bool = False,
    folder: str | Path | None = None,
    progress: Progress = silent,
) -> Spectrum:
    """The eigenvalues at the ends of the spectrum that `Extreme` asks for; `jaxmem.spectrum` checks and calls this.

    Args:
        operator: as for `spectrum`.
        method: what is asked for.
        key: random key of the start vectors, and of those that follow where the space closes.
        vectors: also return unit Ritz vectors.
        folder: where the state is kept after every segment (as large as the basis in use). The same call goes on from
            there, bit for bit; with more ``max_products`` it goes on where they had ended. The products by which it
            recognises the operator, the first once more and those that measure its rounding, are not counted.
        progress: called with the products spent after every segment.

    Products run in compiled segments, between which the residuals are looked at on the host: one step to an eighth of
    the steps so far, at most 32, and a third of what the decay of the residuals lets expect. Memory beside the
    products: a basis of ``subspace · d`` numbers, and up to three times that again in a restart and when vectors are
    made of it (3.3 bases in all were measured at d = 500,000), and a vector for each check that went on.

    No start vector shows more than one copy of a multiple eigenvalue, and a residual says that an eigenvalue is that
    near, not that none is missing. So when the residuals are small, a fresh random vector in the complement of all that
    was found starts a chain of its own, in the same basis. Let x be the middle of the last gap among the wanted values
    that is wider than two tolerances. What was found and the Schur complement of A - x beside it have together as many
    eigenvalues above x as A (Haynsworth's inertia additivity), whether or not all that was found has converged. So the
    chain is of that complement, and goes on until its recurrence has enlarged whatever a random vector has of an
    eigenvector above x so far that its part would have had to be smaller than is likely. If the values have changed by
    then, they converge anew and another chain follows. These products are in ``num_products``; where they do not fit
    into ``max_products``, the status is BUDGET. One wanted value at an end has no copies that matter, and costs none.
    Beside 37 products of a well separated spectrum the check took 6, beside 63 without a gap 16 to 18. Copies and
    clusters cost more, up to 150 % more: each copy that comes to light has to converge, and another chain follows.

    Status CONVERGED: the residuals are small, and no eigenvalue is missing whose absence moves a value by more than
    two tolerances (rtol ‖A‖, or the measured noise where that is more). A single missing eigenvector is overlooked
    with a probability of at most 0.02 (`stopping.OVERLOOKED`), several together less. That is shown for a symmetric
    operator and a chain that no restart cuts; over restarts, the growth of each stretch is added up as if the
    complement were the same, and for A itself it holds where that is normal only. Values that are nearer to each
    other than the runs resolve count as copies. INVARIANT: the same, and the last chain ended in a closed space, or
    all of the space was seen: nothing was left to enlarge. BUDGET: neither small residuals nor complete copies are
    claimed. ROUNDING: as CONVERGED, but the residuals came down to the measured noise only, which is above the
    tolerance.

    Rounding of an operator that is declared symmetric is read off the projected matrix, where it alone makes entries
    that are zero otherwise (`product_noise`): so does an operator that is not as symmetric as was declared. It costs no
    product, one where a run ends before block + 7 steps. Any other operator is measured, with its asymmetry, by two.

    Raises:
        ValueError: on no key, too few products, a product that is NaN or infinite, too little memory, or a folder whose
            state is damaged, of other options or of another operator.
        OSError: the folder cannot be written.
    """
    num_pairs, which, rtol = method.k, method.which, float(method.rtol)
    max_products, block, symmetric = method.max_products, method.block, method.symmetric
    if key is None:
        raise ValueError("key: start vectors need a random key, for instance jax.random.key(0)")
    size = operator.size
    least = room = method.room(size)
    applied = operator.symmetric if symmetric else operator
    declared, per_step = operator.is_symmetric, applied.products_per_mv

    def measuring(steps: int) -> int:
        """Products that measure rounding; none where there are 21 `crossings` or more: from block + 7 steps on."""
        if declared:
            return operator.products_per_mv if min(steps, size) < block + 7 else 0
        return 2 * operator.products_per_mv

    budget = (max_products - measuring(max_products // per_step // block * block)) // per_step // block * block
    if budget < num_pairs:
        fewest = -(-num_pairs // block) * block
        raise ValueError(
            f"max_products: expected at least {measuring(fewest) + fewest * per_step} ({measuring(fewest)} to measure"
            f" rounding, {per_step} per step), got {max_products}"
        )
    itemsize = jnp.dtype(operator.dtype).itemsize
    memory.require(4 * (room + block) * size * itemsize, f"a basis of {room} vectors", "take a smaller subspace")

    seed = np.asarray(jax.random.key_data(key))
    state = begin_block(key, size, room, block, jnp.dtype(operator.dtype))
    products = multiply(applied, state.basis[:block])
    product = np.asarray(products[0])
    options: dict[str, Any] = dict(k=num_pairs, which=which, rtol=rtol, symmetric=symmetric)
    options |= dict(subspace=room, block=block)
    options |= dict(size=size, dtype=str(jnp.dtype(operator.dtype)), seed=seed.tolist())
    path = None if folder is None else Path(folder) / "extreme-pairs.npz"
    probe = partial(probe_first, operator, state.basis[0], products[0], symmetric)
    measured = None if declared else probe()
    if path is not None and path.exists():
        tolerance = 8 * float((measured or probe()).noise)
        state, outside, course = _restore(resume.load(path, _KEPT, product, tolerance, options))
        room = state.projected.shape[1]
    else:
        state, course = absorb_block(state, products, key, block), Course(block, block)
        outside = nothing_outside(state)

    while True:
        steps, spent = int(state.num_steps), course.steps * per_step + (0 if declared else measuring(0))
        if not state.finite:
            raise ValueError(
                f"operator: a product after {spent} others was NaN or infinite; check the parameters, the point and the"
                f" timestep"
            )
        if path is not None:
            arrays = jax.device_get(state)._asdict() | outside._asdict() | course._asdict() | {"product": product}
            arrays["basis"] = arrays["basis"][: steps + course.width]
            resume.save(path, arrays, options)
        progress("extreme pairs", min(spent, max_products), max_products)
        state, outside = settle(state, outside, course.width)
        pairs = block_ritz(state, outside, course.width, symmetric=symmetric)
        wanted = _wanted(len(pairs.values), num_pairs, which)
        norm = np.abs(pairs.values).max()
        crossed = course.crossed + crossings(state, course.kept)
        error = float(measured.noise) if measured else product_noise(state, crossed)
        target = max(rtol * norm, float(rounding_noise(error, steps, norm)))
        # A small residual in a small space may belong to an eigenvalue further inside: the values must rest, too.
        values = pairs.values[wanted]
        # Of a zero operator all are zero.
        worst = max(pairs.residuals[wanted].max(), moved(values, course.last)) / (target or 1)
        gained = inside = course.grown
        copies, unseen = False, np.zeros(0)
        if len(values) == num_pairs:
            copies = len(_levels(values, which, target, first=False)) > 0
            first_chain = not len(course.before)
            asked = _levels(values if first_chain else course.before, which, target, first=first_chain)
            if worst <= 1 or room - steps <= course.width:  # what follows may depend on it
                since = growth(state, outside, course.width, slice(*course.origin), asked, symmetric=symmetric)
                # No part is larger than one: a stretch between restarts that tells nothing takes nothing back.
                gained, inside = gained + max(0.0, since.gained), inside + max(0.0, since.inside)
                unseen = since.coordinates
        resting = pairs.resting[wanted]
        newest = np.sqrt(np.maximum(pairs.residuals[wanted] ** 2 - resting**2, 0)).max()
        check = Check(
            values=values,
            target=target,
            worst=worst,
            resting=resting.max() / (target or 1),
            newest=newest / (target or 1),
            copies=copies,
            gained=gained,
            inside=inside,
            demanded=demanded(size - steps),
        )
        following, course = judge(state, course, check, num_pairs, budget)
        if isinstance(following, Status):
            status = following
            break
        if following is Next.CLOSED:
            state = state._replace(num_fresh=jnp.zeros_like(state.num_fresh))
            course, gained = begin(course, values, steps, course.width), 0.0
        elif following is Next.WAKE:
            hidden = pairs.coordinates[wanted][resting.argmax()] if check.resting > 1 else unseen
            state, outside = wake(state, outside, hidden, course.width)
            course, room = course._replace(width=course.width + 1), state.projected.shape[1]
        turned = following in (Next.BEGIN, Next.CLOSED)
        # A chain that is not cut by a restart is asked more strictly (see `growth`).
        if room - steps < (room // 4 if following is Next.BEGIN and room < size else course.width):
            ends = _ends(which, (num_pairs + steps) // 2)
            # Where a check learns nothing between restarts it would never end; twice the basis is in what was required.
            looking = len(course.before) > 0 and following is Next.GO_ON
            most = min(2 * least, size - 2 * course.width)
            if looking and gained <= course.grown and room + 2 * course.width <= most:
                state, outside = widen(state, outside, 2 * course.width, 2 * course.width)
                room += 2 * course.width
            state, outside = restart(state, outside, *ends, course.width, symmetric=symmetric)
            first = int(state.num_steps)
            origin = np.asarray([first, first + course.width])
            course = course._replace(crossed=crossed, kept=first, origin=origin, grown=gained)
            turned = True
        first = int(state.num_steps)
        if following is Next.BEGIN:
            state, outside = begin_chain(state, outside, key, course.width)
            course = begin(course, values, first, 1)
        if turned and len(outside.rows):
            asked = _levels(course.before, which, target, first=False)
            if len(asked):
                outside = lean(state, outside, float(asked[0].real), symmetric=symmetric)
        width = course.width
        length = max(next_length(course, steps, check), num_pairs - steps)
        length = min(-(-length // width), (room - first) // width, (budget - course.steps) // width) * width
        state = advance_block(applied, state, first + length, key, width, left_out(state, outside))
        course = course._replace(steps=course.steps + int(state.num_steps) - first)

    progress("extreme pairs", max_products, max_products)
    loss = orthogonality_loss(state.basis, min(int(state.num_steps), size))
    if declared and measuring(course.steps):
        error = max(error, float(probe().noise))
    noise = float(rounding_noise(error, len(pairs.values), state.scale, loss))
    noise = max(noise, float(state.dropped))
    residuals = np.maximum(pairs.residuals[wanted], noise)
    if status == Status.CONVERGED and residuals.max() > rtol * norm:
        status = Status.ROUNDING
    return Spectrum(
        eigenvalues=pairs.values[wanted],
        residuals=residuals,
        vectors=ritz_vectors(state.basis, pairs.coordinates[wanted]) if vectors else None,
        num_products=measuring(course.steps) + course.steps * per_step,
        status=status,
        asymmetry=float(measured.asymmetry) if measured else 0.0,
        noise=noise,
        dtype=operator.dtype,
        method=method,
        seed=seed,
    )


def _restore(arrays: dict[str, np.ndarray]) -> tuple[KrylovState, Outside, Course]:
    basis = np.zeros((len(arrays["projected"]), arrays["basis"].shape[1]), arrays["basis"].dtype)
    basis[: len(arrays["basis"])] = arrays["basis"]
    state = KrylovState(*(jnp.asarray((arrays | {"basis": basis})[name]) for name in KrylovState._fields))
    course = {name: arrays[name].item() if arrays[name].ndim == 0 else arrays[name] for name in Course._fields}
    whole = {name: int(arrays[name]) for name in ("settled", "booked")}
    outside = Outside(jnp.asarray(arrays["rows"]), arrays["parts"], weights=arrays["weights"], **whole)
    return state, outside, Course(**course)  # type: ignore[arg-type]  # whole numbers and arrays, as they were


def _levels(values: np.ndarray, which: str, target: float, first: bool) -> np.ndarray:
    """`levels` of both ends."""
    top, bottom = _ends(which, len(values))
    none = np.zeros(0)
    upper = levels(values[:top], target, first) if top else none
    lower = -levels(-values[top:][::-1], target, first) if bottom else none
    return np.concatenate([upper, lower])


def _ends(which: str, count: int) -> tuple[int, int]:
    """How many of ``count`` eigenvalues come from the top, and how many from the bottom."""
    bottom = {"largest": 0, "smallest": count, "both": count // 2}[which]
    return count - bottom, bottom


def _wanted(count: int, num_pairs: int, which: str) -> np.ndarray:
    """Indices of the wanted among ``count`` descending values; of all that are there, if there are fewer."""
    top, bottom = _ends(which, num_pairs)
    index = np.arange(count)
    return index[(index < top) | (index >= count - bottom)]
