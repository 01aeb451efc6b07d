"""Numbers of the summary of an audit's page, and the facts of its run."""

import shlex
from typing import Any

import numpy as np

from jaxmem.memorization.evaluation import FEWEST_LABELS
from jaxmem.report.audit.view import ENOUGH, STRONG, AuditView

SHOWN = 3  # examples from each end of the ranking
_MOST_LISTED = 6  # timesteps in a line
MOST_EVIDENCE = 12  # prompts whose evidence is spelled out


def page_summary(view: AuditView, rows: list[dict[str, Any]], evaluation: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the summary; None where a run cannot say."""
    fixed, others, num_spectra, copies, num_samples = None, None, 0, 0, 0
    if view.judges:
        last = view.counts["tangent"][:, :, view.judged]  # (N, M)
        complete = ~np.isnan(last).any(1)  # a noise that was not looked at may have free directions
        none_free = complete & (np.nan_to_num(last) == 0).all(1)
        num_spectra = int(complete.sum())
        copies, num_samples = int((last == 0).sum()), int((~np.isnan(last)).sum())
        fixed = np.flatnonzero(none_free) if num_spectra else None
        rest = view.free[complete & ~none_free]
        others = float(rest.mean()) if rest.size else None
    totals = {detector: found.get("all") or {} for detector, found in evaluation.items()}
    areas = {detector: total["auc"] for detector, total in totals.items() if total.get("auc_interval")}
    # With a rule whose errors are known the list is what it lists, and nothing else.
    bounded = view.listing.level is not None
    telling = set(np.flatnonzero(view.listing.listed) if bounded else [] if fixed is None else fixed)
    evidence = [
        (
            row,
            fixed is not None and row["index"] in fixed,
            [view.detectors[d].title for d in view.leads if view.flags[row["index"], d]],
        )
        for row in rows
        if row["index"] in telling
    ]
    listed = len(view.result.reference)
    titles = {detector.name: detector.title for detector in view.detectors}
    best = max(areas, key=lambda name: areas[name], default=None)
    placed = [row for row in rows if row["place"]]
    number = min(SHOWN, len(placed) // 2)
    return {
        "fixed": fixed,
        "others": others,
        "num_spectra": num_spectra,
        "copies": copies,
        "num_samples": num_samples,
        "bounded": bounded,
        "num_listed": int(view.listing.listed.sum()),
        "unjudged": int(np.isnan(view.listing.p).sum()),
        "evidence": evidence[:MOST_EVIDENCE],
        "num_evidence": len(evidence),
        "beyond": f"{STRONG:g} % of the {listed:,}" if listed >= ENOUGH else f"all {listed:,}",
        # of a prompt and R more of its kind, these shares of places are beyond the percentile
        "marked_by_chance": len(view.prompts) * (int(listed * (1 - STRONG / 100)) + 1) / (listed + 1),
        "best": None if best is None else {"title": titles.get(best, best), **evaluation[best]["all"]},
        "num_measures": len(areas),
        "detects": any(totals[name]["auc_interval"][0] > 0.5 for name in areas),
        "counted": any(detector.is_count for detector in view.detectors),
        "estimated": any(bool(np.isfinite(ends).any()) for ends in view.intervals.values()),
        "by_category": any(prompt.category for prompt in view.prompts),
        "evaluated_groups": list(dict.fromkeys(g for found in evaluation.values() for g in found if g != "all")),
        "shown": [
            ("Most memorized by the order of the ranking", placed[:number]),
            ("Least memorized", placed[-number:]),
        ]
        if number
        else [],
    }


def shown_evaluation(metrics: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """By detector and group, what labels say where there are enough; and whether there are too few for any of it."""
    every = metrics.get("evaluation") or {}
    kept = {
        detector: {
            group: one
            for group, one in found.items()
            if min(one["num_positive_prompts"], one["num_negative_prompts"]) >= FEWEST_LABELS
        }
        for detector, found in every.items()
    }
    return {detector: found for detector, found in kept.items() if found}, bool(every) and not any(kept.values())


def _listed(shares: dict[str, float] | None) -> str | None:
    """Shares by timestep, in words."""
    if not shares:
        return None
    if len(shares) > _MOST_LISTED:
        return f"{min(shares.values()):.1%} to {max(shares.values()):.1%} at {len(shares)} timesteps"
    return ", ".join(f"{share:.1%} at t = {t}" for t, share in shares.items())


def _time(stamp: str | None) -> str | None:
    """A time of the manifest, for people."""
    return None if stamp is None else stamp.replace("T", " ").replace("Z", " UTC")


def _extended(extension: dict[str, Any]) -> str | None:
    """When an extension was begun, and by which command."""
    origin = extension.get("origin") or {}
    command = " ".join(map(shlex.quote, origin.get("command") or ()))
    return ", ".join(filter(None, (_time(origin.get("begun")), command))) or None


def highlights(result: Any) -> list[tuple[str, str]]:
    """Facts that a reader looks for first, where the run has them: name and value."""
    manifest, metrics = result.manifest, result.metrics or {}
    minutes = (metrics.get("wall_seconds") or {}).get("total")
    config, plan, versions, device = (manifest.get(name) or {} for name in ("config", "plan", "versions", "device"))
    model, origin, extensions = (manifest.get(name) or {} for name in ("model", "origin", "extensions"))
    asked = [
        ("Begun", _time(origin.get("begun"))),
        ("Finished", _time(metrics.get("finished"))),
        ("Command", " ".join(map(shlex.quote, origin.get("command") or ())) or None),
        *(
            (
                f"File of prompts, given as {file['role'].replace('_', '-')}",
                f"{file['name']}, SHA-256 {file['sha256'] or 'not kept'}",
            )
            for file in origin.get("files") or ()
        ),
        *((name.replace("-", " ").capitalize(), _extended(one)) for name, one in extensions.items()),
        ("Model", metrics.get("model") or None),
        ("Model, SHA-256 of its weights", model.get("sha256")),
        ("Seed", config.get("seed")),
        ("Guidance", plan.get("guidance")),
        ("Precision", manifest.get("dtype")),
        ("Device", f"{device['count']} × {device['kind']}" if {"count", "kind"} <= device.keys() else None),
        ("Eigenvalues below -1/σ², which no density has", _listed(metrics.get("share_below_bound"))),
        ("Jacobian products", f"{metrics['num_products']:,}" if "num_products" in metrics else None),
        ("Time of all recorded work", None if minutes is None else f"{minutes / 60:,.1f} minutes"),
        ("Reference list", len(result.reference) or "none"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or None),
    ]
    return [(name, str(item)) for name, item in asked if item is not None]
