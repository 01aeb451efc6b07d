"""When a restarted Krylov run looks at its residuals, and when it ends: host decisions from a few numbers a check."""

from enum import Enum
from typing import NamedTuple

import numpy as np

from jaxmem.krylov import Status
from jaxmem.spectra.restarted import KrylovState

#: Probability, at most, that a chain overlooks a single missing eigenvector: of the Schur complement at the level
#: asked, which has one wherever A has one more than was found. It is exact where no restart cuts the chain. The
#: products of a check go with its logarithm. The bound is nearly reached by the spectrum of a memorized point, zeros
#: over one multiple value: with 0.02, 7 of 1,000 keys missed one, and on another instruction set 6 of 400.
OVERLOOKED = 0.002


class Course(NamedTuple):
    """What the host remembers between segments."""

    steps: int  #: products with the operator applied, those before restarts included
    width: int  #: of the chain: rows whose products are to come
    origin: np.ndarray = np.zeros(2, int)  #: its growth counts from these rows: the first, and the one after the last
    grown: float = 0.0  #: `growth` up to the last restart, from which on it counts anew
    kept: int = 0  #: rows that the last restart kept
    crossed: np.ndarray = np.zeros(2)  #: `crossings` of the steps before it
    checks: np.ndarray = np.zeros((0, 2))  #: steps, and the worst wanted residual relative to what it should be
    last: np.ndarray = np.zeros(0)  #: the wanted values at the last check
    begun: int = 0  #: steps when the chain began
    before: np.ndarray = np.zeros(0)  #: the wanted values then; empty for the first


def begin(course: Course, values: np.ndarray, row: int, width: int) -> Course:
    """A new chain from ``row`` on."""
    return course._replace(
        before=values, begun=course.steps, origin=np.asarray([row, row + width]), width=width, grown=0.0
    )


class Next(Enum):
    """What follows a check, where the run does not end."""

    GO_ON = "the chain goes on"
    CLOSED = "the chain has closed, and the random rows that took its place are the next"
    BEGIN = "the chain has told what it can, and another begins"
    WAKE = "what is missing lies outside the basis, and joins the chain"


class Check(NamedTuple):
    """What a look at a state has shown."""

    values: np.ndarray  #: the wanted, as far as there are so many
    target: float  #: what residuals should be, and how far values may move
    worst: float  #: residual or move since the last check, relative to ``target``
    resting: float  #: the part of the residual that is outside the basis, relative to ``target``
    newest: float  #: the other part of it
    copies: bool  #: whether a missing copy would matter (see `levels`)
    gained: float  #: the growth of the chain, where residuals are small enough
    inside: float  #: what it would be if nothing were outside the basis
    demanded: float  #: what it should be (see `demanded`)


def moved(values: np.ndarray, before: np.ndarray) -> float:
    """How far wanted values have moved; infinite where some were not there."""
    return float(np.abs(values - before).max()) if len(values) == len(before) else np.inf


def levels(values: np.ndarray, target: float, first: bool) -> np.ndarray:
    """Where an eigenvalue that matters would be, if one were missing at one end; ``values`` descend from the outermost.

    A missing copy of the last value, or of one nearer to it than two ``target``, changes no value by more than that. A
    copy of any other is above the middle of the gap that follows. The ``first`` chain has its own values' copies to
    leave to others, and is asked about what is further out than all of them, by ten times what it resolves.
    """
    real = values.real
    if first:
        level, seen = real[0] + 10 * target, values
    else:
        seen = values[real > real[-1] + 2 * target]
        if not len(seen):
            return np.zeros(0)
        level = (seen[-1].real + real[-1]) / 2
    return np.unique(level + 1j * seen.imag) if np.iscomplexobj(values) else np.asarray([level])


def demanded(dimensions: int) -> float:
    """Log of the growth after which a random vector of so many dimensions hides an eigenvector: `OVERLOOKED` times.

    A component of a random unit vector has a density of at most ``sqrt(n / 2π)``.
    """
    return float(np.log(np.sqrt(2 * max(dimensions, 1) / np.pi) / OVERLOOKED))


def judge(
    state: KrylovState, course: Course, check: Check, num_pairs: int, budget: int
) -> tuple[Status | Next, Course]:
    """Whether to end with these wanted values, or how to go on; and what to remember."""
    row = [course.steps, check.worst]
    course = course._replace(checks=np.vstack([course.checks, row]), last=check.values)
    size, first = state.basis.shape[1], not len(course.before)
    full, closed = bool(state.num_steps >= size), bool(state.num_fresh >= course.width)
    if full:
        return Status.INVARIANT, course
    there = len(check.values) == num_pairs
    reached = there and (check.worst <= 1 or (closed and check.resting <= 1))
    leaking = check.gained < check.demanded <= check.inside
    grown = (closed and not leaking) or check.gained >= check.demanded
    nothing_new = moved(check.values, course.before) <= check.target
    if reached and (grown or not first) and (not check.copies or (nothing_new and grown)):
        return (Status.INVARIANT if closed else Status.CONVERGED), course
    following, width = Next.GO_ON, course.width
    unfinished = there and check.resting > 1 >= (0 if closed else check.newest)
    if unfinished or (reached and nothing_new and leaking):
        following, width = Next.WAKE, width + 1
    elif closed:
        following = Next.CLOSED
    elif reached and (grown if first else not nothing_new):
        following, width = Next.BEGIN, 1
    return (Status.BUDGET if course.steps + width > budget else following), course


def next_length(course: Course, steps: int, check: Check) -> int:
    """Steps to the next check: few beside what is done, and a third of what the fastest of the last decays lets expect.

    Every check costs an eigenproblem on the host; every step past the end costs a product. Residuals may rise for a
    while, so that the last decay alone would say nothing. Growth is nearly even: the next check is where it is enough.
    """
    longest = min(32, max(1, steps // 8))
    if check.worst <= 1:
        done = course.steps - course.begun
        expected = done * (check.demanded / check.gained - 1) if check.gained > 0 else 0
        return int(np.clip(expected, 1, longest))
    logarithms = np.log(np.clip(course.checks[-8:, 1], 1, 1e30))
    fastest = np.max(-np.diff(logarithms) / np.diff(course.checks[-8:, 0]), initial=0)
    return int(np.clip(logarithms[-1] / fastest / 3, 1, longest)) if fastest > 0 else longest
