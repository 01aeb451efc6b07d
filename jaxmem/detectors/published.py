"""The published detectors of memorization: their formulas, one function each, and their entries.

``ε = -σ s``, so ``Δε = ε_c - ε_u = -σ s_Δ``. Score-pair functions take one point (`jax.vmap` outside) with arrays of
any shape and compute in at least float32; ``sigma`` is the point's noise level. "As released" is what the public code
does where it is not what the paper says. The papers:

* Wen et al., "Detecting, explaining, and mitigating memorization in diffusion models", ICLR 2024.
* Jeon et al., "Understanding and mitigating memorization in generative models via sharpness of probability
  landscapes", ICML 2025.
* Asthana and Belagiannis, "Detecting and mitigating memorization in diffusion models through anisotropy of the
  log-probability", ICLR 2026.
* Score evolution: an anonymous repository of 2026 ("DSM").
* "Curv": a paper of ICML 2026 on local curvature (arXiv 2605.26756), whose map says where in an image it is.
* Carlini et al., "Extracting training data from diffusion models", USENIX Security 2023.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmem.detectors.entry import Detector
from jaxmem.detectors.evidence import EpsDifferences, HessianProducts, Images, ScorePairs, Setting, StartPairs

# JAX is imported where a score is computed: to read scores that are kept, and to write their page, takes no JAX.

ANISOTROPY_WEIGHTS = (1.0, 2.0)  #: (γ₁, γ₂) of the released code for Stable Diffusion 1
ANISOTROPY_WEIGHTS_V = (1.0, 0.1)  #: of the released code for Stable Diffusion 2, which predicts v
SCORE_EVOLUTION_STEPS = 3  #: the released code follows the difference over the first three steps
TILES_PER_SIDE = 4  #: Carlini et al.: 128 of 512 pixels


def _wide(x: Any) -> Any:
    """In at least float32: sums of squares of bfloat16 numbers lose their digits, of float16 ones overflow."""
    import jax.numpy as jnp

    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _norm(x: Any) -> Any:
    """The ℓ2 norm of all entries, scaled so that no square overflows or underflows."""
    import jax.numpy as jnp

    largest = jnp.abs(x).max()
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return scale * jnp.sqrt(jnp.square(x / scale).sum())


def eps_difference(pair: Any, sigma: Any) -> Float[Any, ""]:
    """Wen et al. at one step: ``‖ε_c - ε_u‖₂ = σ ‖s_Δ‖₂``. High means memorized.

    In units of the noise, whose norm is about √d. As published the score is its mean over the steps, `wen`:
    the first, the first 5, or all. As released the same, in float16.
    """
    return _norm(sigma * _wide(pair.difference))


def wen(eps_differences: Any) -> Any:
    """Mean of ``‖ε_c - ε_u‖₂`` over sampling steps, the last axis, from the first one on. High means memorized.

    Wen et al. tabulate 1, 5 and all steps. NaN where one of the steps is.
    """
    return np.asarray(eps_differences, np.float64).mean(-1)


def hessian_difference(
    score: Any, state: Any, x: Any, t: Any, cond: Any, uncond: Any, *, precision: str = "highest"
) -> Float[Any, ""]:
    """Jeon et al.: ``‖H_c s_Δ - H_u s_Δ‖₂``, H_c and H_u the Jacobians of the two scores. High means memorized.

    As published it is squared; as released, and here, it is not (the ranking is the same; means over noises are not).
    At the first step of the sampler by default in both. The released code for models that predict v has a wrong sign
    of the v term, which at small σ multiplies the value by 1/σ²; this takes any score.

    Costs 2 score evaluations and 2 products with the Jacobians, each linearised once; both linearisations are in
    memory together. In units of x⁻³. Where the two scores nearly agree, rounding is what is left: about the precision
    times ``‖H_c‖ ‖s_Δ‖``.

    Raises:
        ValueError: as `jaxmem.jacobian.score_jacobian`.
    """
    from jaxmem.jacobian import score_jacobian

    return linearised_difference(
        score_jacobian(score, state, x, t, cond, precision=precision),
        score_jacobian(score, state, x, t, uncond, precision=precision),
    )


def linearised_difference(cond: Any, uncond: Any) -> Float[Any, ""]:
    """`hessian_difference` of two Jacobians that are there already: 2 products and no evaluation."""
    tangent = (cond.value - uncond.value).reshape(-1)
    return _norm(_wide(cond.mv(tangent)) - _wide(uncond.mv(tangent)))


def anisotropy(
    first: Any,
    late: Any,
    sigma: Any,
    *,
    weights: tuple[float, float] = ANISOTROPY_WEIGHTS,
    channel_axis: int = -1,
) -> Float[Any, ""]:
    """Asthana and Belagiannis: ``γ₁ ‖ε_c - ε_u‖₂(x_T, t₀) + γ₂ mean_pixels cos(ε_u, ε_c - ε_u)(x_T, t_late)``.

    High means memorized. The cosine is over the channels of a pixel. Both terms are of the same pure noise x_T, the
    second at a low-noise timestep it was not made for: off the sampling trajectory. As released: ``t_late`` is the
    third last timestep of the sampler (41 for 50 DDIM steps), the weights are `ANISOTROPY_WEIGHTS` (chosen for latents
    of 64×64×4; the first term grows with √d, the second does not), and for models that predict v the first term is
    ``(α/σ²)‖v_c - v_u‖₂ = ‖s_Δ‖₂/σ``; here it is ``σ ‖s_Δ‖₂`` for every model. At t₀, σ is nearly 1.

    Args:
        first: the scores at (x_T, t₀), a `jaxmem.ScorePair`.
        late: the scores at (x_T, t_late).
        sigma: noise level of t₀. That of t_late cancels in the cosine.
        weights: γ₁, γ₂.
        channel_axis: of the arrays; the last for this library's networks.
    """
    uncond, delta = _wide(late.uncond), _wide(late.difference)
    cosine = (_direction(uncond, channel_axis) * _direction(delta, channel_axis)).sum(channel_axis)
    return weights[0] * eps_difference(first, sigma) + weights[1] * cosine.mean()


def _direction(x: Any, axis: int) -> Any:
    """Vectors along an axis divided by their norms; zero where they are."""
    import jax.numpy as jnp

    largest = jnp.abs(x).max(axis, keepdims=True)
    scaled = x / jnp.where(largest > 0, largest, 1)
    norm = jnp.sqrt(jnp.square(scaled).sum(axis, keepdims=True))
    return scaled / jnp.where(norm > 0, norm, 1)


def score_evolution(s_delta: Float[Any, " steps *shape"]) -> Float[Any, ""]:
    """``Σ_k ‖s_Δ(x_{k+1}) - s_Δ(x_k)‖₂²`` for k = 0, 1: from the first three steps of the sampler. High is memorized.

    As released (no paper): over three DDIM steps; the two terms are also reported alone. Squared, in units of x⁻².

    Args:
        s_delta: ``s_c - s_u`` along the trajectory from x_T on; steps after the third are not looked at.

    Raises:
        ValueError: fewer than three steps.
    """
    import jax
    import jax.numpy as jnp

    if s_delta.shape[0] < SCORE_EVOLUTION_STEPS:
        raise ValueError(f"s_delta: expected the first 3 steps of the sampler or more, got {s_delta.shape[0]}")
    steps = _wide(s_delta[:SCORE_EVOLUTION_STEPS])
    return jnp.square(jax.vmap(_norm)(steps[1:] - steps[:-1])).sum()


def tiled_l2(images: Any, *, tiles_per_side: int = TILES_PER_SIDE) -> np.ndarray:
    """Of each generation of one prompt, its mean distance from the others: ``mean_{l≠j} max_tiles rms(a_j - a_l)``.

    Low means memorized. Carlini et al.: images are compared tile by tile and the largest distance counts, so that
    equal backgrounds do not make images equal; a tile is a quarter of the side (128 of 512 pixels), and the distance
    is ``√(Σ(a - b)²/n)`` over the n numbers of a tile, in units of the pixels' range (0 to 1). The mean of what is
    returned is the mean over all pairs. As published, a threshold on the pairs then gives cliques of near copies;
    as a detector of prompts the mean is what is compared.

    Args:
        images: shape (m, h, w, channels); uint8 is divided by 255, other numbers are taken as they are.
        tiles_per_side: h and w must be multiples of it.

    Returns:
        Shape (m,), float64.

    Raises:
        ValueError: fewer than two images, or sides that are no multiple of ``tiles_per_side``.
    """
    images = np.asarray(images)
    values = images.astype(np.float64) / (255 if images.dtype == np.uint8 else 1)
    if values.ndim != 4 or len(values) < 2:
        raise ValueError(f"images: expected two or more, shape (m, h, w, channels), got shape {images.shape}")
    m, height, width, channels = values.shape
    if height % tiles_per_side or width % tiles_per_side:
        raise ValueError(
            f"images: expected sides that are multiples of {tiles_per_side} (tiles per side), got {height} × {width}"
        )
    tiles = values.reshape(m, tiles_per_side, height // tiles_per_side, tiles_per_side, -1, channels)
    tiles = tiles.transpose(0, 1, 3, 2, 4, 5).reshape(m, tiles_per_side**2, -1)
    distances = np.stack([np.sqrt(np.square(tiles - one).mean(-1)).max(-1) for one in tiles])
    return distances.sum(-1) / (m - 1)


def curvature_map(diagonal: Any, sigma: float, shape: tuple[int, ...]) -> np.ndarray:
    """Where in an image the condition makes the density sharp: ``max(0, -σ Σ_channels diag(H_c - H_u))``.

    As released ("Curv", ICML 2026): σ because the code differentiates ``-(ε_c - ε_u)``; at the last step of the
    sampler, from 16 Rademacher probes; then shown at four times the resolution. Here the diagonal is any, with its
    own error: `jaxmem.diagonal` of the conditional Hessian minus the unconditional one.

    Args:
        diagonal: (d,) entries of ``H_c - H_u``.
        sigma: noise level of the timestep.
        shape: of x, (rows, columns, channels).

    Returns:
        (rows, columns), float64.
    """
    entries = np.asarray(diagonal, np.float64).reshape(shape)
    return np.maximum(0.0, -sigma * entries.sum(-1))


def _weights(setting: Setting) -> dict[str, float]:
    norm, cosine = ANISOTROPY_WEIGHTS_V if setting.prediction == "v" else ANISOTROPY_WEIGHTS
    return {"norm": norm, "cosine": cosine}


_WEN: Any = {"source": "Wen et al., ICLR 2024", "memorized_is": "high", "statistic": "wen", "place": 1, "score": wen}
_MEAN_OF_NORMS = "mean of ‖ε_c - ε_u‖₂ over {steps} steps"

DETECTORS = (
    Detector("wen-1", "Score difference, first step", "‖ε_c - ε_u‖₂", needs=EpsDifferences(1), **_WEN),
    Detector("wen-5", "Score difference, first 5 steps", _MEAN_OF_NORMS, needs=EpsDifferences(5), **_WEN),
    Detector("wen-all", "Score difference, all {steps} steps", _MEAN_OF_NORMS, needs=EpsDifferences(), **_WEN),
    Detector(
        name="jeon",
        title="Hessian difference, first step",
        formula="‖H_c s_Δ - H_u s_Δ‖₂",
        source="Jeon et al., ICML 2025",
        as_released="not squared, as here (the paper squares; the ranking of points is the same)",
        memorized_is="high",
        needs=HessianProducts(),
        score=lambda products: np.linalg.norm((products.cond - products.uncond).astype(np.float64)),
        place=2,
    ),
    Detector(
        name="score-evolution",
        title="Score evolution, first 3 steps",
        formula="‖s_Δ(x₁) - s_Δ(x₀)‖² + ‖s_Δ(x₂) - s_Δ(x₁)‖²",
        source="an anonymous repository, 2026",
        memorized_is="high",
        needs=ScorePairs(SCORE_EVOLUTION_STEPS),
        score=lambda pairs: score_evolution(pairs.difference),
        place=6,
    ),
    Detector(
        name="anisotropy",
        title="Norm and anisotropy",
        formula="{norm} ‖ε_c - ε_u‖₂(x_T, t₀) + {cosine} mean cos(ε_u, ε_c - ε_u)(x_T, t_late)",
        source="Asthana and Belagiannis, ICLR 2026",
        as_released="for models that predict v the norm is that of s_Δ over σ; σ is nearly 1 there",
        memorized_is="high",
        needs=StartPairs(step=-3),
        score=lambda found, norm, cosine: anisotropy(found.first, found.late, found.sigma, weights=(norm, cosine)),
        parameters=_weights,
        place=4,
    ),
    Detector(
        name="tiled-l2",
        title="Tiled distance between generations",
        formula="mean over pairs of max over tiles of √(Σ(a - b)²/n)",
        source="Carlini et al., USENIX Security 2023",
        memorized_is="low",
        needs=Images(fewest=2, multiple=TILES_PER_SIDE),
        score=tiled_l2,
        place=5,
    ),
)
