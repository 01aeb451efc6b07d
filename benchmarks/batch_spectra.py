"""All 784 eigenvalues of ½(J + Jᵀ) at many points of one U-Net, in JAX and in torch, with the same weights.

    python benchmarks/batch_spectra.py

Each contender lives in its own subprocess and waits. First every torch candidate (transformation, chunk size, threads)
does a few points, and the fastest goes on. Then ours and torch's take turns: one round is a block of points for each,
so a slow minute of the machine hits both alike, and ratios of seconds per point are taken within a round. Spectra are
compared at every point that both computed. Seconds of processor time are kept too: of a busy machine they say more.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from exact_jacobian import LABEL, ROOT, SIDE, SIZE, TIMESTEP, build_weights, chunked_jacfwd, environment, peak_mb

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
# A device per core keeps the cores busy; LAPACK's own threads would only wait for each other.
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}
PER_CORE = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={CORES}", **ONE_THREAD}
OUR_CHUNK = 56  # the default of batch_spectra; torch's is chosen below
OURS: dict[str, dict[str, Any]] = {
    "batch_spectra, a device per core": {"devices": CORES, "env": PER_CORE},
    "batch_spectra, one device": {"devices": 1, "env": ONE_THREAD},
}
# Threads that spin while they wait for each other are torch's default, and good on an idle machine only.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
CHUNKS = {"jacrev": (28, 56, 112, 196), "jacfwd": (112,)}
TORCH: dict[str, dict[str, Any]] = {
    f"torch.func.{name}, {threads} threads": {"transform": name, "chunks": chunks, "threads": threads, "env": PASSIVE}
    for threads in sorted({CORES, 1}, reverse=True)
    for name, chunks in CHUNKS.items()
} | {"torch.func.jacrev, as it comes": {"transform": "jacrev", "chunks": (112, 196), "threads": CORES, "env": {}}}


def all_points(count: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, SIDE, SIDE, 1)).astype(np.float32)


def ours(name: str, count: int) -> Any:
    import jax
    import jax.numpy as jnp

    from jaxmem import batch_spectra

    _, score, state = build_weights()
    options = OURS[name]
    mesh = jax.make_mesh((options["devices"],), ("points",)) if options["devices"] > 1 else None
    x = all_points(count)

    def spectra(first: int, number: int) -> np.ndarray:
        points = jnp.asarray(x[first : first + number])
        labels = jnp.full(number, LABEL)
        found = batch_spectra(score, state, points, TIMESTEP, labels, mesh=mesh, batch=1, chunk=OUR_CHUNK)
        return found.eigenvalues

    return spectra


def torchs(name: str, chunk: int, count: int) -> Any:
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    from torch_unet import from_state, torch_score

    options = TORCH[name]
    torch.set_num_threads(options["threads"])
    twin, _, state = build_weights()
    model = from_state(twin, state).requires_grad_(False)
    t, cond = torch.tensor(TIMESTEP), torch.tensor(LABEL)
    x = torch.tensor(all_points(count).transpose(0, 3, 1, 2))

    def f(x: Any) -> Any:
        return torch_score(model, x, t, cond)

    forward = options["transform"] == "jacfwd"
    jacobian = chunked_jacfwd(f, chunk) if forward else torch.func.jacrev(f, chunk_size=chunk)

    def spectra(first: int, number: int) -> np.ndarray:
        found = []
        for i in range(first, first + number):
            matrix = jacobian(x[i]).reshape(SIZE, SIZE)
            found.append(torch.linalg.eigvalsh(0.5 * (matrix + matrix.T)).flip(0))
        return torch.stack(found).numpy()

    return spectra


def work(name: str, chunk: int, count: int, out: str) -> None:
    """Subprocess: one line of JSON per block of points, asked for by their first and number."""
    spectra = ours(name, count) if name in OURS else torchs(name, chunk, count)
    start = time.perf_counter()
    spectra(0, 2)
    print(json.dumps({"first_call_s": time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        first, number = map(int, line.split())
        wall, cpu = time.perf_counter(), time.process_time()
        found = spectra(first, number)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        np.save(f"{out}-{first}.npy", found)
        print(json.dumps({"s": wall / number, "cpu_s": cpu / number, "peak_mb": peak_mb()}), flush=True)


class Worker:
    def __init__(self, name: str, chunk: int, count: int, folder: Path) -> None:
        self.name, self.chunk, self.out = name, chunk, folder / f"{name}-{chunk}".replace(" ", "_")
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.found: dict[int, np.ndarray] = {}
        extra = (OURS | TORCH)[name]["env"]
        command = ["--worker", name, "--chunk", str(chunk), "--points", str(count), "--file", str(self.out)]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **extra},
        )  # fmt: skip
        self.first_call = self.read()["first_call_s"]

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} (chunk {self.chunk}) ended: run it with --worker to see why")
        return json.loads(line)

    def measure(self, first: int, number: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{first} {number}\n")
        self.process.stdin.flush()
        answer = self.read()
        self.seconds.append(answer["s"])
        self.cpu_seconds.append(answer["cpu_s"])
        self.peak = answer["peak_mb"]
        for i, values in enumerate(np.load(f"{self.out}-{first}.npy")):
            self.found[first + i] = values

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def choose_torch(count: int, folder: Path, trial: int) -> tuple[tuple[str, int], list[dict[str, Any]]]:
    """The fastest candidate by its better one of two blocks, and what all of them took."""
    trials = []
    for name, options in TORCH.items():
        for chunk in options["chunks"]:
            worker = Worker(name, chunk, count, folder)
            for first in (0, trial):
                worker.measure(first, trial)
            worker.close()
            trials.append({"contender": name, "chunk": chunk, "s": round(min(worker.seconds), 4)})
            print(trials[-1], flush=True)
    best = min(trials, key=lambda row: row["s"])
    return (best["contender"], best["chunk"]), trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument(
        "--torch-points", type=int, default=256, help="of the points, for torch; spread over all rounds"
    )
    parser.add_argument("--trial", type=int, default=2, help="points of a block when torch's candidates are compared")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "batch_spectra.json")
    for hidden in ("--worker", "--file"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--chunk", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.chunk, args.points, args.file)
        return
    if args.points % args.rounds or args.torch_points % args.rounds or args.torch_points > args.points:
        parser.error("--points and --torch-points: expected multiples of --rounds, torch's at most as many")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        chosen, trials = choose_torch(args.points, folder, args.trial)
        workers = [Worker(name, OUR_CHUNK, args.points, folder) for name in OURS]
        workers.append(Worker(*chosen, args.points, folder))
        for i in range(args.rounds):
            for worker in workers:
                total = args.torch_points if worker is workers[-1] else args.points
                worker.measure(i * args.points // args.rounds, total // args.rounds)
            print(i, [round(worker.seconds[-1], 3) for worker in workers], flush=True)
        for worker in workers:
            worker.close()
    theirs = workers[-1]

    def summary(worker: Worker) -> dict[str, Any]:
        shared = sorted(set(worker.found) & set(theirs.found))
        ours, other = (np.stack([w.found[i] for i in shared]) for w in (worker, theirs))
        error = np.abs(ours - other).max(1) / np.abs(other).max(1)
        pairs = [b / a for a, b in zip(worker.seconds, theirs.seconds, strict=True)]
        return {
            "contender": worker.name,
            "chunk": worker.chunk,
            "points": len(worker.found),
            "s_per_point": round(float(np.median(worker.seconds)), 4),
            "cpu_s_per_point": round(float(np.median(worker.cpu_seconds)), 4),
            "all_s": [round(s, 4) for s in worker.seconds],
            "all_cpu_s": [round(s, 4) for s in worker.cpu_seconds],
            "torch_times_slower": {"median": round(float(np.median(pairs)), 2), "pairs": [round(p, 2) for p in pairs]},
            "cpu_times": round(float(np.median(theirs.cpu_seconds) / np.median(worker.cpu_seconds)), 2),
            "largest_difference_relative": float(error.max()),
            "points_compared": len(shared),
            "first_call_s": round(worker.first_call, 2),
            "peak_mb": round(worker.peak),
        }

    result = {
        "what": "all 784 eigenvalues of the symmetric part of the Jacobian of the default U-Net's score, float32",
        "environment": environment(),
        "load_average_after": round(os.getloadavg()[0], 2),
        "seconds": round(time.perf_counter() - start),
        "contenders": [summary(worker) for worker in workers],
        "torch_trials": trials,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for c in result["contenders"]:
        print({k: v for k, v in c.items() if not k.startswith("all_")})


if __name__ == "__main__":
    main()
