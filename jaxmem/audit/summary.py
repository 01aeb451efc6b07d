"""The end of an audit: ranks and rates per detector, and one row per prompt for pandas."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from jaxmem.audit.result import AuditResult
from jaxmem.memorization.evaluation import FPR_LIMITS, evaluate_categories
from jaxmem.memorization.registry import Detector
from jaxmem.memorization.sharpness import below_bound
from jaxmem.memorization.standing import percentile, rank
from jaxmem.memorization.thresholds import threshold_split
from jaxmem.prompts import RESULTS_COLUMNS, as_cell, from_cell
from jaxmem.runs.durable import write_atomically


def summarise(result: AuditResult, truncated: list[bool]) -> dict[str, Any]:
    """The metrics of a finished audit: of each prompt mean scores, ranks and percentiles; rates by label.

    Ends of 95 % intervals of estimated counts are means over noises, too. The interval of a mean is narrower: errors of
    different noises are independent.
    """
    means, reference = result.scores.mean(1), result.reference_scores.mean(1)
    places, standing = {}, {}
    for i, detector in enumerate(result.detectors):
        places[detector.name] = rank(means[:, i], memorized_is=detector.memorized_is)
        there = bool((~np.isnan(reference[:, i])).any())
        standing[detector.name] = (
            percentile(means[:, i], reference[:, i], memorized_is=detector.memorized_is)
            if there
            else np.full(len(means), np.nan)
        )
    names = [detector.name for detector in result.detectors]
    intervals = {name: ends.mean(1) for name, ends in result.intervals.items()}
    rows = [
        {
            "prompt": prompt.text,
            "label": prompt.label,
            "category": prompt.category,
            "truncated": bool(truncated[n]),
            "scores": dict(zip(names, means[n].tolist(), strict=True)),
            "intervals": {name: ends[n].tolist() for name, ends in intervals.items()},
            "rank": {name: None if np.isnan(places[name][n]) else int(places[name][n]) for name in names},
            "percentile": {name: float(standing[name][n]) for name in names},
        }
        for n, prompt in enumerate(result.prompts)
    ]
    return {
        "detectors": names,
        "prompts": rows,
        "evaluation": _evaluation(result),
        "held_out": _held_out(result),
        "share_below_bound": _share_below_bound(result),
    }


def _share_below_bound(result: AuditResult) -> dict[str, float]:
    """By timestep, of whole spectra: how much of them no density has, so how wrong the model's derivative is there."""
    if result.method != "eigh":
        return {}
    shares = below_bound(result.eigenvalues, result.spectral_sigma, result.noise)
    return {str(t): float(shares[..., k].mean()) for k, t in enumerate(result.spectral_timesteps)}


def _evaluation(result: AuditResult) -> dict[str, Any]:
    """By detector and category, every point an example; empty without labels."""
    labels = [prompt.label for prompt in result.prompts]
    categories = [prompt.category for prompt in result.prompts]
    if all(label is None for label in labels):
        return {}
    return {
        detector.name: {
            name: found._asdict()
            for name, found in evaluate_categories(
                result.scores[..., i], labels, categories, memorized_is=detector.memorized_is
            ).items()
        }
        for i, detector in enumerate(result.detectors)
    }


def _held_out(result: AuditResult) -> dict[str, Any]:
    """By detector and limit on the FPR: a threshold fixed on half of the labelled prompts, its rates on the rest."""
    known = [n for n, prompt in enumerate(result.prompts) if prompt.label is not None]
    labels = np.array([bool(result.prompts[n].label) for n in known], bool)
    if labels.all() or not labels.any():
        return {}
    categories = [result.prompts[n].category for n in known]
    found: dict[str, Any] = {}
    for i, detector in enumerate(result.detectors):
        scores = result.scores[known][..., i]
        splits = {
            f"{limit:g}": threshold_split(
                scores, labels, memorized_is=detector.memorized_is, categories=categories, limit=limit
            )
            for limit in FPR_LIMITS
        }
        found[detector.name] = {limit: None if split is None else split._asdict() for limit, split in splits.items()}
    return found


def write_table(directory: Path, metrics: dict[str, Any], detectors: tuple[Detector, ...]) -> Path:
    """``results.csv``, for pandas and spreadsheets: one row per prompt; of each detector score, rank and percentile.

    Of counts that were estimated there are the ends of the 95 % interval, ``low`` and ``high``, too. A prompt or a
    category that a spreadsheet would compute stands behind an apostrophe (`jaxmem.prompts.as_cell`), which
    `read_results` takes away.
    """
    kinds = (("scores", ""), ("rank", " rank"), ("percentile", " percentile"))
    names = [(detector.name, part, ending) for detector in detectors for part, ending in kinds]
    estimated = [detector.name for detector in detectors if detector.name in metrics["prompts"][0]["intervals"]]
    ends = [f"{name} {end}" for name in estimated for end in ("low", "high")]
    header = io.StringIO(newline="")
    csv.writer(header, lineterminator="\n").writerow([*RESULTS_COLUMNS, *(n + end for n, _, end in names), *ends])

    def quoted(text: str | None) -> str:
        # Always: a spreadsheet that splits at semicolons or tabs, too, would find formulas in the parts.
        return '"' + as_cell(text or "").replace('"', '""') + '"'

    lines = [header.getvalue()]
    for row in metrics["prompts"]:
        label = "" if row["label"] is None else str(int(row["label"]))
        numbers = [row[part][name] for name, part, _ in names]
        numbers += [end for name in estimated for end in row["intervals"][name]]
        cells = ["" if number is None or number != number else repr(number) for number in numbers]
        known = [quoted(row["prompt"]), label, quoted(row["category"]), str(int(row["truncated"]))]
        lines.append(",".join([*known, *cells]) + "\n")
    path = directory / "results.csv"
    write_atomically(path, lambda stream: stream.write("".join(lines).encode()))
    return path


def read_results(path: str | Path) -> Any:
    """The table ``results.csv`` of an audit as a pandas DataFrame, every prompt and category as it was given.

    ``pandas.read_csv`` alone differs in two ways: a text that a spreadsheet would compute, such as ``=1+1``, keeps the
    apostrophe that stands before it in the file, and a prompt such as ``NA`` or ``null`` is taken for a missing one.

    Args:
        path: the folder of the run, or the file.

    Raises:
        ValueError: the folder has no such file.
        ImportError: pandas is missing.
    """
    try:
        import pandas
    except ImportError:
        raise ImportError(
            "read_results: expected pandas, which makes the table, got none; pip install 'jaxmem[all]'"
        ) from None
    path = Path(path)
    file = path / "results.csv" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path}: expected a finished audit with its results.csv, got no such file")
    columns = pandas.read_csv(file, nrows=0).columns
    texts = ["prompt", "category"]
    table = pandas.read_csv(
        file,
        dtype=dict.fromkeys(texts, str),
        keep_default_na=False,
        na_values={name: [""] for name in columns if name not in texts},
    )
    for name in texts:
        table[name] = table[name].map(from_cell)
    return table.assign(category=table["category"].where(table["category"] != "", None))
