"""Exact 784×784 score Jacobians of one U-Net at one point, in JAX and in torch, with the same weights.

    python benchmarks/exact_jacobian.py --pairs 5

Every contender lives in its own subprocess and waits; each round lets all of them compute the same Jacobian once, one
after another, so a slow minute of the machine hits all alike and ratios are taken within a round. Contenders come in
families with several chunk sizes; a family is judged by its fastest member.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from page import update_page

ROOT = Path(__file__).resolve().parent.parent
SIDE, SIZE, TIMESTEP, LABEL = 28, 784, 20, 3

CONTENDERS: dict[str, dict[str, Any]] = {
    "jaxmem score_jacobian().to_dense": {"chunks": [28, 56, 112]},
    "jaxmem score_jacobian(), transposed": {"chunks": [56]},
    "jax.jacfwd": {"chunks": [None]},
    "jax.jacrev": {"chunks": [None]},
    "torch.func.jacfwd": {"chunks": [None]},
    "torch.func.jacfwd, chunked": {"chunks": [112]},
    "torch.func.jacrev": {"chunks": [None]},
    "torch.func.jacrev, chunked": {"chunks": [28, 56, 112, 196]},
    "torch.func.jacrev, chunked, channels_last": {"chunks": [112]},
    "torch.autograd.functional.jacobian": {"chunks": [None]},
    "torch.autograd.functional.jacobian, vectorize": {"chunks": [None]},
}


def build_weights() -> tuple[Any, Any, Any]:
    """A U-Net of the default size with random weights (time does not depend on them), its score and parameters."""
    import jax
    from flax import nnx

    from jaxmem.diffusion import NoiseSchedule
    from jaxmem.networks.unet import UNet
    from jaxmem.score import bind

    twin = UNet(rngs=nnx.Rngs(0))
    score, state = bind(twin, NoiseSchedule(), "eps")
    leaves, tree = jax.tree.flatten(state)
    rng = np.random.default_rng(0)
    leaves = [
        jax.numpy.asarray(rng.normal(size=p.shape) / max(p.shape[0], 4) ** 0.5, jax.numpy.float32) for p in leaves
    ]
    return twin, score, jax.tree.unflatten(tree, leaves)


def jax_contender(family: str, chunk: int | None) -> tuple[Any, dict[str, Any]]:
    import jax
    import jax.numpy as jnp

    from jaxmem.jacobian import score_jacobian

    _, score, state = build_weights()
    x = jnp.asarray(point())
    t, cond = jnp.int32(TIMESTEP), jnp.int32(LABEL)

    if family.startswith("jaxmem"):
        transposed = "transposed" in family

        @jax.jit
        def apply(operator: Any) -> Any:
            if not transposed:
                return operator.to_dense(chunk)
            return jax.lax.map(lambda i: operator.rmv(jax.nn.one_hot(i, SIZE)), jnp.arange(SIZE), batch_size=chunk)

        operator = score_jacobian(score, state, x, t, cond)
        tangent = jax.make_jaxpr(operator.mv)(jnp.zeros(SIZE))
        extra = {"flop_per_product": count_flop(tangent.jaxpr), "flop": SIZE * count_flop(tangent.jaxpr)}
        return lambda: apply(score_jacobian(score, state, x, t, cond)).block_until_ready(), extra

    transform = {"jax.jacfwd": jax.jacfwd, "jax.jacrev": jax.jacrev}[family]

    @jax.jit
    def dense(state: Any, x: Any, t: Any, cond: Any) -> Any:
        return transform(lambda x: score(state, x, t, cond))(x).reshape(SIZE, SIZE)

    return lambda: dense(state, x, t, cond).block_until_ready(), {}


def chunked_jacfwd(f: Any, chunk: int) -> Any:
    """What `torch.func.jacfwd` has no option for: `chunk` tangents at a time."""
    import torch

    def columns(x: Any) -> Any:
        basis = torch.eye(SIZE).reshape(SIZE, *x.shape)
        return torch.vmap(lambda v: torch.func.jvp(f, (x,), (v,))[1], chunk_size=chunk)(basis).reshape(SIZE, SIZE).T

    return columns


def torch_contender(family: str, chunk: int | None) -> tuple[Any, dict[str, Any]]:
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    from torch_unet import from_state, torch_score

    twin, _, state = build_weights()
    model = from_state(twin, state).requires_grad_(False)
    if "channels_last" in family:
        model = model.to(memory_format=torch.channels_last)
    x = torch.tensor(point().transpose(2, 0, 1))
    t, cond = torch.tensor(TIMESTEP), torch.tensor(LABEL)

    def f(x: Any) -> Any:
        return torch_score(model, x, t, cond)

    if family.startswith("torch.func.jacfwd"):
        jacobian = torch.func.jacfwd(f) if chunk is None else chunked_jacfwd(f, chunk)
    elif family.startswith("torch.func.jacrev"):
        jacobian = torch.func.jacrev(f, chunk_size=chunk)
    else:
        vectorize = "vectorize" in family

        def jacobian(x: Any) -> Any:
            return torch.autograd.functional.jacobian(f, x, vectorize=vectorize)

    return lambda: jacobian(x).reshape(SIZE, SIZE), {}


def point() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(SIDE, SIDE, 1)).astype(np.float32)


def count_flop(jaxpr: Any) -> int:
    """Multiplications and additions of a jaxpr's matrix products and convolutions, nested ones included."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            depth = int(np.prod([eqn.invars[0].aval.shape[axis] for axis in contract]))
            total += 2 * depth * int(np.prod(eqn.outvars[0].aval.shape))
        if eqn.primitive.name == "conv3x3":
            kernel = eqn.invars[1].aval.shape
            total += 2 * 9 * kernel[2] * kernel[3] * int(np.prod(eqn.invars[0].aval.shape[:3]))
        if eqn.primitive.name.startswith("attention"):
            heads, queries, depth = eqn.invars[0].aval.shape
            keys, width = eqn.invars[2].aval.shape[1:]
            # In units of one product queries × keys: q kᵀ and P v; q kᵀ, two for W, W [v, 1] and P dv; five in reverse.
            columns = {
                "attention": depth + width + 1,
                "attention_tangent": 3 * depth + 2 * width + 1,
                "attention_cotangent": 3 * depth + 2 * width + 1,
            }[eqn.primitive.name]
            total += 2 * heads * queries * keys * columns
        repeats = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += repeats * count_flop(inner)
    return total


def gemm_rate(framework: str, n: int = 2048) -> float:
    """GFLOP/s of one n×n float32 product: best of five."""
    a = np.random.default_rng(0).normal(size=(n, n)).astype(np.float32)
    if framework == "jax":
        import jax

        b, product = jax.numpy.asarray(a), jax.jit(lambda b: b @ b)
        run = lambda: product(b).block_until_ready()  # noqa: E731
    else:
        import torch

        c = torch.tensor(a)
        run = lambda: c @ c  # noqa: E731
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return 2e-9 * n**3 / min(seconds[1:])


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def work(family: str, chunk: int | None) -> None:
    """Subprocess: one line of JSON per computed Jacobian, each on request."""
    framework = "jax" if family.startswith("jax") else "torch"
    run, extra = (jax_contender if framework == "jax" else torch_contender)(family, chunk)
    before = peak_mb()
    start = time.perf_counter()
    dense = run()
    first = time.perf_counter() - start
    np.save(sys.stdin.readline().strip(), np.asarray(dense))
    del dense
    print(json.dumps({"first_call_s": first, "peak_mb_before": before, **extra}), flush=True)
    for line in sys.stdin:
        if line.strip() == "gemm":
            print(json.dumps({"gemm_gflop_per_s": gemm_rate(framework)}), flush=True)
            continue
        start = time.perf_counter()
        run()
        print(json.dumps({"s": time.perf_counter() - start, "peak_mb": peak_mb()}), flush=True)


class Worker:
    def __init__(self, family: str, chunk: int | None, out: Path) -> None:
        self.family, self.chunk = family, chunk
        self.seconds: list[float] = []
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--worker", family, "--chunk", str(chunk or 0)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        self.facts = self.ask(str(out))
        self.dense = np.load(out)

    def ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.family} (chunk {self.chunk}) ended: run it with --worker to see why")
        return json.loads(answer)

    def measure(self) -> None:
        answer = self.ask("go")
        self.seconds.append(answer["s"])
        self.facts["peak_mb"] = answer["peak_mb"]


def environment() -> dict[str, Any]:
    model = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model,
        "cpus_usable": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax", "torch", "numpy")},
    }


def summarise(workers: list[Worker], rounds: int) -> dict[str, Any]:
    reference = workers[0].dense
    contenders = []
    for worker in workers:
        error = float(np.abs(worker.dense - reference).max() / np.abs(reference).max())
        contenders.append(
            {
                "family": worker.family,
                "framework": "jax" if worker.family.startswith("jax") else "torch",
                "chunk": worker.chunk,
                "first_call_s": round(worker.facts["first_call_s"], 3),
                "median_s": round(float(np.median(worker.seconds)), 4),
                "all_s": [round(s, 4) for s in worker.seconds],
                "peak_mb": round(worker.facts["peak_mb"]),
                "peak_mb_before_jacobian": round(worker.facts["peak_mb_before"]),
                "max_difference_relative": error,
            }
        )
    ours = min((c for c in contenders if c["family"] == workers[0].family), key=lambda c: c["median_s"])
    theirs = [c for c in contenders if c["framework"] == "torch"]
    best = min(theirs, key=lambda c: c["median_s"])
    forward = next(c for c in theirs if c["family"] == "torch.func.jacfwd")

    def ratio(other: dict[str, Any]) -> dict[str, Any]:
        pairs = [b / a for a, b in zip(ours["all_s"], other["all_s"], strict=True)]
        return {
            "against": other["family"],
            "chunk": other["chunk"],
            "median": round(float(np.median(pairs)), 2),
            "pairs": [round(p, 2) for p in pairs],
        }

    facts = workers[0].facts
    gemm = {framework: workers[i].facts["gemm"] for framework, i in (("jax", 0), ("torch", -1))}
    return {
        "what": "exact 784x784 Jacobian of the score of the default U-Net (28x28x1) at one point, float32",
        "rounds": rounds,
        "environment": environment(),
        "ours": {"family": ours["family"], "chunk": ours["chunk"], "median_s": ours["median_s"]},
        "times_faster": {"torch.func.jacfwd": ratio(forward), "torch_best": ratio(best)},
        "gemm_gflop_per_s": gemm,
        "matrix_product_flop": facts["flop"],
        "floor_s": round(facts["flop"] / max(gemm.values()) / 1e9, 4),
        "contenders": contenders,
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        "| contender | chunk | seconds | × ours | first call, s | peak memory, MB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for c in result["contenders"]:
        slower = c["median_s"] / result["ours"]["median_s"]
        lines.append(
            f"| `{c['family']}` | {c['chunk'] or 'all'} | {c['median_s']:.2f} | {slower:.2f} | {c['first_call_s']:.1f}"
            f" | {c['peak_mb']} |"
        )
    return "\n".join(lines)


def page_section(result: dict[str, Any]) -> str:
    """The benchmark as the page of performance shows it: the fastest chunk of each family, and the ratios."""
    best: dict[str, dict[str, Any]] = {}
    for c in result["contenders"]:
        if c["family"] not in best or c["median_s"] < best[c["family"]]["median_s"]:
            best[c["family"]] = c
    forward, reverse = result["times_faster"]["torch.func.jacfwd"], result["times_faster"]["torch_best"]
    facts = result["environment"]
    floor, ours = result["floor_s"], result["ours"]["median_s"]
    return "\n".join(
        [
            f"The exact 784 × 784 Jacobian of the MNIST U-Net, float32, {facts['cpus_usable']} CPU cores, jax"
            f" {facts['jax']} and torch {facts['torch']}, same weights, in one run, taking turns: **{forward['median']}"
            f" times faster than `torch.func.jacfwd`** ({min(forward['pairs'])} to {max(forward['pairs'])}) and"
            f" {reverse['median']} times faster than torch's best (`{reverse['against']}`, chunk"
            f" {reverse['chunk'] or 'all'}; {min(reverse['pairs'])} to {max(reverse['pairs'])}): medians and ranges of"
            f" {result['rounds']} paired ratios. The table has medians of the times, each family with its fastest chunk"
            " size:",
            "",
            table(result | {"contenders": list(best.values())}),
            "",
            f"Matrix products and convolutions as plain sums are {result['matrix_product_flop'] / 1e9:.0f} GFLOP; at"
            f" the {max(result['gemm_gflop_per_s'].values())} GFLOP/s that one large product reaches here they would"
            f" take {floor:.2f} s, and we take {ours / floor:.1f} times that (Winograd's convolutions need fewer"
            " multiplications). The first call includes compilation.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5, help="rounds; each times every contender once")
    parser.add_argument("--only", default="", help="only families that contain this text (no file is written)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "exact_jacobian.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--chunk", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.chunk or None)
        return
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        workers = [
            Worker(family, chunk, Path(folder) / "dense.npy")
            for family, options in CONTENDERS.items()
            for chunk in options["chunks"]
            if args.only in family
        ]
        for framework in (workers[0], workers[-1]):
            framework.facts["gemm"] = round(framework.ask("gemm")["gemm_gflop_per_s"])
        for _ in range(args.pairs):
            for worker in workers:
                worker.measure()
        for worker in workers:
            worker.process.stdin.close()
            worker.process.wait()
    if args.only:
        for worker in workers:
            print(worker.family, worker.chunk, np.round(worker.seconds, 3), worker.facts)
        return
    result = summarise(workers, args.pairs)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    update_page("performance", "benchmark", page_section(result))
    print(table(result))
    print(json.dumps({k: v for k, v in result.items() if k != "contenders"}, indent=1))


if __name__ == "__main__":
    main()
