"""All eigenvalues of one operator: in memory, or through a file at sizes where the matrix is gigabytes.

In memory the matrix is there three times over, and a kill loses everything. Through a file, a column costs one product
and is on the disk when it is done; what the solve holds is one float64 matrix.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array

from jaxmem.operators import Operator
from jaxmem.runs import memory
from jaxmem.runs.progress import Progress, silent
from jaxmem.spectra.columns import ColumnStore, checksum, header
from jaxmem.spectra.measure import check_operator, dense_and_noise, dense_products
from jaxmem.spectra.methods import Dense
from jaxmem.spectra.result import Spectrum, Status, order_descending, rounding_noise

_BLOCK = 512  # side of the blocks in which a matrix is read and symmetrised: 2 MB in float64


def dense_in_memory(operator: Operator, method: Dense, vectors: bool, chunk: int) -> Spectrum:
    """All eigenvalues, with eigenvectors where asked for, of a matrix that is held in memory."""
    matrix, product_noise = (np.asarray(part, np.float64) for part in dense_and_noise(operator, chunk))
    if not np.isfinite(matrix).all():
        raise ValueError("operator: its matrix holds NaN or infinity; check the parameters, the point and the timestep")
    norm = np.linalg.norm(matrix)
    asymmetry = np.linalg.norm(matrix - matrix.T) / norm if norm > 0 else 0.0
    if method.symmetric:
        symmetric = (matrix + matrix.T) / 2
        values, columns = np.linalg.eigh(symmetric) if vectors else (np.linalg.eigvalsh(symmetric), None)
    else:
        values, columns = np.linalg.eig(matrix) if vectors else (np.linalg.eigvals(matrix), None)
        values = values.astype(np.complex128)
    order = order_descending(values)
    # LAPACK's backward error is a small multiple of eps ‖A‖, here of float64; d eps is above it.
    noise = float(rounding_noise(product_noise, operator.size, norm, operator.size * np.finfo(np.float64).eps))
    return Spectrum(
        eigenvalues=values[order],
        residuals=np.full(len(values), noise),
        vectors=None if columns is None else columns.T[order],
        num_products=dense_products(operator),
        status=Status.CONVERGED,
        asymmetry=float(asymmetry),
        noise=noise,
        dtype=operator.dtype,
        method=method,
        seed=None,
    )


class DenseCost(NamedTuple):
    """What `dense_from_file` takes, beside what the process and the operator hold already."""

    products: int  #: with A or Aᵀ, of a run that is not interrupted
    disk_bytes: int  #: the matrix in the precision of the products, at least float32
    device_bytes: int  #: one chunk of products, by the compiler's account
    host_bytes: int  #: the solve: one float64 matrix and blocks


def dense_cost(operator: Operator, chunk: int = 56) -> DenseCost:
    """The products, the disk and the memory of ``Dense(folder=...)``; compiles one chunk and runs nothing.

    On a CPU the device's memory and the host's are one, but not needed at one time. For d = 16,384 in float32 the disk
    takes 1.1 GB and the host 2.3 GB.
    """
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    check_operator(operator, "dense_cost")
    size = operator.size
    program = _columns.lower(operator, _indices(size, 0, chunk)).compile()
    return DenseCost(
        products=(size + 1) * operator.products_per_mv,
        disk_bytes=file_bytes(size, _stored(operator)),
        device_bytes=sum(memory.program_bytes(program)),
        host_bytes=solve_bytes(size),
    )


def file_bytes(size: int, dtype: Any) -> int:
    """Size of the file of columns, in bytes."""
    return len(header(size, np.dtype(dtype))) + size**2 * np.dtype(dtype).itemsize


def solve_bytes(size: int) -> int:
    """Memory of the solve on the host, in bytes."""
    # a block of rows is read in the file's precision; blocks of blocks, and LAPACK's panels, are smaller
    return 8 * size**2 + 2 * 8 * min(_BLOCK, size) * size


def dense_from_file(
    operator: Operator, method: Dense, folder: str | Path, chunk: int = 56, progress: Progress = silent
) -> Spectrum:
    """All eigenvalues of the symmetric part ½(A + Aᵀ) through a matrix on disk: d products and one solve.

    Columns of A go to ``jacobian.npy`` in the folder, ``chunk`` at a time, each chunk on the disk before
    ``jacobian.json`` says so: the same call after an interruption, or a kill, goes on after the last whole chunk and
    gives the same bits. The finished file is A itself (``np.load(..., mmap_mode="r")``); a later call only solves.
    The solve reads it into one float64 matrix, symmetrises that in place and hands it to LAPACK's ``dsyevd`` without
    a copy; it leaves the file alone, and begins again when interrupted (an interrupt waits until LAPACK is done, a
    kill does not).

    Args:
        operator: see `spectrum`; what differs bit for bit in one product is another operator and gets another folder.
        method: what the result says it is of.
        folder: new or empty, or of an earlier call with the same operator and chunk.
        chunk: columns taken together (see `Operator.to_dense`).
        progress: called with the tasks ``"columns"``, ``"read"``, ``"symmetrise"`` and ``"solve"``.

    Costs d products and one for each start (a chunk that a kill cut short is not counted), and (4/3) d³ floating-point
    operations. Memory and disk are `dense_cost`'s, and are looked for before the work. At d = 16,384 with products of
    5 to 8 ms the solve took 16 of 20 minutes on two shared CPU cores, and the process 2.7 GB with JAX and its compiler
    (``benchmarks/results/full_spectrum.json``, which also has the times of LAPACK's drivers).

    Raises:
        ValueError: as `spectrum`; if the disk or the memory is too small; if the folder holds another operator's
            columns, something else, or a damaged file; if a column is NaN or infinite, by its number.
        OSError: if the folder cannot be written; whole chunks are kept.
    """
    cost = dense_cost(operator, chunk)
    size, vector = operator.size, _fixed_vector(operator)
    product = np.asarray(_product(operator, vector))
    store = ColumnStore(Path(folder), size, _stored(operator), chunk, checksum(product.tobytes()))
    _require_room(store, cost)
    store.begin()
    progress("columns", store.done, size)
    for first in range(store.done, size, chunk):
        columns = np.asarray(_columns(operator, _indices(size, first, chunk)), store.dtype)
        for i in np.flatnonzero(~np.isfinite(columns).all(1)):
            _require_finite_column(columns[i], f"column {first + i}")
        store.append(columns)
        progress("columns", store.done, size)
    _require_finite_column(product, "a product with a random unit vector")  # after the columns, which have a number

    matrix, norm, gap, again = _symmetrised(store, np.asarray(vector, np.float64), progress)
    progress("solve", 0, 1)
    # The transpose of a symmetric matrix is itself, and in Fortran's order, which LAPACK overwrites without a copy.
    values = scipy.linalg.eigh(matrix.T, eigvals_only=True, overwrite_a=True, check_finite=False, driver="evd")
    progress("solve", 1, 1)
    # as in `jaxmem.spectra.measure`: two roundings of one product, and a bound on LAPACK's backward error
    exact = product.astype(np.float64)
    rounding = max(np.linalg.norm(again - exact), float(jnp.finfo(operator.dtype).eps) * np.linalg.norm(exact))
    noise = float(rounding_noise(rounding, size, norm, size * np.finfo(np.float64).eps))
    return Spectrum(
        eigenvalues=values[::-1].copy(),
        residuals=np.full(size, noise),
        vectors=None,
        num_products=(size + store.starts) * operator.products_per_mv,
        status=Status.CONVERGED,
        asymmetry=gap / norm if norm > 0 else 0.0,
        noise=noise,
        dtype=operator.dtype,
        method=method,
        seed=None,
    )


def _symmetrised(
    store: ColumnStore, vector: np.ndarray, progress: Progress
) -> tuple[np.ndarray, float, float, np.ndarray]:
    """½(A + Aᵀ) of the columns A on the disk, made in place; ‖A‖ and ‖A - Aᵀ‖, Frobenius; and the product A v."""
    size = store.size
    matrix, square, gap = np.empty((size, size)), 0.0, 0.0  # sums of squares
    product = np.zeros(size)
    for rows in _blocks(size):
        block = matrix[rows]
        block[...] = store.read(rows)
        square += float(np.vdot(block, block))
        product += vector[rows] @ block
        progress("read", rows.stop, size)
    pairs = [(a, b) for a in _blocks(size) for b in _blocks(size) if a.start <= b.start]
    for done, (a, b) in enumerate(pairs):
        upper, lower = matrix[a, b], matrix[b, a]
        difference = upper - lower.T
        gap += (1 if a == b else 2) * float(np.vdot(difference, difference))
        upper[...] = (upper + lower.T) / 2
        lower[...] = upper.T
        progress("symmetrise", done + 1, len(pairs))
    return matrix, float(np.sqrt(square)), float(np.sqrt(gap)), product


@jax.jit
def _columns(operator: Any, indices: Any) -> Array:
    """Columns of A, as rows: its products with unit vectors."""

    def column(index: Array) -> Array:
        return operator.mv(jax.nn.one_hot(index, operator.size, dtype=operator.dtype))

    return jax.vmap(column)(indices)


@jax.jit
def _product(operator: Any, vector: Any) -> Array:
    return operator.mv(vector)


def _fixed_vector(operator: Operator) -> Array:
    vector = jax.random.normal(jax.random.key(0), (operator.size,), operator.dtype)
    return vector / jnp.linalg.norm(vector)


def _indices(size: int, first: int, chunk: int) -> Array:
    return jnp.arange(first, min(first + chunk, size))


def _blocks(size: int) -> Iterator[slice]:
    return (slice(first, min(first + _BLOCK, size)) for first in range(0, size, _BLOCK))


def _stored(operator: Operator) -> np.dtype:
    """The file's precision: float32 also for products of less, which NumPy's format does not know."""
    return np.dtype(jnp.promote_types(operator.dtype, jnp.float32))


def _require_finite_column(column: np.ndarray, what: str) -> None:
    bad = int((~np.isfinite(column)).sum())
    if bad:
        raise ValueError(
            f"operator: {bad} of {len(column)} entries of {what} are NaN or infinite; check the parameters, the point"
            f" and the timestep"
        )


def _require_room(store: ColumnStore, cost: DenseCost) -> None:
    memory.require(cost.device_bytes, f"{store.chunk} columns of d = {store.size:,}", "take a smaller chunk")
    require_host_memory(store.size)
    require_disk(store.missing_bytes, store.folder, f"the matrix of d = {store.size:,}")


def require_host_memory(size: int) -> None:
    """Raise a ValueError if the solve of a matrix of this size does not fit."""
    remedy = "free some, or take fewer eigenvalues (Lanczos or Extreme)"
    memory.require(solve_bytes(size), f"the solve of the matrix of d = {size:,}", remedy, of_host=True)


def require_disk(needed: int, folder: Path, what: str) -> None:
    """Raise a ValueError if ``needed`` more bytes do not fit where the folder is, or will be."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ValueError(
            f"{what}: needs {memory.gigabytes(needed)} more in {folder}, where {memory.gigabytes(free)} are free; make"
            f" room or choose another folder"
        )
