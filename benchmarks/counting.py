"""Counts of positive eigenvalues at d = 16,384 against known spectra: errors, coverage, and what other methods say.

    python benchmarks/counting.py --seeds 100

Each operator is a diagonal in a reflected basis, in float32, declared symmetric, so that a product counts once. Every
seed draws the spectrum, the reflection and the start vectors anew. Finished counts are kept in
``--rows`` and are not repeated, so an interrupted benchmark goes on. `count_coverage` tries more spectra and budgets.
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
from exact_jacobian import environment
from page import FIGURES, update_page

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


def ours(name: str, budget: float, seed: int) -> dict[str, Any]:
    operator, truth = draw(name, seed)
    start = time.perf_counter()
    count = count_positive(operator, max_products=int(budget * SIZE), key=jax.random.key(seed))
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


def page_section(result: dict[str, Any]) -> str:
    """The benchmark as the page of benchmarks shows it."""
    lines = [
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
    parser.add_argument("--seeds", type=int, default=100)
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
    work = [("count", name, budget, seed) for seed in range(arguments.seeds) for name, (budget, _) in CONTRACT.items()]
    work += [("count", "null space, no gap", 0.06, seed) for seed in range(arguments.other_seeds)]
    for name in ("gap", "no gap"):
        for budget in BUDGETS:
            seeds = range(arguments.other_seeds)
            work += [("count", name, budget, s) for s in seeds] + [("others", name, budget, s) for s in seeds]
    rows = {}
    for task, name, budget, seed in dict.fromkeys(work):
        key = (task, name, budget, seed)
        if key not in known:
            row = (ours if task == "count" else others)(name, budget, seed)
            known[key] = {"task": task, "name": name, "budget": budget, "seed": seed, **row}
            with open(arguments.rows, "a") as stream:
                stream.write(json.dumps(known[key]) + "\n")
        rows[key] = known[key]

    def select(task: str, name: str, budget: float, seeds: int) -> list[dict[str, Any]]:
        return [rows[task, name, budget, seed] for seed in range(seeds)]

    contract = {name: select("count", name, budget, arguments.seeds) for name, (budget, _) in CONTRACT.items()}
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
        "what": f"positive eigenvalues of rotated diagonals, d = {SIZE:,}, float32, declared symmetric",
        "environment": environment(),
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
    draw_figure(FIGURES / "counting.png", result, contract)
    update_page("benchmarks", "counting", page_section(result))
    print(page_section(result))


if __name__ == "__main__":
    main()
