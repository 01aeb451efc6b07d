"""Seconds of the stages of a run, and losses of its trainings, kept beside its results."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from jaxmem.runs.directory import Run


@contextmanager
def timed(run: Run, stage: str) -> Iterator[None]:
    """Write the seconds of a stage to the run's costs, also when it is interrupted."""
    start = time.perf_counter()
    try:
        yield
    finally:
        run.cost({"stage": stage, "seconds": time.perf_counter() - start})


def save_losses(run: Run, name: str, losses: np.ndarray) -> None:
    """Keep the losses of one start of a training (`TrainingResult.losses`), under the step of the first row."""
    if len(losses):
        run.save(f"{name}-{int(losses[0, 0]):06d}", losses=losses)


def wall_seconds(*runs: Run) -> dict[str, float]:
    """Seconds per stage, summed over all starts of the runs."""
    totals: dict[str, float] = {}
    for row in (row for run in runs for row in run.costs()):
        totals[row["stage"]] = totals.get(row["stage"], 0.0) + row["seconds"]
    return totals | {"total": sum(totals.values())}
