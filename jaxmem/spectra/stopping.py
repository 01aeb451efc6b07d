"""When a restarted Krylov run looks at its residuals, and when it ends: host decisions from a few numbers a check."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmem.krylov import Status
from jaxmem.spectra.restarted import KrylovState


class Course(NamedTuple):
    """What the host remembers between segments."""

    steps: int  #: products with the operator applied, those before restarts included
    kept: int = 0  #: rows that the last restart kept
    crossed: np.ndarray = np.zeros(2)  #: `crossings` of the steps before it
    checks: np.ndarray = np.zeros((0, 2))  #: steps, and the worst wanted residual relative to what it should be
    last: np.ndarray = np.zeros(0)  #: the wanted values at the last check
    before: np.ndarray = np.zeros(0)  #: the wanted values when the space closed last; empty before
    closed_at: int = 0  #: steps at that time


def judge(
    state: KrylovState, course: Course, values: np.ndarray, worst: float, num_pairs: int, block: int, budget: int
) -> tuple[Status | None, Course]:
    """Whether to end with these wanted values, ``worst`` residual relative to its target; and what to remember."""
    course = course._replace(checks=np.vstack([course.checks, [course.steps, worst]]), last=values)
    enough = len(values) == num_pairs
    if state.num_steps >= state.basis.shape[1]:
        return Status.INVARIANT, course
    if state.num_fresh >= block:
        if enough and len(course.before) == num_pairs:
            shift = np.abs(values - course.before).max()
            if shift <= 20 * float(jnp.finfo(state.basis.dtype).eps * state.scale):
                return Status.INVARIANT, course  # another random direction, followed to its end, brought no copy
        course = course._replace(before=values, closed_at=course.steps)
    elif enough and worst <= 1 and course.steps >= 2 * course.closed_at:
        # Where rounding keeps a later direction from closing, it was followed as long as all before it.
        return Status.CONVERGED, course
    return (Status.BUDGET if course.steps >= budget else None), course


def next_length(checks: np.ndarray, steps: int) -> int:
    """Steps to the next check: few beside what is done, and a third of what the fastest of the last decays lets expect.

    Every check costs an eigenproblem on the host; every step past the end costs a product. Residuals may rise for a
    while, so that the last decay alone would say nothing.
    """
    longest = min(32, max(1, steps // 8))
    logarithms = np.log(np.clip(checks[-8:, 1], 1, 1e30))
    fastest = np.max(-np.diff(logarithms) / np.diff(checks[-8:, 0]), initial=0)
    return int(np.clip(logarithms[-1] / fastest / 3, 1, longest)) if fastest > 0 else longest
