"""The number of positive eigenvalues: exact where it fits the budget, else a certified bound and an estimate."""

from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.stats

from jaxmem.krylov import Status
from jaxmem.operators import Operator
from jaxmem.spectra.ritz import ritz_pairs
from jaxmem.spectra.single import dense_products, krylov_noise, probe_products, run_krylov, spectrum


class Count(NamedTuple):
    """How many eigenvalues of the symmetric part are positive."""

    lower: int  #: certified: eigenvalues above ``threshold`` (the rounding of products cannot have made them)
    estimate: float  #: exact where the whole spectrum was computed
    interval: tuple[float, float]  #: 95 % for an estimate; from undecided signs (within ±threshold) if exact
    threshold: float  #: what the rounding of products can move an eigenvalue by, measured (`rounding_noise`)
    num_products: int  #: applications of A or Aᵀ


def count_positive(
    operator: Operator, budget: int | None = None, key: Any = None, *, steps_per_probe: int = 50, chunk: int = 56
) -> Count:
    """Count the positive eigenvalues of ½(A + Aᵀ).

    With a budget of at least d + 1 products (or None) the spectrum is computed and the count is exact. With less, each
    random probe v runs ``steps_per_probe`` Lanczos steps; the number of its Ritz values above the threshold is a lower
    bound (Cauchy interlacing), and ``d · sum of the weights (e_1ᵀ y)² of its positive Ritz values`` an estimate
    (stochastic Lanczos quadrature), averaged over the probes with Student's 95 % interval. The quadrature smooths the
    step at zero, so with a dense spectrum there the estimate has a bias of its own that the interval does not show.

    Args:
        operator: see `spectrum`.
        budget: products with A or Aᵀ that may be spent; None for an exact count.
        key: random key of the probes; needed below d + 1 products.
        steps_per_probe: Lanczos steps per probe, two products each for a non-symmetric operator. 50 resolves
            1/50 of the spectrum's range at zero; a choice of ours.
        chunk: as in `spectrum`.

    Raises:
        ValueError: if the budget is too small for two probes, or the key is missing, or as `spectrum`.
    """
    if steps_per_probe < 1:
        raise ValueError(f"steps_per_probe: expected at least 1, got {steps_per_probe}")
    exact_cost = dense_products(operator)
    if budget is None or budget >= exact_cost:
        exact = spectrum(operator, "eigh", chunk=chunk)
        threshold = float(exact.noise)
        lower = int((exact.eigenvalues > threshold).sum())
        upper = int((exact.eigenvalues > -threshold).sum())
        positive = float((exact.eigenvalues > 0).sum())
        return Count(lower, positive, (float(lower), float(upper)), threshold, int(exact.num_products))

    steps = min(steps_per_probe, operator.size)
    per_probe = steps * operator.symmetric.products_per_mv + probe_products(operator)
    num_probes = budget // per_probe
    if num_probes < 2:
        raise ValueError(
            f"budget: expected at least {2 * per_probe} products (two probes of {steps} steps), got {budget};"
            f" lower steps_per_probe or raise the budget"
        )
    if key is None:
        raise ValueError("key: an estimate needs a random key, for instance jax.random.key(0)")
    estimates, threshold, products = np.zeros(num_probes), 0.0, 0
    found: list[np.ndarray] = []
    for i in range(num_probes):
        probe_key = jax.random.fold_in(key, i)
        start = jax.random.rademacher(probe_key, (operator.size,), operator.dtype)
        factorization, measured = jax.device_get(run_krylov(operator, start, steps, symmetric=True))
        if factorization.status == Status.NONFINITE:
            raise ValueError(
                "operator: a product was NaN or infinite; check the parameters, the point and the timestep"
            )
        pairs = ritz_pairs(factorization, symmetric=True)
        noise = krylov_noise(factorization, pairs, measured)
        estimates[i] = operator.size * np.sum(pairs.coordinates[pairs.values > noise, 0] ** 2)
        found.append(pairs.values)
        threshold = max(threshold, noise)
        products += len(pairs.values) * operator.symmetric.products_per_mv + probe_products(operator)
    lower = max(int((values > threshold).sum()) for values in found)
    mean = float(estimates.mean())
    half = float(scipy.stats.t.ppf(0.975, num_probes - 1) * estimates.std(ddof=1) / num_probes**0.5)
    interval = (max(float(lower), mean - half), min(float(operator.size), max(float(lower), mean + half)))
    return Count(lower, max(mean, float(lower)), interval, threshold, products)
