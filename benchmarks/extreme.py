"""What extreme eigenpairs cost in products at d = 16,384: `Extreme`, ARPACK, matfree, the paper's Algorithm 1.

    pip install --target /tmp/matfree --no-deps matfree
    PYTHONPATH=/tmp/matfree python benchmarks/extreme.py

All multiply by the same operator from the same start vectors; ours, ARPACK in float32 and matfree through the same
compiled function. A method counts when the worst true residual of the wanted pairs, by the operator's closed form in
float64, is at most ``rtol`` times its norm. Who has no stopping rule (matfree, Algorithm 1) or needs a parameter
(ARPACK's subspace) is given the best one afterwards: a bound on what it can do, not what its user would get. ARPACK is
also run as it comes, and matfree by doubling its steps until the residual is small. Medians of five start vectors.

matfree is pure Python and no dependency of this project; without it its lines are absent, and the output says so.
"""

import argparse
import itertools
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft
import scipy.sparse.linalg
from exact_jacobian import environment
from page import FIGURES

from jaxmem import Extreme, NoiseSchedule, from_matvec, score_jacobian, spectrum
from jaxmem.function_operators import MatrixOperator
from jaxmem.krylov import lanczos
from jaxmem.operators import Operator
from jaxmem.oracles import Separable, SeparableScore

ROOT = Path(__file__).resolve().parent.parent
D, SEEDS, RTOL = 16_384, 5, 1e-4
SUBSPACES = (20, 40, 70, 100, 160, 280)
STEPS = 340  # of the methods without a stopping rule; more than any of the problems needs

try:
    from matfree import decomp
except ImportError:
    decomp = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rotated(Operator):
    """A diagonal matrix in the basis of cosines."""

    values: Any
    is_symmetric = True
    size = property(lambda self: self.values.shape[0])
    dtype = property(lambda self: self.values.dtype)

    def mv(self, vector: Any) -> Any:
        return jax.scipy.fft.idct(self.values * jax.scipy.fft.dct(vector, norm="ortho"), norm="ortho")

    rmv = mv


@dataclass
class Problem:
    name: str
    operator: Any
    values: np.ndarray  # by the closed form, in the rotated basis
    signs: np.ndarray
    num_pairs: int
    which: str

    def __post_init__(self) -> None:
        self.norm = np.abs(self.values).max()
        self.calls = 0

    def product(self, vectors: np.ndarray) -> np.ndarray:
        """In float64, rows."""
        self.calls += 1
        rotated = scipy.fft.dct(self.signs * vectors, norm="ortho", axis=-1)
        return self.signs * scipy.fft.idct(self.values * rotated, norm="ortho", axis=-1)

    def residual(self, vectors: np.ndarray, values: np.ndarray) -> float:
        """The worst true one, relative to the norm."""
        vectors = np.asarray(vectors, np.float64)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return float(np.linalg.norm(self.product(vectors) - values[:, None] * vectors, axis=1).max() / self.norm)

    def missed(self, values: np.ndarray) -> float:
        """How far the wanted eigenvalues are from the true ones, relative to the norm."""
        exact = np.sort(self.values)[::-1][self.wanted(D)]
        return float(np.abs(np.sort(values)[::-1] - exact).max() / self.norm)

    def wanted(self, count: int) -> np.ndarray:
        bottom = {"largest": 0, "smallest": self.num_pairs, "both": self.num_pairs // 2}[self.which]
        index = np.arange(count)
        return index[(index < self.num_pairs - bottom) | (index >= count - bottom)]


def problems() -> list[Problem]:
    rng, t, schedule = np.random.default_rng(0), 300, NoiseSchedule()
    alpha, sigma = schedule.alpha[t], schedule.sigma[t]

    def separable(ratios: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray]:
        signs = rng.choice([-1.0, 1.0], D)
        ratios = rng.permutation(ratios)
        state = Separable(jnp.asarray(ratios * sigma / alpha, jnp.float32), jnp.asarray(signs, jnp.float32))
        score, x = SeparableScore(schedule), jnp.zeros(D)
        # Known to be symmetric: one product a step for everyone.
        operator = from_matvec(score_jacobian(score, state, x, t).mv, D, symmetric=True)
        return operator, score._rotated_curvature(state, x, t), signs

    free = np.r_[np.linspace(1.2, 2, 24), rng.uniform(0.1, 0.9, D - 24)]
    dense = np.sqrt(np.maximum(1 + 0.25 * rng.normal(size=D), 0.01))
    uniform = rng.uniform(-1, 1, D).astype(np.float32)
    return [
        Problem("score, 24 free directions above a gap", *separable(free), 8, "largest"),
        Problem("score, normal curvatures, no gap", *separable(dense), 4, "largest"),
        Problem("rotated diagonal, uniform, both ends", Rotated(jnp.asarray(uniform)), uniform, np.ones(D), 2, "both"),
    ]


def start_of(seed: int) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(jax.random.key(seed), 0), (D,), jnp.float32)


def run_ours(problem: Problem, seed: int, rtol: float = RTOL, **options: Any) -> dict[str, float]:
    method = Extreme(problem.num_pairs, problem.which, max_products=2000, rtol=rtol, **options)
    result = spectrum(problem.operator, method, key=jax.random.key(seed), vectors=True)
    return {
        "products": result.num_products,
        "residual": problem.residual(result.vectors, result.eigenvalues),
        "missed": problem.missed(result.eigenvalues),
        "status": result.status.name,
    }


@jax.jit
def multiply(operator: Any, vector: jax.Array) -> jax.Array:
    return operator.mv(vector)


def run_arpack(
    problem: Problem, seed: int, ncv: int | None, dtype: str, rtol: float = RTOL, loose: bool = False
) -> Any:
    calls = []

    def mv(vector: np.ndarray) -> np.ndarray:
        calls.append(None)
        if dtype == "float64":
            return problem.product(vector.reshape(-1))
        return np.asarray(multiply(problem.operator, vector.reshape(-1)))

    exact = np.sort(problem.values)[::-1][problem.wanted(D)]
    # ARPACK's tolerance is relative to each eigenvalue: right for the largest wanted, or for the smallest.
    tol = rtol * problem.norm / (np.abs(exact).min() if loose else np.abs(exact).max())
    which = {"largest": "LA", "smallest": "SA", "both": "BE"}[problem.which]
    matrix = scipy.sparse.linalg.LinearOperator((D, D), mv, dtype=np.dtype(dtype))
    start = np.asarray(start_of(seed), dtype)
    try:
        values, vectors = scipy.sparse.linalg.eigsh(
            matrix, k=problem.num_pairs, which=which, ncv=ncv, v0=start, tol=tol, maxiter=400
        )
    except scipy.sparse.linalg.ArpackError as error:
        return {
            "products": len(calls),
            "residual": float("inf"),
            "missed": float("inf"),
            "status": type(error).__name__,
        }
    return {
        "products": len(calls),
        "residual": problem.residual(vectors.T, values),
        "missed": problem.missed(values),
        "status": "",
    }


def leading(problem: Problem, basis: np.ndarray, hessenberg: np.ndarray, last: float, steps: int) -> Any:
    """Wanted Ritz values, vectors and the recurrence's residual after ``steps`` of more."""
    square = hessenberg[:steps, :steps]
    values, columns = np.linalg.eigh((square + square.T) / 2)
    values, columns = values[::-1], columns[:, ::-1]
    coupling = abs(hessenberg[steps, steps - 1]) if steps < len(hessenberg) else last
    chosen = problem.wanted(steps)
    return values[chosen], columns[:, chosen].T @ basis[:steps], coupling * np.abs(columns[-1, chosen]).max()


def fewest_steps(problem: Problem, basis: np.ndarray, hessenberg: np.ndarray, last: float, rtol: float) -> Any:
    """The fewest steps whose true residual is small enough: what one would ask for if one knew."""

    def enough(steps: int) -> bool:
        values, vectors, bound = leading(problem, basis, hessenberg, last, steps)
        return bound <= 1.1 * rtol * problem.norm and problem.residual(vectors, values) <= rtol

    coarse = next((steps for steps in range(16, len(basis) + 1, 8) if enough(steps)), len(basis))
    for steps in range(max(problem.num_pairs, coarse - 8), coarse + 1):
        if enough(steps):
            values, vectors, _ = leading(problem, basis, hessenberg, last, steps)
            residual = problem.residual(vectors, values)
            return {"products": steps, "residual": residual, "missed": problem.missed(values), "status": ""}
    return {"products": len(basis), "residual": float("inf"), "missed": float("inf"), "status": "not reached"}


def factorise_matfree(problem: Problem, seed: int, steps: int) -> tuple[np.ndarray, np.ndarray, float]:
    run = decomp.tridiag_sym(steps, reortho="full", custom_vjp=False)
    out = jax.jit(lambda operator, start: run(lambda v, operator: operator.mv(v), start, operator))(
        problem.operator, start_of(seed)
    )
    basis, small = np.asarray(out.Q_tall, np.float64), np.asarray(out.J_small, np.float64)
    basis = basis if basis.shape[1] == D else basis.T
    return basis, small, float(np.linalg.norm(np.asarray(out.residual, np.float64)))


def factorise_paper(problem: Problem, seed: int, steps: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Algorithm 1: modified Gram-Schmidt once, in torch at float64."""
    import torch

    torch.set_num_threads(1)  # vectors of 16,384 numbers are too small for more
    start = torch.from_numpy(np.asarray(start_of(seed), np.float64))
    basis, h = torch.zeros(steps + 1, D, dtype=torch.float64), torch.zeros(steps + 1, steps, dtype=torch.float64)
    basis[0] = start / start.norm()
    for k in range(steps):
        v = torch.from_numpy(problem.product(basis[k].numpy()))
        for j in range(k + 1):
            h[j, k] = basis[j] @ v
            v = v - h[j, k] * basis[j]
        h[k + 1, k] = v.norm()
        if h[k + 1, k] <= 1e-15:  # the paper leaves the threshold open
            break
        basis[k + 1] = v / h[k + 1, k]
    return basis[:steps].numpy(), h.numpy(), 0.0


def doubled(problem: Problem, basis: np.ndarray, hessenberg: np.ndarray, last: float) -> int:
    """Products until doubling the steps, each time from the start, has found what is wanted."""
    steps, spent = 20, 0
    while True:
        steps = min(steps, len(basis))
        spent += steps
        values, vectors, _ = leading(problem, basis, hessenberg, last, steps)
        if problem.residual(vectors, values) <= RTOL or steps == len(basis):
            return spent
        steps *= 2


def multiple() -> dict[str, Any]:
    """The largest eigenvalue sixfold over a bulk, d = 600: wrong answers of ten start vectors, five and eight asked."""
    size, rng = 600, np.random.default_rng(5)
    values = np.r_[np.full(6, 2.0), rng.uniform(-1, 1, size - 6)]
    rotation = np.linalg.qr(rng.normal(size=(size, size)))[0]
    double = (rotation * values) @ rotation.T
    double = (double + double.T) / 2
    matrix = double.astype(np.float32)
    facts: dict[str, Any] = {}
    for count in (5, 8):
        exact = np.sort(values)[::-1][:count]
        found: dict[str, list[tuple[int, bool]]] = {"extreme_pairs": [], "ARPACK float32": [], "ARPACK float64": []}
        for seed in range(10):
            operator = MatrixOperator(jnp.asarray(matrix), symmetric=True)
            ours = spectrum(operator, Extreme(count, max_products=2000), key=jax.random.key(seed))
            found["extreme_pairs"].append((ours.num_products, bool(np.abs(ours.eigenvalues - exact).max() > 1e-3)))
            for dtype in ("float32", "float64"):
                calls: list[None] = []

                def mv(vector: np.ndarray, calls: list[None] = calls, dtype: str = dtype) -> np.ndarray:
                    calls.append(None)
                    return (matrix if dtype == "float32" else double) @ vector

                start = np.random.default_rng(seed).normal(size=size).astype(dtype)
                linear = scipy.sparse.linalg.LinearOperator((size, size), mv, dtype=np.dtype(dtype))
                theirs = scipy.sparse.linalg.eigsh(
                    linear, k=count, which="LA", v0=start, tol=RTOL, return_eigenvectors=False
                )
                wrong = bool(np.abs(np.sort(theirs)[::-1] - exact).max() > 1e-3)
                found[f"ARPACK {dtype}"].append((len(calls), wrong))
        facts[f"{count} largest"] = {
            name: {"wrong": sum(w for _, w in runs), "of": len(runs), "products": [p for p, _ in runs]}
            for name, runs in found.items()
        }
    return facts


def median_row(method: str, runs: list[dict[str, Any]], note: str) -> dict[str, Any]:
    return {
        "method": method,
        "note": note,
        "median_products": float(np.median([run["products"] for run in runs])),
        "products": [run["products"] for run in runs],
        "worst_residual": max(run["residual"] for run in runs),
        "worst_missed": max(run["missed"] for run in runs),
        "reached": all(run["residual"] <= RTOL for run in runs),
        "status": sorted({run["status"] for run in runs}),
    }


def compare_ours(problem: Problem) -> list[dict[str, Any]]:
    seeds = range(SEEDS)
    return [
        median_row("extreme_pairs", [run_ours(problem, s) for s in seeds], "rounding measured for no product"),
        median_row("extreme_pairs, subspace 40", [run_ours(problem, s, subspace=40) for s in seeds], "restarted"),
        median_row("extreme_pairs, block 4", [run_ours(problem, s, block=4) for s in seeds], "4 products together"),
    ]


def compare(problem: Problem) -> list[dict[str, Any]]:
    print(f"comparing: {problem.name}", file=sys.stderr, flush=True)
    seeds = range(SEEDS)
    rows = compare_ours(problem)
    rows.append(median_row("ARPACK float32", [run_arpack(problem, s, None, "float32") for s in seeds], "SciPy's ncv"))
    tuned = []
    for ncv, loose in itertools.product(SUBSPACES, (False, True)):
        runs = [run_arpack(problem, s, ncv, "float32", RTOL, loose) for s in seeds]
        tuned.append(median_row("ARPACK float32, best", runs, f"ncv {ncv}, {'loose' if loose else 'strict'} tol"))
    rows.append(min((row for row in tuned if row["reached"]), key=lambda row: row["median_products"]))
    if decomp is not None:
        factorisations = [factorise_matfree(problem, s, STEPS) for s in seeds]
        fewest = [fewest_steps(problem, *f, RTOL) for f in factorisations]
        rows.append(median_row("matfree, best", fewest, "steps known afterwards"))
        spent = [{**run, "products": doubled(problem, *f)} for run, f in zip(fewest, factorisations, strict=True)]
        rows.append(median_row("matfree, doubled", spent, "20, 40, 80 ... until enough"))
    fewest = [fewest_steps(problem, *factorise_paper(problem, s, STEPS), RTOL) for s in seeds]
    rows.append(median_row("Algorithm 1, best", fewest, "float64, torch; steps known afterwards"))
    return rows


RTOLS = 10.0 ** np.arange(-1.5, -4.6, -0.5)


def curve_ours(problem: Problem) -> list[tuple[int, float]]:
    found = [run_ours(problem, 0, rtol) for rtol in RTOLS]
    return [(run["products"], run["residual"]) for run in found]


def curves(problem: Problem) -> dict[str, list[tuple[int, float]]]:
    """(products, true residual) for one start vector as the tolerance falls."""
    found: dict[str, list[tuple[int, float]]] = {"ARPACK, SciPy's ncv": [], "ARPACK, best ncv": []}
    found["extreme_pairs"] = curve_ours(problem)
    for rtol in RTOLS:
        default = run_arpack(problem, 0, None, "float32", rtol)
        found["ARPACK, SciPy's ncv"].append((default["products"], default["residual"]))
        tuned = [run_arpack(problem, 0, ncv, "float32", rtol) for ncv in SUBSPACES[1:]]
        best = min((run for run in tuned if run["residual"] <= rtol), key=lambda run: run["products"], default=None)
        if best:
            found["ARPACK, best ncv"].append((best["products"], best["residual"]))
    return found


def overhead(problem: Problem, steps: int = 100, rounds: int = 9) -> dict[str, Any]:
    """Seconds of 100 steps beyond 100 products, each pair in turn; medians of the differences."""

    @jax.jit
    def products(operator: Any, vector: jax.Array) -> jax.Array:
        # Scaled, that the numbers stay in range; fused into the product's last loop.
        return jax.lax.fori_loop(0, steps, lambda _, v: operator.mv(v) * jnp.float32(1 / problem.norm), vector)

    @jax.jit
    def loop(operator: Any, vector: jax.Array) -> jax.Array:
        return lanczos(operator.mv, vector, steps).hessenberg

    def whole() -> None:
        # More than can be found: every check is made, and the budget ends it.
        method = Extreme(40, max_products=steps, rtol=1e-12)
        result = spectrum(problem.operator, method, key=jax.random.key(0), vectors=True)
        assert result.num_products == steps

    start = start_of(0)
    tasks = {
        "products": lambda: products(problem.operator, start).block_until_ready(),
        "lanczos": lambda: loop(problem.operator, start).block_until_ready(),
        "extreme_pairs": whole,
    }
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(rounds):
        for name, task in tasks.items():
            begin = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - begin)
    unet = json.loads((ROOT / "benchmarks" / "results" / "stable_diffusion.json").read_text())
    product = float(np.median(unet["seconds"]["jaxmem product with J"]))
    facts: dict[str, Any] = {"steps": steps, "seconds": seconds, "load_average": os.getloadavg()[0]}
    alone = np.asarray(seconds["products"])
    facts["oracle_product_s"] = float(np.median(alone) / steps)
    facts["unet_product_s"] = product
    for name in ("lanczos", "extreme_pairs"):
        beyond = float(np.median(np.asarray(seconds[name]) - alone))
        facts[name] = {
            "beyond_products_s": beyond,
            "relative_to_oracle": beyond / float(np.median(alone)),
            "relative_to_unet": beyond / (steps * product),
        }
    return facts


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank(Operator):
    """F Fᵀ."""

    factor: Any
    is_symmetric = True
    size = property(lambda self: self.factor.shape[0])
    dtype = property(lambda self: self.factor.dtype)

    def mv(self, vector: Any) -> Any:
        return jnp.matmul(self.factor, jnp.matmul(vector, self.factor, precision="highest"), precision="highest")

    rmv = mv


def closing_spaces() -> dict[str, Any]:
    """Operators whose Krylov space closes long before the 30 steps that are asked for."""
    rng = np.random.default_rng(0)
    exact = {"rank 5": [900.0, 30.0, 5.0, 1.0, 0.3], "one axis": [4.0], "zero": [0.0]}
    five = np.linalg.qr(rng.normal(size=(D, 5)))[0] * np.sqrt(exact["rank 5"])
    operators: dict[str, Any] = {
        "rank 5": LowRank(jnp.asarray(five, jnp.float32)),
        "one axis": LowRank(jnp.zeros((D, 1)).at[5, 0].set(2.0)),
        "zero": LowRank(jnp.zeros((D, 1))),
    }
    facts: dict[str, Any] = {}
    for name, operator in operators.items():
        result = spectrum(operator, Extreme(len(exact[name]), max_products=30), key=jax.random.key(0))
        facts[name] = {
            "exact": exact[name],
            "extreme_pairs": {
                "eigenvalues": result.eigenvalues.tolist(),
                "status": result.status.name,
                "products": result.num_products,
            },
        }
        for method in ("tridiag_sym", "hessenberg") if decomp is not None else ():
            run = getattr(decomp, method)(30, reortho="full", custom_vjp=False)
            out = jax.jit(lambda operator, v, run=run: run(lambda v, o: o.mv(v), v, operator))(operator, start_of(0))
            small = np.asarray(out.J_small)
            finite = bool(np.isfinite(small).all())
            facts[name][f"matfree {method}"] = {
                "nan_entries": int(np.isnan(small).sum()),
                "largest": np.sort(np.linalg.eigvals(small).real)[::-1][:5].tolist() if finite else None,
            }
    return facts


def draw(result: dict[str, Any], path: Path) -> None:
    from jaxmem.report.style import GENERAL, MEMORIZED, NEUTRAL, figure

    styles = {
        "extreme_pairs": dict(color=GENERAL, marker="o"),
        "ARPACK, best ncv": dict(color=MEMORIZED, marker="s", linestyle="none"),
        "ARPACK, SciPy's ncv": dict(color=NEUTRAL, marker="^"),
    }
    with figure(path, 10, 3.4) as canvas:
        axes = canvas.subplots(1, len(result["curves"]), sharey=True)
        for ax, (name, found) in zip(axes, result["curves"].items(), strict=True):
            for method, style in styles.items():
                products, residuals = zip(*found[method], strict=True)
                ax.plot(products, residuals, label=method, markersize=4, **style)
            ax.set(title=name, xlabel="products", yscale="log", ylim=(3e-7, 0.3))
        axes[0].set_ylabel("worst true residual / norm")
        axes[0].legend(loc="lower left")


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=130)
    for name, rows in result["comparison"].items():
        table = Table(title=f"{name}: products to a residual of {RTOL:g} ‖A‖, medians of {SEEDS}")
        for column in ("method", "products", "all", "worst residual", "worst error of a value", "note"):
            table.add_column(column, justify="left" if column in ("method", "note") else "right")
        for row in rows:
            products = f"{row['median_products']:.0f}" + ("" if row["reached"] else " (not reached)")
            table.add_row(
                row["method"],
                products,
                " ".join(map(str, row["products"])),
                f"{row['worst_residual']:.1e}",
                f"{row['worst_missed']:.1e}",
                row["note"],
            )
        console.print(table)
    if decomp is None:
        console.print("matfree is not installed: its lines are absent (see the head of this file)")
    for name, facts in result["overhead"].items():
        for method in ("lanczos", "extreme_pairs"):
            one = facts[method]
            console.print(
                f"{name}: {method}, {facts['steps']} steps: {1e3 * one['beyond_products_s']:.1f} ms beyond products,"
                f" {100 * one['relative_to_oracle']:.1f} % of the oracle's,"
                f" {100 * one['relative_to_unet']:.3f} % of the UNet's"
            )
    for name, facts in result["closing_spaces"].items():
        console.print(name, facts)
    for name, facts in result["multiple"].items():
        console.print("sixfold,", name, facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "extreme.json")
    parser.add_argument("--redraw", action="store_true", help="only the figure and the tables, from the file")
    parser.add_argument("--ours", action="store_true", help="only extreme_pairs' products again, into the file")
    args = parser.parse_args()
    if args.redraw:
        result = json.loads(args.out.read_text())
    elif args.ours:
        result = json.loads(args.out.read_text())
        result["environment of extreme_pairs"] = environment()
        result["multiple"] = multiple()
        for name, facts in closing_spaces().items():
            result["closing_spaces"][name] |= {"extreme_pairs": facts["extreme_pairs"]}
        for problem in problems():
            print(f"again: {problem.name}", file=sys.stderr, flush=True)
            rows = result["comparison"][problem.name]
            result["comparison"][problem.name] = compare_ours(problem) + [
                row for row in rows if not row["method"].startswith("extreme_pairs")
            ]
            result["curves"][problem.name]["extreme_pairs"] = curve_ours(problem)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    else:
        facts = environment()
        if decomp is not None:
            from importlib.metadata import version

            facts["matfree"] = version("matfree")
        result = {
            "what": f"products for extreme eigenpairs, d = {D}, float32, residual {RTOL:g} of the norm",
            "environment": facts,
            "comparison": {},
            "curves": {},
            "overhead": {},
            "closing_spaces": closing_spaces(),
            "multiple": multiple(),
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        for problem in problems():
            result["comparison"][problem.name] = compare(problem)
            result["curves"][problem.name] = curves(problem)
            result["overhead"][problem.name] = overhead(problem)
            args.out.write_text(json.dumps(result, indent=1) + "\n")  # what is there so far
    draw(result, FIGURES / "extreme.png")
    show(result)


if __name__ == "__main__":
    main()
