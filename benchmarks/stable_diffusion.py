"""Hessian-vector products of the full Stable Diffusion v1.4 UNet (random weights, 64×64 latents) in JAX and in torch.

    python benchmarks/stable_diffusion.py --rounds 5

Every contender is a subprocess that waits; in each round all that fit into memory together compute once, one after
another, and ratios are taken within a round. `torch.func.jvp` needs 17 GB and takes its turn alone, with ours beside it
stopped. Outputs are compared: the benchmark fails where the two sides are not the same function.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from exact_jacobian import count_flop, environment, gemm_rate
from page import update_page

ROOT = Path(__file__).resolve().parent.parent
TIMESTEP = 501


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"x": (64, 64, 4), "v": (64, 64, 4), "u": (64, 64, 4), "cond": (77, 768)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def make_weights(folder: Path) -> None:
    """What diffusers saves for a randomly initialised UNet of the v1.4 configuration: 3.4 GB."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    unet.save_pretrained(folder, max_shard_size="20GB")


def peak_gb() -> float:
    # Not getrusage: its peak survives exec, and is that of the process that started this one.
    return 1024e-9 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def seconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def jax_worker(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tasks of our side, and facts about it."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxmem import NoiseSchedule
    from jaxmem.jacobian import score_jacobian
    from jaxmem.runs import memory
    from jaxmem.score import NetworkScore
    from jaxmem.stable_diffusion import weights
    from jaxmem.stable_diffusion.configs import UNetConfig
    from jaxmem.stable_diffusion.tensors import read_tensors
    from jaxmem.stable_diffusion.unet import UNet

    config = UNetConfig()
    start = time.perf_counter()
    read = UNetConfig.from_diffusers(json.loads((folder / "config.json").read_text()))
    assert read == config, read
    tensors = read_tensors(folder, weights.UNET.basename)
    graphdef, state = weights.load_state(lambda: UNet(config, rngs=nnx.Rngs(0)), tensors, weights.UNET, "unet")
    facts = {
        "load_s": time.perf_counter() - start,
        "load_peak_gb": peak_gb(),
        "weights_gb": memory.tree_bytes(state) / 1e9,
    }
    # eps as the network gives it: the parametrisation of the score is one multiplication, which torch is spared.
    score = NetworkScore(graphdef, NoiseSchedule.stable_diffusion(), "score")
    given = {name: jnp.asarray(array) for name, array in inputs().items()}
    x, cond, t = given["x"], given["cond"], jnp.int32(TIMESTEP)
    v, u = (given[name].reshape(-1) for name in "vu")
    held: dict[str, Any] = {}

    forward = jax.jit(lambda state, x, t, cond: score(state, x, t, cond))
    multiply, transposed = jax.jit(lambda A, v: A.mv(v)), jax.jit(lambda A, v: A.rmv(v))

    def linearise() -> None:
        held.pop("operator", None)  # one at a time
        held["operator"] = score_jacobian(score, state, x, t, cond)
        jax.block_until_ready(held["operator"].value)

    tasks = {
        "linearise": linearise,
        "product": lambda: held.update(product=multiply(held["operator"], v).block_until_ready()),
        "forward": lambda: held.update(value=forward(state, x, t, cond).block_until_ready()),
        "peak": lambda: None,
        "transposed": lambda: held.update(transposed=transposed(held["operator"], u).block_until_ready()),
    }
    linearise()
    held_bytes = memory.tree_bytes(held["operator"]._residuals)
    facts["residuals_gb"] = held_bytes / 1e9
    facts["forward_flop"] = count_flop(jax.make_jaxpr(lambda x: score(state, x, t, cond))(x).jaxpr)
    facts["product_flop"] = count_flop(jax.make_jaxpr(held["operator"].mv)(v).jaxpr)

    def results() -> dict[str, np.ndarray]:
        shape = (64, 64, 4)
        return {
            name: np.asarray(held[name]).reshape(shape) for name in ("value", "product", "transposed") if name in held
        }

    return tasks, facts | {"results": results}


def torch_worker(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    import torch
    from diffusers import UNet2DConditionModel

    start = time.perf_counter()
    unet = UNet2DConditionModel.from_pretrained(folder).eval().requires_grad_(False)
    facts = {"load_s": time.perf_counter() - start, "load_peak_gb": peak_gb()}
    given = {name: torch.tensor(array) for name, array in inputs().items()}
    x, v, u = (given[name].permute(2, 0, 1)[None].contiguous() for name in "xvu")
    held: dict[str, Any] = {}

    def f(x: Any) -> Any:
        return unet(x, TIMESTEP, given["cond"][None]).sample

    def graph() -> None:
        held["input"] = x.clone().requires_grad_()
        held["output"] = f(held["input"])

    def forward() -> None:
        with torch.no_grad():
            held["value"] = f(x)

    def jvp() -> None:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the fused one has no forward mode
            held["product"] = torch.func.jvp(f, (x,), (v,))[1]

    def reverse() -> None:
        (held["transposed"],) = torch.autograd.grad(held["output"], held["input"], u, retain_graph=True)

    tasks = {"forward": forward, "jvp": jvp, "graph": graph, "reverse": reverse, "peak": lambda: None}

    def results() -> dict[str, np.ndarray]:
        names = [name for name in ("value", "product", "transposed") if name in held]
        return {name: held[name].detach()[0].permute(1, 2, 0).numpy() for name in names}

    return tasks, facts | {"results": results}


def work(kind: str, folder: Path) -> None:
    if kind == "weights":
        make_weights(folder)
        return
    tasks, facts = jax_worker(folder) if kind == "jaxmem" else torch_worker(folder)
    results = facts.pop("results")
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        task, *rest = line.split()
        if task == "save":
            np.savez(rest[0], **results())
            answer: dict[str, Any] = {}
        elif task == "gemm":
            answer = {"gemm_gflop_per_s": gemm_rate("jax" if kind == "jaxmem" else "torch")}
        else:
            answer = {"s": seconds(tasks[task]), "peak_gb": peak_gb()}
        print(json.dumps(answer), flush=True)


class Worker:
    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.times, self.peaks = kind, {}, {}
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--worker", kind, "--folder", str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=variables,
        )  # fmt: skip
        self.facts = self.read()

    def read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.kind} ended: run it with --worker to see why")
        return json.loads(line)

    def ask(self, task: str) -> dict[str, Any]:
        self.process.stdin.write(task + "\n")
        self.process.stdin.flush()
        return self.read()

    def measure(self, task: str, *, warm_up: bool = False) -> None:
        answer = self.ask(task)
        self.peaks[task] = answer["peak_gb"]
        if not warm_up:
            self.times.setdefault(task, []).append(answer["s"])

    def gemm(self) -> None:
        self.facts.setdefault("gemm", []).append(self.ask("gemm")["gemm_gflop_per_s"])

    def results(self) -> dict[str, np.ndarray]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "results.npz"
            self.ask(f"save {path}")
            with np.load(path) as file:
                return dict(file)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def run(rounds: int, folder: Path) -> dict[str, Any]:
    ours, theirs = Worker("jaxmem", folder), Worker("torch", folder)
    for task in ("linearise", "product", "forward"):
        ours.measure(task, warm_up=True)
    arnoldi_peak = ours.ask("peak")["peak_gb"]  # of a process that only multiplies by J; Lanczos needs Jᵀ as well
    ours.measure("transposed", warm_up=True)
    for task in ("forward", "graph", "reverse"):
        theirs.measure(task, warm_up=True)
    for _ in range(rounds):
        ours.gemm()
        theirs.gemm()
        for worker, task in (
            (ours, "product"),
            (theirs, "forward"),
            (ours, "transposed"),
            (theirs, "reverse"),
            (ours, "forward"),
            (ours, "linearise"),
        ):
            worker.measure(task)
    mine, peer = ours.results(), theirs.results()
    for worker in (ours, theirs):
        worker.close()
    forward_mode = Worker("torch", folder)
    for i in range(3):
        forward_mode.measure("jvp", warm_up=i == 0)
    peer |= forward_mode.results()
    forward_mode.close()
    errors = {name: float(np.abs(mine[name] - peer[name]).max() / np.abs(peer[name]).max()) for name in mine}
    for name, bound in (("value", 1e-4), ("product", 1e-3), ("transposed", 1e-3)):
        if not errors[name] <= bound:
            raise SystemExit(f"{name}: expected agreement with torch to {bound}, got {errors[name]}")
    return summarise(ours, theirs, forward_mode, errors, arnoldi_peak, rounds)


def summarise(
    ours: Worker, theirs: Worker, forward_mode: Worker, errors: dict[str, float], arnoldi_peak: float, rounds: int
) -> dict[str, Any]:
    def paired(other: list[float], mine: list[float]) -> dict[str, Any]:
        ratios = [round(b / a, 3) for a, b in zip(mine, other, strict=True)]
        return {"median": round(float(np.median(ratios)), 2), "pairs": ratios}

    product, jvp = ours.times["product"], forward_mode.times["jvp"]
    rate = max(ours.facts["gemm"] + theirs.facts["gemm"])
    return {
        "what": "SD v1.4 UNet, random weights, batch 1, 64x64x4 latents, float32",
        "rounds": rounds,
        "environment": environment(),
        "seconds": {
            "jaxmem forward": ours.times["forward"],
            "jaxmem linearise": ours.times["linearise"],
            "jaxmem product with J": product,
            "jaxmem product with Jt": ours.times["transposed"],
            "torch forward": theirs.times["forward"],
            "torch reverse-mode product, retained graph": theirs.times["reverse"],
            "torch.func.jvp": jvp,
        },
        "ratios": {
            "product / torch forward": paired(product, theirs.times["forward"]),
            "forward / torch forward": paired(ours.times["forward"], theirs.times["forward"]),
            "torch reverse / product": paired(theirs.times["reverse"], product),
            "torch.func.jvp / product": {"median": round(float(np.median(jvp) / np.median(product)), 2)},
        },
        "peak_gb": {
            "jaxmem, products with J": round(arnoldi_peak, 2),
            "jaxmem, products with J and Jt": round(ours.peaks["linearise"], 2),
            "torch, forward and retained graph": round(theirs.peaks["reverse"], 2),
            "torch.func.jvp": round(forward_mode.peaks["jvp"], 2),
        },
        "residuals_gb": round(ours.facts["residuals_gb"], 2),
        "weights_gb": round(ours.facts["weights_gb"], 2),
        "load": {name: round(ours.facts[name], 2) for name in ("load_s", "load_peak_gb")},
        "difference_from_torch": errors,
        "gemm_gflop_per_s": {"jax": ours.facts["gemm"], "torch": theirs.facts["gemm"], "best": rate},
        "flop": {"forward": ours.facts["forward_flop"], "product": ours.facts["product_flop"]},
        "share_of_gemm_rate": {
            "product": round(ours.facts["product_flop"] / np.median(product) / rate / 1e9, 2),
            "forward": round(ours.facts["forward_flop"] / np.median(ours.times["forward"]) / rate / 1e9, 2),
        },
    }


def page_section(result: dict[str, Any]) -> str:
    """The benchmark as the page of performance shows it."""
    median = {name: float(np.median(times)) for name, times in result["seconds"].items()}
    ratios, peaks, facts, shares = (result[k] for k in ("ratios", "peak_gb", "environment", "share_of_gemm_rate"))
    product, flop = median["jaxmem product with J"], result["flop"]
    floor = flop["product"] / result["gemm_gflop_per_s"]["best"] / 1e9

    def spread(name: str) -> str:
        pairs = ratios[name]["pairs"]
        return f"**{ratios[name]['median']}** ({min(pairs):.2f} to {max(pairs):.2f})"

    rows = [
        ("`jaxmem`: forward pass", median["jaxmem forward"], ""),
        ("`jaxmem`: linearise, once per point", median["jaxmem linearise"], ""),
        ("`jaxmem`: product with ∂s/∂x", product, peaks["jaxmem, products with J"]),
        (
            "`jaxmem`: product with its transpose",
            median["jaxmem product with Jt"],
            peaks["jaxmem, products with J and Jt"],
        ),
        ("torch: forward pass", median["torch forward"], ""),
        (
            "torch: reverse-mode product on a retained graph",
            median["torch reverse-mode product, retained graph"],
            peaks["torch, forward and retained graph"],
        ),
        ("`torch.func.jvp`", median["torch.func.jvp"], peaks["torch.func.jvp"]),
    ]
    return "\n".join(
        [
            f"The full Stable Diffusion v1.4 UNet (random weights, 64 × 64 latents, float32, {facts['cpus_usable']} CPU"
            " cores, in one run, taking turns; medians and ranges of"
            f" {result['rounds']} paired ratios): a product with ∂s/∂x takes {spread('product / torch forward')} of"
            f" the time of torch's *forward* pass, is {ratios['torch.func.jvp / product']['median']} times faster than"
            f" `torch.func.jvp` and {spread('torch reverse / product')} times faster than torch's reverse-mode"
            f" product on a retained graph; our forward pass takes {spread('forward / torch forward')} of torch's. The"
            f" two agree to {max(result['difference_from_torch'].values()):.0e}.",
            "",
            "| | seconds | peak of the process, GB |",
            "|---|--:|--:|",
            *(f"| {name} | {time:.2f} | {peak} |" for name, time, peak in rows),
            "",
            f"Weights ({result['weights_gb']} GB) are held once; a linearisation keeps {result['residuals_gb']} GB"
            f" beside them; loading takes {result['load']['load_s']:.1f} s and peaks at"
            f" {result['load']['load_peak_gb']} GB. A product is {flop['product'] / 1e12:.2f} TFLOP, {floor:.1f} s at"
            f" the {result['gemm_gflop_per_s']['best']:.0f} GFLOP/s that one large matrix product reaches here: it"
            f" runs at {shares['product']:.0%} of that rate, the forward pass ({flop['forward'] / 1e12:.2f} TFLOP) at"
            f" {shares['forward']:.0%}. The rest goes to the 40 columns of a head, which fill a matrix product badly,"
            " and the exponentials between them; to convolutions at 8×8 and 16×16, which read 59 MB of weights for 64"
            " or 256 pixels; and to norms, activations and copies.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="of the weights; made in a temporary folder if not given")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "stable_diffusion.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "config.json").exists():
            subprocess.run([sys.executable, __file__, "--worker", "weights", "--folder", str(folder)], check=True)
        result = run(args.rounds, folder)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    update_page("performance", "stable diffusion benchmark", page_section(result))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
