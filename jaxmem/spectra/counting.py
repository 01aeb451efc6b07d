"""The number of positive eigenvalues: exact where products suffice, else a certified bound and an estimate.

Exact counts are of a spectrum: one that is there, or that `jaxmem.spectra.dense` computes. Below that a first Lanczos
run from a random vector takes a third of the products. Each of its Ritz values above zero is one positive eigenvalue
(Cauchy interlacing); they are deflated, exactly (`jaxmem.spectra.deflation`), and what is left is estimated with fresh
random vectors: d times the mass that such a vector has above zero (`jaxmem.spectra.quadrature`,
`jaxmem.spectra.estimate`).
"""

from functools import partial
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxmem.krylov import Factorization, Status, begin, extend, reopened
from jaxmem.operators import Operator, SymmetricPart
from jaxmem.runs.progress import Progress, silent
from jaxmem.spectra.columns import ESTIMATE
from jaxmem.spectra.deflation import Deflated, deflate
from jaxmem.spectra.dense import dense_from_file, dense_in_memory
from jaxmem.spectra.driver import Kept, drive, segments
from jaxmem.spectra.estimate import Estimate, Runs, combine, probe_steps
from jaxmem.spectra.measure import (
    Probe,
    check_operator,
    dense_products,
    krylov_noise,
    probe_and_product,
    probe_products,
)
from jaxmem.spectra.methods import LARGEST_DENSE, Arnoldi, Dense, Extreme, Lanczos
from jaxmem.spectra.quadrature import PACKED, Tridiagonal, packed, unpacked
from jaxmem.spectra.result import Spectrum
from jaxmem.spectra.ritz import ritz_pairs, unstacked

FEWEST_STEPS = 12  #: of an estimate: 4 of the first run, and 8 of a fresh vector
_NONFINITE = "operator: a product was NaN or infinite; check the parameters, the point and the timestep"


class Count(NamedTuple):
    """How many eigenvalues of the symmetric part are positive."""

    lower: int  #: certified: eigenvalues above ``threshold`` (the rounding of products cannot have made them)
    estimate: float  #: where the whole spectrum was computed, exact but for the undecided signs
    interval: tuple[float, float]  #: 95 % for an estimate; from undecided signs (within ±threshold) if exact
    threshold: float  #: what the rounding of products can move an eigenvalue by, measured (`rounding_noise`)
    num_products: int  #: applications of A or Aᵀ; none for a spectrum that was there
    paper: int  #: the paper's count: eigenvalues, or Ritz values of the first run, above 1e-15, rounding included
    tangent: Estimate | None  #: of eigenvalues above -1/(2 sigma²), where ``sigma`` was given


def count_positive(
    operator: Operator | Spectrum,
    *,
    max_products: int | None = None,
    key: Any = None,
    sigma: float | None = None,
    steps_per_probe: int | None = None,
    chunk: int | None = None,
    folder: str | Path | None = None,
    progress: Progress = silent,
) -> Count:
    """Count the positive eigenvalues of ½(A + Aᵀ).

    With at least d + 1 products (d + 2 for ``operator.symmetric``, whose product takes two; or None) the spectrum is
    computed and the count is exact. With less it is an estimate with a 95 % interval. Eigenvalues within ±threshold of
    zero then count as not positive.

    The interval assumes nothing about the spectrum, so it is as wide as the runs fail to tell eigenvalues just below
    zero from those just above: a range of about 1/steps of the spectrum's. Across a gap it is as narrow as the number
    of vectors allows, or one number; where many eigenvalues crowd at zero (no gap, a null space) it is wide, more so
    with fewer products. The estimate lies nearer to the truth than the interval says where the density of eigenvalues
    is smooth on either side of zero (``docs/benchmarks.md``).

    Args:
        operator: see `spectrum`; ``A - B`` for the difference of two. Or a `Spectrum` with all eigenvalues of the
            symmetric part (of `Dense`), which is counted without a product.
        max_products: most products with A or Aᵀ; None for an exact count.
        key: random key of the start vectors; needed for an estimate.
        sigma: noise level of the point, for the tangent count: directions in which the posterior of x0 is wider than
            half the noise. From the same products.
        steps_per_probe: Lanczos steps per fresh vector, two products each for a non-symmetric operator. By default the
            number that the first run says gives the smallest error.
        chunk: products taken together: columns of an exact count, 56 by default as in `spectrum`; fresh vectors of an
            estimate, 1 by default, because each holds a basis.
        folder: where the work is kept as it goes on; the same call takes it up after an interruption or a kill, and
            gives the same count bit for bit. Needed for exact counts of more than 4,096 dimensions, which are those of
            `jaxmem.spectra.dense.dense_from_file`: its memory, disk and restarts (one product each).
        progress: told of the products; for an exact count with a folder, as `jaxmem.spectra.dense.dense_from_file`.

    Memory of an estimate: the Krylov basis of a third of all steps, ``steps · d`` numbers, up to twice as much for what
    is deflated (rows come in powers of two, at least 32), and twice ``chunk`` bases of ``steps_per_probe`` rounded up
    to 32.

    Raises:
        ValueError: if the products are too few, or the key is missing, or an exact count needs a folder, or as
            `spectrum`; if the folder's state is damaged, of another call or of another operator; if a spectrum does not
            have all eigenvalues, or comes with options of products.
        OSError: the folder cannot be written.
    """
    tangent_level = None if sigma is None else _tangent_level(float(sigma))
    if isinstance(operator, Spectrum):
        given = dict(max_products=max_products, key=key, steps_per_probe=steps_per_probe, folder=folder)
        _check_spectrum(operator, [name for name, value in given.items() if value is not None])
        return _of_spectrum(operator, tangent_level, 0)
    check_operator(operator, "count_positive")
    numbers = dict(max_products=max_products, steps_per_probe=steps_per_probe, chunk=chunk)
    max_products, steps_per_probe, chunk = (None if value is None else index(value) for value in numbers.values())
    sigma = None if sigma is None else float(sigma)
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    exact = dense_products(operator)
    if max_products is None or max_products >= exact:
        return _exact(operator, tangent_level, 56 if chunk is None else chunk, folder, progress)
    fewest = FEWEST_STEPS * operator.symmetric.products_per_mv + probe_products(operator)
    if max_products < fewest:
        estimate = f"{fewest} products ({FEWEST_STEPS} Lanczos steps), or " if fewest < exact else ""
        raise ValueError(
            f"max_products: expected at least {estimate}{exact} for an exact count, got {max_products}; allow more"
        )
    if key is None:
        raise ValueError("key: an estimate needs a random key, for instance jax.random.key(0)")
    asked = _Asked(max_products, key, sigma, steps_per_probe, 1 if chunk is None else chunk)
    return _estimated(operator, asked, None if folder is None else Path(folder) / ESTIMATE, progress)


class _Asked(NamedTuple):
    """What an estimate is asked for; see `count_positive`."""

    max_products: int
    key: Any
    sigma: float | None
    steps_per_probe: int | None
    chunk: int

    @property
    def tangent_level(self) -> float | None:
        return None if self.sigma is None else _tangent_level(self.sigma)


def _estimated(operator: Operator, asked: _Asked, path: Path | None, progress: Progress) -> Count:
    start = jax.random.normal(jax.random.fold_in(asked.key, 0), (operator.size,), operator.dtype)
    measured, product = jax.device_get(jax.jit(probe_and_product)(operator, start))
    if not np.isfinite([measured.noise, measured.asymmetry, measured.norm]).all():
        raise ValueError(_NONFINITE)
    options: dict[str, Any] = asked._asdict() | dict(size=operator.size, dtype=str(jnp.dtype(operator.dtype)))
    options["key"] = np.asarray(jax.random.key_data(asked.key)).tolist()
    kept = Kept(path, product, 8 * float(measured.noise), options)
    per_step, measuring = operator.symmetric.products_per_mv, probe_products(operator)
    steps = (asked.max_products - measuring) // per_step
    there = kept.load(PACKED)
    first, probes = (begin(start, steps // 3), []) if there is None else (there[0], unpacked(there[1]))

    def spent(first: Factorization) -> int:
        return int(first.num_steps) + sum(len(run.diagonal) for run in probes)

    def keep(first: Factorization) -> None:
        _refuse_nonfinite(first)
        kept.save(first, **packed(probes))
        progress("products", measuring + spent(first) * per_step, measuring + steps * per_step)

    progress("products", measuring + spent(first) * per_step, measuring + steps * per_step)
    first = jax.device_get(drive(segments(operator.symmetric, symmetric=True), first, keep))
    runs, deflated, signs_known = _deflated(operator, first, measured, probes)
    left = steps - len(runs.ritz_values)
    length = max(1, min(_probe_length(runs, asked, left, signs_known), operator.size - runs.taken, left))
    while spent(first) + length <= steps:
        together = min(asked.chunk, (steps - spent(first)) // length)
        keys = jnp.stack([jax.random.fold_in(asked.key, 1 + len(probes) + i) for i in range(together)])
        # Few shapes, so that few programs are compiled.
        for one in unstacked(_probe_runs(deflated, keys, length, -(-length // 32) * 32)):
            _refuse_nonfinite(one)
            probes.append(Tridiagonal.of(reopened(one, runs.level)))
        keep(first)
    progress("products", measuring + steps * per_step, measuring + steps * per_step)
    tangent = None if asked.tangent_level is None else combine(runs, asked.tangent_level + runs.level)
    paper = int((runs.ritz_values > 1e-15).sum())
    return Count(*combine(runs, runs.level), runs.level, measuring + spent(first) * per_step, paper, tangent)


def _deflated(
    operator: Operator, first: Factorization, measured: Probe, probes: list[Tridiagonal]
) -> tuple[Runs, Deflated, bool]:
    """The operator without what the first run has found; and whether all signs of its Ritz values are certain."""
    pairs = ritz_pairs(first, symmetric=True)
    # Twice what the first run may have moved eigenvalues by: the runs on what is left share the error of its vectors.
    # Numbers below the smallest normal one have lost digits, whatever was measured.
    tiny = operator.size**0.5 * float(jnp.finfo(operator.dtype).tiny)
    threshold = max(2 * krylov_noise(first, pairs, measured), tiny)
    # What counted as closed within 20 eps ‖A‖ may hold more than rounding: the level must not lie within it.
    first = reopened(first, threshold)
    pairs = ritz_pairs(first, symmetric=True)  # with the residuals of what was left
    deflated, taken, amplification = deflate(operator.symmetric, first, pairs, threshold)
    runs = Runs(
        size=operator.size,
        first=Tridiagonal.of(first),
        ritz_values=pairs.values,
        taken=taken,
        level=threshold,
        coupling=float(deflated.coupling),
        margin=amplification * threshold,
        probes=probes,
    )
    return runs, deflated, bool(((pairs.residuals <= pairs.values) | (pairs.values <= threshold)).all())


def _probe_length(runs: Runs, asked: _Asked, left: int, signs_known: bool) -> int:
    """Steps of each fresh vector: as asked, or those with the smallest error that the first run lets expect."""
    if asked.steps_per_probe is not None:
        return asked.steps_per_probe
    length = probe_steps(runs, runs.level, left, signs_known)
    if asked.tangent_level is None:
        return length
    return max(length, probe_steps(runs, asked.tangent_level, left, False))


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
        exact = dense_from_file(whole, Dense(), folder, chunk, progress)
    elif operator.size > LARGEST_DENSE:
        raise ValueError(
            f"folder: expected one for an exact count of {operator.size:,} dimensions, whose matrix does not stay in"
            f" memory (up to {LARGEST_DENSE:,} do), got none; give one, or a `max_products` below"
            f" {dense_products(operator):,}"
        )
    else:
        progress("products", 0, dense_products(operator))
        exact = dense_in_memory(operator, Dense(), False, chunk)
        progress("products", dense_products(operator), dense_products(operator))
    return _of_spectrum(exact, tangent_level, exact.num_products)


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
    if not (isinstance(given.method, Dense) and given.method.symmetric):
        why = {
            Lanczos: "Ritz values, whose positive ones are only a lower bound",
            Arnoldi: "Ritz values of A, which is not its symmetric part",
            Dense: "eigenvalues of A, which is not its symmetric part",
            Extreme: "only some of the eigenvalues",
        }[type(given.method)]
        raise ValueError(
            f"spectrum: expected all eigenvalues of the symmetric part (those of Dense()), got those of"
            f" {given.method}: {why}; count the operator, with `max_products` for an estimate"
        )
    if given.eigenvalues.ndim != 1:
        raise ValueError(
            f"spectrum: expected that of one operator, got eigenvalues of shape {given.eigenvalues.shape}; count those"
            f" of each point, spectra.point(i)"
        )
    if not np.isfinite(given.eigenvalues).all() or not np.isfinite(given.noise):
        raise ValueError("spectrum: expected finite eigenvalues and noise, got NaN or infinity; compute it again")


def _refuse_nonfinite(factorization: Factorization) -> None:
    if factorization.status == Status.NONFINITE:
        raise ValueError(_NONFINITE)


@partial(jax.jit, static_argnames="room")
def _probe_runs(deflated: Deflated, keys: Array, num_steps: Any, room: int) -> Factorization:
    def one(key: Array) -> Factorization:
        start = jax.random.normal(key, (deflated.size,), deflated.dtype)
        start = deflated.project(deflated.project(start))
        return extend(deflated.mv, begin(start, room), num_steps, symmetric=True)

    return jax.vmap(one)(keys)
