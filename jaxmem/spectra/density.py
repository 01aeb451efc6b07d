"""The spectral density of an operator, as the cumulative distribution of its eigenvalues with bounds."""

from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxmem.extras import require_package
from jaxmem.krylov import Status, reopened
from jaxmem.operators import Operator
from jaxmem.runs import resume
from jaxmem.runs.progress import Progress, silent
from jaxmem.spectra.measure import check_operator, krylov_noise, probe_and_product, probe_products, run_krylov
from jaxmem.spectra.quadrature import PACKED, Tridiagonal, mass_above, packed, unpacked
from jaxmem.spectra.ritz import ritz_pairs


class Density(NamedTuple):
    """``F(x) = #{λ ≤ x} / d`` of the symmetric part at some levels x."""

    levels: np.ndarray  #: (n,), ascending
    cumulative: np.ndarray  #: (n,), non-decreasing
    width: np.ndarray  #: (n,), the mean distance of the two bounds that the products give to each probe's own F
    standard_error: np.ndarray  #: (n,), of F from the choice of the probes: sqrt(2 F (1 - F) / (d probes))
    num_products: int  #: applications of A or Aᵀ

    def density(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean density of the intervals between neighbouring levels, per unit of λ, and their middles."""
        return np.diff(self.cumulative) / np.diff(self.levels), (self.levels[1:] + self.levels[:-1]) / 2

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with a row for each level: ``level``, ``cumulative``, ``width``, ``standard_error``.

        Raises:
            MissingExtra: pandas is not installed.
        """
        require_package("pandas", "Density.to_dataframe")
        import pandas

        columns = {name: getattr(self, name) for name in ("cumulative", "width", "standard_error")}
        return pandas.DataFrame({"level": self.levels} | columns)


def spectral_density(
    operator: Operator,
    *,
    num_probes: int,
    num_steps: int,
    key: Any,
    levels: Any = 200,
    folder: str | Path | None = None,
    progress: Progress = silent,
) -> Density:
    """Estimate the distribution of the eigenvalues of ½(A + Aᵀ) by stochastic Lanczos quadrature.

    Each Gaussian probe runs ``num_steps`` Lanczos steps; at each level its mass below is the middle of its bounds
    (Gauss-Radau, see `jaxmem.spectra.quadrature`), which is smooth where the spectrum is: no kernel, no bandwidth.

    Args:
        operator: see `spectrum`.
        num_probes: 1 or more; the error falls with its root.
        num_steps: the resolution is about 1/num_steps of the spectrum's range.
        key: random key of the probes.
        levels: an ascending array, or how many to lay evenly from the smallest to the largest Ritz value.
        folder: where finished probes are kept: the same call goes on there after an interruption or a kill, to the same
            bits, and one with more probes adds to them. The products by which it recognises the operator are not
            counted.
        progress: told of the probes.

    Raises:
        ValueError: on numbers out of range, levels that do not ascend, or products that are NaN or infinite; if the
            folder's state is damaged, of another call or of another operator.
        OSError: if the folder cannot be written.
    """
    check_operator(operator, "spectral_density")
    if key is None:
        raise ValueError("key: probes need a random key, for instance jax.random.key(0)")
    if num_probes < 1 or not 1 <= num_steps <= operator.size:
        raise ValueError(
            f"num_probes, num_steps: expected at least 1, and 1 to {operator.size} (the operator's size), got"
            f" {num_probes} and {num_steps}"
        )
    grid = _checked_levels(levels)
    store = None if folder is None else _Store(operator, key, num_steps, Path(folder) / "density.npz")
    runs, products = ([], []) if store is None else store.load(num_probes)
    for i in range(len(runs), num_probes):
        progress("probes", i, num_probes)
        factorization, measured = jax.device_get(
            run_krylov(operator, _start(operator, key, i), num_steps, symmetric=True)
        )
        if factorization.status == Status.NONFINITE:
            raise ValueError(
                "operator: a product was NaN or infinite; check the parameters, the point and the timestep"
            )
        noise = krylov_noise(factorization, ritz_pairs(factorization, symmetric=True), measured)
        runs.append(Tridiagonal.of(reopened(factorization, 2 * noise)))
        per_step = operator.symmetric.products_per_mv
        products.append(int(factorization.num_steps) * per_step + probe_products(operator))
        if store is not None:
            store.save(runs, products)
    progress("probes", num_probes, num_probes)
    if grid is None:
        values = np.concatenate([run.values() for run in runs])
        reach = max(values.max() - values.min(), np.abs(values).max() * 1e-6, np.finfo(np.float32).tiny)
        grid = np.linspace(values.min() - 0.01 * reach, values.max() + 0.01 * reach, levels)
    found = np.array([[mass_above(run, level) for level in grid] for run in runs]).mean(0)
    cumulative = np.maximum.accumulate(np.clip(1 - found[:, 0], 0, 1))
    error = np.sqrt(2 * cumulative * (1 - cumulative) / (operator.size * num_probes))
    return Density(grid, cumulative, found[:, 1], error, sum(products))


def _checked_levels(levels: Any) -> np.ndarray | None:
    """The levels, or None if they are to be laid where the Ritz values are."""
    grid = None if np.ndim(levels) == 0 else np.asarray(levels, np.float64)
    few = index(levels) < 2 if grid is None else grid.ndim != 1 or len(grid) < 2 or not np.isfinite(grid).all()
    if few or (grid is not None and (np.diff(grid) <= 0).any()):
        raise ValueError(
            "levels: expected an ascending array of at least two finite numbers, or a number of at least 2"
        )
    return grid


def _start(operator: Operator, key: Any, number: int) -> Array:
    return jax.random.normal(jax.random.fold_in(key, number), (operator.size,), operator.dtype)


class _Store:
    """The file that keeps the tridiagonal matrices of finished probes."""

    def __init__(self, operator: Operator, key: Any, num_steps: int, path: Path) -> None:
        measured, self.product = jax.device_get(jax.jit(probe_and_product)(operator, _start(operator, key, 0)))
        self.path, self.rounding = path, 8 * float(measured.noise)
        self.options: dict[str, Any] = dict(num_steps=num_steps, size=operator.size)
        self.options |= dict(seed=np.asarray(jax.random.key_data(key)).tolist(), dtype=str(jnp.dtype(operator.dtype)))

    def save(self, runs: list[Tridiagonal], products: list[int]) -> None:
        arrays = packed(runs) | {"products": np.asarray(products), "product": self.product}
        resume.save(self.path, arrays, self.options)

    def load(self, num_probes: int) -> tuple[list[Tridiagonal], list[int]]:
        """The first probes, as many as are there and asked for, and the products of each."""
        if not self.path.exists():
            return [], []
        arrays = resume.load(self.path, (*PACKED, "products"), self.product, self.rounding, self.options)
        return unpacked(arrays)[:num_probes], arrays["products"][:num_probes].tolist()
