"""What a condition does to a score: ∂s/∂c as a linear map that is linearised once."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from jaxmem.jacobian import Linearised, check_score, linearise
from jaxmem.rectangular import Rectangular
from jaxmem.score import Score


@jax.tree_util.register_pytree_node_class
class ConditionJacobian(Linearised, Rectangular):
    """C = ∂s/∂c at one point, d × n, on flat vectors; made by `condition_jacobian`.

    The numbers of a condition are in the order of `jax.tree.leaves`, each leaf row by row: those of a prompt's
    embedding token by token. `unravel` puts such a vector into the shape of the condition.
    """

    def __init__(self, value: Any, state: Any, residuals: Any, layout: Any, cond: Any) -> None:
        super().__init__(value, state, residuals, layout)
        self.cond = cond  #: the condition

    @property
    def shape(self) -> tuple[int, int]:
        return math.prod(self.value.shape), sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.cond))

    def mv(self, vector: Float[Array, " n"]) -> Float[Array, " d"]:
        return self._linear(vector).reshape(-1)

    def rmv(self, vector: Float[Array, " d"]) -> Float[Array, " n"]:
        tangent = jax.ShapeDtypeStruct((self.shape[1],), self.dtype)
        (cotangent,) = jax.linear_transpose(self._linear, tangent)(vector.reshape(self.value.shape))
        return cotangent

    def unravel(self, vector: Float[Array, " n"]) -> Any:
        """The vector as a pytree like the condition."""
        return ravel_pytree(self.cond)[1](vector)

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        return (self.value, self._state, self._residuals, self.cond), self._layout

    @classmethod
    def tree_unflatten(cls, layout: Any, children: Any) -> "ConditionJacobian":
        value, state, residuals, cond = children
        return cls(value, state, residuals, layout, cond)


@dataclass(frozen=True)
class _OfCondition:
    """A score as a function of its condition, flat, at a point."""

    score: Score

    def __call__(self, state: Any, flat: Array, t: Array, given: Any) -> Array:
        x, cond = given  # cond for its structure alone
        return self.score(state, x, t, ravel_pytree(cond)[1](flat))


def condition_jacobian(
    score: Score, state: Any, x: Any, t: Any, cond: Any, *, precision: str = "highest"
) -> ConditionJacobian:
    """Linearise a score in its condition: ``C = ∂s(x, t, c)/∂c``, which moves the score by ``C δ`` for ``c + δ``.

    It is also that of ``s(x, t, c) - s(x, t)``, as the unconditional score does not depend on c. Its singular values
    (`singular_values`) say how far the score moves with the condition at most, ``trace(C.gram)`` is their sum of
    squares. In units of x⁻¹ over those of the condition.

    Args:
        score: a hashable function ``(state, x, t, cond) -> array shaped like x`` (see `jaxmem.score`).
        state: its parameters, passed through.
        x: one point, floating point, any shape.
        t: its timestep.
        cond: its condition, a pytree of floating-point arrays, such as a prompt's embedding, (tokens, features).
        precision: of the matrix products, as for `jaxmem.score_jacobian`.

    Costs one forward pass; each later product costs about one more.

    Raises:
        ValueError: as `jaxmem.score_jacobian`, or a condition that is none or has whole numbers: a class, or tokens,
            has no derivative.
    """
    x = jnp.asarray(x)
    t = jnp.asarray(t, jnp.result_type(t))
    leaves = jax.tree.leaves(cond)
    whole = [str(jnp.result_type(leaf)) for leaf in leaves if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
    if whole or not leaves:
        got = f"numbers of {', '.join(whole)}" if whole else "none"
        raise ValueError(
            f"cond: expected floating-point arrays, such as a prompt's embedding, got {got}; a class has no derivative"
        )
    cond = jax.tree.map(lambda leaf: jnp.asarray(leaf, x.dtype), cond)
    check_score(score, state, x, t, cond)
    flat = ravel_pytree(cond)[0]
    value, residuals = linearise(_OfCondition(score), state, flat, t, (x, cond), precision)
    return ConditionJacobian(value, state, residuals.arrays, residuals.layout, cond)
