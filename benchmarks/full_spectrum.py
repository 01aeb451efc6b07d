"""All 16,384 eigenvalues of a trained U-Net's Hessian on two CPU cores, and what the paper's Arnoldi would cost.

    python benchmarks/full_spectrum.py --folder runs/full_spectrum

Every stage is a process of its own, whose peak memory is measured; a second start goes on where the first ended. The
columns of the matrix are killed once (kill -9) after a third of them, and resumed. The whole takes an hour or two.
"""

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.ndimage
import scipy.optimize
from exact_jacobian import environment
from flax import nnx
from page import FIGURES, update_page

from jaxmem import Dense, Lanczos, bind, count_positive, score_jacobian, spectrum
from jaxmem.config import TrainingConfig
from jaxmem.data.mnist import load_subset, to_pixels
from jaxmem.diffusion import NoiseSchedule
from jaxmem.krylov import begin, extend
from jaxmem.memorization.sharpness import below_bound, positive_count, tangent_count
from jaxmem.networks.unet import UNet
from jaxmem.report.style import GENERAL as BLUE
from jaxmem.report.style import NEUTRAL, REFERENCE, figure
from jaxmem.runs.durable import append_line, as_json, json_writer, read_lines, write_atomically
from jaxmem.runs.progress import show_progress
from jaxmem.spectra.dense import dense_cost
from jaxmem.spectra.measure import run_krylov
from jaxmem.spectra.ritz import ritz_pairs
from jaxmem.training import train

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = RESULTS.parent.parent
SCHEDULE = NoiseSchedule()
CHANNELS, FEATURES, NUM_BLOCKS, NUM_HEADS = 4, (32, 64, 128), (1, 1, 2), (0, 2, 4)
PATCH = {64: 2, 24: 1}  # by side of the latents: 16,384 dimensions, and 2,304 for the comparison with Arnoldi
STEPS = {64: 1000, 24: 500}
BUDGETS, COUNTS = (0.02, 0.04, 0.06, 0.12), 10  # products of a count in d, and keys for each
MEMORIZED_SHARE = 0.1
TIMESTEP, GENERAL, KEY = 100, 0, 0
ROOMS = (1024, 2048, 4096, 8192, 16_384)  # steps that a basis has room for
LIMIT = 8 * 2**30  # bytes that any stage may take


def latents(side: int) -> tuple[np.ndarray, np.ndarray]:
    """``(latents, classes)``: 750 of four different threes each, one per channel, and one of the nine four times.

    The digits of the shipped subset, resized to ``side × side`` by linear interpolation. Every three is used once.
    """
    threes, nine = load_subset()
    digits = to_pixels(np.concatenate([threes, np.repeat(nine[None], CHANNELS, 0)]))[..., 0]
    resized = scipy.ndimage.zoom(digits, (1, side / 28, side / 28), order=1)
    by_channel = resized.reshape(-1, CHANNELS, side, side).transpose(0, 2, 3, 1)
    return by_channel, (np.arange(len(by_channel)) == len(by_channel) - 1).astype(np.int32)


def trained(side: int, folder: Path) -> tuple[Any, Any]:
    """The score and its parameters, trained (on from the last checkpoint) or read."""
    module = UNet(
        (side, side, CHANNELS),
        num_classes=2,
        schedule=SCHEDULE,
        patch=PATCH[side],
        features=FEATURES,
        num_blocks=NUM_BLOCKS,
        num_heads=NUM_HEADS,
        rngs=nnx.Rngs(0),
    )
    score, state = bind(module, SCHEDULE, "eps")
    path = folder / f"state-{side}.npz"
    if path.exists():  # without the hundreds of megabytes that reading a checkpoint takes
        with np.load(path) as arrays:
            leaves = [jnp.asarray(arrays[name]) for name in arrays.files]
        return score, jax.tree.unflatten(jax.tree.structure(state), leaves)
    config = TrainingConfig(num_steps=STEPS[side], batch_size=16, ema_decay=0.99, checkpoint_every=100)
    x0, classes = latents(side)
    probabilities = np.where(classes == 1, MEMORIZED_SHARE, (1 - MEMORIZED_SHARE) / np.sum(classes == 0))
    start = time.perf_counter()
    with show_progress() as progress:
        result = train(
            score,
            state,
            (jnp.asarray(x0), jnp.asarray(classes)),
            SCHEDULE,
            config,
            probabilities=jnp.asarray(probabilities, jnp.float32),
            folder=folder / f"checkpoints-{side}",
            progress=lambda _, step, total: progress(f"train {side}×{side}×{CHANNELS}", step, total),
        )
    if len(result.losses):  # what this start trained
        seconds = time.perf_counter() - start
        append_line(folder / "training.jsonl", {"side": side, "seconds": seconds, "losses": result.losses.tolist()})
    leaves = jax.tree.leaves(result.state)
    write_atomically(path, lambda stream: np.savez(stream, *leaves))
    return score, result.state


def operator_at(side: int, folder: Path) -> tuple[Any, int]:
    """The Jacobian at a noised training latent of the general class, and the number of the network's parameters."""
    score, state = trained(side, folder)
    x0 = jnp.asarray(latents(side)[0][0])
    x = SCHEDULE.add_noise(x0, jax.random.normal(jax.random.key(KEY), x0.shape), TIMESTEP)
    operator = score_jacobian(score, state, x, jnp.int32(TIMESTEP), jnp.int32(GENERAL))
    return operator, sum(leaf.size for leaf in jax.tree.leaves(state))


def release() -> None:
    """Give back what compiling left with the allocator, 0.3 GB, before the matrix is read."""
    jax.clear_caches()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


class Clock:
    """A progress callable that knows how long each task took."""

    def __init__(self, progress: Any) -> None:
        self.progress, self.seconds, self._task, self._since = progress, {}, None, 0.0

    def __call__(self, task: str, completed: int, total: int) -> None:
        now = time.perf_counter()
        if task != self._task:
            if task == "read":
                release()
            # What was done between two tasks belongs to the later one.
            self._since = now if self._task is None else self._last
            self._task = task
        self._last = now
        self.seconds[task] = now - self._since
        self.progress(task, completed, total)


def dense(folder: Path, side: int) -> dict[str, Any]:
    operator, parameters = operator_at(side, folder)
    cost = dense_cost(operator)
    print(f"d = {operator.size:,}: {cost}", file=sys.stderr)
    with show_progress() as progress:
        clock = Clock(progress)
        found = spectrum(operator, Dense(folder=folder / f"columns-{side}"), progress=clock)
    write_atomically(folder / f"eigenvalues-{side}.npy", lambda stream: np.save(stream, found.eigenvalues))
    sigma = float(SCHEDULE.sigma[TIMESTEP])
    values = found.eigenvalues
    start = time.perf_counter()
    lanczos = spectrum(operator, Lanczos(100), key=jax.random.key(1))
    return {
        "dimension": operator.size,
        "parameters": parameters,
        "seconds_of_the_last_start": clock.seconds,
        "promised": cost._asdict(),
        "num_products": int(found.num_products),
        "asymmetry": float(found.asymmetry),
        "noise": float(found.noise),
        "lower_bound": -1 / sigma**2,
        "largest": float(values[0]),
        "smallest": float(values[-1]),
        "positive": int(positive_count(values)),
        "certified_positive": int(positive_count(values, found.noise)),
        "tangent": int(tangent_count(values, sigma)),
        "share_below_bound": float(below_bound(values, sigma, found.noise)),
        "lanczos_100": {
            "seconds": time.perf_counter() - start,
            "num_products": int(lanczos.num_products),
            "largest_differs_by": float(abs(lanczos.eigenvalues[0] - values[0])),
            "smallest_differs_by": float(abs(lanczos.eigenvalues[-1] - values[-1])),
            "residuals": [float(lanczos.residuals[0]), float(lanczos.residuals[-1])],
        },
    }


def arnoldi(folder: Path) -> dict[str, Any]:
    """The paper's Algorithm 1 with m = d against LAPACK on the same J, at 24×24×4."""
    operator, _ = operator_at(24, folder)
    size, vector = operator.size, jax.random.normal(jax.random.key(1), (operator.size,))
    start = time.perf_counter()
    factorization, _ = jax.device_get(run_krylov(operator, vector, size, symmetric=False, tolerance=0.0))
    seconds = {"arnoldi": time.perf_counter() - start}
    steps = int(factorization.num_steps)
    start = time.perf_counter()
    a = np.linalg.eigvals(np.asarray(factorization.hessenberg[:steps, :steps], np.float64))
    seconds["hessenberg"] = time.perf_counter() - start
    start = time.perf_counter()
    tridiagonal, _ = jax.device_get(run_krylov(operator, vector, size, symmetric=True, tolerance=0.0))
    ritz = ritz_pairs(tridiagonal, symmetric=True).values
    seconds["lanczos"] = time.perf_counter() - start
    symmetric = np.load(folder / "eigenvalues-24.npy")
    start = time.perf_counter()
    exact = spectrum(operator, Dense(symmetric=False))
    seconds["eig"] = time.perf_counter() - start
    b = exact.eigenvalues
    distance = np.abs(a[:, None] - b[None])
    rows, columns = scipy.optimize.linear_sum_assignment(distance)
    matched = distance[rows, columns]
    radius = float(np.abs(b).max())
    return {
        "dimension": size,
        "seconds": seconds,
        "num_products": {"arnoldi": steps, "eig": int(exact.num_products), "lanczos": 2 * len(ritz)},
        "steps": steps,
        "asymmetry": float(exact.asymmetry),
        "noise": float(exact.noise),
        "spectral_radius": radius,
        "complex_eigenvalues": {"arnoldi": int((a.imag != 0).sum()), "eig": int((b.imag != 0).sum())},
        "matched_one_to_one": {
            "largest_distance": float(matched.max()),
            "median_distance": float(np.median(matched)),
            "largest_relative_to_radius": float(matched.max()) / radius,
        },
        "lanczos_from_dense_spectrum": float(np.abs(ritz - symmetric).max()),
        "positive_real_part": {"arnoldi": int((a.real > 0).sum()), "eig": int((b.real > 0).sum())},
    }


@partial(jax.jit, static_argnames="steps", donate_argnames="factorization")
def go_on(operator: Any, factorization: Any, steps: int) -> Any:
    return extend(operator.mv, factorization, steps, symmetric=False, tolerance=0.0)


def arnoldi_steps(folder: Path) -> dict[str, Any]:
    """Seconds of a step of `jaxmem.krylov` at d = 16,384 by the room of the basis and how full it is."""
    operator, _ = operator_at(64, folder)
    size, rows, steps = operator.size, [], 4
    product = jax.jit(lambda operator, v: operator.mv(v))
    vector = jax.random.normal(jax.random.key(1), (size,))
    product(operator, vector).block_until_ready()
    times = []
    for _ in range(20):
        start = time.perf_counter()
        product(operator, vector).block_until_ready()
        times.append(time.perf_counter() - start)
    for room in ROOMS:
        empty = jax.eval_shape(lambda v, room=room: begin(v, room), vector)
        compiled = go_on.lower(operator, empty, steps).compile()
        analysis = compiled.memory_analysis()
        needed = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
        print(f"room {room:,}: {needed / 1e9:.2f} GB", file=sys.stderr)
        if needed > LIMIT - 2**30:  # beside JAX itself
            rows.append({"room": room, "bytes": needed, "seconds_per_step": None})
            continue
        for fill in (0, room // 2, room - 2 * steps):
            # Unit vectors stand for the basis of the first steps: orthonormal, and as many numbers to go through.
            now, index = begin(jnp.eye(1, size)[0], room), jnp.arange(1, fill + 1)
            now = now._replace(basis=now.basis.at[index, index].set(1.0), num_steps=jnp.int32(fill))
            seconds = []
            for _ in range(2):
                start = time.perf_counter()
                now = jax.block_until_ready(compiled(operator, now))
                seconds.append((time.perf_counter() - start) / steps)
            if int(now.num_steps) != fill + 2 * steps:
                raise RuntimeError(f"expected {fill + 2 * steps} steps, got {int(now.num_steps)}")
            del now
            rows.append({"room": room, "fill": fill, "bytes": needed, "seconds_per_step": min(seconds)})
            print(rows[-1], file=sys.stderr)
    return {"dimension": size, "product_seconds": float(np.median(times)), "steps": rows}


def check(folder: Path) -> dict[str, Any]:
    """The spectrum against what the matrix tells without eigenvalues: trace, norm, and inertia by Sylvester's law."""
    values = np.load(folder / "eigenvalues-64.npy")
    stored = np.load(folder / "columns-64" / "jacobian.npy", mmap_mode="r")
    size, square, start = len(values), 0.0, time.perf_counter()
    matrix = np.empty((size, size), order="F")
    for first in range(0, size, 256):
        part = slice(first, first + 256)
        matrix[:, part] = (stored[:, part].astype(np.float64) + stored[part].T) / 2
        square += float(np.sum(matrix[:, part] ** 2))
    trace = float(np.trace(matrix))
    factor, pivots, info = scipy.linalg.lapack.dsytrf(matrix, lower=1, lwork=64 * size, overwrite_a=1)
    if info < 0:
        raise RuntimeError(f"dsytrf: {info}")
    # A pivot of one row is positive or not; one of two rows (negative in ``pivots``) has one eigenvalue of each sign.
    single = pivots > 0
    positive = int((np.diagonal(factor)[single] > 0).sum() + (~single).sum() // 2)
    return {
        "trace_relative": abs(values.sum() - trace) / abs(trace),
        "norm_relative": abs(np.sqrt(np.sum(values**2)) - np.sqrt(square)) / np.sqrt(square),
        "positive_by_eigenvalues": int((values > 0).sum()),
        "positive_by_inertia": positive,
        "seconds": time.perf_counter() - start,
    }


def counts(folder: Path) -> dict[str, Any]:
    """What `count_positive` says of the operator whose eigenvalues are all known, by budget and key."""
    operator, _ = operator_at(64, folder)
    values = np.load(folder / "eigenvalues-64.npy")
    sigma = float(SCHEDULE.sigma[TIMESTEP])
    rows = []
    for budget in BUDGETS:
        for seed in range(COUNTS):
            start = time.perf_counter()
            found = count_positive(
                operator, max_products=int(budget * operator.size), key=jax.random.key(seed), sigma=sigma
            )
            assert found.tangent is not None
            row = {"budget": budget, "seed": seed, "seconds": time.perf_counter() - start}
            rows.append(row | found._asdict() | {"tangent": found.tangent._asdict()})
    return {"positive": int(positive_count(values)), "tangent": int(tangent_count(values, sigma)), "rows": rows}


def solvers(_: Path) -> dict[str, Any]:
    """Seconds of LAPACK's drivers for eigenvalues alone, by SciPy in both precisions, and of JAX's in float32."""
    rows = []
    for size in (2048, 4096):
        half = np.random.default_rng(0).normal(size=(size, size))
        symmetric = half + half.T
        ways = {
            (driver, dtype): partial(
                scipy.linalg.eigh, eigvals_only=True, overwrite_a=True, check_finite=False, driver=driver
            )
            for driver in ("evd", "evr", "ev")
            for dtype in ("float64", "float32")
        }
        ways["jax.numpy.linalg.eigvalsh", "float32"] = lambda matrix: np.asarray(jnp.linalg.eigvalsh(matrix))
        for (driver, dtype), solve in ways.items():
            matrix = np.asfortranarray(symmetric.astype(dtype))
            start, cpu = time.perf_counter(), time.process_time()
            solve(matrix)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            rows.append({"size": size, "driver": driver, "dtype": dtype, "seconds": seconds, "cpu_seconds": cpu})
            print(rows[-1], file=sys.stderr)
    return {"rows": rows}


STAGES = {
    "train-24": lambda folder: trained(24, folder) and {},
    "train-64": lambda folder: trained(64, folder) and {},
    "dense-24": partial(dense, side=24),
    "dense-64": partial(dense, side=64),
    "arnoldi-24": arnoldi,
    "arnoldi-steps-64": arnoldi_steps,
    "check-64": check,
    "counts-64": counts,
    "solvers": solvers,
}


def run(stage: str, folder: Path, kill_at: float | None = None) -> None:
    """Run a stage in a process of its own, or kill it when this share of its columns is there; note what it took."""
    command = [sys.executable, __file__, "--folder", str(folder), "--stage", stage]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    start = time.perf_counter()
    child = subprocess.Popen(command, env=environ)
    record, columns, killed, ended = folder / stage.replace("dense", "columns") / "jacobian.json", 0, False, 0
    while not ended:
        ended, status, usage = os.wait4(child.pid, 0 if kill_at is None or killed else os.WNOHANG)
        if ended or kill_at is None or killed:
            continue
        time.sleep(0.2)
        if record.exists():
            entries = json.loads(record.read_text())
            columns = min(len(entries["sums"]) * entries["chunk"], entries["size"])
            if killed := columns >= kill_at * entries["size"]:
                child.send_signal(signal.SIGKILL)
    if os.waitstatus_to_exitcode(status) != (-signal.SIGKILL if killed else 0):
        raise SystemExit(f"{stage}: ended with {os.waitstatus_to_exitcode(status)}")
    unit = 1 if sys.platform == "darwin" else 1024
    row = {"stage": stage, "seconds": time.perf_counter() - start, "peak_bytes": usage.ru_maxrss * unit}
    row |= {"cpu_seconds": usage.ru_utime + usage.ru_stime, "load_average": list(os.getloadavg())}
    append_line(folder / "processes.jsonl", row | ({"killed_with_columns": columns} if killed else {}))


def fit(steps: dict[str, Any]) -> dict[str, Any]:
    """What m = d would cost: seconds of a step are ``constant + slope · room``, whatever the fill."""
    size = steps["dimension"]
    known = [row for row in steps["steps"] if row["seconds_per_step"] is not None]
    rooms, seconds = (np.array([row[name] for row in known]) for name in ("room", "seconds_per_step"))
    slope, constant = np.polyfit(rooms, seconds, 1)
    full = [row["seconds_per_step"] for row in known if row["room"] == size]
    step = float(np.median(full)) if full else float(constant + slope * size)
    return {
        "seconds_per_step_at_room_d": step,
        "room_d_was_measured": bool(full),
        "seconds_of_d_steps": step * size,
        "seconds_of_d_steps_if_the_basis_grew_with_the_steps": float(constant * size + slope * size**2 / 2),
        "products": size,
        "basis_bytes": 4 * (size + 1) * size,
        "hessenberg_bytes": 4 * (size + 1) * size,
        "bytes_in_all": max(row["bytes"] for row in steps["steps"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "full_spectrum", help="for what is resumed")
    parser.add_argument("--stage", choices=STAGES, help="run one stage alone, in this process")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.stage:
        found = as_json(STAGES[arguments.stage](folder), arguments.stage)
        write_atomically(folder / f"{arguments.stage}.json", json_writer(found))
        return
    for stage in STAGES:
        if (folder / f"{stage}.json").exists():
            continue
        log = folder / "processes.jsonl"
        if stage == "dense-64" and not (log.exists() and any("killed_with_columns" in row for row in read_lines(log))):
            run(stage, folder, kill_at=1 / 3)
        run(stage, folder)
    report(folder)


def report(folder: Path) -> None:
    found = {stage: json.loads((folder / f"{stage}.json").read_text()) for stage in STAGES}
    processes, training = read_lines(folder / "processes.jsonl"), read_lines(folder / "training.jsonl")
    extrapolated = fit(found["arnoldi-steps-64"])
    small, large = found["arnoldi-24"], found["dense-64"]
    starts = [row for row in processes if row["stage"] == "dense-64"]
    factor = (large["dimension"] / small["dimension"]) ** 3
    extrapolated["seconds_of_the_hessenberg_eigenvalues"] = small["seconds"]["hessenberg"] * factor
    result = {
        "what": "all eigenvalues of the symmetric part of a trained U-Net's score Jacobian, 64x64x4, float32 products",
        "network": {
            "parameters": found["dense-64"]["parameters"],
            "features": FEATURES,
            "num_blocks": NUM_BLOCKS,
            "num_heads": NUM_HEADS,
            "patch": PATCH[64],
            "training_steps": STEPS[64],
            "training_seconds": sum(row["seconds"] for row in training if row["side"] == 64),
            "last_loss": [row["losses"][-1][1] for row in training if row["side"] == 64][-1],
            "latents": " ".join((latents.__doc__ or "").split()),
            "timestep": TIMESTEP,
        },
        "environment": environment(),
        "dense": large
        | {
            "checks": found["check-64"],
            "starts": starts,
            "seconds": sum(row["seconds"] for row in starts),
            "peak_bytes": max(row["peak_bytes"] for row in starts),
        },
        "dense_2304": found["dense-24"] | next(row for row in processes if row["stage"] == "dense-24"),
        "solvers": found["solvers"]["rows"],
        "arnoldi_2304": small,
        "arnoldi_steps": found["arnoldi-steps-64"],
        "arnoldi_extrapolated": extrapolated,
        "counts": found["counts-64"],
        "processes": processes,
    }
    result["side_by_side"] = side_by_side(result)
    write_atomically(RESULTS / "full_spectrum.json", json_writer(as_json(result, "result")))
    print_table(result)
    update_page("benchmarks", "full spectrum", page_section(result))
    draw(np.load(folder / "eigenvalues-64.npy"), large)


def print_table(result: dict[str, Any]) -> None:
    print(f"{'way':<62}{'products':>9}{'seconds':>9}{'peak GB':>9}{'disk GB':>9}")
    for row in result["side_by_side"]:
        peak, disk = (f"{row[name] / 1e9:.2f}" if row[name] else "" for name in ("peak_bytes", "disk_bytes"))
        print(f"{row['way']:<62}{row['products']:>9,}{row['seconds']:>9,.0f}{peak:>9}{disk:>9}")


def page_section(result: dict[str, Any]) -> str:
    """The benchmark as the page of benchmarks shows it."""
    lines = ["| way | products | seconds | peak, GB | disk, GB |", "|---|--:|--:|--:|--:|"]
    for row in result["side_by_side"]:
        peak, disk = (f"{row[name] / 1e9:.2f}" if row[name] else "" for name in ("peak_bytes", "disk_bytes"))
        lines.append(f"| {row['way']} | {row['products']:,} | {row['seconds']:,.0f} | {peak} | {disk} |")
    found = result["counts"]
    truth = found["positive"], found["tangent"]
    lines += [
        "",
        f"Counts of the same operator, whose {truth[0]} positive and {truth[1]} tangent eigenvalues are known:",
        "",
        "| budget | first three estimates of the positive | rms error | interval covers | certified, median |"
        " the paper's count, median | tangent: rms error, covers |",
        "|--:|---|--:|--:|--:|--:|--:|",
    ]
    for budget in BUDGETS:
        rows = [row for row in found["rows"] if row["budget"] == budget]
        shown = ", ".join("{:.1f} [{:.1f}, {:.1f}]".format(row["estimate"], *row["interval"]) for row in rows[:3])
        cells = []
        for estimates, true in ((rows, truth[0]), ([row["tangent"] for row in rows], truth[1])):
            rms = np.sqrt(np.mean([(row["estimate"] - true) ** 2 for row in estimates]))
            covered = sum(row["interval"][0] <= true <= row["interval"][1] for row in estimates)
            cells.append((f"{rms:.1f}", f"{covered} of {len(rows)}"))
        lower, paper = (np.median([row[name] for row in rows]) for name in ("lower", "paper"))
        lines.append(
            f"| {100 * budget:g} % of d | {shown} | {cells[0][0]} | {cells[0][1]} | {lower:.0f} | {paper:.0f} |"
            f" {cells[1][0]}, {cells[1][1]} |"
        )
    return "\n".join(lines)


def side_by_side(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The ways to all eigenvalues; the peak is that of a whole process, JAX and the compiler included."""
    large, small, rest = result["dense"], result["arnoldi_2304"], result["arnoldi_extrapolated"]
    peaks = {process["stage"]: process["peak_bytes"] for process in result["processes"]}
    seconds, products = small["seconds"], small["num_products"]

    def row(way: str, products: int, seconds: float, peak: int = 0, disk: int = 0) -> dict[str, Any]:
        return {"way": way, "products": products, "seconds": seconds, "peak_bytes": peak, "disk_bytes": disk}

    def dense_row(way: str, found: dict[str, Any]) -> dict[str, Any]:
        return row(way, found["num_products"], found["seconds"], found["peak_bytes"], found["promised"]["disk_bytes"])

    return [
        dense_row("2,304: Dense(folder), symmetric part, whole process", result["dense_2304"]),
        row("2,304: Lanczos, m = d, symmetric part", products["lanczos"], seconds["lanczos"]),
        row("2,304: Dense(symmetric=False), of J", products["eig"], seconds["eig"]),
        row("2,304: Arnoldi, m = d, of J", products["arnoldi"], seconds["arnoldi"] + seconds["hessenberg"]),
        dense_row("16,384: Dense(folder), killed once, all processes", large),
        row(
            "16,384: Arnoldi, m = d, steps (extrapolated)",
            rest["products"],
            rest["seconds_of_d_steps"],
            peaks["arnoldi-steps-64"],
        ),
        row(
            "16,384: the same if the basis grew with the steps",
            rest["products"],
            rest["seconds_of_d_steps_if_the_basis_grew_with_the_steps"],
        ),
        row(
            "16,384: eigenvalues of its Hessenberg matrix (extrapolated)",
            0,
            rest["seconds_of_the_hessenberg_eigenvalues"],
        ),
    ]


def draw(values: np.ndarray, facts: dict[str, Any]) -> None:
    bound = facts["lower_bound"]
    label = rf"$-1/\sigma^2$ = {bound:.3g}".replace("= -", "= −")
    with figure(FIGURES / "full_spectrum.png", 9.6, 3.8) as canvas:
        left, right = canvas.subplots(1, 2)
        left.plot(np.arange(1, len(values) + 1), values, color=BLUE)
        left.axhline(0, color=NEUTRAL, linewidth=0.8)
        left.axhline(bound, color=REFERENCE, linestyle="--", linewidth=1, label=label)
        left.set_xlabel("eigenvalue, from the largest")
        left.set_ylabel(r"eigenvalue of $\nabla^2\log p_t(x\,|\,c)$")
        left.legend()
        right.hist(values, bins=120, color=BLUE, log=True)
        right.axvline(0, color=NEUTRAL, linewidth=0.8)
        right.axvline(bound, color=REFERENCE, linestyle="--", linewidth=1, label=label)
        right.set_xlabel(r"eigenvalue of $\nabla^2\log p_t(x\,|\,c)$")
        right.set_ylabel("how many")
        right.legend()
        canvas.suptitle(
            f"All {len(values):,} eigenvalues, 64×64×4, t = {TIMESTEP}: {facts['positive']:,} positive,"
            f" {facts['tangent']:,} above $-1/(2\\sigma^2)$",
            fontsize=10,
        )


if __name__ == "__main__":
    main()
