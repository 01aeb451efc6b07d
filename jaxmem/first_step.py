"""Does a network predict what its scheduler's file says? The first sampling step, where x is all noise, tells.

There ``x_T`` is about the noise itself and the posterior mean of ``x_0`` hardly depends on it. So of the noise that
went in, an epsilon network gives back all, a network of v (``alpha eps - sigma x_0``) or of ``x_0`` next to nothing. On
the model that ships, one noise of 256 numbers: 1.00 ± 0.01 of epsilon, 0.05 ± 0.05 of v, 0.03 ± 0.05 of x_0.

A network of rectified flow (``eps - x_0``) gives back all, too. Networks of v and x_0 are not told apart, nor are those
of epsilon and of flow: which of these it is, the schedule of the model has to say. A network of ``x_0 - eps``, as some
codes of flow have it, gives back the noise with the other sign. A random network gives back next to nothing as well and
is none of epsilon either, so a warning about it is true.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmem.diffusion import Prediction, to_output

EPSILON, OTHER = 0.7, 0.3  #: shares of the noise from and up to which a network is taken for one; between, for neither
_LEAST_NOISE = 0.95  # sigma below which the first step is not all noise: few steps with leading timesteps


def noise_share(prediction: Prediction, scores: Any, x: Any, alpha: float, sigma: float) -> float | None:
    """``<output, x> / <x, x>`` over points of pure noise; None where the output cannot be had or x is not all noise.

    Args:
        prediction: what the output was taken for when the scores were made of it.
        scores: at these points, shape (n, ...).
        x: standard normal, the same shape.
        alpha: signal scale of the timestep.
        sigma: noise scale of the timestep.
    """
    if prediction == "score" or sigma < _LEAST_NOISE:
        return None
    x = np.asarray(x, np.float64)
    output = to_output(prediction, np.asarray(scores, np.float64), x, alpha, sigma)
    return float((output * x).sum() / (x * x).sum())


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
    if share is None or prediction == "score":
        return None
    named = names or {one: one for one in ("eps", "v", "x0", "flow")}
    said = named.get(prediction, prediction)
    noise = [repr(named[one]) for one in ("eps", "flow") if one in named]
    expected, remedies = "about 1", []
    if prediction in ("v", "x0"):
        if share < EPSILON:
            return None
        expected, looks, remedies = "about 0", " (or ".join(noise) + ")" * (len(noise) - 1), noise
    elif abs(share) <= OTHER:
        looks, remedies = f"{named['v']!r} (or {named['x0']!r}), or not trained", [repr(named["v"])]
    elif share <= -EPSILON:
        looks = f"{said!r} with the other sign"
    else:
        return None
    arguments = " or ".join(f"`{argument}={one}`" for one in remedies)
    cure = f"load it with {arguments}" if arguments else "give the model the negative of its output"
    return (
        f"{argument}: the model says {said!r}, but at the first step its output holds {share:.2f} of the noise that"
        f" went in; {said!r} gives {expected}. It looks like {looks}. Then all numbers are wrong: {cure}"
    )
