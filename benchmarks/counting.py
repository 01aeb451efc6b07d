"""Counts of positive eigenvalues against known spectra: coverage, errors, and what other methods say.

    python benchmarks/counting.py --seeds 100

Two parts. *Coverage*: the families of `count_families`, from 12 steps to 12 % of d products, d from 200 to 16,384,
every other operator not symmetric, each with its tangent count. *Accuracy*: d = 16,384, declared symmetric, so that a
product counts once. Each operator is a diagonal in a reflected basis, in float32; one that is not symmetric has 10 %
skew noise besides. Every seed draws the spectrum, the reflection and the start vectors anew. Finished counts are kept
in ``--rows`` and are not repeated, so an interrupted benchmark goes on.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from count_families import FAMILIES
from exact_jacobian import environment
from page import update_page

from jaxmem.krylov import lanczos
from jaxmem.operators import Operator
from jaxmem.report import style
from jaxmem.spectra import count_positive
from jaxmem.spectra.quadrature import Tridiagonal

RESULTS = Path(__file__).parent / "results"
SIZE = 16_384
CONTRACT = {  # name: (budget in d, largest root-mean-square error asked for, in counts)
    "gap": (0.06, 15),
    "no gap": (0.06, 30),
    "no gap, 12 %": (0.12, 15),
    "few, gap": (0.06, 2),
    "few, no gap": (0.06, 2),
    "null space": (0.06, 15),
    "clusters": (0.06, 40),
}
WHAT = {
    "gap": "300 in [5, 200], the rest in [-1000, -50]",
    "no gap": "300 half-normal of scale 50, the rest minus half-normal of scale 300",
    "no gap, 12 %": "the same, with twice the budget",
    "few, gap": "24 in [5, 200], the rest in [-1000, -50]",
    "few, no gap": "24 half-normal of scale 50, the rest minus half-normal of scale 300",
    "null space": "300 in [5, 200], 4,000 zeros, the rest in [-1000, -50]",
    "clusters": "300 in [5, 200], 500 at 0.5, 500 at -0.5, the rest in [-1000, -50]",
    "null space, no gap": "300 half-normal of scale 50, 4,000 zeros, the rest minus half-normal of scale 300",
}
BUDGETS = (0.02, 0.04, 0.06, 0.12)
COVERAGE: dict[str, tuple[tuple[int, ...], float | None]] = {  # sizes, and the budget in d
    "12 steps": ((200, 1024, 4096, 16_384), None),
    "2 % of d": ((4096,), 0.02),
    "6 % of d": ((1024, 2048), 0.06),
    "12 % of d": ((512, 2048), 0.12),
}
OTHERS = ("Lanczos, one run (the paper's count)", "stochastic quadrature, 50 steps", "stochastic quadrature, 150 steps")


def eigenvalues(name: str, rng: np.random.Generator) -> np.ndarray:
    def half(scale: float, count: int) -> np.ndarray:
        return np.abs(rng.normal(0, scale, count))

    kind = name.removesuffix(", 12 %")
    positive = 24 if kind.startswith("few") else 300
    if kind.endswith("no gap"):
        zeros = 4000 if kind.startswith("null") else 0
        return np.r_[half(50, positive), np.zeros(zeros), -half(300, SIZE - positive - zeros)]
    middle = {"null space": np.zeros(4000), "clusters": np.repeat([0.5, -0.5], 500)}.get(kind, np.zeros(0))
    rest = SIZE - positive - len(middle)
    return np.r_[rng.uniform(5, 200, positive), middle, rng.uniform(-1000, -50, rest)]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rotated(Operator):
    """``R diag R`` with the reflection ``R = I - 2 u uᵀ``: dense, and a product costs next to nothing."""

    diagonal: Any
    axis: Any
    is_symmetric = True
    dtype = jnp.dtype(jnp.float32)

    @property
    def size(self) -> int:
        return len(self.axis)

    def reflect(self, vector: Any) -> Any:
        return vector - 2 * jnp.dot(self.axis, vector, precision="highest") * self.axis

    def mv(self, vector: Any) -> Any:
        return self.reflect(self.diagonal * self.reflect(vector))

    rmv = mv


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Skewed(Rotated):
    """The same and ``skew (P - Pᵀ)``, P a cyclic shift."""

    skew: Any
    is_symmetric = False

    def noise(self, vector: Any) -> Any:
        return self.skew * (jnp.roll(vector, 1) - jnp.roll(vector, -1))

    def mv(self, vector: Any) -> Any:
        return super().mv(vector) + self.noise(vector)

    def rmv(self, vector: Any) -> Any:
        return super().mv(vector) - self.noise(vector)


def rotated(values: np.ndarray, rng: np.random.Generator, symmetric: bool = True) -> Rotated:
    axis = rng.normal(size=len(values))
    arrays = jnp.asarray(values, jnp.float32), jnp.asarray(axis / np.linalg.norm(axis), jnp.float32)
    if symmetric:
        return Rotated(*arrays)
    # ‖P - Pᵀ‖ = sqrt(2 d), Frobenius
    return Skewed(*arrays, jnp.float32(0.1 * np.linalg.norm(values) / np.sqrt(2 * len(values))))


def draw(name: str, seed: int) -> tuple[Rotated, int]:
    rng = np.random.default_rng([seed, 17])
    values = eigenvalues(name, rng)
    return rotated(values, rng), int((values > 0).sum())


def covered(name: str, label: str, seed: int) -> dict[str, Any]:
    """One count of a family: sizes take turns with the seeds, and so do operators that are symmetric and not."""
    sizes, share = COVERAGE[label]
    size, symmetric = sizes[seed // 2 % len(sizes)], seed % 2 == 1
    rng = np.random.default_rng([seed, list(FAMILIES).index(name)])
    values = FAMILIES[name][0](size, rng).astype(np.float32)
    level = min(float(np.quantile(values, 0.9)), -0.02 * float(np.abs(values).max()))
    sigma = (-0.5 / level) ** 0.5
    budget = int(share * size) if share else (14 if symmetric else 27)
    count = count_positive(rotated(values, rng, symmetric), budget, jax.random.key(seed), sigma=sigma)
    found = {"size": size, "products": count.num_products, "threshold": count.threshold}
    for kind, one, truth in (
        ("positive", count, values > 0),
        ("tangent", count.tangent, values > -0.5 / sigma / sigma),
    ):
        found[kind] = [int(truth.sum()), one.lower, one.estimate, *one.interval]
    return found


def ours(name: str, budget: float, seed: int) -> dict[str, Any]:
    operator, truth = draw(name, seed)
    start = time.perf_counter()
    count = count_positive(operator, int(budget * SIZE), jax.random.key(seed))
    row = {"truth": truth, "lower": count.lower, "estimate": count.estimate, "interval": count.interval}
    return row | {"products": count.num_products, "threshold": count.threshold, "s": time.perf_counter() - start}


@jax.jit
def plain_run(operator: Rotated, key: Any, steps: Any) -> Any:
    return lanczos(operator.mv, jax.random.normal(key, (SIZE,)), steps.shape[0], tolerance=0.0)


def others(name: str, budget: float, seed: int) -> dict[str, Any]:
    operator, truth = draw(name, seed)
    key, products = jax.random.key(seed), int(budget * SIZE)
    row: dict[str, Any] = {"truth": truth}
    for method in OTHERS:
        steps = products if "one run" in method else int(method.split()[-2])
        estimates = []
        for i in range(products // steps):
            found = plain_run(operator, jax.random.fold_in(key, i), np.zeros(steps))
            run = Tridiagonal.of(jax.device_get(found))
            values, vectors = np.linalg.eigh(
                np.diag(run.diagonal) + np.diag(run.off_diagonal[:-1], 1) + np.diag(run.off_diagonal[:-1], -1)
            )
            above = values > 1e-15
            estimates.append(float(above.sum() if "one run" in method else SIZE * np.sum(vectors[0, above] ** 2)))
        row[method] = float(np.mean(estimates))
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    truth = np.array([row["truth"] for row in rows])
    errors = np.array([row["estimate"] for row in rows]) - truth
    low, high = np.array([row["interval"] for row in rows]).T
    rms = float(np.sqrt(np.mean(errors**2)))
    return {
        "seeds": len(rows),
        "positive": float(truth.mean()),
        "rms_error": rms,
        "bias": float(errors.mean()),
        "covered": int(((low <= truth) & (truth <= high)).sum()),
        "median_half_width": float(np.median(high - low) / 2),
        "half_width_over_rms": float(np.median(high - low) / 2 / rms) if rms > 0 else None,
        "certified_above_truth": int(sum(row["lower"] > row["truth"] for row in rows)),
        "median_lower": float(np.median([row["lower"] for row in rows])),
        "median_products": float(np.median([row["products"] for row in rows])),
        "median_s": float(np.median([row["s"] for row in rows])),
    }


def coverage(rows: list[dict[str, Any]]) -> dict[str, Any]:
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


def coverage_section(result: dict[str, Any]) -> list[str]:
    cells = result["coverage"]
    labels = list(next(iter(cells.values())))
    seeds = next(iter(cells.values()))[labels[0]]["seeds"]
    every = [cell[kind] for row in cells.values() for cell in row.values() for kind in ("positive", "tangent")]
    worst, above = min(one["covered"] for one in every), sum(one["certified_above_truth"] for one in every)
    lines = [
        f"How many of {seeds} intervals hold the truth, of the positive and of the tangent count, and the median half"
        f" width and error of the positive one (truth, its median, at 12 % of d = 512 and 2,048). The fewest:"
        f" **{worst} of {seeds}**. The certified bound was above the truth in {above} of {seeds * len(every):,}"
        f" counts.",
        "",
        "| spectrum | truth | " + " | ".join(labels) + " |",
        "|---|--:|" + "--:|" * len(labels),
    ]
    for name, row in cells.items():
        parts = []
        for cell in row.values():
            positive, tangent = cell["positive"], cell["tangent"]
            widths = f"±{positive['median_half_width']:.0f}, {positive['median_error']:.0f}"
            parts.append(f"{positive['covered']}, {tangent['covered']}; {widths}")
        truth = row[labels[-1]]["positive"]["median_truth"]
        lines.append(f"| {name}: {result['families'][name]} | {truth:.0f} | " + " | ".join(parts) + " |")
    sizes = "; ".join(
        f"{label}: d = {', '.join(f'{size:,}' for size in sizes)}" for label, (sizes, _) in COVERAGE.items()
    )
    return [*lines, "", f"Sizes: {sizes}. Every other operator is not symmetric, where a step costs two products."]


def readme_section(result: dict[str, Any]) -> str:
    """The benchmark as benchmarks/README.md shows it."""
    lines = coverage_section(result)
    lines += [
        "",
        "Accuracy:",
        "",
        "| spectrum, d = 16,384 | products | positive | rms error, asked | rms error | bias | 95 % interval covers |"
        " median half-width | certified: median, above the truth |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, found in result["counts"].items():
        asked = f"{result['asked'][name]['rms_error']:g}" if name in result["asked"] else "none"
        lines.append(
            f"| {name}: {result['spectra'][name]} | {found['median_products']:,.0f} | {found['positive']:.0f} |"
            f" {asked} |"
            f" **{found['rms_error']:.2f}** | {found['bias']:+.2f} | {found['covered']} of {found['seeds']} |"
            f" {found['median_half_width']:.1f} | {found['median_lower']:.0f}, {found['certified_above_truth']} |"
        )
    lines += ["", "Relative rms error with no gap, by method and products (8 seeds):", ""]
    cells = result["accuracy"]["no gap"]
    lines += ["| | " + " | ".join(f"{100 * float(budget):g} % of d" for budget in cells) + " |"]
    lines += ["|---|" + "--:|" * len(cells)]
    for method in ("jaxmem", *OTHERS):
        lines.append(f"| {method} | " + " | ".join(f"{100 * cell[method]:.1f} %" for cell in cells.values()) + " |")
    return "\n".join(lines)


def draw_figure(path: Path, result: dict[str, Any], rows: dict[str, list[dict[str, Any]]]) -> None:
    with style.figure(path, 10, 3.6) as canvas:
        left, right = canvas.subplots(1, 2, width_ratios=(1.1, 1))
        names = [name for name in CONTRACT if name in rows]
        for i, name in enumerate(names):
            errors = np.array([row["estimate"] - row["truth"] for row in rows[name]])
            jitter = np.linspace(-0.25, 0.25, len(errors))
            left.plot(errors, i + jitter, ".", color=style.GENERAL, markersize=3)
            left.plot([-CONTRACT[name][1], CONTRACT[name][1]], [i - 0.38] * 2, color=style.MEMORIZED, linewidth=2)
        left.set_yticks(range(len(names)), names)
        left.set_xlabel("estimate minus truth (eigenvalues)")
        left.set_title(f"{len(rows[names[0]])} seeds each; bar: root-mean-square error asked for", loc="left")
        left.invert_yaxis()
        marks = dict(zip((*OTHERS, "jaxmem"), ("s", "^", "v", "o"), strict=True))
        colours = (style.NEUTRAL, "#E69F00", "#CC79A7", style.GENERAL)
        for (method, mark), colour in zip(marks.items(), colours, strict=True):
            points = [(100 * budget, result["accuracy"]["no gap"][str(budget)][method]) for budget in BUDGETS]
            right.plot(*zip(*points, strict=True), marker=mark, color=colour, label=method)
        right.set(xscale="log", yscale="log", xlabel="products (% of d = 16,384)", ylabel="relative error (rms, %)")
        right.set_ylim(0.004, 1.2)
        right.set_yticks([0.01, 0.03, 0.1, 0.3, 1], ["1", "3", "10", "30", "100"])
        right.set_xticks([100 * budget for budget in BUDGETS], [f"{100 * budget:g}" for budget in BUDGETS])
        right.minorticks_off()
        right.legend(fontsize=8, loc="lower left")
        right.set_title("300 positive, no gap", loc="left")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=100, help="for coverage")
    parser.add_argument("--accuracy-seeds", type=int, default=100, help="at d = 16,384, which take most of the time")
    parser.add_argument("--other-seeds", type=int, default=8, help="for the comparison with other methods")
    parser.add_argument("--rows", type=Path, default=Path("runs") / "benchmark-counting.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder")
    arguments = parser.parse_args()
    for folder in (arguments.rows.parent, arguments.out):
        folder.mkdir(parents=True, exist_ok=True)
    known = {}
    if arguments.rows.exists():
        for line in arguments.rows.read_text().splitlines():
            row = json.loads(line)
            known[row["task"], row["name"], row["budget"], row["seed"]] = row
    work: list[tuple[str, str, Any, int]] = []
    for label in COVERAGE:  # one after another, so that few programs are compiled anew
        work += [("coverage", name, label, seed) for seed in range(arguments.seeds) for name in FAMILIES]
    for seed in range(arguments.accuracy_seeds):
        work += [("count", name, budget, seed) for name, (budget, _) in CONTRACT.items()]
    work += [("count", "null space, no gap", 0.06, seed) for seed in range(arguments.other_seeds)]
    for name in ("gap", "no gap"):
        for budget in BUDGETS:
            seeds = range(arguments.other_seeds)
            work += [("count", name, budget, s) for s in seeds] + [("others", name, budget, s) for s in seeds]
    rows = {}
    for task, name, budget, seed in dict.fromkeys(work):
        key = (task, name, budget, seed)
        if key not in known:
            row = {"coverage": covered, "count": ours, "others": others}[task](name, budget, seed)
            known[key] = {"task": task, "name": name, "budget": budget, "seed": seed, **row}
            with open(arguments.rows, "a") as stream:
                stream.write(json.dumps(known[key]) + "\n")
        rows[key] = known[key]

    def select(task: str, name: str, budget: Any, seeds: int) -> list[dict[str, Any]]:
        return [rows[task, name, budget, seed] for seed in range(seeds)]

    contract = {name: select("count", name, budget, arguments.accuracy_seeds) for name, (budget, _) in CONTRACT.items()}
    hard = select("count", "null space, no gap", 0.06, arguments.other_seeds)
    accuracy: dict[str, Any] = {}
    for name in ("gap", "no gap"):
        for budget in BUDGETS:
            cell = accuracy.setdefault(name, {})[str(budget)] = {}
            theirs = select("others", name, budget, arguments.other_seeds)
            for method in OTHERS:
                errors = [row[method] / row["truth"] - 1 for row in theirs]
                cell[method] = float(np.sqrt(np.mean(np.square(errors))))
            mine = select("count", name, budget, arguments.other_seeds)
            errors = [row["estimate"] / row["truth"] - 1 for row in mine]
            cell["jaxmem"] = float(np.sqrt(np.mean(np.square(errors))))
    result = {
        "what": f"positive eigenvalues of rotated diagonals in float32; accuracy: d = {SIZE:,}, declared symmetric",
        "environment": environment(),
        "families": {name: what for name, (_, what) in FAMILIES.items()},
        "coverage": {
            name: {label: coverage(select("coverage", name, label, arguments.seeds)) for label in COVERAGE}
            for name in FAMILIES
        },
        "spectra": WHAT,
        "asked": {name: {"budget": budget, "rms_error": rms} for name, (budget, rms) in CONTRACT.items()},
        "counts": {name: summary(found) for name, found in contract.items()} | {"null space, no gap": summary(hard)},
        "accuracy": accuracy,
        "rows": {
            name: [[row["truth"], row["lower"], row["estimate"], *row["interval"]] for row in found]
            for name, found in contract.items()
        },
    }
    (arguments.out / "counting.json").write_text(json.dumps(result, indent=1) + "\n")
    draw_figure(arguments.out / "counting.png", result, contract)
    update_page("counting", readme_section(result))
    print(readme_section(result))


if __name__ == "__main__":
    main()
