"""Spectra of many points as units of a run, which several processes share and any of them may leave and take up again.

Processes are JAX's: each calls ``jax.distributed.initialize()`` before anything else, which finds the others under
SLURM, Open MPI, Kubernetes and on TPU pods (or takes ``coordinator_address``, ``num_processes`` and ``process_id``),
and opens the same run directory, on a file system that all see. Alone, a process does everything.
"""

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from jaxmem.jacobian import check_score, score_jacobian
from jaxmem.runs import resume
from jaxmem.runs.directory import Run
from jaxmem.runs.functions import name_of
from jaxmem.runs.identity import fingerprint
from jaxmem.runs.progress import Progress, silent
from jaxmem.score import Score
from jaxmem.spectra.batch import batch_spectra, batched_method, check_points, start_keys
from jaxmem.spectra.measure import probe_and_product
from jaxmem.spectra.methods import Dense, Method
from jaxmem.spectra.result import Spectrum

_KEPT = ("eigenvalues", "num_products", "status", "asymmetry", "noise")  # of a spectrum, in the arrays of a unit


def shared_units(run: Run, keys: Sequence[str], task: str, progress: Progress = silent) -> Iterator[str]:
    """Yield the units that this process has to do; end when all processes have recorded theirs.

    Unit i is process ``i mod n``'s among n, whoever did what in earlier starts: no two processes of a start do the
    same one, also where n has changed since. The caller saves arrays and appends the row before it takes the next.
    When one process crashes or fails, JAX ends those that wait for it (``heartbeat_timeout_seconds`` and
    ``shutdown_timeout_seconds`` of ``jax.distributed.initialize``); then all are started again.
    """

    def recorded() -> int:
        if jax.process_count() > 1:
            run.refresh()
        return sum(map(run.done, keys))

    for key in keys[jax.process_index() :: jax.process_count()]:
        if not run.done(key):
            progress(task, recorded(), len(keys))
            yield key
    while jax.process_count() > 1 and (done := recorded()) < len(keys):
        progress(task, done, len(keys))
        time.sleep(1.0)
    progress(task, len(keys), len(keys))


def record_spectra(
    run: Run,
    score: Score,
    state: Any,
    x: Shaped[Any, " n *shape"],
    t: Any,
    cond: Any = None,
    method: Method = Dense(),
    *,
    unit: int,
    name: str = "spectra",
    key: Any = None,
    progress: Progress = silent,
    **options: Any,
) -> Spectrum:
    """The spectra of n points, recorded in a run ``unit`` points at a time and shared by all processes.

    Every process returns the spectra of all points, equal to those of `batch_spectra` at once; one of them
    (``jax.process_index() == 0``) finalises the run. What a run has it keeps: after a kill, start the same again, with
    as many processes as there are now.

    Args:
        run: opened by every process, with a config that fixes the points, ``unit`` and the options.
        score: the score function, and ``state`` its parameters.
        state: the parameters.
        x: as of `batch_spectra`; NumPy arrays stay on the host but for the unit at work.
        t: as of `batch_spectra`.
        cond: as of `batch_spectra`.
        method: as of `batch_spectra`.
        unit: points of one unit, which is what a kill can lose; a multiple of ``batch`` times the mesh's devices
            fills every group.
        name: begins the keys of the units, ``<name>-<first point>``.
        key: as of `batch_spectra`: a point's start does not depend on its unit.
        progress: called as units are recorded, by any process.
        options: of `batch_spectra`: ``batch``, ``chunk``, ``mesh`` (of this process).

    Raises:
        ValueError: as `batch_spectra`, or if ``unit`` is below 1 or another one than the run began with.
    """
    if unit < 1:
        raise ValueError(f"unit: expected at least 1 point, got {unit}")
    x, t, cond = check_points(x, t, cond)
    starts = None if key is None else start_keys(key, len(x))
    parts = {f"{name}-{first:07d}": slice(first, min(first + unit, len(x))) for first in range(0, len(x), unit)}
    for unit_key in shared_units(run, list(parts), name, progress):
        part = parts[unit_key]
        points, times, conds, keys = jax.tree.map(lambda leaf, part=part: jnp.asarray(leaf[part]), (x, t, cond, starts))
        try:
            found = batch_spectra(score, state, points, times, conds, method, key=keys, **options)
        except ValueError as error:
            raise ValueError(f"points {part.start} to {part.stop - 1}, counted from 0 here: {error}") from error
        residuals = {} if isinstance(found.method, Dense) else {"residuals": found.residuals}  # else they are the noise
        kept = {name: getattr(found, name) for name in _KEPT} | residuals
        run.save(unit_key, **{name: np.asarray(array) for name, array in kept.items()})
        run.append({"key": unit_key, "number": len(points), "products": int(found.num_products.sum())})
    units = []
    for unit_key, part in parts.items():
        units.append(run.load(unit_key))
        size = len(units[-1]["eigenvalues"])
        if size != part.stop - part.start:
            raise ValueError(
                f"unit: expected the size that the run began with, {unit_key} has {size} points, got {unit};"
                f" put it into the run's config"
            )
    arrays = {name: np.concatenate([kept[name] for kept in units]) for name in units[0]}
    width = arrays["eigenvalues"].shape[1]
    return Spectrum(
        **{"residuals": np.repeat(arrays["noise"][:, None], width, 1)} | arrays,
        vectors=None,
        dtype=jnp.asarray(x[:0]).dtype,
        method=method,
        seed=None if starts is None or isinstance(method, Dense) else np.asarray(jax.random.key_data(starts)),
    )


def spectra_in_folder(
    folder: str | Path,
    score: Score,
    state: Any,
    x: Any,
    t: Any,
    cond: Any,
    method: Method,
    *,
    unit: int,
    **options: Any,
) -> Spectrum:
    """`record_spectra` in a run of its own, which knows the points, the parameters, the method and the keys.

    Raises:
        ValueError: as `record_spectra`, or if the folder holds something else.
    """
    x, t, cond = check_points(x, t, cond)
    # Everything that can be refused is, before there is a folder that would fix what was wrong.
    krylov = batched_method(method, math.prod(np.shape(x)[1:]))
    keys = None if krylov is None else start_keys(options["key"], len(x))
    if unit < 1:
        raise ValueError(f"unit: expected at least 1 point, got {unit}")
    first = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), (x, t, cond))
    check_score(score, state, *first)
    config = dict(
        method=str(method),
        unit=unit,
        score=name_of(score),
        state=_fingerprint(state),
        points=_fingerprint((x, t, cond)),
        keys=None if keys is None else _fingerprint(jax.random.key_data(keys)),
    )
    run = Run.open(folder, config, experiment="spectra")
    _require_same_score(run.directory / "product.npz", score, state, *first)
    return record_spectra(run, score, state, x, t, cond, method, unit=unit, **options)


def _require_same_score(path: Path, score: Score, state: Any, x: Any, t: Any, cond: Any) -> None:
    """Refuse a score of the same name as the one that the folder began with, but another product at its first point."""
    operator = score_jacobian(score, state, x, t, cond)
    vector = jax.random.normal(jax.random.key(0), (operator.size,), operator.dtype)
    measured, product = jax.device_get(jax.jit(probe_and_product)(operator, vector))
    if not np.isfinite(product).all():
        return  # the point is refused by its number
    if path.exists():
        resume.load(path, (), product, 8 * float(measured.noise), {})
    elif jax.process_index() == 0:
        resume.save(path, {"product": product}, {})


def _fingerprint(tree: Any) -> str:
    """One hash of all arrays of a pytree."""
    leaves = [fingerprint(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)]
    return hashlib.sha256(" ".join(leaves).encode()).hexdigest()
