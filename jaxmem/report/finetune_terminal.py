"""What a fine-tune of the shipped model memorized, as tables for the terminal."""

from typing import Any

from rich.console import Console

from jaxmem.memorization.verdicts import WORDS
from jaxmem.report.tables import print_table


def print_finetune(metrics: dict[str, Any], config: dict[str, Any], console: Console) -> None:  # noqa: ARG001
    """Print what samples return, what the audits of the checkpoints say, and what follows from the sweeps."""
    columns = [(way, kind) for way in metrics["returned"] for kind in ("single", "many")]
    rows = []
    for step in sorted({int(step) for table in metrics["returned"].values() for step in table}):
        found = [metrics["returned"][way].get(str(step), {}).get(kind) for way, kind in columns]
        rows.append([str(step), *("" if share is None else f"{share:.0%}" for share in found)])
    title = "Samples that are images of the training, by steps: captions of a single image, and of many"
    print_table(title, ["steps", *(f"{way}, {kind}" for way, kind in columns)], rows, console)
    audits = metrics.get("audits") or {}
    rows = [
        [way, step, kind, *(str(found["verdicts"][kind][word]["number"]) for word in WORDS)]
        for way, steps in audits.get("checkpoints", {}).items()
        for step, found in steps.items()
        for kind in ("single", "many")
    ]
    if rows:
        print_table("Verdicts on training images", ["trained", "steps", "captions of", *WORDS], rows, console)
    for way, sweep in audits.get("sweeps", {}).items():
        console.print(f"{way}: {sweep['advice']['reason']}", highlight=False)
