"""Extreme eigenpairs to a tolerance, with as few products as it takes, and a folder to go on from after a kill."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.krylov import Status
from jaxmem.operators import Operator
from jaxmem.runs import resume
from jaxmem.runs.progress import Progress, silent
from jaxmem.spectra.extreme_search import At, Search
from jaxmem.spectra.methods import Extreme
from jaxmem.spectra.restarted import (
    KrylovState,
    Outside,
)
from jaxmem.spectra.result import Spectrum
from jaxmem.spectra.stopping import Course, judge

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
    Beside 37 products of a well separated spectrum the check took 7, beside 63 without a gap 21 to 33. Copies and
    clusters cost more, up to 150 % more: each copy that comes to light has to converge, and another chain follows.

    Status CONVERGED: the residuals are small, and no eigenvalue is missing whose absence moves a value by more than
    two tolerances (rtol ‖A‖, or the measured noise where that is more). A single missing eigenvector is overlooked
    with a probability of at most 0.002 (`stopping.OVERLOOKED`), several together less. That is shown for a symmetric
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
    if key is None:
        raise ValueError("key: start vectors need a random key, for instance jax.random.key(0)")
    search = Search(operator, method, key)
    kept = _Kept(search, None if folder is None else Path(folder) / "extreme-pairs.npz")
    at, most = kept.load() or search.begin(), method.max_products
    while True:
        spent = search.spent(at)
        if not at.state.finite:
            raise ValueError(
                f"operator: a product after {spent} others was NaN or infinite; check the parameters, the point and the"
                f" timestep"
            )
        kept.save(at)
        progress("extreme pairs", min(spent, most), most)
        at = at.settled()
        look = search.look(at)
        following, course = judge(at.state, at.course, look.check, method.k, search.budget)
        at, steps = at._replace(course=course), int(at.state.num_steps)
        if isinstance(following, Status):
            break
        at = search.advance(search.turn(at, look, following), look.check, steps)
    progress("extreme pairs", most, most)
    return search.result(at, look, following, vectors)


class _Kept:
    """The file in which a search is kept; with no path, none."""

    def __init__(self, search: Search, path: Path | None) -> None:
        method, operator = search.method, search.operator
        self.search, self.path, self.product = search, path, np.asarray(search.products[0])
        self.options: dict[str, Any] = dict(k=method.k, which=method.which, rtol=float(method.rtol))
        self.options |= dict(symmetric=method.symmetric, subspace=search.least, block=method.block)
        self.options |= dict(size=operator.size, dtype=str(jnp.dtype(operator.dtype)), seed=search.seed.tolist())

    def save(self, at: At) -> None:
        if self.path is not None:
            arrays = jax.device_get(at.state)._asdict() | at.outside._asdict() | at.course._asdict()
            arrays["basis"] = arrays["basis"][: int(at.state.num_steps) + at.course.width]
            resume.save(self.path, arrays | {"product": self.product}, self.options)

    def load(self) -> At | None:
        if self.path is None or not self.path.exists():
            return None
        rounding = 8 * float((self.search.measured or self.search.probe()).noise)
        return _restore(resume.load(self.path, _KEPT, self.product, rounding, self.options))


def _restore(arrays: dict[str, np.ndarray]) -> At:
    basis = np.zeros((len(arrays["projected"]), arrays["basis"].shape[1]), arrays["basis"].dtype)
    basis[: len(arrays["basis"])] = arrays["basis"]
    state = KrylovState(*(jnp.asarray((arrays | {"basis": basis})[name]) for name in KrylovState._fields))
    course = {name: arrays[name].item() if arrays[name].ndim == 0 else arrays[name] for name in Course._fields}
    whole = {name: int(arrays[name]) for name in ("settled", "booked")}
    outside = Outside(jnp.asarray(arrays["rows"]), arrays["parts"], weights=arrays["weights"], **whole)
    return At(state, outside, Course(**course))  # type: ignore[arg-type]  # whole numbers and arrays, as they were
