"""The score contract, and the one door from a Flax module to it.

A score is a pure function of one example, ``score(state, x, t, cond) -> array shaped like x``: ``state`` is any pytree
of parameters (always an argument, never captured), ``t`` a timestep of the schedule, ``cond`` any pytree or None.
It must be hashable, because it is a static argument of every compiled function: a frozen dataclass with ``__call__``
or a module-level function. Two equal scores share one compilation.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxmem.diffusion import Prediction, Schedule, to_score
from jaxmem.parameters import widened

Score = Callable[[Any, Array, Any, Any], Array]  #: ``(state, x, t, cond) -> score``, for one example


@dataclass(frozen=True, repr=False)
class NetworkScore:
    """The score of a Flax NNX network: ``s = to_score(network(x, t, cond))``; equal by its three fields.

    Parameters of fewer bits than x are computed with in x's type.
    """

    graphdef: nnx.GraphDef
    schedule: Schedule
    prediction: Prediction

    def __call__(self, state: Any, x: Float[Array, "*shape"], t: Any, cond: Any) -> Float[Array, "*shape"]:
        alpha, sigma = self.schedule.at(t, x.dtype)
        output = nnx.merge(self.graphdef, widened(state, x.dtype))(x, t, cond)
        return to_score(self.prediction, output, x, alpha, sigma)

    def __post_init__(self) -> None:
        try:
            network = hash(self.graphdef)
        except TypeError:
            # Lists, dicts or settings among the module's attributes. They are the module's own: if it changed one, this
            # score would be another, under the name of programs that were compiled for the first.
            object.__setattr__(self, "graphdef", copy.deepcopy(self.graphdef))
            network = self.graphdef.num_leaves
        object.__setattr__(self, "_hash", hash((network, self.schedule, self.prediction)))

    # JAX hashes a score at every call of a compiled function and prints it at every check of its shapes. Those of a
    # graph definition walk the whole module: 12 of the 20 ms that `score_jacobian` took with the default U-Net.
    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:  # another process hashes strings otherwise: it makes its own
        return NetworkScore, (self.graphdef, self.schedule, self.prediction)

    def __repr__(self) -> str:
        roots = [getattr(node, "type", None) for node in self.graphdef.nodes[:1]]
        names = [getattr(root, "__name__", str(root)) for root in roots]
        return f"NetworkScore({', '.join([*names, str(self.schedule), repr(self.prediction)])})"


def bind(module: nnx.Module, schedule: Schedule, prediction: Prediction) -> tuple[NetworkScore, nnx.State]:
    """Split a Flax module into a hashable score function and its parameters.

    The module is called as ``module(x, t, cond)`` on one example and returns an array shaped like ``x``, which
    ``prediction`` says how to read: ``"eps"``, ``"v"``, ``"x0"``, ``"flow"`` or ``"score"``. Binding two modules of
    one architecture gives equal scores, so nothing compiles twice. What is changed in the module afterwards does not
    reach the score.

    Raises:
        ValueError: for an unknown prediction.
    """
    if prediction not in get_args(Prediction):
        raise ValueError(f"prediction: expected one of {get_args(Prediction)}, got {prediction!r}")
    graphdef, state = nnx.split(module)
    return NetworkScore(graphdef, schedule, prediction), state


@dataclass(frozen=True)
class GuidedScore:
    """The score under classifier-free guidance, ``uncond + scale (cond - uncond)``.

    Its condition is a pytree whose leaves have the condition and its absence as leading axis of two.
    """

    score: Score
    scale: float

    def __call__(self, state: Any, x: Float[Array, "*shape"], t: Any, cond: Any) -> Float[Array, "*shape"]:
        both = jax.vmap(lambda cond: self.score(state, x, t, cond))(cond)
        return ScorePair(both[0], both[1]).guided(self.scale)


def with_guidance(score: Score, cond: Any, guidance: float, uncond: Any) -> tuple[GuidedScore, Any]:
    """Score and conditions of classifier-free guidance, ``s(x, ∅) + guidance (s(x, c) - s(x, ∅))``.

    Args:
        score: the score function.
        cond: a pytree whose leaves have the batch as leading axis.
        guidance: 1 is the conditional score itself.
        uncond: the condition ∅ of one example, a pytree like ``cond`` without the batch axis.

    Raises:
        ValueError: ``cond`` or ``uncond`` is missing, or they differ in structure or shapes.
    """
    one, absent = jax.tree.map(lambda leaf: jnp.shape(leaf)[1:], cond), jax.tree.map(jnp.shape, uncond)
    if cond is None or one != absent:
        raise ValueError(
            f"uncond: expected the condition of one example, like cond without its batch axis (shapes {one}), got"
            f" shapes {absent}; guidance needs both"
        )
    both = jax.tree.map(lambda c, u: jnp.stack([c, jnp.broadcast_to(u, jnp.shape(c))], 1), cond, uncond)
    return GuidedScore(score, guidance), both


class ScorePair(NamedTuple):
    """The scores of one point with a condition and without: the input of every conditional-against-marginal detector.

    Guidance follows diffusers: ``guided(g) = uncond + g (cond - uncond)``.
    """

    cond: Float[Array, "*shape"]
    uncond: Float[Array, "*shape"]

    @property
    def difference(self) -> Float[Array, "*shape"]:
        """``s_delta = s(x, t, c) - s(x, t)``."""
        return self.cond - self.uncond

    def guided(self, scale: float) -> Float[Array, "*shape"]:
        """The score under classifier-free guidance of the given scale (1 is the conditional score)."""
        return self.uncond + scale * self.difference
