"""What each process of `test_distributed.py` does that opens runs in the same instants as others; without JAX."""

import warnings

from jaxmem.runs import directory, manifest


def open_all(directories, seeds, barrier, results, process):
    writer = {"versions": {"writer": str(process)}, "device": {}}
    manifest.environment = lambda: writer
    warnings.simplefilter("ignore")  # that another environment began the run
    outcomes = []
    for folder, seed in zip(directories, seeds, strict=True):
        barrier.wait(60)
        try:
            outcomes.append(directory.Run.open(folder, {"seed": seed}, process=process).manifest)
        except ValueError as error:
            outcomes.append(str(error))
    results.put(outcomes)
