"""Does a network predict what its scheduler's file says? The first sampling step, where x is all noise, tells.

There ``x_T`` is about the noise itself and the posterior mean of ``x_0`` hardly depends on it. So of the noise that
went in, an epsilon network gives back all, a network of v (``alpha eps - sigma x_0``) or of ``x_0`` next to nothing. On
the model that ships, one noise of 256 numbers: 1.00 ± 0.01 of epsilon, 0.05 ± 0.05 of v, 0.03 ± 0.05 of x_0.

v and x_0 are not told apart: no model of this kind is published that predicts x_0. A random network gives back next to
nothing as well and is no epsilon network either, so a warning about it is true.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

EPSILON, OTHER = 0.7, 0.3  #: shares of the noise from and up to which a network is taken for one; between, for neither
_LEAST_NOISE = 0.95  # sigma below which the first step is not all noise: few steps with leading timesteps


def noise_share(prediction: str, scores: Any, x: Any, alpha: float, sigma: float) -> float | None:
    """``<output, x> / <x, x>`` over points of pure noise; None where the output cannot be had or x is not all noise.

    Args:
        prediction: what the output was taken for when the scores were made of it.
        scores: at these points, shape (n, ...).
        x: standard normal, the same shape.
        alpha: signal scale of the timestep.
        sigma: noise scale of the timestep.
    """
    if prediction not in ("eps", "v", "x0") or sigma < _LEAST_NOISE:
        return None
    x, eps = np.asarray(x, np.float64), -sigma * np.asarray(scores, np.float64)
    outputs = {"eps": eps, "v": (eps - sigma * x) / alpha, "x0": (x - sigma * eps) / alpha}
    return float((outputs[prediction] * x).sum() / (x * x).sum())


def contradiction(
    prediction: str, share: float | None, argument: str = "prediction", names: Mapping[str, str] | None = None
) -> str | None:
    """What to tell the user if a network cannot predict what it is said to, given `noise_share`; None if it can.

    Args:
        prediction: what the network is said to predict.
        share: what `noise_share` found.
        argument: the argument that says so where the model is made.
        names: what predictions are called there, by `jaxmem.diffusion.Prediction`; by default the same.
    """
    if share is None or prediction not in ("eps", "v", "x0"):
        return None
    eps, v, x0, said = (names[one] if names else one for one in ("eps", "v", "x0", prediction))
    if prediction == "eps" and abs(share) <= OTHER:
        expected, looks, remedy = "about 1", f"{v!r} (or {x0!r}), or not trained", v
    elif prediction != "eps" and share >= EPSILON:
        expected, looks, remedy = "about 0", repr(eps), eps
    else:
        return None
    return (
        f"{argument}: the model says {said!r}, but at the first step its output holds {share:.2f} of the noise that"
        f" went in; {said!r} gives {expected}. It looks like {looks}. Then all numbers are wrong: load it with"
        f" `{argument}={remedy!r}`"
    )
