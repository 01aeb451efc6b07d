"""Detectors of cross-attention: where a prompt is memorized it is spread over more tokens, and its end gets much.

* Ren et al., "Unveiling and mitigating memorization in text-to-image diffusion models through cross attention", ECCV
  2024.
* Chen et al., "Exploring local memorization in diffusion models via bright ending attention", ICLR 2025.

Maps are those of `jaxmem.stable_diffusion.attention_maps`; NumPy in, float64 out.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

ENTROPY_LAYER = 3  #: Ren et al., at one step: the fourth of Stable Diffusion's 16 layers, as released
LAST_STEPS = 10  #: Ren et al., over many: the last ten of 50, as released


def token_attention(layers: Sequence[Any]) -> Float[np.ndarray, " tokens"]:
    """How much attention each token gets: the mean over pixels, heads and layers. Sums to 1.

    Args:
        layers: maps of one evaluation, each (heads, pixels, tokens); as many as are to be averaged.
    """
    if not layers:
        raise ValueError("layers: expected the map of at least one layer, got none")
    return np.mean([np.asarray(layer, np.float64).mean((0, 1)) for layer in layers], 0)


def entropy(attention: Any) -> Any:
    """``-Σ a log a`` over the tokens, the last axis; in nats."""
    values = np.asarray(attention, np.float64)
    return -(values * np.log(np.where(values > 0, values, 1))).sum(-1)


def layer_entropy(layers: Sequence[Any], layer: int = ENTROPY_LAYER) -> float:
    """Ren et al. at the first step: the entropy of one layer's attention over the tokens. High means memorized.

    Args:
        layers: all maps of the first step, in the order of evaluation.
        layer: which; as released the fourth of 16. Of a network with fewer it is the last one.
    """
    if not layers:
        raise ValueError("layers: expected the map of at least one layer, got none")
    return float(entropy(token_attention([layers[min(layer, len(layers) - 1)]])))


def attention_entropy(attention: Any, end: int) -> float:
    """Ren et al. over sampling: ``mean H + |mean H_end - H_end(first step)|``. High means memorized.

    ``H`` is the entropy over all tokens, ``H_end`` the part of it of the end token and what pads the prompt; means are
    over the last ten steps. As published with the absolute value; as released without it.

    Args:
        attention: `token_attention` of each sampling step, all layers together, shape (steps, tokens).
        end: index of the prompt's end token, the first after its words.

    Raises:
        ValueError: an end that is no token, or no step before the last ten.
    """
    values = np.asarray(attention, np.float64)
    if values.ndim != 2 or len(values) <= LAST_STEPS or not 0 < end < values.shape[1]:
        raise ValueError(
            f"attention, end: expected (steps, tokens) of more than {LAST_STEPS} steps, and the index of a token, got"
            f" shape {values.shape} and {end}"
        )
    late, ending = values[-LAST_STEPS:], entropy(values[:, end:])
    return float(entropy(late).mean() + abs(ending[-LAST_STEPS:].mean() - ending[0]))


def bright_ending(down: Sequence[Any], end: int, shape: tuple[int, ...]) -> Float[np.ndarray, "rows columns"]:
    """Chen et al.: the mask, attention of each pixel to the end token at the last step, mean of two layers and heads.

    Args:
        down: maps of the way down at the last sampling step, in the order of evaluation; the first two, of the latent's
            own resolution, are used, or the only one of a smaller network.
        end: index of the prompt's end token.
        shape: of the latent.

    Raises:
        ValueError: the network has no attention at the latent's resolution, or the end is no token.
    """
    pixels = shape[0] * shape[1]
    chosen = [np.asarray(layer, np.float64) for layer in down if layer.shape[1] == pixels][:2]
    if not chosen or not 0 < end < chosen[0].shape[2]:
        tokens = f"{chosen[0].shape[2]} tokens" if chosen else "none"
        raise ValueError(
            f"down, end: expected a layer of {pixels} pixels, as the latent has, and the index of a token, got {tokens}"
            f" and {end}"
        )
    return np.mean([layer[:, :, end].mean(0) for layer in chosen], 0).reshape(shape[:2])


def masked_difference(difference: Any, mask: Any) -> float:
    """Chen et al. at one step: ``‖(ε_c - ε_u) ∘ m‖₂ / mean(m)``; their score is its mean over steps. High is memorized.

    Args:
        difference: ``ε_c - ε_u``, (rows, columns, channels).
        mask: `bright_ending`.

    Raises:
        ValueError: a mask without a positive mean, which weighs nothing.
    """
    mask = np.asarray(mask, np.float64)
    if not mask.mean() > 0:
        raise ValueError(f"mask: expected a positive mean, got {mask.mean()}")
    return float(np.linalg.norm(np.asarray(difference, np.float64) * mask[..., None]) / mask.mean())
