"""One of the processes that `test_distributed.py` starts: ``shared_run.py out port processes index mode``."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from killing import at_call, die

from jaxmem import batch_spectra
from jaxmem.diffusion import NoiseSchedule
from jaxmem.oracles import Separable, SeparableScore
from jaxmem.runs.directory import Run
from jaxmem.spectra.shared import record_spectra

SIZE, POINTS, UNIT = 12, 22, 3
SCORE = SeparableScore(NoiseSchedule())


def problem():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(POINTS, SIZE)).astype(np.float32)
    return Separable(jnp.linspace(0.2, 2, SIZE), jnp.ones(SIZE)), x, rng.integers(20, 1000, POINTS)


def work(out):
    state, x, t = problem()
    run = Run.open(out, {"points": POINTS, "unit": UNIT})
    found = record_spectra(run, SCORE, state, x, t, unit=UNIT, batch=2)
    if jax.process_index() == 0:
        run.finalise({"mean": found.eigenvalues.mean()}, {"eigenvalues": found.eigenvalues})
    return found


def mesh_over_processes():
    """Batches take no mesh with devices of several processes."""
    mesh = jax.make_mesh((jax.device_count(),), ("points",))
    state, x, t = problem()
    try:
        batch_spectra(SCORE, state, jnp.asarray(x), t, mesh=mesh)
    except ValueError as error:
        assert "mesh: expected devices of this process, got 2 of several" in str(error)  # noqa: PT017
    else:
        raise AssertionError("a mesh over processes was taken")


def main():
    out, port, processes, index, mode = sys.argv[1:]
    jax.distributed.initialize(
        f"127.0.0.1:{port}", int(processes), int(index),
        initialization_timeout=120, heartbeat_timeout_seconds=5, shutdown_timeout_seconds=60,
    )  # fmt: skip
    assert jax.process_count() == int(processes)
    if mode == "mesh":
        mesh_over_processes()
    if mode == "deadly":
        Run.append = at_call(2, Run.append, die)  # the array of the second unit is saved, its row is not
    work(out)


if __name__ == "__main__":
    main()
