"""The number of positive eigenvalues: exact where it fits the budget, else a certified bound and an estimate.

A first Lanczos run from a random vector takes a third of the budget. Each of its Ritz values above zero is one positive
eigenvalue (Cauchy interlacing); they are deflated, exactly (`jaxmem.spectra.deflation`), and what is left is estimated
with fresh random vectors: d times the mass that such a vector has above zero (`jaxmem.spectra.quadrature`,
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

from jaxmem.krylov import Factorization, Status, begin, extend, may_go_on
from jaxmem.operators import Operator
from jaxmem.progress import Progress, silent
from jaxmem.spectra import resume
from jaxmem.spectra.deflation import Deflated, deflate
from jaxmem.spectra.estimate import Estimate, Runs, combine, probe_steps
from jaxmem.spectra.quadrature import Tridiagonal
from jaxmem.spectra.ritz import ritz_pairs
from jaxmem.spectra.single import (
    check_operator,
    dense_products,
    krylov_noise,
    probe_and_product,
    probe_products,
    spectrum,
)

_FEWEST_STEPS = 12  # 4 for the first run, and two vectors of 4
_NONFINITE = "operator: a product was NaN or infinite; check the parameters, the point and the timestep"
_SEGMENT = 32  # steps of the first run between two looks at it, which is what a kill can lose


class Count(NamedTuple):
    """How many eigenvalues of the symmetric part are positive."""

    lower: int  #: certified: eigenvalues above ``threshold`` (the rounding of products cannot have made them)
    estimate: float  #: where the whole spectrum was computed, exact but for the undecided signs
    interval: tuple[float, float]  #: 95 % for an estimate; from undecided signs (within ±threshold) if exact
    threshold: float  #: what the rounding of products can move an eigenvalue by, measured (`rounding_noise`)
    num_products: int  #: applications of A or Aᵀ
    paper: int  #: the paper's count: eigenvalues, or Ritz values of the first run, above 1e-15, rounding included
    tangent: Estimate | None  #: of eigenvalues above -1/(2 sigma²), where ``sigma`` was given


def count_positive(
    operator: Operator,
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

    With a budget of at least d + 1 products (or None) the spectrum is computed and the count is exact. With less it is
    an estimate with a 95 % interval. Eigenvalues within ±threshold of zero then count as not positive. If the first run
    has found all that are positive, the interval is one number, or the few that may hide just above zero. Positive
    eigenvalues that crowd closer to zero than the steps resolve, about 1/steps of the spectrum's range, are beyond it,
    and so are many exact zeros between positive and negative eigenvalues that come as near: there the interval is
    wide but may still miss (d = 300, 75 products, 150 zeros between 75 eigenvalues on either side from 0.2 to 1: all
    of 12 seeds, one with 155, 104 to 207).

    Args:
        operator: see `spectrum`; for the difference of two, `jaxmem.operators.Difference`.
        budget: products with A or Aᵀ that may be spent; None for an exact count.
        key: random key of the start vectors; needed below d + 1 products.
        sigma: noise level of the point, for the tangent count: directions in which the posterior of x0 is wider than
            half the noise. From the same products.
        steps_per_probe: Lanczos steps per fresh vector, two products each for a non-symmetric operator. By default the
            number that the first run says gives the smallest error.
        batch: fresh vectors whose products are taken together.
        chunk: as in `spectrum`.
        folder: where the runs are kept as they go on; the same call takes them up after an interruption or a kill, and
            gives the same count bit for bit. Not for exact counts: `jaxmem.spectra.dense_spectrum`.
        progress: told of the products.

    Memory: the Krylov basis of a third of the budget's steps, ``steps · d`` numbers, up to twice as much for what is
    deflated (rows come in powers of two, at least 32), and twice ``batch`` bases of ``steps_per_probe`` rounded up
    to 32.

    Raises:
        ValueError: if the budget is too small, or the key is missing, or as `spectrum`; if the folder's state is
            damaged, of another call or of another operator.
        OSError: the folder cannot be written.
    """
    check_operator(operator, "count_positive")
    budget, steps_per_probe = (None if value is None else index(value) for value in (budget, steps_per_probe))
    batch, sigma = index(batch), None if sigma is None else float(sigma)
    for name, value in (("steps_per_probe", steps_per_probe), ("batch", batch)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    tangent_level = None if sigma is None else _tangent_level(sigma)
    if budget is None or budget >= dense_products(operator):
        return _exact(operator, tangent_level, chunk, progress)
    each, measuring = operator.symmetric.products_per_mv, probe_products(operator)
    steps = (budget - measuring) // each
    if steps < _FEWEST_STEPS:
        raise ValueError(
            f"budget: expected at least {_FEWEST_STEPS * each + measuring} products ({_FEWEST_STEPS} Lanczos steps), or"
            f" {dense_products(operator)} for an exact count, got {budget}; raise the budget"
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
    kept = _Kept(None if folder is None else Path(folder) / "count.npz", product, 8 * float(measured.noise), options)
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
    factorization = jax.device_get(factorization)
    pairs = ritz_pairs(factorization, symmetric=True)
    # Twice what the first run may have moved eigenvalues by: the runs on what is left share the error of its vectors.
    # Numbers below the smallest normal one have lost digits, whatever was measured.
    tiny = operator.size**0.5 * float(jnp.finfo(operator.dtype).tiny)
    threshold = max(2 * krylov_noise(factorization, pairs, measured), tiny)
    deflated, taken, amplification = deflate(operator.symmetric, factorization, pairs, threshold)
    margin = amplification * threshold
    runs = Runs(operator.size, Tridiagonal.of(factorization), pairs.values, taken, margin, probes)
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
            probes.append(Tridiagonal.of(one))
        kept.save(factorization, probes)
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


def _exact(operator: Operator, tangent_level: float | None, chunk: int, progress: Progress) -> Count:
    progress("products", 0, dense_products(operator))
    exact = spectrum(operator, "eigh", chunk=chunk)
    progress("products", dense_products(operator), dense_products(operator))
    threshold, values = float(exact.noise), exact.eigenvalues

    def above(level: float) -> Estimate:
        low, high = int((values > level + threshold).sum()), int((values > level - threshold).sum())
        return Estimate(low, float((values > level).sum()), (float(low), float(high)))

    tangent = None if tangent_level is None else above(tangent_level)
    return Count(*above(0.0), threshold, int(exact.num_products), int((values > 1e-15).sum()), tangent)


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
