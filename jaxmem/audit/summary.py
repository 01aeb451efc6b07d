"""The end of an audit: ranks and rates per detector, and one row per prompt for pandas."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxmem.audit.prompt_verdicts import prompt_verdicts
from jaxmem.audit.ranking import Ranking
from jaxmem.audit.tables import write_csv
from jaxmem.memorization.evaluation import FPR_LIMITS, evaluate_categories
from jaxmem.memorization.sharpness import below_bound
from jaxmem.memorization.splits import threshold_split
from jaxmem.memorization.standing import percentile, rank
from jaxmem.prompts import RESULTS_COLUMNS, STANDING_COLUMNS, from_cell

if TYPE_CHECKING:
    from jaxmem.audit.result import Audit


def summary_metrics(result: "Audit") -> dict[str, Any]:
    """The metrics of a finished audit: of each prompt mean scores, ranks and percentiles; rates by label."""
    return {
        "detectors": [detector.name for detector in result.detectors],
        "prompts": prompt_rows(result),
        "evaluation": _evaluation(result),
        "held_out": _held_out(result),
        "listing": _listing(result.ranking),
        "share_below_bound": _share_below_bound(result),
    }


def prompt_rows(result: "Audit") -> list[dict[str, Any]]:
    """Of each prompt its mean scores, ranks and percentiles, by detector; NaN and None where not done.

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
    return [
        {
            "prompt": prompt.text,
            "label": prompt.label,
            "category": prompt.category,
            "truncated": bool(result.truncated[n]),
            "scores": dict(zip(names, means[n].tolist(), strict=True)),
            "intervals": {name: ends[n].tolist() for name, ends in intervals.items()},
            "rank": {name: None if np.isnan(places[name][n]) else int(places[name][n]) for name in names},
            "percentile": {name: float(standing[name][n]) for name in names},
        }
        for n, prompt in enumerate(result.prompts)
    ]


def _share_below_bound(result: "Audit") -> dict[str, float]:
    """By timestep, of whole spectra: how much of them no density has, so how wrong the model's derivative is there."""
    if result.method != "eigh":
        return {}
    shares = below_bound(result.eigenvalues, result.spectral_sigma, result.noise)
    return {str(t): float(shares[..., k].mean()) for k, t in enumerate(result.spectral_timesteps)}


def _evaluation(result: "Audit") -> dict[str, Any]:
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


def _held_out(result: "Audit") -> dict[str, Any]:
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


def write_table(table: dict[str, list[Any]], path: Path) -> Path:
    """Write ``results.csv``, for pandas and spreadsheets: the columns of `table_columns`, one row per prompt.

    A prompt or a category that a spreadsheet would compute stands behind an apostrophe (`jaxmem.prompts.as_cell`),
    which `read_results` takes away.
    """
    return write_csv(table, path, texts=("prompt", "category", "verdict", "reasons"))


def table_columns(result: "Audit") -> dict[str, list[Any]]:
    """The table of an audit, by column, in the order of its page.

    What is known of a prompt; ``place`` in the order, ``number`` in the list of prompts (both from 1) and ``p``, the
    chance of so unusual a prompt among the reference ones by all measures together (`jaxmem.memorization.chance`); its
    ``verdict`` with the ``reasons`` (`jaxmem.audit.prompt_verdicts`); of each detector score, rank and percentile. Of
    counts that were estimated there are the ends of the 95 % interval, ``low`` and ``high``, too.
    """
    every, ranking = prompt_rows(result), result.ranking
    rows = [every[n] for n in ranking.order]
    known = ("prompt", "label", "category", "truncated")
    table = {name: [row[key] for row in rows] for name, key in zip(RESULTS_COLUMNS, known, strict=True)}
    table |= dict(zip(STANDING_COLUMNS, _standing(result, ranking), strict=True))
    for detector in result.detectors:
        for part, ending in (("scores", ""), ("rank", " rank"), ("percentile", " percentile")):
            table[detector.name + ending] = [row[part][detector.name] for row in rows]
    for name in result.intervals:
        for i, end in enumerate(("low", "high")):
            table[f"{name} {end}"] = [row["intervals"][name][i] for row in rows]
    return table


def _listing(ranking: Ranking) -> dict[str, Any]:
    """Which prompts stand out from the reference, in the order of the list, and how many would by chance."""
    listing = ranking.listing
    return listing._asdict() | {"rate": listing.rate, "by_chance": listing.by_chance}


def _standing(result: "Audit", ranking: Ranking) -> tuple[list[Any], ...]:
    """Of the prompts in order: place, or None without a score; number in the list; p by chance; verdict, reasons."""
    order, verdicts = ranking.order, prompt_verdicts(result)
    words = [verdicts[n].word for n in order]
    reasons = ["; ".join(verdicts[n].reasons) for n in order]
    places = [None if np.isnan(ranking.places[n]) else place for place, n in enumerate(order.tolist(), 1)]
    return places, (order + 1).tolist(), ranking.listing.p[order].tolist(), words, reasons


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
    texts = [name for name in ("prompt", "category", "verdict", "reasons") if name in columns]
    table = pandas.read_csv(
        file,
        dtype=dict.fromkeys(texts, str),
        keep_default_na=False,
        na_values={name: [""] for name in columns if name not in texts},
    )
    for name in texts:
        table[name] = table[name].map(from_cell)
    return table.assign(category=table["category"].where(table["category"] != "", None))
