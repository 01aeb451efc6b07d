"""Blockwise attention by block size, and the plain formula: value, linearised application, its transpose.

    python benchmarks/attention.py

The default block of `jaxmem.kernels.attention` comes from here: 4,096 tokens, 8 heads of 40, the largest of
Stable Diffusion at 64×64.
"""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from exact_jacobian import environment

from jaxmem.kernels.attention import attention

HEADS, TOKENS, DEPTH, ROUNDS = 8, 4096, 40, 7
BLOCKS = (64, 128, 256, 512, 1024)


def plain(q: Any, k: Any, v: Any) -> Any:
    weights = jax.nn.softmax(jnp.einsum("hqd,hkd->hqk", q, k) / DEPTH**0.5, axis=-1)
    return jnp.einsum("hqk,hkd->hqd", weights, v)


def main() -> None:
    arrays = [jax.random.normal(key, (HEADS, TOKENS, DEPTH)) for key in jax.random.split(jax.random.key(0), 3)]
    tasks, kept = {}, {}
    for name, f in {"plain": plain, **{str(block): partial(attention, block=block) for block in BLOCKS}}.items():
        y, linear = jax.jit(partial(jax.linearize, f))(*arrays)
        # q, k, v themselves are there anyway
        kept[name] = sum(leaf.nbytes for leaf in jax.tree.leaves(linear)) / 1e6
        value, apply = jax.jit(f), jax.jit(lambda linear, *tangents: linear(*tangents))
        transposed = jax.jit(lambda linear, u: jax.linear_transpose(linear, *arrays)(u))
        tasks[name, "value"] = partial(value, *arrays)
        tasks[name, "tangent"] = partial(apply, linear, *arrays)
        tasks[name, "cotangent"] = partial(transposed, linear, y)
    seconds: dict[tuple[str, str], list[float]] = {task: [] for task in tasks}
    for i in range(ROUNDS + 1):  # the first compiles
        for task, run in tasks.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if i:
                seconds[task].append(time.perf_counter() - start)
    result = {
        "what": f"attention, {TOKENS} tokens, {HEADS} heads of {DEPTH}, float32, one CPU process",
        "environment": environment(),
        "median_ms": {
            name: {
                kind: round(1e3 * float(np.median(seconds[name, kind])), 1)
                for kind in ("value", "tangent", "cotangent")
            }
            for name in kept
        },
        "kept_by_a_linearisation_mb": {name: round(size, 1) for name, size in kept.items()},
        "all_s": {f"{name} {kind}": [round(s, 4) for s in times] for (name, kind), times in seconds.items()},
    }
    path = Path(__file__).parent / "results" / "attention.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("median_ms", "kept_by_a_linearisation_mb")}, indent=1))


if __name__ == "__main__":
    main()
