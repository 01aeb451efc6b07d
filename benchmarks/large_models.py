"""What the parameters of large models need, and what products with parameters in bfloat16 hold of them in float32.

    python benchmarks/large_models.py

The sizes are of the published architectures, made on torch's device "meta", where tensors have shapes and no numbers.
The scratch memory of compiled programs is XLA's own account, of a network of equal layers, on a CPU, each setting of
XLA in a process of its own. Nothing is timed.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exact_jacobian import environment
from page import update_page

from jaxmem.sources.needs import Needs

ROOT = Path(__file__).resolve().parent.parent
LAYERS, WIDTH = 24, 512
SETTINGS = {
    "XLA's defaults": "",
    "without the concurrency-optimized scheduler": "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    "and without moving code out of loops": "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    " --xla_disable_hlo_passes=while-loop-invariant-code-motion",
}


def architectures() -> dict[str, dict[str, Callable[[], Any]]]:
    """The parts of SDXL (stabilityai/stable-diffusion-xl-base-1.0) and FLUX (black-forest-labs/FLUX.1-dev)."""
    import diffusers
    import transformers

    def clip(cls: Any, **sizes: int) -> Callable[[], Any]:
        return lambda: cls(transformers.CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **sizes))

    large = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    big = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20)

    def unet_xl() -> Any:
        return diffusers.UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )

    def flux() -> Any:
        return diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=19,
            num_single_layers=38,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=4096,
            pooled_projection_dim=768,
            guidance_embeds=True,
        )

    def t5() -> Any:
        return transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=32128,
                d_model=4096,
                d_kv=64,
                d_ff=10240,
                num_layers=24,
                num_heads=64,
                feed_forward_proj="gated-gelu",
            )
        )

    def vae(channels: int, **changes: Any) -> Callable[[], Any]:
        blocks = dict(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        return lambda: diffusers.AutoencoderKL(latent_channels=channels, **blocks, **changes)

    return {
        "SDXL": {
            "unet": unet_xl,
            "text_encoder": clip(transformers.CLIPTextModel, **large),
            "text_encoder_2": clip(transformers.CLIPTextModelWithProjection, projection_dim=1280, **big),
            "vae": vae(4),
        },
        "FLUX": {
            "transformer": flux,
            "text_encoder": clip(transformers.CLIPTextModel, **large),
            "text_encoder_2": t5,
            "vae": vae(16, use_quant_conv=False, use_post_quant_conv=False),
        },
    }


def count() -> dict[str, dict[str, int]]:
    """Parameters of each part."""
    import torch

    found: dict[str, dict[str, int]] = {}
    for model, parts in architectures().items():
        found[model] = {}
        for part, make in parts.items():
            with torch.device("meta"):
                found[model][part] = sum(one.numel() for one in make().parameters())
    return found


def scratch() -> dict[str, dict[str, int]]:
    """Bytes of scratch memory of compiled programs, for parameters of each type."""
    import jax
    import jax.numpy as jnp

    from jaxmem import score_jacobian
    from jaxmem.jacobian import linearise_points
    from jaxmem.runs.memory import program_bytes, tree_bytes

    def score(state: Any, x: Any, t: Any, cond: Any) -> Any:  # noqa: ARG001
        for weight in state:
            x = jnp.tanh(x @ weight)
        return x

    found = {}
    for dtype in ("float32", "bfloat16"):
        state = [jnp.full((WIDTH, WIDTH), 1 / WIDTH, dtype) for _ in range(LAYERS)]
        x, batch = jnp.ones(WIDTH), jnp.ones((16, WIDTH))
        operator = score_jacobian(score, state, x)
        programs = {
            "16 points linearised": linearise_points.lower(score, state, batch, jnp.zeros(16, jnp.int32), None),
            "16 products at once": jax.jit(lambda A, v: jax.vmap(A.mv)(v)).lower(operator, batch),
            "whole Jacobian, a loop of products": jax.jit(lambda A: A.to_dense(64)).lower(operator),
        }
        kept = [leaf for leaf in jax.tree.leaves(operator) if not any(leaf is weight for weight in state)]
        found[dtype] = {"parameters": tree_bytes(state), "kept by one linearisation": tree_bytes(kept)}
        found[dtype] |= {name: program_bytes(lowered.compile())[1] for name, lowered in programs.items()}
    return found


def page_section(result: dict[str, Any]) -> str:
    """The tables of the page on large models."""
    lines = [
        "| | parameters of the network | of the other parts | network in float32 | in bfloat16 | opening, float32"
        " | opening, bfloat16 | stay, float32 | stay, bfloat16 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for model, parts in result["parameters"].items():
        found = Needs(parts)
        network = found.jax_bytes("float32") // 4
        sizes = [
            f(kind)
            for f in (found.jax_bytes, found.opening_bytes, found.kept_bytes)
            for kind in result["scratch"][next(iter(SETTINGS))]
        ]
        counts = [f"{n / 1e9:.2f} billion" for n in (network, sum(parts.values()) - network)]
        lines.append(f"| {model} | {' | '.join([*counts, *(f'{size / 1e9:.1f} GB' for size in sizes)])} |")
    half = {setting: found["bfloat16"] for setting, found in result["scratch"].items()}
    first = next(iter(half.values()))
    lines += [
        "",
        f"A network of {LAYERS} equal layers, {first['parameters'] / 2**20:.0f} MB of parameters in bfloat16,"
        f" {first['parameters'] / 2**19:.0f} MB in float32, {4 * WIDTH**2 / 2**20:.0f} MB a layer; what programs hold"
        f" beside them:",
        "",
        f"| XLA on a CPU | {' | '.join(name for name in first if name != 'parameters')} |",
        f"|---|{'--:|' * (len(first) - 1)}",
    ]
    for setting, found in half.items():
        shown = [f"{size / 2**20:.1f} MB" for name, size in found.items() if name != "parameters"]
        lines.append(f"| {setting} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "large_models.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(scratch()))
        return
    measured = {}
    for setting, flags in SETTINGS.items():
        command = [sys.executable, __file__, "--worker"]
        done = subprocess.run(
            command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, check=True
        )
        measured[setting] = json.loads(done.stdout.splitlines()[-1])
    result = {
        "what": "parameters of large models, and scratch memory of programs with parameters in bfloat16",
        "environment": environment(),
        "parameters": count(),
        "scratch": measured,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(page_section(result))
    update_page("large-models", "large models", page_section(result))


if __name__ == "__main__":
    main()
