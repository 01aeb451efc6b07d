"""Spectra of many points: points × timesteps × conditions, one compilation, bounded memory."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float, Shaped

from jaxmem.jacobian import check_score, check_timesteps, score_jacobian
from jaxmem.krylov import Factorization, Status, scaled_norm
from jaxmem.runs.progress import Progress, silent
from jaxmem.score import Score
from jaxmem.spectra.devices import each_point, on_devices, require_local
from jaxmem.spectra.measure import Probe, dense_and_noise, run_krylov
from jaxmem.spectra.methods import Dense, Extreme, Krylov, Method, check_method
from jaxmem.spectra.result import Spectrum, rounding_noise
from jaxmem.spectra.ritz import ritz_table


def _tridiagonal_on_cpu(matrices: Array) -> tuple[Array, Array]:
    # One at a time: several matrices jaxlib hands to XLA's thread pool, and blocks a thread of it until they are done.
    # The devices of one CPU share that pool; when each of its threads waits, none is left to work.
    _, diagonal, off_diagonal, _ = jax.lax.map(jax.lax.linalg.tridiagonal, matrices)
    return diagonal, off_diagonal


def _tridiagonal_elsewhere(matrices: Array) -> tuple[Array, Array]:
    values = jnp.linalg.eigvalsh(matrices)
    return values, jnp.zeros_like(values[:, 1:])


def _tridiagonal(matrices: Float[Array, "n d d"]) -> tuple[Float[Array, "n d"], Float[Array, "n d-1"]]:
    """Diagonals and off-diagonals of tridiagonal matrices with the eigenvalues of symmetric ones.

    On a CPU, JAX's solver takes more than twice as long as this, because it makes eigenvectors as well. Elsewhere it is
    kept (TPUs have no ``tridiagonal``): eigenvalues as a diagonal matrix, which is tridiagonal.
    """
    return jax.lax.platform_dependent(matrices, cpu=_tridiagonal_on_cpu, default=_tridiagonal_elsewhere)


@partial(jax.jit, static_argnames=("score", "chunk", "mesh"))
def _dense_group(
    score: Score, state: Any, x: Array, t: Array, cond: Any, chunk: int, mesh: Any = None
) -> tuple[Array, ...]:
    def symmetric(state: Any, x: Array, t: Array, cond: Any) -> tuple[Array, ...]:
        operator = score_jacobian(score, state, x, t, cond)
        matrix, error = dense_and_noise(operator, chunk)
        norm = scaled_norm(matrix)
        asymmetry = scaled_norm(matrix - matrix.T) / jnp.where(norm > 0, norm, 1)
        # Where the matrix is not finite the solver may never return: it gets zeros, and the caller is told.
        finite = jnp.all(jnp.isfinite(matrix)) & jnp.all(jnp.isfinite(operator.value))
        safe = jnp.where(finite, matrix, 0).astype(jnp.promote_types(matrix.dtype, jnp.float32))  # no half solvers
        return 0.5 * (safe + safe.T), asymmetry, error, finite

    def share(state: Any, *points: Any) -> tuple[Array, ...]:
        matrices, *rest = jax.vmap(partial(symmetric, state))(*points)
        return *_tridiagonal(matrices), *rest

    return on_devices(share, mesh, state, x, t, cond)


@partial(jax.jit, static_argnames=("score", "method", "mesh"))
def _krylov_group(
    score: Score, state: Any, x: Array, t: Array, cond: Any, keys: Array, method: Krylov, mesh: Any = None
) -> tuple[Factorization, Probe]:
    def one(state: Any, x: Array, t: Array, cond: Any, key: Array) -> tuple[Factorization, Probe]:
        operator = score_jacobian(score, state, x, t, cond)
        start = jax.random.normal(key, (operator.size,), operator.dtype)
        options: dict[str, Any] = dict(symmetric=method.symmetric, tolerance=method.tolerance)
        factorization, probe = run_krylov(operator, start, method.num_steps, **options)
        finite = jnp.all(jnp.isfinite(operator.value))
        return factorization._replace(status=jnp.where(finite, factorization.status, Status.NONFINITE)), probe

    return each_point(one, mesh, state, x, t, cond, keys)


def batch_spectra(
    score: Score,
    state: Any,
    x: Shaped[Any, " n *shape"],
    t: Any,
    cond: Any = None,
    method: Method = Dense(),
    *,
    key: Any = None,
    batch: int = 1,
    chunk: int = 56,
    mesh: jax.sharding.Mesh | None = None,
    folder: str | Path | None = None,
    unit: int | None = None,
    progress: Progress = silent,
) -> Spectrum:
    """The spectra of n points at their timesteps and conditions; every array of the result has n as leading axis.

    Args:
        score: the score function, and ``state`` its parameters (see `score_jacobian`).
        state: the parameters.
        x: points, shape (n, ...). For points × timesteps × conditions, repeat and flatten.
        t: one timestep for all, or n of them.
        cond: None, or a pytree whose leaves have n as leading axis.
        method: ``Dense()`` (all eigenvalues of the symmetric part), `Lanczos` or `Arnoldi`; the others are not batched.
        key: random key for Krylov starts, where point i starts from ``fold_in(key, i)``; or n keys.
        batch: points that one compiled call takes together, on each device.
        chunk: Jacobian columns taken together per point.
        mesh: devices of this process that share the points, for instance ``jax.make_mesh((8,), ("points",))``; by
            default one. On a CPU ``XLA_FLAGS=--xla_force_host_platform_device_count=<cores>`` makes a device of each
            core (with ``OPENBLAS_NUM_THREADS=1``: solvers take one matrix after another on each device). There a score
            must not factorise or solve batches of large matrices itself: jaxlib's calls for them can wait for each
            other for ever. Several processes share a ``folder``.
        folder: a run where finished points are kept, ``unit`` at a time: the same call goes on there after an
            interruption or a kill. Several processes (`jax.distributed.initialize`), each with the same call and a file
            system that all see, share the points; each returns all (`jaxmem.spectra.shared.record_spectra`).
        unit: points that are kept together, which is what a kill can lose; by default those of one compiled call.
        progress: told of the points; with a folder, of the units.

    Memory on each device: the parameters, and ``batch`` times (``chunk`` times what one product holds, plus four d × d
    matrices), or for Krylov bases of ``batch · (num_steps + 1) · d`` numbers and up to twice as much again. Devices
    exchange nothing. The last group is filled up by repeating a point, so one program serves all.

    Raises:
        ValueError: as `spectrum`, or if leading axes disagree, or the mesh has devices of other processes; a score that
            is NaN or infinite names its point.
    """
    _check_arguments(cond, batch, chunk, folder, unit)
    if folder is not None:
        from jaxmem.spectra.shared import spectra_in_folder  # which calls this for its units

        unit = batch * (1 if mesh is None else mesh.size) if unit is None else unit
        options = dict(unit=unit, key=key, progress=progress, batch=batch, chunk=chunk, mesh=mesh)
        return spectra_in_folder(folder, score, state, x, t, cond, method, **options)
    # On the host, so that taking a group's points waits for nothing that a device still computes.
    x, t, cond = jax.device_get(jax.tree.map(jnp.asarray, check_points(x, t, cond)))
    count = len(x)
    krylov = batched_method(method, int(np.prod(x.shape[1:])))
    keys = None if krylov is None else jax.device_get(start_keys(key, count))
    check_score(score, state, x[0], t[0], jax.tree.map(lambda leaf: leaf[0], cond))
    check_timesteps(score, t)  # all of them; check_score sees one
    if mesh is not None:
        require_local(mesh)
        state = jax.device_put(state, jax.NamedSharding(mesh, jax.P()))
    num_devices = 1 if mesh is None else mesh.size
    together = num_devices * min(batch, -(-count // num_devices))

    def begin(first: int) -> Any:
        index = np.minimum(np.arange(first, first + together), count - 1)
        group = jax.tree.map(lambda leaf: leaf[index], (x, t, cond, keys))
        if mesh is not None:
            group = jax.device_put(group, jax.NamedSharding(mesh, jax.P(mesh.axis_names)))
        if krylov is None:
            return _dense_group(score, state, *group[:3], chunk, mesh)
        return _krylov_group(score, state, *group, krylov, mesh)

    def finish(first: int, computed: Any) -> list[np.ndarray]:
        result = _dense_result(computed, first, x.dtype) if krylov is None else _krylov_result(computed, first, krylov)
        keep = min(together, count - first)
        progress("points", first + keep, count)
        return [part[:keep] for part in result]

    progress("points", 0, count)
    begun = ((first, begin(first)) for first in range(0, count, together))
    groups = []
    # Devices go on while the host finishes a group; not with Krylov's, because two groups' bases would be held at once.
    for group in _one_ahead(begun) if krylov is None else begun:
        groups.append(finish(*group))
        del group  # before the next one is begun
    eigenvalues, residuals, num_products, status, asymmetry, noise = map(np.concatenate, zip(*groups, strict=True))
    seed = None if krylov is None else np.asarray(jax.random.key_data(key))
    return Spectrum(eigenvalues, residuals, None, num_products, status, asymmetry, noise, x.dtype, method, seed)


def _check_arguments(cond: Any, batch: int, chunk: int, folder: str | Path | None, unit: int | None) -> None:
    if batch < 1 or chunk < 1:
        raise ValueError(f"batch and chunk: expected at least 1, got {batch} and {chunk}")
    if isinstance(cond, Method):
        raise ValueError(f"cond: expected None or arrays, got the method {cond}; write method={cond}")
    if unit is not None and folder is None:
        raise ValueError(f"unit: expected none without a folder to keep the points in, got {unit}; give a `folder`")


def batched_method(method: Any, size: int) -> Krylov | None:
    """The method if it is a Krylov one, None for `Dense`; refuses what is not batched."""
    check_method(method, size)
    if isinstance(method, Extreme) or (isinstance(method, Dense) and (not method.symmetric or method.folder)):
        raise ValueError(
            f"method: expected Dense(), Lanczos or Arnoldi, got {method}, which is not batched; take spectrum of each"
            f" point"
        )
    method.check_size(size)
    return None if isinstance(method, Dense) else method


def _one_ahead(items: Iterable[Any]) -> Iterator[Any]:
    """The items, each handed out after the next one was made."""
    items = iter(items)
    last = next(items)
    for item in items:
        yield last
        last = item
    yield last


def _refuse_nonfinite(bad: np.ndarray, first: int) -> None:
    if bad.any():
        raise ValueError(
            f"score: the score or its Jacobian at point {first + int(bad.argmax())} holds NaN or infinity;"
            f" check the parameters, the point and the timestep"
        )


def check_points(x: Any, t: Any, cond: Any) -> tuple[Any, Any, Any]:
    """The points with a timestep each, after a check that leading axes agree; NumPy arrays stay such."""
    count = np.shape(x)[0] if np.ndim(x) else 0
    if count == 0:
        raise ValueError(f"x: expected at least one point with the points as leading axis, got shape {np.shape(x)}")
    t = np.asarray(t, jnp.result_type(t))  # not weakly typed, so that a Python number is no other program
    if t.shape not in ((), (count,)):
        raise ValueError(f"t: expected one timestep or {count} of them, got shape {t.shape}")
    wrong = [np.shape(leaf) for leaf in jax.tree.leaves(cond) if np.shape(leaf)[:1] != (count,)]
    if wrong:
        raise ValueError(f"cond: expected leaves with a leading axis of {count} (the points), got shape {wrong[0]}")
    return x, np.broadcast_to(t, (count,)), cond


def start_keys(key: Any, count: int) -> Array:
    """A random key for each point: ``fold_in(key, i)``, or the n keys that were given."""
    if key is None:
        raise ValueError("key: Krylov methods need a random key, for instance jax.random.key(0)")
    if not hasattr(key, "dtype"):
        raise ValueError(f"key: expected a random key (jax.random.key(0)), got {type(key).__name__}")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.shape not in ((), (count,)):
        raise ValueError(f"key: expected one random key (jax.random.key(0)) or {count} of them, got shape {key.shape}")
    return key if key.shape else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))


def _tridiagonal_eigenvalues(diagonal: np.ndarray, off_diagonal: np.ndarray) -> np.ndarray:
    """In double precision, so that nothing is lost to this step; descending."""
    wide = diagonal.astype(np.float64), off_diagonal.astype(np.float64)
    return scipy.linalg.eigvalsh_tridiagonal(*wide, lapack_driver="sterf")[::-1].astype(diagonal.dtype)


def _dense_result(computed: tuple[Array, ...], first: int, dtype: Any) -> list[np.ndarray]:
    diagonals, off_diagonals, asymmetry, error, finite = jax.device_get(computed)
    _refuse_nonfinite(~finite, first)
    eigenvalues = np.stack([_tridiagonal_eigenvalues(*pair) for pair in zip(diagonals, off_diagonals, strict=True)])
    count, size = eigenvalues.shape
    # LAPACK's reduction has a backward error of a few eps ‖A‖; sqrt(d) eps is above what was seen.
    solver = size**0.5 * float(jnp.finfo(dtype).eps)
    noise = rounding_noise(error, size, np.abs(eigenvalues).max(1), solver)
    return [
        eigenvalues,
        np.repeat(noise[:, None], size, 1),
        np.full(count, size + 1),
        np.full(count, int(Status.CONVERGED)),
        asymmetry,
        noise,
    ]


def _krylov_result(computed: tuple[Factorization, Probe], first: int, method: Krylov) -> list[np.ndarray]:
    factorizations, probes = jax.device_get(computed)
    _refuse_nonfinite(factorizations.status == Status.NONFINITE, first)
    table = ritz_table(factorizations, probes.noise, symmetric=method.symmetric)
    products = factorizations.num_steps * (2 if method.symmetric else 1) + 3
    return [table.values, table.residuals, products, factorizations.status, probes.asymmetry, table.noise]
