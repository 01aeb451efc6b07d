"""The weights with which a UNet attends to the tokens of a prompt.

The network itself computes them block by block and keeps none (`jaxmem.kernels.attention`). Who asks for them gets them
from a copy of the network whose cross-attentions also say them; nobody else pays.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxmem.parameters import widened
from jaxmem.stable_diffusion.layers import Attention


class AttentionMaps(NamedTuple):
    """Weights of all cross-attention layers, each (heads, pixels, tokens), summing to 1 over the tokens."""

    down: tuple[Any, ...]  #: on the way down, in the order of evaluation: 6 in Stable Diffusion 1
    mid: tuple[Any, ...]
    up: tuple[Any, ...]  #: on the way up: 9 in Stable Diffusion 1

    @property
    def layers(self) -> tuple[Any, ...]:
        """All, in the order of evaluation."""
        return self.down + self.mid + self.up


def attention_maps(
    graphdef: nnx.GraphDef, state: Any, x: Float[Array, "rows columns channels"], t: Any, cond: Float[Array, "_ _"]
) -> AttentionMaps:
    """The cross-attention maps of one latent at one timestep; pure, ``jax.jit(partial(attention_maps, graphdef))``.

    Args:
        graphdef: of a `UNet`, static: the first of what ``StableDiffusion.network("unet")`` gives.
        state: its parameters, the second.
        x: one latent.
        t: its timestep.
        cond: one prompt's embedding, (tokens, features).

    Memory: heads × pixels × tokens numbers for each layer, 10 MB each at 64×64 with 8 heads and 77 tokens; the forward
    pass is that of the network, and the output is dropped.
    """
    unet = nnx.merge(graphdef, widened(state, x.dtype))
    found: dict[str, list[Array]] = {"down": [], "mid": [], "up": []}
    for part, blocks in (("down", unet.down_blocks), ("mid", [unet.mid_block]), ("up", unet.up_blocks)):
        for block in blocks:
            for transformer in block.attentions:
                for layer in transformer.transformer_blocks:
                    layer.attn2 = _telling(layer.attn2, found[part].append)
    with jax.default_matmul_precision("highest"):
        unet(x, t, cond)
    return AttentionMaps(*(tuple(found[part]) for part in AttentionMaps._fields))


def _telling(attention: Attention, tell: Callable[[Array], None]) -> Callable[[Array, Array], Array]:
    """The same attention, which also tells its weights."""

    def run(x: Array, context: Array) -> Array:
        tell(attention.weights(x, context))
        return attention(x, context)

    return run
