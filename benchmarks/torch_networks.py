"""Products with the Jacobian of torch networks: in JAX by `from_torch`, and by torch's own two modes.

    python benchmarks/torch_networks.py --rounds 5

Two networks of diffusers with random weights, of the kinds of Stable Diffusion XL's UNet and of DiT, each of more than
50 million parameters. Every contender is a subprocess that waits; in each round each computes one product, one after
another, and ratios are taken within a round. Products are compared: the benchmark fails where they differ.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from exact_jacobian import environment, peak_mb
from page import update_page

ROOT = Path(__file__).resolve().parent.parent
SHAPE, TIMESTEP = (4, 32, 32), 501
NETWORKS = ("DiT", "SDXL's UNet, narrow")
OURS = "from_torch, score_jacobian"
CONTENDERS = (OURS, "torch.func.jvp", "torch, reverse mode on a retained graph")


def network(kind: str) -> tuple[Any, Any, Any]:
    """A torch module, how it is called, and the condition of one example."""
    import diffusers
    import torch

    from jaxmem.pipelines import calls

    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    if kind == "DiT":
        module = diffusers.DiTTransformer2DModel(
            sample_size=32, num_layers=14, attention_head_dim=64, num_attention_heads=8, in_channels=4, out_channels=8
        )
        return module.eval(), calls.dit, np.array(3, np.int32)
    module = diffusers.UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(64, 192, 320),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 3, 5),
        cross_attention_dim=512,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=64,
        projection_class_embeddings_input_dim=64 * 6 + 320,
    )
    condition = {
        "tokens": rng.standard_normal((77, 512), np.float32),
        "pooled": rng.standard_normal(320, np.float32),
        "time_ids": np.array([256, 256, 0, 0, 256, 256], np.float32),
    }
    return module.eval(), calls.unet_xl, condition


def ours(kind: str) -> tuple[Callable[[], np.ndarray], dict[str, Any]]:
    import jax
    import jax.numpy as jnp

    import jaxmem as jm

    module, call, cond = network(kind)
    x, v = inputs()
    score, state = jm.from_torch(module, jm.NoiseSchedule(), "score", call=call)
    operator = jm.score_jacobian(score, state, x, TIMESTEP, jax.tree.map(jnp.asarray, cond))
    parameters = sum(one.numel() for one in module.parameters())
    multiply, vector = jax.jit(lambda A, v: A.mv(v)), jnp.asarray(v.reshape(-1))
    return lambda: np.asarray(multiply(operator, vector)).reshape(SHAPE), {"parameters": parameters}


def theirs(kind: str, forward_mode: bool) -> tuple[Callable[[], np.ndarray], dict[str, Any]]:
    import jax
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    module, call, cond = network(kind)
    module.requires_grad_(False)
    x, v = (torch.tensor(array)[None] for array in inputs())
    t, cond = torch.tensor([TIMESTEP]), jax.tree.map(lambda leaf: torch.tensor(leaf)[None], cond)

    def f(x: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):  # the fused one has no forward mode
            return call(module, x, t, cond)

    if forward_mode:
        return lambda: torch.func.jvp(f, (x,), (v,))[1][0].numpy(), {}
    x.requires_grad_(True)
    y = call(module, x, t, cond)  # reverse mode takes the fused attention
    return lambda: torch.autograd.grad(y, x, v, retain_graph=True)[0][0].numpy(), {}


def inputs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal(SHAPE, np.float32), rng.standard_normal(SHAPE, np.float32)


def work(kind: str, contender: str) -> None:
    """Compute one product for each line of standard input."""
    start = time.perf_counter()
    made = ours(kind) if contender == OURS else theirs(kind, contender == "torch.func.jvp")
    product, facts = made
    found = product()
    facts["first_call_s"] = time.perf_counter() - start
    with tempfile.NamedTemporaryFile(suffix=".npy", delete=False) as file:
        np.save(file, found)
    print(json.dumps(facts | {"product": file.name}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        product()
        print(json.dumps({"seconds": time.perf_counter() - start, "peak_mb": peak_mb()}), flush=True)


def measure(kind: str, rounds: int) -> dict[str, Any]:
    """Seconds of each contender, their memory, and ratios."""
    workers, facts = {}, {}
    for contender in CONTENDERS:
        command = [sys.executable, "-W", "ignore", __file__, "--worker", kind, contender]
        workers[contender] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        facts[contender] = _answer(workers[contender])
    products = {name: np.load(facts[name].pop("product")) for name in CONTENDERS}
    scale = np.abs(products[OURS]).max()
    assert np.abs(products[OURS] - products["torch.func.jvp"]).max() <= 1e-3 * scale, "the products differ"
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, worker in workers.items():
            assert worker.stdin is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
            answer = _answer(worker)
            seconds[name].append(answer["seconds"])
            facts[name]["peak_mb"] = answer["peak_mb"]
    for worker in workers.values():
        worker.communicate()
    ratios = {
        name: float(np.median([b / a for a, b in zip(seconds[OURS], seconds[name], strict=True)]))
        for name in CONTENDERS[1:]
    }
    return {"network": kind, "seconds": seconds, "facts": facts, "times_faster": ratios}


def _answer(worker: Any) -> dict[str, Any]:
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError("a contender ended early; its messages are above")
    return json.loads(line)


def page_section(result: dict[str, Any]) -> str:
    """The table of the performance page."""
    lines = [
        "| network | parameters | product by | seconds | × ours | peak memory, MB |",
        "|---|--:|---|--:|--:|--:|",
    ]
    for one in result["networks"]:
        for name in CONTENDERS:
            parameters = f"{one['facts'][OURS]['parameters'] / 1e6:.0f} M"
            lines.append(
                f"| {one['network']} | {parameters} | `{name}` | {np.median(one['seconds'][name]):.3f}"
                f" | {one['times_faster'].get(name, 1.0):.1f} | {one['facts'][name]['peak_mb']:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "torch_networks.json")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker)
        return
    results = [measure(kind, arguments.rounds) for kind in NETWORKS]
    result = {
        "what": "one product with the Jacobian of a torch network, float32",
        "environment": environment(),
        "networks": results,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(page_section(result))
    update_page("performance", "torch networks", page_section(result))


if __name__ == "__main__":
    main()
