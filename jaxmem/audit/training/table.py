"""``images.csv``: one row per training image, and per held-out one after them, for pandas and spreadsheets."""

from pathlib import Path
from typing import Any

from jaxmem.audit.tables import write_csv
from jaxmem.audit.training.found import TrainingFound


def image_columns(found: TrainingFound) -> dict[str, list[Any]]:
    """The table by column: the image, its verdict with its reasons, and the numbers behind it, means over noises."""
    missing = len(found.records) - len(found.evidence)
    table: dict[str, list[Any]] = {
        "image": [record.name for record in found.records],
        "caption": [record.captions[0] if record.captions else "" for record in found.records],
        "sha256": [record.sha256 for record in found.records],
        "held out": [int(record.held_out) for record in found.records],
        "group": [record.group for record in found.records],
        "repeats": [record.repeats for record in found.records],
        "verdict": [verdict.word for verdict in found.verdicts] + [""] * missing,
        "reasons": ["; ".join(verdict.reasons) for verdict in found.verdicts] + [""] * missing,
    }
    for name in ("drawn", "copies", "foreign", "closest", "similarity"):
        table[name] = [getattr(one, name) for one in found.evidence] + [None] * missing
    for look, values in found.p_values.items():
        table[f"p-value {look}"] = [*values.tolist(), *[None] * missing]
    for look, there in found.looks.items():
        means = there.scores.mean(1)
        for d, detector in enumerate(there.detectors):
            table[f"{detector.name} {look}"] = [float(value) for value in means[:, d]]
    return table


def write_images(found: TrainingFound, path: Path) -> Path:
    """Write the table; a text that a spreadsheet would compute stands behind an apostrophe, as in ``results.csv``."""
    return write_csv(image_columns(found), path, texts=("image", "caption", "sha256", "verdict", "reasons"))
