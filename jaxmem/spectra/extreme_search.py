"""One search for extreme eigenvalues: what a look at the basis shows, and what follows from it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.krylov import Status
from jaxmem.operators import Operator
from jaxmem.runs import memory
from jaxmem.spectra.block_ritz import (
    BlockRitz,
    Growth,
    block_ritz,
    crossings,
    growth,
    orthogonality_loss,
    probe_first,
    product_noise,
    ritz_vectors,
)
from jaxmem.spectra.measure import Probe
from jaxmem.spectra.methods import Extreme, basis_rows
from jaxmem.spectra.restarted import (
    KrylovState,
    Outside,
    absorb_block,
    advance_block,
    begin_block,
    begin_chain,
    lean,
    left_out,
    multiply,
    nothing_outside,
    restart,
    settle,
    wake,
    widen,
)
from jaxmem.spectra.result import Spectrum, rounding_noise
from jaxmem.spectra.stopping import Check, Course, Next, begin, demanded, levels, moved, next_length


class At(NamedTuple):
    """Where a search is between two segments."""

    state: KrylovState
    outside: Outside
    course: Course

    @property
    def room(self) -> int:
        """Steps that the basis has room for."""
        return self.state.projected.shape[1]

    def settled(self) -> "At":
        state, outside = settle(self.state, self.outside, self.course.width)
        return self._replace(state=state, outside=outside)


class Look(NamedTuple):
    """What the projected matrix shows at a check."""

    check: Check
    pairs: BlockRitz
    wanted: np.ndarray  #: indices of the wanted among the pairs
    norm: float  #: the largest |θ|
    error: float  #: of one product, measured
    crossed: np.ndarray  #: `crossings` so far
    hidden: np.ndarray  #: coordinates of what lies outside the basis, should it join the chain


class Search:
    """The terms of one call: the operator, what is asked for, and the first product."""

    def __init__(self, operator: Operator, method: Extreme, key: Any) -> None:
        self.operator, self.method, self.key, self.size = operator, method, key, operator.size
        self.applied = operator.symmetric if method.symmetric else operator
        self.per_step = self.applied.products_per_mv
        self.least, block = basis_rows(method, self.size), method.block
        self.budget = self._affordable_steps()
        memory.require(
            4 * (self.least + block) * self.size * jnp.dtype(operator.dtype).itemsize,
            f"a basis of {self.least} vectors",
            "take a smaller subspace",
        )
        self.seed = np.asarray(jax.random.key_data(key))
        rows = self._empty().basis[:block]
        self.start, self.products = rows[0], multiply(self.applied, rows)
        self.measured = None if operator.is_symmetric else self.probe()

    def _empty(self) -> KrylovState:
        dtype = jnp.dtype(self.operator.dtype)
        return begin_block(self.key, self.size, self.least, self.method.block, dtype)

    def _affordable_steps(self) -> int:
        """Steps that the products allow, in whole blocks."""
        most, block, per_step = self.method.max_products, self.method.block, self.per_step
        steps = (most - self.measuring(most // per_step // block * block)) // per_step // block * block
        if steps < self.method.k:
            fewest = -(-self.method.k // block) * block
            raise ValueError(
                f"max_products: expected at least {self.measuring(fewest) + fewest * per_step}"
                f" ({self.measuring(fewest)} to measure rounding, {per_step} per step), got {most}"
            )
        return steps

    def measuring(self, steps: int) -> int:
        """Products that measure rounding; none where there are 21 `crossings` or more: from block + 7 steps on."""
        if self.operator.is_symmetric:
            return self.operator.products_per_mv if min(steps, self.size) < self.method.block + 7 else 0
        return 2 * self.operator.products_per_mv

    def probe(self) -> Probe:
        """What one or two more products with the first vector tell."""
        return probe_first(self.operator, self.start, self.products[0], self.method.symmetric)

    def spent(self, at: At) -> int:
        """Products so far; of an operator declared symmetric without that of `measuring`, which comes last."""
        return at.course.steps * self.per_step + (0 if self.operator.is_symmetric else self.measuring(0))

    def begin(self) -> At:
        """The first block of products, taken in."""
        block = self.method.block
        state = absorb_block(self._empty(), self.products, self.key, block)
        return At(state, nothing_outside(state), Course(block, block))

    def look(self, at: At) -> Look:
        """Ritz pairs, and what `judge` needs to know of them."""
        state, outside, course = at
        method, steps = self.method, int(state.num_steps)
        pairs = block_ritz(state, outside, course.width, symmetric=method.symmetric)
        wanted = _wanted(len(pairs.values), method.k, method.which)
        norm = np.abs(pairs.values).max()
        crossed = course.crossed + crossings(state, course.kept)
        error = float(self.measured.noise) if self.measured else product_noise(state, crossed)
        target = max(method.rtol * norm, float(rounding_noise(error, steps, norm)))
        # A small residual in a small space may belong to an eigenvalue further inside: the values must rest, too.
        values, residuals, resting = pairs.values[wanted], pairs.residuals[wanted], pairs.resting[wanted]
        # Of a zero operator all are zero.
        worst = max(residuals.max(), moved(values, course.last)) / (target or 1)
        copies, since = False, Growth(0.0, 0.0, np.zeros(0))
        if len(values) == method.k:
            copies = len(_levels(values, method.which, target, first=False)) > 0
            first_chain = not len(course.before)
            asked = _levels(values if first_chain else course.before, method.which, target, first=first_chain)
            if worst <= 1 or at.room - steps <= course.width:  # what follows may depend on it
                since = growth(state, outside, course.width, slice(*course.origin), asked, symmetric=method.symmetric)
        check = Check(
            values=values,
            target=target,
            worst=worst,
            resting=resting.max() / (target or 1),
            newest=np.sqrt(np.maximum(residuals**2 - resting**2, 0)).max() / (target or 1),
            copies=copies,
            # No part is larger than one: a stretch between restarts that tells nothing takes nothing back.
            gained=course.grown + max(0.0, since.gained),
            inside=course.grown + max(0.0, since.inside),
            demanded=demanded(self.size - steps),
        )
        hidden = pairs.coordinates[wanted][resting.argmax()] if check.resting > 1 else since.coordinates
        return Look(check, pairs, wanted, norm, error, crossed, hidden)

    def turn(self, at: At, look: Look, following: Next) -> At:
        """What comes before the next products: a chain ends, wakes or begins, and a full basis is restarted."""
        state, outside, course = at
        steps, method = int(state.num_steps), self.method
        if following is Next.CLOSED:
            state = state._replace(num_fresh=jnp.zeros_like(state.num_fresh))
            course = begin(course, look.check.values, steps, course.width)
        elif following is Next.WAKE:
            state, outside = wake(state, outside, look.hidden, course.width)
            course = course._replace(width=course.width + 1)
        at = At(state, outside, course)
        turned = following in (Next.BEGIN, Next.CLOSED)
        # A chain that is not cut by a restart is asked more strictly (see `growth`).
        early = following is Next.BEGIN and at.room < self.size
        if at.room - steps < (at.room // 4 if early else course.width):
            at, turned = self._restarted(at, look, following, steps), True
        if following is Next.BEGIN:
            first = int(at.state.num_steps)
            state, outside = begin_chain(at.state, at.outside, self.key, at.course.width)
            at = At(state, outside, begin(at.course, look.check.values, first, 1))
        if turned and len(at.outside.rows):
            asked = _levels(at.course.before, method.which, look.check.target, first=False)
            if len(asked):
                level = float(asked[0].real)
                at = at._replace(outside=lean(at.state, at.outside, level, symmetric=method.symmetric))
        return at

    def _restarted(self, at: At, look: Look, following: Next, steps: int) -> At:
        """The basis with half of what is not wanted, so that there is room."""
        (state, outside, course), room = at, at.room
        gained = 0.0 if following is Next.CLOSED else look.check.gained
        # Where a check learns nothing between restarts it would never end; twice the basis is in what was required.
        looking = len(course.before) > 0 and following is Next.GO_ON
        more = 2 * course.width
        if looking and gained <= course.grown and room + more <= min(2 * self.least, self.size - more):
            state, outside = widen(state, outside, more, more)
        ends = _ends(self.method.which, (self.method.k + steps) // 2)
        state, outside = restart(state, outside, *ends, course.width, symmetric=self.method.symmetric)
        first = int(state.num_steps)
        origin = np.asarray([first, first + course.width])
        course = course._replace(crossed=look.crossed, kept=first, origin=origin, grown=gained)
        return At(state, outside, course)

    def advance(self, at: At, check: Check, steps: int) -> At:
        """The next segment of products; ``steps`` were in the basis at the check."""
        state, outside, course = at
        first, width = int(state.num_steps), course.width
        length = max(next_length(course, steps, check), self.method.k - steps)
        length = min(-(-length // width), (at.room - first) // width, (self.budget - course.steps) // width) * width
        state = advance_block(self.applied, state, first + length, self.key, width, left_out(state, outside))
        return At(state, outside, course._replace(steps=course.steps + int(state.num_steps) - first))

    def result(self, at: At, look: Look, status: Status, vectors: bool) -> Spectrum:
        """The wanted pairs with their noise."""
        state, course, pairs = at.state, at.course, look.pairs
        error = look.error
        if self.operator.is_symmetric and self.measuring(course.steps):
            error = max(error, float(self.probe().noise))
        loss = orthogonality_loss(state.basis, min(int(state.num_steps), self.size))
        noise = float(rounding_noise(error, len(pairs.values), state.scale, loss))
        noise = max(noise, float(state.dropped))
        residuals = np.maximum(pairs.residuals[look.wanted], noise)
        if status is Status.CONVERGED and residuals.max() > self.method.rtol * look.norm:
            status = Status.ROUNDING
        return Spectrum(
            eigenvalues=pairs.values[look.wanted],
            residuals=residuals,
            vectors=ritz_vectors(state.basis, pairs.coordinates[look.wanted]) if vectors else None,
            num_products=self.measuring(course.steps) + course.steps * self.per_step,
            status=status,
            asymmetry=float(self.measured.asymmetry) if self.measured else 0.0,
            noise=noise,
            dtype=self.operator.dtype,
            method=self.method,
            seed=self.seed,
        )


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
