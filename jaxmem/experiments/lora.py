"""LoRA of a UNet's attention: the layers, the score that is trained, the file, and the weights that it makes.

As diffusers' training script has it: ``W + B A`` for each of the four projections of every attention, A from a normal
distribution of deviation 1/rank, B zero at first, alpha equal to the rank, so that no factor stands before the product.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxmem.extras import require
from jaxmem.runs.durable import write_atomically
from jaxmem.score import NetworkScore

FILE = "pytorch_lora_weights.safetensors"  #: as diffusers' scripts name it
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
Factors = dict[str, dict[str, Array]]  #: by the name of a layer: ``lora_A`` (rank, in) and ``lora_B`` (out, rank)


@dataclass(frozen=True)
class LoraScore:
    """The score of a network with LoRA; its state is the pair of the factors and the network's own parameters."""

    network: NetworkScore

    def __call__(
        self, state: tuple[Factors, nnx.State], x: Float[Array, "*shape"], t: Any, cond: Any
    ) -> Float[Array, "*shape"]:
        factors, base = state
        return self.network(fused(base, factors), x, t, cond)


def initial_factors(base: nnx.State, rank: int, seed: int) -> Factors:
    """Factors whose product is zero, one pair for each projection of an attention."""
    weights = {name: value for name, value in _by_layer(base).items() if name.endswith(tuple(f".{t}" for t in TARGETS))}
    keys = jax.random.split(jax.random.key(seed), len(weights))
    return {
        name: {
            "lora_A": jax.random.normal(key, (rank, value.shape[0])) / rank,
            "lora_B": jnp.zeros((value.shape[1], rank)),
        }
        for key, (name, value) in zip(keys, weights.items(), strict=True)
    }


def fused(base: nnx.State, factors: Factors) -> nnx.State:
    """The network's parameters with each product added; ours are (in, out), so ``W + (B A)ᵀ``."""
    flat = []
    for path, variable in nnx.to_flat_state(base):
        pair = factors.get(_layer(path)) if path[-1] == "weight" else None
        if pair is not None:
            variable = variable.replace(variable.get_value() + (pair["lora_B"] @ pair["lora_A"]).T)
        flat.append((path, variable))
    return nnx.from_flat_state(flat)


def save_lora(factors: Factors, folder: Path) -> None:
    """Write the file that diffusers' scripts leave in a checkpoint, for ``pipe.load_lora_weights(folder)``."""
    tensors = {
        f"unet.{name}.{factor}.weight": np.ascontiguousarray(value)
        for name, pair in factors.items()
        for factor, value in pair.items()
    }
    require("audit", "files of a LoRA")
    from safetensors.numpy import save

    write_atomically(folder / FILE, lambda stream: stream.write(save(tensors, {"format": "pt"})))


def _by_layer(state: nnx.State) -> dict[str, Any]:
    """The weights of all layers by the names of these, which are diffusers'."""
    return {_layer(path): value.get_value() for path, value in nnx.to_flat_state(state) if path[-1] == "weight"}


def _layer(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path[:-1]))
