"""``jaxmem compare``: audits of several checkpoints of one training, side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jaxmem.commands.output import say


@dataclass(frozen=True)
class Compare:
    """When did memorization begin? Compares audits with training images of several checkpoints of one training.

    Finished or not, they are of the same images and with the same settings. The folder gets comparison.html and
    comparison.csv (one row per image and run). Exit codes: 0 done, 2 runs that cannot be compared.
    """

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUNS")]
    """Folders of audits, one of each checkpoint."""
    out: Path
    """Folder for the page and its table; what is there of an earlier comparison is replaced."""
    steps: tuple[int, ...] = ()
    """The training step of each run; by default the number in the name of its network (checkpoint-500/unet), its model
    or its folder."""
    series: tuple[str, ...] = ()
    """What each run belongs to, such as raw or average; by default its name without the step."""

    def __call__(self) -> None:
        from rich.console import Console

        from jaxmem.comparison import compare
        from jaxmem.report.comparison.terminal import print_comparison

        found = compare(self.runs, steps=self.steps or None, series=self.series or None)
        for one in found.checkpoints:
            if not one.finished:
                say(f"{one.run}: the run is not finished; what is said of it may change")
        self.out.mkdir(parents=True, exist_ok=True)
        paths = [found.write_page(self.out / "comparison.html"), found.to_csv(self.out / "comparison.csv")]
        print_comparison(found, paths, Console())
