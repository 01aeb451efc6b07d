"""`spectrum`: the eigenvalues of one operator, by the method that is asked for."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxmem.krylov import Factorization, Status, begin
from jaxmem.operators import Operator
from jaxmem.runs import memory
from jaxmem.runs.progress import Progress, silent
from jaxmem.spectra.dense import dense_from_file, dense_in_memory
from jaxmem.spectra.driver import Kept, drive, segments
from jaxmem.spectra.extreme import extreme_pairs
from jaxmem.spectra.measure import check_operator, dense_products, krylov_noise, probe_and_product, probe_products
from jaxmem.spectra.methods import Dense, Extreme, Krylov, Method, check_method
from jaxmem.spectra.result import Spectrum
from jaxmem.spectra.ritz import ritz_pairs, ritz_vectors

KRYLOV = "krylov.npz"  #: what a folder keeps of `Lanczos` and `Arnoldi`


def spectrum(
    operator: Operator,
    method: Method = Dense(),
    *,
    key: Any = None,
    start: Any = None,
    vectors: bool = False,
    chunk: int = 56,
    folder: str | Path | None = None,
    progress: Progress = silent,
) -> Spectrum:
    """Eigenvalues of an operator A, here mostly of the Hessian of log p_t(x | c).

    Args:
        operator: made by `score_jacobian`, `from_matvec` or `from_scipy`, or anything with their interface.
        method: `Dense`: all eigenvalues, d products. `Lanczos`: Ritz values after some steps. `Extreme`: the ends of
            the spectrum, to a tolerance. These are of the symmetric part ½(A + Aᵀ), two products a step; of A itself
            are ``Dense(symmetric=False)``, `Arnoldi` (one product a step) and ``Extreme(..., symmetric=False)``. A
            learned Jacobian is not exactly symmetric: the two kinds differ by as much as ``asymmetry`` says.
        key: random key of the start vectors (Gaussian), for Krylov methods.
        start: a start vector of length d instead of ``key``, for `Lanczos` and `Arnoldi`.
        vectors: also return eigenvectors or Ritz vectors, as rows.
        chunk: products taken together by `Dense` (see `Operator.to_dense`).
        folder: where finished work is kept: the same call goes on there after an interruption or a kill, and gives the
            same bits. The products by which it recognises the operator are not counted again.
        progress: called as ``progress(task, done, total)``.

    The dense solver and the small Krylov eigenproblems run on the host in float64. Without a folder `Dense` holds the
    d × d matrix three times over and refuses d > 4,096. `Lanczos` and `Arnoldi` hold a basis of (num_steps + 1) d
    numbers; they run a few seconds at a time, after which `progress` is told and the folder written.

    Raises:
        ValueError: on something else than a method, a number that is out of range for the size, no key, a start vector
            that is zero or of the wrong shape, a score or product that is NaN or infinite, too little memory or disk,
            or a folder with something else.
        OSError: if the folder cannot be written.
    """
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    check_operator(operator, "spectrum")
    check_method(method, operator.size)
    if start is not None and isinstance(method, Dense | Extreme):
        raise ValueError(f"start: expected none with {type(method).__name__}, got one; it is for Lanczos and Arnoldi")
    if isinstance(method, Dense):
        return _dense(operator, method, vectors, chunk, folder, progress)
    method.check_size(operator.size)
    if isinstance(method, Extreme):
        return extreme_pairs(operator, method, key=key, vectors=vectors, folder=folder, progress=progress)
    return _krylov(operator, method, key, start, vectors, folder, progress)


def _dense(
    operator: Operator, method: Dense, vectors: bool, chunk: int, folder: str | Path | None, progress: Progress
) -> Spectrum:
    if folder is not None and method.folder is not None and Path(folder) != Path(method.folder):
        raise ValueError(f"folder: expected that of the method, {method.folder}, or none, got {folder}")
    folder = method.folder if folder is None else folder
    method.check_folder(folder)
    if folder is None:
        method.check_size(operator.size)
        products = dense_products(operator)
        progress("products", 0, products)
        found = dense_in_memory(operator, method, vectors, chunk)
        progress("products", products, products)
        return found
    if vectors:
        raise ValueError(
            "vectors: expected False with a folder, whose solve makes none, got True; take Extreme or Lanczos for some,"
            " or no folder"
        )
    return dense_from_file(operator, method, folder, chunk, progress)


def _krylov(
    operator: Operator,
    method: Krylov,
    key: Any,
    start: Any,
    vectors: bool,
    folder: str | Path | None,
    progress: Progress,
) -> Spectrum:
    basis = (method.num_steps + 1) * operator.size * jnp.dtype(operator.dtype).itemsize
    memory.require(2 * basis, f"a basis of {method.num_steps + 1} vectors", "take fewer steps")
    start_vector, seed = _start_vector(operator, key, start)
    measured, product = jax.device_get(jax.jit(probe_and_product)(operator, start_vector))
    applied = operator.symmetric if method.symmetric else operator
    per_step, measuring = applied.products_per_mv, probe_products(operator)
    options = dict(method=str(method), size=operator.size, dtype=str(jnp.dtype(operator.dtype)))
    options |= dict(seed=None if seed is None else seed.tolist())
    path = None if folder is None else Path(folder) / KRYLOV
    kept = Kept(path, product, 8 * float(measured.noise), options)
    there = kept.load()
    factorization = begin(start_vector, method.num_steps) if there is None else there[0]

    def on_step(factorization: Factorization) -> None:
        steps = int(factorization.num_steps)
        if factorization.status == Status.NONFINITE:
            raise ValueError(
                f"operator: product {steps + 1} was NaN or infinite; check the parameters, the point and the timestep"
            )
        kept.save(factorization)
        progress("products", measuring + steps * per_step, measuring + method.num_steps * per_step)

    progress("products", measuring + int(factorization.num_steps) * per_step, measuring + method.num_steps * per_step)
    step = segments(applied, symmetric=method.symmetric, tolerance=method.tolerance)
    factorization = jax.device_get(drive(step, factorization, on_step))
    if factorization.num_steps < method.num_steps:  # the space closed
        progress("products", measuring + method.num_steps * per_step, measuring + method.num_steps * per_step)
    pairs = ritz_pairs(factorization, symmetric=method.symmetric)
    noise = krylov_noise(factorization, pairs, measured)
    return Spectrum(
        eigenvalues=pairs.values,
        residuals=np.maximum(pairs.residuals, noise),
        vectors=ritz_vectors(factorization, pairs) if vectors else None,
        num_products=measuring + len(pairs.values) * per_step,
        status=Status(int(factorization.status)),
        asymmetry=float(measured.asymmetry),
        noise=noise,
        dtype=operator.dtype,
        method=method,
        seed=seed,
    )


def _start_vector(operator: Operator, key: Any, start: Any) -> tuple[Array, np.ndarray | None]:
    if start is None:
        if key is None:
            raise ValueError("key: Krylov methods need a random key (jax.random.key(0)) or a start vector")
        return jax.random.normal(key, (operator.size,), operator.dtype), np.asarray(jax.random.key_data(key))
    start = np.asarray(start, np.float64)
    if start.shape != (operator.size,):
        raise ValueError(f"start: expected shape ({operator.size},), got {start.shape}")
    if not np.isfinite(start).all():
        raise ValueError("start: the start vector holds NaN or infinity")
    if not np.any(start):
        raise ValueError("start: the start vector is zero, and spans no Krylov space; pass a key for a random one")
    # Its length is nothing that counts, and in float64 none under- or overflows.
    start = start / np.abs(start).max()
    return jnp.asarray(start / np.linalg.norm(start), operator.dtype), None
