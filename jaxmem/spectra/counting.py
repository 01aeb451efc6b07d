"""The number of positive eigenvalues: exact where it fits the budget, else a certified bound and an estimate.

Exact counts are of a spectrum: one that is there, or that `jaxmem.spectra.spectrum` or, with a folder,
`jaxmem.spectra.dense_spectrum` computes. Below that a first Lanczos run from a random vector takes a third of the
budget. Each of its Ritz values above zero is one positive eigenvalue (Cauchy interlacing); they are deflated, exactly
(`jaxmem.spectra.deflation`), and what is left is estimated with fresh random vectors: d times the mass that such a
vector has above zero (`jaxmem.spectra.quadrature`, `jaxmem.spectra.estimate`).
"""

from functools import partial
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxmem.krylov import Factorization, Status, begin, extend, may_go_on, reopened
from jaxmem.operators import Operator, SymmetricPart
from jaxmem.runs import resume
from jaxmem.runs.progress import Progress, silent
from jaxmem.spectra.columns import ESTIMATE
from jaxmem.spectra.deflation import Deflated, deflate
from jaxmem.spectra.dense import dense_spectrum
from jaxmem.spectra.estimate import Estimate, Runs, combine, probe_steps
from jaxmem.spectra.quadrature import Tridiagonal
from jaxmem.spectra.result import LARGEST_DENSE, Spectrum
from jaxmem.spectra.ritz import ritz_pairs
from jaxmem.spectra.single import (
    check_operator,
    dense_products,
    krylov_noise,
    probe_and_product,
    probe_products,
    spectrum,
)

FEWEST_STEPS = 12  #: of an estimate: 4 of the first run, and 8 of a fresh vector
_NONFINITE = "operator: a product was NaN or infinite; check the parameters, the point and the timestep"
_SEGMENT = 32  # steps of the first run between two looks at it, which is what a kill can lose


class Count(NamedTuple):
    """How many eigenvalues of the symmetric part are positive."""

    lower: int  #: certified: eigenvalues above ``threshold`` (the rounding of products cannot have made them)
    estimate: float  #: where the whole spectrum was computed, exact but for the undecided signs
    interval: tuple[
        float, float
    ]  #: 95 % for an estimate, of any spectrum; from undecided signs (within ±threshold) if exact
    threshold: float  #: what the rounding of products can move an eigenvalue by, measured (`rounding_noise`)
    num_products: int  #: applications of A or Aᵀ; none for a spectrum that was there
    paper: int  #: the paper's count: eigenvalues, or Ritz values of the first run, above 1e-15, rounding included
    tangent: Estimate | None  #: of eigenvalues above -1/(2 sigma²), where ``sigma`` was given


def count_positive(
    operator: Operator | Spectrum,
    budget: int | None = None,
    key: Any = None,
    *,
    sigma: float | None = None,
    steps_per_probe: int | None = None,
    batch: int = 1,
    chunk: int = 56,
    folder: str | Path | None = None,
    progress: Progress = silent,
) -> Count:
    """Count the positive eigenvalues of ½(A + Aᵀ).

    With a budget of at least d + 1 products (d + 2 for ``operator.symmetric``, whose product takes two; or None) the
    spectrum is computed and the count is exact. With less it is an estimate with a 95 % interval. Eigenvalues within
    ±threshold of zero then count as not positive.

    The interval assumes nothing about the spectrum, so it is as wide as the runs fail to tell eigenvalues just below
    zero from those just above: a range of about 1/steps of the spectrum's. Across a gap it is as narrow as the number
    of vectors allows, or one number; where many eigenvalues crowd at zero (no gap, a null space) it is wide, more so
    with fewer products. The estimate lies nearer to the truth than the interval says where the density of eigenvalues
    is smooth on either side of zero (``docs/benchmarks.md``).

    Args:
        operator: see `spectrum`; for the difference of two, `jaxmem.operators.Difference`. Or a `Spectrum` with all
            eigenvalues of the symmetric part (of ``"eigh"`` or `dense_spectrum`), which is counted without a product.
        budget: products with A or Aᵀ that may be spent; None for an exact count.
        key: random key of the start vectors; needed for an estimate.
        sigma: noise level of the point, for the tangent count: directions in which the posterior of x0 is wider than
            half the noise. From the same products.
        steps_per_probe: Lanczos steps per fresh vector, two products each for a non-symmetric operator. By default the
            number that the first run says gives the smallest error.
        batch: fresh vectors whose products are taken together.
        chunk: as in `spectrum`.
        folder: where the work is kept as it goes on; the same call takes it up after an interruption or a kill, and
            gives the same count bit for bit. Needed for exact counts of more than 4,096 dimensions, which are those of
            `jaxmem.spectra.dense_spectrum`: its memory, disk and restarts (one product each).
        progress: told of the products; for an exact count with a folder, as `jaxmem.spectra.dense_spectrum`.

    Memory of an estimate: the Krylov basis of a third of the budget's steps, ``steps · d`` numbers, up to twice as much
    for what is deflated (rows come in powers of two, at least 32), and twice ``batch`` bases of ``steps_per_probe``
    rounded up to 32.

    Raises:
        ValueError: if the budget is too small, or the key is missing, or an exact count needs a folder, or as
            `spectrum` and `jaxmem.spectra.dense_spectrum`; if the folder's state is damaged, of another call or of
            another operator; if a spectrum does not have all eigenvalues, or comes with options of products.
        OSError: the folder cannot be written.
    """
    tangent_level = None if sigma is None else _tangent_level(float(sigma))
    if isinstance(operator, Spectrum):
        given = dict(budget=budget, key=key, steps_per_probe=steps_per_probe, folder=folder)
        _check_spectrum(operator, [name for name, value in given.items() if value is not None])
        return _of_spectrum(operator, tangent_level, 0)
    check_operator(operator, "count_positive")
    budget, steps_per_probe = (None if value is None else index(value) for value in (budget, steps_per_probe))
    batch, sigma = index(batch), None if sigma is None else float(sigma)
    for name, value in (("steps_per_probe", steps_per_probe), ("batch", batch), ("chunk", chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if budget is None or budget >= dense_products(operator):
        return _exact(operator, tangent_level, chunk, folder, progress)
    each, measuring = operator.symmetric.products_per_mv, probe_products(operator)
    steps = (budget - measuring) // each
    if steps < FEWEST_STEPS:
        fewest, exact = FEWEST_STEPS * each + measuring, dense_products(operator)
        estimate = f"{fewest} products ({FEWEST_STEPS} Lanczos steps), or " if fewest < exact else ""
        raise ValueError(
            f"budget: expected at least {estimate}{exact} for an exact count, got {budget}; raise the budget"
        )
    if key is None:
        raise ValueError("key: an estimate needs a random key, for instance jax.random.key(0)")

    start = jax.random.normal(jax.random.fold_in(key, 0), (operator.size,), operator.dtype)
    measured, product = jax.device_get(jax.jit(probe_and_product)(operator, start))
    if not np.isfinite([measured.noise, measured.asymmetry, measured.norm]).all():
        raise ValueError(_NONFINITE)
    room = steps // 3
    options = dict(budget=budget, seed=np.asarray(jax.random.key_data(key)).tolist(), steps_per_probe=steps_per_probe)
    options |= dict(batch=batch, sigma=sigma, size=operator.size, dtype=str(jnp.dtype(operator.dtype)))
    kept = _Kept(None if folder is None else Path(folder) / ESTIMATE, product, 8 * float(measured.noise), options)
    factorization, probes = kept.load(room) or (begin(start, room), [])

    def report() -> int:
        spent = int(factorization.num_steps) + sum(len(run.diagonal) for run in probes)
        progress("products", spent * each + measuring, steps * each + measuring)
        return spent

    spent = report()
    while may_go_on(factorization, room):
        factorization = _extend(operator.symmetric, factorization, _SEGMENT)
        _refuse_nonfinite(factorization)
        kept.save(factorization, probes)
        spent = report()
    first = factorization = jax.device_get(factorization)
    pairs = ritz_pairs(factorization, symmetric=True)
    # Twice what the first run may have moved eigenvalues by: the runs on what is left share the error of its vectors.
    # Numbers below the smallest normal one have lost digits, whatever was measured.
    tiny = operator.size**0.5 * float(jnp.finfo(operator.dtype).tiny)
    threshold = max(2 * krylov_noise(factorization, pairs, measured), tiny)
    # What counted as closed within 20 eps ‖A‖ may hold more than rounding: the level must not lie within it.
    factorization = reopened(factorization, threshold)
    pairs = ritz_pairs(factorization, symmetric=True)  # with the residuals of what was left
    deflated, taken, amplification = deflate(operator.symmetric, factorization, pairs, threshold)
    margin = amplification * threshold
    coupling = float(deflated.coupling)
    runs = Runs(operator.size, Tridiagonal.of(factorization), pairs.values, taken, threshold, coupling, margin, probes)
    left = steps - len(pairs.values)
    if steps_per_probe is None:
        signs_known = bool(((pairs.residuals <= pairs.values) | (pairs.values <= threshold)).all())
        steps_per_probe = probe_steps(runs, threshold, left, signs_known)
        if tangent_level is not None:
            steps_per_probe = max(steps_per_probe, probe_steps(runs, tangent_level, left, False))
    steps_per_probe = max(1, min(steps_per_probe, operator.size - taken, left))
    while spent + steps_per_probe <= steps:
        together = min(batch, (steps - spent) // steps_per_probe)
        keys = jnp.stack([jax.random.fold_in(key, 1 + len(probes) + i) for i in range(together)])
        # Few shapes, so that few programs are compiled.
        found = jax.device_get(_probe_runs(deflated, keys, steps_per_probe, -(-steps_per_probe // 32) * 32))
        for i in range(together):
            one = jax.tree.map(lambda leaf, i=i: leaf[i], found)
            _refuse_nonfinite(one)
            probes.append(Tridiagonal.of(reopened(one, threshold)))
        kept.save(first, probes)
        spent = report()
    progress("products", steps * each + measuring, steps * each + measuring)
    positive = combine(runs, threshold)
    tangent = None if tangent_level is None else combine(runs, tangent_level + threshold)
    paper = int((pairs.values > 1e-15).sum())
    return Count(*positive, threshold, spent * each + measuring, paper, tangent)


def _tangent_level(sigma: float) -> float:
    level = -0.5 / sigma / sigma if sigma > 0 else -np.inf
    if not -1e30 < level < 0:
        raise ValueError(f"sigma: expected a positive noise level, got {sigma}")
    return level


def _exact(
    operator: Operator, tangent_level: float | None, chunk: int, folder: str | Path | None, progress: Progress
) -> Count:
    if folder is not None:
        # Of the symmetric part it would take twice the columns, to symmetrise what is symmetric.
        whole = operator.operator if isinstance(operator, SymmetricPart) else operator
        exact = dense_spectrum(whole, folder, chunk=chunk, progress=progress)
    elif operator.size > LARGEST_DENSE:
        raise ValueError(
            f"folder: expected one for an exact count of {operator.size:,} dimensions, whose matrix does not stay in"
            f" memory (up to {LARGEST_DENSE:,} do), got none; give one, or a budget of fewer products than"
            f" {dense_products(operator):,}"
        )
    else:
        progress("products", 0, dense_products(operator))
        exact = spectrum(operator, "eigh", chunk=chunk)
        progress("products", dense_products(operator), dense_products(operator))
    return _of_spectrum(exact, tangent_level, int(exact.num_products))


def _of_spectrum(exact: Spectrum, tangent_level: float | None, num_products: int) -> Count:
    threshold, values = float(exact.noise), exact.eigenvalues

    def above(level: float) -> Estimate:
        low, high = int((values > level + threshold).sum()), int((values > level - threshold).sum())
        return Estimate(low, float((values > level).sum()), (float(low), float(high)))

    tangent = None if tangent_level is None else above(tangent_level)
    return Count(*above(0.0), threshold, num_products, int((values > 1e-15).sum()), tangent)


def _check_spectrum(given: Spectrum, options: list[str]) -> None:
    """Refuse what does not have all eigenvalues of one symmetric part, and options that only products need."""
    if options:
        raise ValueError(
            f"{options[0]}: expected none with a spectrum, which is counted as it is, got one; leave it out, or count"
            f" the operator"
        )
    if given.method != "eigh":
        why = {
            "lanczos": "Ritz values, whose positive ones are only a lower bound",
            "arnoldi": "Ritz values of A, which is not its symmetric part",
            "eig": "eigenvalues of A, which is not its symmetric part",
        }.get(given.method, "others")
        raise ValueError(
            f"spectrum: expected all eigenvalues of the symmetric part (method 'eigh', or dense_spectrum), got those of"
            f" {given.method!r}: {why}; count the operator, with a budget for an estimate"
        )
    if given.eigenvalues.ndim != 1:
        raise ValueError(
            f"spectrum: expected that of one point, got eigenvalues of shape {given.eigenvalues.shape}; count each, for"
            f" instance with given._replace(eigenvalues=given.eigenvalues[i], noise=given.noise[i])"
        )
    if not np.isfinite(given.eigenvalues).all() or not np.isfinite(given.noise):
        raise ValueError("spectrum: expected finite eigenvalues and noise, got NaN or infinity; compute it again")


def _refuse_nonfinite(factorization: Factorization) -> None:
    if factorization.status == Status.NONFINITE:
        raise ValueError(_NONFINITE)


@jax.jit
def _extend(operator: Operator, factorization: Factorization, num_steps: Any) -> Factorization:
    return extend(operator.mv, factorization, num_steps, symmetric=True)


@partial(jax.jit, static_argnames="room")
def _probe_runs(deflated: Deflated, keys: Array, num_steps: Any, room: int) -> Factorization:
    def one(key: Array) -> Factorization:
        start = jax.random.normal(key, (deflated.size,), deflated.dtype)
        start = deflated.project(deflated.project(start))
        return extend(deflated.mv, begin(start, room), num_steps, symmetric=True)

    return jax.vmap(one)(keys)


class _Kept(NamedTuple):
    """What a folder keeps of a count: the first run and the tridiagonal matrices of the others."""

    path: Path | None
    product: np.ndarray
    rounding: float
    options: dict[str, Any]

    def save(self, factorization: Factorization, probes: list[Tridiagonal]) -> None:
        if self.path is None:
            return
        arrays = jax.device_get(factorization)._asdict() | {"product": self.product}
        arrays["basis"] = arrays["basis"][: int(arrays["num_steps"]) + 1]
        arrays["lengths"] = np.array([len(run.diagonal) for run in probes], int)
        for name in Tridiagonal._fields:
            arrays[name] = np.concatenate([np.zeros(0), *(getattr(run, name) for run in probes)])
        resume.save(self.path, arrays, self.options)

    def load(self, room: int) -> tuple[Factorization, list[Tridiagonal]] | None:
        if self.path is None or not self.path.exists():
            return None
        names = (*Factorization._fields, "lengths", *Tridiagonal._fields)
        arrays = resume.load(self.path, names, self.product, self.rounding, self.options)
        basis = np.zeros((room + 1, arrays["basis"].shape[1]), arrays["basis"].dtype)
        basis[: len(arrays["basis"])] = arrays["basis"]
        state = arrays | {"basis": basis}
        factorization = Factorization(*(jnp.asarray(state[name]) for name in Factorization._fields))
        ends = np.cumsum(arrays["lengths"])[:-1]
        parts = (np.split(arrays[name], ends) for name in Tridiagonal._fields)
        probes = [Tridiagonal(*part) for part in zip(*parts, strict=True)] if len(arrays["lengths"]) else []
        return factorization, probes
