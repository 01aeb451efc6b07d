"""The end of an audit: ranks and rates per detector, and one row per prompt for pandas."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from jaxmem.audit.result import AuditResult
from jaxmem.durable import write_atomically
from jaxmem.memorization.registry import Detector


def ranks(scores: np.ndarray, memorized_is: str) -> np.ndarray:
    """1 for the most memorized; equal scores share the better rank, NaN has none (0)."""
    ordered = -scores if memorized_is == "high" else scores
    found = (ordered[None] < ordered[:, None]).sum(1) + 1
    return np.where(np.isnan(scores), 0, found)


def percentiles(scores: np.ndarray, reference: np.ndarray, memorized_is: str) -> np.ndarray:
    """Per cent of the reference prompts that look less memorized (ties count half); NaN without any."""
    reference = reference[~np.isnan(reference)]
    if not reference.size:
        return np.full(len(scores), np.nan)
    sign = 1 if memorized_is == "high" else -1
    less = (sign * reference[None] < sign * scores[:, None]).mean(1)
    equal = (reference[None] == scores[:, None]).mean(1)
    return np.where(np.isnan(scores), np.nan, 100 * (less + equal / 2))


def summarise(result: AuditResult, truncated: list[bool]) -> dict[str, Any]:
    """The metrics of a finished audit; see `jaxmem.audit`."""
    means = result.scores.mean(1)
    reference = result.reference_scores.mean(1)
    rank, percentile = {}, {}
    for i, detector in enumerate(result.detectors):
        rank[detector.name] = ranks(means[:, i], detector.memorized_is)
        percentile[detector.name] = percentiles(means[:, i], reference[:, i], detector.memorized_is)
    names = [detector.name for detector in result.detectors]
    rows = [
        {
            "prompt": prompt.text,
            "label": prompt.label,
            "category": prompt.category,
            "truncated": bool(truncated[n]),
            "scores": dict(zip(names, means[n].tolist(), strict=True)),
            "rank": {name: int(rank[name][n]) or None for name in names},
            "percentile": {name: float(percentile[name][n]) for name in names},
        }
        for n, prompt in enumerate(result.prompts)
    ]
    return {"detectors": names, "prompts": rows, "evaluation": _evaluation(result)}


def _evaluation(result: AuditResult) -> dict[str, Any]:
    return {}


def write_table(directory: Path, metrics: dict[str, Any], detectors: tuple[Detector, ...]) -> Path:
    """``results.csv``, for ``pandas.read_csv``: one row per prompt, and of each detector score, rank and percentile."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    kinds = (("scores", ""), ("rank", " rank"), ("percentile", " percentile"))
    names = [(detector.name, part, ending) for detector in detectors for part, ending in kinds]
    writer.writerow(["prompt", "label", "category", "truncated", *(name + ending for name, _, ending in names)])
    for row in metrics["prompts"]:
        label = "" if row["label"] is None else int(row["label"])
        cells = [row[part][name] for name, part, _ in names]
        cells = ["" if cell is None or cell != cell else repr(cell) for cell in cells]
        writer.writerow([row["prompt"], label, row["category"] or "", int(row["truncated"]), *cells])
    path = directory / "results.csv"
    write_atomically(path, lambda stream: stream.write(text.getvalue().encode()))
    return path
