"""How often the intervals of `count_positive` hold the truth, by spectrum and budget.

    python benchmarks/count_coverage.py --seeds 100

Spectra that a dozen Lanczos steps resolve, and such that they do not; from 12 steps to 12 % of d products, d from 200
to 16,384, positive and tangent counts. Each operator is a diagonal in a reflected basis, in float32; every other one
has 10 % skew noise besides, so that a step costs two products. Every seed draws the spectrum, the reflection and the
start vectors anew. Finished counts are kept in ``--rows`` and are not repeated; ``--labels`` does some budgets, so that
several processes can share the work, and ``--known`` none: the page is then of the counts that are there.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from counting import RESULTS, rotated
from exact_jacobian import environment
from page import FIGURES, update_page

from jaxmem.report import style
from jaxmem.spectra import count_positive

LEARNED = RESULTS / "learned_spectra.json"


def half(rng: np.random.Generator, scale: float, count: int) -> np.ndarray:
    return np.abs(rng.normal(0, scale, count))


def _few(size: int, share: float) -> int:
    return max(3, round(share * size))


def gap(size: int, rng: np.random.Generator) -> np.ndarray:
    few = _few(size, 0.018)
    return np.r_[rng.uniform(5, 200, few), rng.uniform(-1000, -50, size - few)]


def no_gap(size: int, rng: np.random.Generator) -> np.ndarray:
    few = _few(size, 0.018)
    return np.r_[half(rng, 0.15, few), -half(rng, 1, size - few)]


def few(size: int, rng: np.random.Generator) -> np.ndarray:
    count = _few(size, 0.0015)
    return np.r_[half(rng, 50, count), -half(rng, 300, size - count)]


def ten_above_a_gap(size: int, rng: np.random.Generator) -> np.ndarray:
    return np.r_[rng.uniform(1e-3, 1e-2, 10), -1 - half(rng, 1, size - 10)]


def student_t(size: int, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_t(3, size) - 3


def cauchy(size: int, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_cauchy(size) - 3


def outlier(size: int, rng: np.random.Generator) -> np.ndarray:
    few = _few(size, 0.025)
    return np.r_[100.0, half(rng, 0.2, few), -half(rng, 1, size - few - 1)]


def density_through_zero(size: int, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(-0.5, 1, size)


def plateau(size: int, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(-1, 0.05, size)


def null_space(size: int, rng: np.random.Generator) -> np.ndarray:
    few, zeros = _few(size, 0.018), size // 4
    return np.r_[rng.uniform(5, 200, few), np.zeros(zeros), rng.uniform(-1000, -50, size - few - zeros)]


def null_space_no_gap(size: int, rng: np.random.Generator) -> np.ndarray:
    few, zeros = _few(size, 0.018), size // 4
    return np.r_[half(rng, 50, few), np.zeros(zeros), -half(rng, 300, size - few - zeros)]


def clusters_on_both_sides(size: int, rng: np.random.Generator) -> np.ndarray:
    few, cluster = _few(size, 0.018), size // 32
    bulk = rng.uniform(-1000, -50, size - few - 2 * cluster)
    return np.r_[rng.uniform(5, 200, few), np.repeat([0.5, -0.5], cluster), bulk]


def cluster_just_above(size: int, rng: np.random.Generator) -> np.ndarray:
    cluster = _few(size, 0.02)
    return np.r_[np.full(cluster, 1e-3), -half(rng, 1, size - cluster)]


def cluster_just_below(size: int, rng: np.random.Generator) -> np.ndarray:
    cluster = _few(size, 0.02)
    return np.r_[half(rng, 0.2, cluster), np.full(cluster, -1e-3), -half(rng, 1, size - 2 * cluster)]


def cluster_at_the_resolution(size: int, rng: np.random.Generator) -> np.ndarray:
    # a Lanczos run of m steps tells about 1/m of the range apart: somewhere between 10 and 300 steps
    cluster = _few(size, 0.02)
    return np.r_[np.full(cluster, 10 ** rng.uniform(-2.5, -1)), -half(rng, 1, size - cluster)]


def gap_with_a_jump_above(size: int, rng: np.random.Generator) -> np.ndarray:
    few = size // 20
    return np.r_[rng.uniform(0.02, 0.5, few), rng.uniform(-1, 0.02, size - few)]


def none_positive(size: int, rng: np.random.Generator) -> np.ndarray:
    return -half(rng, 1, size)


def all_positive(size: int, rng: np.random.Generator) -> np.ndarray:
    return 1e-3 + half(rng, 1, size)


def power_law(size: int, rng: np.random.Generator) -> np.ndarray:
    # a Gaussian's Hessian with variances that fall as of natural images, and directions between its modes
    variances = 200 * np.arange(1.0, size + 1) ** -1.5
    free = np.arange(size) < _few(size, 0.016)
    return np.where(free, 0.3 * rng.exponential(1, size), -1 / (1 + variances))


def learned(size: int, rng: np.random.Generator) -> np.ndarray:
    # of one point of a small network, drawn from its distribution function
    points = json.loads(LEARNED.read_text())["eigenvalues"]
    values = np.sort(points[rng.integers(len(points))])
    return np.interp(rng.uniform(0, len(values) - 1, size), np.arange(len(values)), values)


FAMILIES: dict[str, tuple[Callable[[int, np.random.Generator], np.ndarray], str]] = {
    "gap": (gap, "1.8 % in [5, 200], the rest in [-1000, -50]"),
    "no gap": (no_gap, "1.8 % half-normal of scale 0.15, the rest minus half-normal of scale 1"),
    "few, no gap": (few, "0.15 % half-normal of scale 50, the rest minus half-normal of scale 300"),
    "ten above a gap": (ten_above_a_gap, "10 in [1e-3, 1e-2], the rest -1 minus half-normal"),
    "Student-t": (student_t, "3 degrees of freedom, shifted by -3"),
    "Cauchy": (cauchy, "shifted by -3"),
    "outlier": (outlier, "one at 100, 2.5 % half-normal of scale 0.2, the rest minus half-normal of scale 1"),
    "density through zero": (density_through_zero, "normal, shifted by -0.5"),
    "plateau": (plateau, "uniform in [-1, 0.05]"),
    "null space": (null_space, "as gap, a quarter zeros"),
    "null space, no gap": (
        null_space_no_gap,
        "1.8 % half-normal of scale 50, a quarter zeros, minus half-normal of 300",
    ),
    "clusters on both sides": (clusters_on_both_sides, "as gap, 3 % at 0.5 and 3 % at -0.5"),
    "cluster just above": (cluster_just_above, "2 % at 0.001, the rest minus half-normal of scale 1"),
    "cluster just below": (cluster_just_below, "2 % half-normal of scale 0.2, 2 % at -0.001, minus half-normal of 1"),
    "cluster at the resolution": (cluster_at_the_resolution, "2 % at one of 0.003 to 0.1, minus half-normal of 1"),
    "a jump near zero": (gap_with_a_jump_above, "5 % in [0.02, 0.5], the rest in [-1, 0.02]"),
    "none positive": (none_positive, "minus half-normal of scale 1"),
    "all positive": (all_positive, "0.001 and half-normal of scale 1"),
    "power law": (power_law, "1.6 % exponential of scale 0.3, the rest -1/(1 + 200 k^-1.5)"),
    "learned": (learned, "drawn from those of the model that ships, t = 281 and 41"),
}

COVERAGE: dict[str, tuple[tuple[int, ...], float | None]] = {  # sizes, and the budget in d
    "12 steps": ((200, 1024, 4096, 16_384), None),
    "2 % of d": ((4096,), 0.02),
    "6 % of d": ((1024, 2048), 0.06),
    "12 % of d": ((512, 2048), 0.12),
}


def covered(name: str, label: str, seed: int) -> dict[str, Any]:
    """One count of a family: sizes take turns with the seeds, and so do operators that are symmetric and not."""
    sizes, share = COVERAGE[label]
    size, symmetric = sizes[seed // 2 % len(sizes)], seed % 2 == 1
    rng = np.random.default_rng([seed, list(FAMILIES).index(name)])
    values = FAMILIES[name][0](size, rng).astype(np.float32)
    level = min(float(np.quantile(values, 0.9)), -0.02 * float(np.abs(values).max()))
    sigma = (-0.5 / level) ** 0.5
    budget = int(share * size) if share else (14 if symmetric else 27)
    operator = rotated(values, rng, symmetric)
    count = count_positive(operator, max_products=budget, key=jax.random.key(seed), sigma=sigma)
    found = {"size": size, "products": count.num_products, "threshold": count.threshold}
    for kind, one, truth in (
        ("positive", count, values > 0),
        ("tangent", count.tangent, values > -0.5 / sigma / sigma),
    ):
        found[kind] = [int(truth.sum()), one.lower, one.estimate, *one.interval]
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one family with one budget, for positive and tangent counts."""
    cell: dict[str, Any] = {"seeds": len(rows)}
    for kind in ("positive", "tangent"):
        truth, lower, estimate, low, high = np.array([row[kind] for row in rows]).T
        cell[kind] = {
            "covered": int(((low <= truth) & (truth <= high)).sum()),
            "certified_above_truth": int((lower > truth).sum()),
            "median_truth": float(np.median(truth)),
            "median_half_width": float(np.median(high - low) / 2),
            "median_error": float(np.median(np.abs(estimate - truth))),
        }
    return cell


def page_section(result: dict[str, Any]) -> str:
    """The benchmark as the page of benchmarks shows it."""
    cells = result["coverage"]
    shares, above, counts = [], 0, 0
    for row in cells.values():
        for cell in row.values():
            for kind in ("positive", "tangent"):
                shares.append((cell[kind]["covered"] / cell["seeds"], cell[kind]["covered"], cell["seeds"]))
                above += cell[kind]["certified_above_truth"]
                counts += cell["seeds"]
    covered = sum(share[1] for share in shares)
    _, fewest, seeds = min(shares)
    lines = [
        f"Of {counts:,} intervals {covered:,} hold the truth; the fewest of one spectrum and budget: **{fewest} of"
        f" {seeds}**. The certified bound was above the truth in **{above}**. Cells: intervals that hold the positive"
        " and the tangent count; median half width of the positive one, and median error of its estimate.",
        "",
        "| spectrum | " + " | ".join(COVERAGE) + " |",
        "|---|" + "--:|" * len(COVERAGE),
    ]
    for name, row in cells.items():
        parts = []
        for cell in row.values():
            positive, tangent = cell["positive"], cell["tangent"]
            held = f"{positive['covered']} and {tangent['covered']} of {cell['seeds']}"
            parts.append(
                f"{held}; ±{positive['median_half_width']:.0f}, {positive['median_error']:.0f} of"
                f" {positive['median_truth']:.0f}"
            )
        lines.append(f"| {name}: {result['families'][name]} | " + " | ".join(parts) + " |")
    sizes = "; ".join(f"{label}: d = {', '.join(f'{d:,}' for d in sizes)}" for label, sizes in result["sizes"].items())
    return "\n".join([*lines, "", f"Sizes, in turn: {sizes}."])


def draw_figure(path: Path, cells: dict[str, dict[str, Any]]) -> None:
    with style.figure(path, 10, 5.2) as canvas:
        left, right = canvas.subplots(1, 2, sharey=True)
        names, labels = list(cells), list(COVERAGE)
        colours = (style.NEUTRAL, "#E69F00", "#CC79A7", style.GENERAL)
        for j, (label, colour) in enumerate(zip(labels, colours, strict=True)):
            places = np.arange(len(names)) + 0.18 * (j - 1.5)
            for kind, mark in (("positive", "o"), ("tangent", "x")):
                shares = [100 * cells[name][label][kind]["covered"] / cells[name][label]["seeds"] for name in names]
                left.plot(shares, places, mark, color=colour, markersize=4, label=f"{kind}, {label}")
            found = [cells[name][label]["positive"] for name in names]
            for key, mark in (("median_half_width", "|"), ("median_error", ".")):
                values = [one[key] / max(one["median_truth"], 1) for one in found]
                right.plot(np.maximum(values, 1e-3), places, mark, color=colour, markersize=6)
        left.axvline(95, color=style.MEMORIZED, linewidth=1)
        left.set(xlim=(85, 101), xlabel="intervals that hold the truth (%)")
        left.set_yticks(range(len(names)), names)
        left.invert_yaxis()
        left.legend(fontsize=7, loc="lower left")
        right.set(xscale="log", xlabel="median, as a share of the count (0.001: that or less)")
        right.set_title("half width (bar) and error of the estimate (dot)", loc="left")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--rows", type=Path, default=Path("runs") / "benchmark-count-coverage.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder")
    parser.add_argument("--labels", nargs="*", choices=list(COVERAGE), help="only these budgets, and no page")
    parser.add_argument("--known", action="store_true", help="the page of what --rows has")
    arguments = parser.parse_args()
    for folder in (arguments.rows.parent, arguments.out):
        folder.mkdir(parents=True, exist_ok=True)
    known = {}
    if arguments.rows.exists():
        for line in arguments.rows.read_text().splitlines():
            row = json.loads(line)
            known[row["name"], row["budget"], row["seed"]] = row
    for label in arguments.labels or COVERAGE:
        for seed in range(0 if arguments.known else arguments.seeds):
            for name in FAMILIES:
                if (name, label, seed) not in known:
                    row = {"name": name, "budget": label, "seed": seed, **covered(name, label, seed)}
                    known[name, label, seed] = row
                    with open(arguments.rows, "a") as stream:
                        stream.write(json.dumps(row) + "\n")
    if arguments.labels:
        return
    cells = {
        name: {
            label: summary(
                [known[name, label, seed] for seed in range(arguments.seeds) if (name, label, seed) in known]
            )
            for label in COVERAGE
        }
        for name in FAMILIES
    }
    result = {
        "what": "intervals of counts of rotated diagonals in float32, every other one with 10 % skew noise",
        "environment": environment(),
        "families": {name: what for name, (_, what) in FAMILIES.items()},
        "sizes": {label: list(sizes) for label, (sizes, _) in COVERAGE.items()},
        "coverage": cells,
    }
    (arguments.out / "count_coverage.json").write_text(json.dumps(result, indent=1) + "\n")
    draw_figure(FIGURES / "count_coverage.png", cells)
    update_page("benchmarks", "count coverage", page_section(result))
    print(page_section(result))


if __name__ == "__main__":
    main()
