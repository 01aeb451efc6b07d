"""The cost of each stage of an experiment, kept outside its results."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from jaxmem.runs import Run


@contextmanager
def timed(run: Run, stage: str) -> Iterator[None]:
    """Write the seconds of a stage to the run's costs, also when it is interrupted."""
    start = time.perf_counter()
    try:
        yield
    finally:
        run.cost({"stage": stage, "seconds": time.perf_counter() - start})


def wall_seconds(run: Run) -> dict[str, float]:
    """Seconds per stage, summed over all starts of the run."""
    totals: dict[str, float] = {}
    for row in run.costs():
        totals[row["stage"]] = totals.get(row["stage"], 0.0) + row["seconds"]
    return totals | {"total": sum(totals.values())}
