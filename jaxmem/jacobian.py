"""The Jacobian of a score, which is the Hessian of the log density, as an operator linearised once."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, Float

from jaxmem.diffusion import Schedule
from jaxmem.operators import Operator
from jaxmem.parameters import Origin, origins, widened, widened_shapes
from jaxmem.score import Score


class Linearised:
    """A function of a score that was linearised once: its value, and what its linear map needs beside the parameters.

    What the linear map needs of the parameters is not copied: the residuals that *are* parameters are put back from
    ``state``. Parameters of fewer bits than the point are widened to its type, and where need be rearranged, in each
    product: no wide copy is kept.
    """

    def __init__(self, value: Any, state: Any, residuals: tuple[Any, ...], layout: "_Layout") -> None:
        self.value = value  #: the score at the point, shaped like x
        self._state, self._residuals, self._layout = state, residuals, layout

    @property
    def dtype(self) -> Any:
        """Data type of vectors and products."""
        return self.value.dtype

    def _linear(self, tangent: Array) -> Array:
        return self._layout.restore(self._state, self._residuals, self.dtype)(tangent)

    def check(self) -> None:
        """Raise a ValueError where the score is not finite: its Jacobian may be."""
        require_finite(self.value, "at this point")


@jax.tree_util.register_pytree_node_class
class ScoreJacobian(Linearised, Operator):
    """J = ∂s/∂x at one point, on flat vectors of length ``size = x.size``; made by `score_jacobian`.

    The forward pass was run once; ``mv`` is the linear map alone and ``rmv`` its transpose.
    """

    @property
    def size(self) -> int:
        return math.prod(self.value.shape)

    def mv(self, vector: Float[Array, " d"]) -> Float[Array, " d"]:
        return self._linear(vector.reshape(self.value.shape)).reshape(-1)

    def rmv(self, vector: Float[Array, " d"]) -> Float[Array, " d"]:
        (cotangent,) = jax.linear_transpose(self._linear, self.value)(vector.reshape(self.value.shape))
        return cotangent.reshape(-1)

    @property
    def axes(self) -> "ScoreJacobian":
        """What `jax.vmap` takes as ``in_axes`` for operators made by `batch_jacobian`."""
        return ScoreJacobian(0, None, (0,) * len(self._residuals), self._layout)

    def tree_flatten(self) -> tuple[tuple[Any, ...], "_Layout"]:
        return (self.value, self._state, self._residuals), self._layout

    @classmethod
    def tree_unflatten(cls, layout: "_Layout", children: tuple[Any, Any, Any]) -> "ScoreJacobian":
        return cls(*children, layout)


class _Layout:
    """How the leaves of a linearised map are put together again from parameters and residuals (static, compared)."""

    def __init__(self, treedef: Any, sources: tuple[Origin | None, ...]) -> None:
        self.treedef, self.sources = treedef, sources

    def restore(self, state: Any, residuals: tuple[Array, ...], dtype: Any) -> Any:
        parameters, rest = jax.tree.leaves(state), iter(residuals)
        leaves = [next(rest) if source is None else source.restored(parameters, dtype) for source in self.sources]
        return jax.tree.unflatten(self.treedef, leaves)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Layout) and (self.treedef, self.sources) == (other.treedef, other.sources)

    def __hash__(self) -> int:
        return hash((self.treedef, self.sources))


@partial(jax.jit, static_argnames=("score", "precision"))
def linearise(score: Score, state: Any, x: Array, t: Array, cond: Any, precision: str) -> tuple[Any, ...]:
    """The value at x, and what the linear map in x needs beside the parameters; what is compiled."""
    treedefs = []

    def both(wide: Any, x: Array, t: Array, cond: Any) -> tuple[Any, list[Any]]:
        # The precision is an argument of jit too: it is part of what was compiled, and products keep it.
        with jax.default_matmul_precision(precision):
            value, linear = jax.linearize(lambda x: score(wide, x, t, cond), x)
        leaves, treedef = jax.tree.flatten(linear)
        treedefs.append(treedef)
        return value, leaves

    arguments = widened(state, x.dtype), x, t, cond
    program = jax.make_jaxpr(both)(*arguments)
    value, *leaves = jaxpr_as_fun(program)(*jax.tree.leaves(arguments))
    stored = jax.tree.leaves(state)
    sources = tuple(
        None if found is None or (found.steps and stored[found.argument].dtype == x.dtype) else found
        for found in origins(program.jaxpr, len(stored))[1:]
    )
    residuals = tuple(leaf for leaf, source in zip(leaves, sources, strict=True) if source is None)
    return value, _Residuals(residuals, _Layout(treedefs[0], sources))


@jax.tree_util.register_pytree_node_class
class _Residuals:
    """The residuals with their layout: carries the static layout out of the compiled function."""

    def __init__(self, arrays: tuple[Any, ...], layout: _Layout) -> None:
        self.arrays, self.layout = arrays, layout

    def tree_flatten(self) -> tuple[tuple[Any, ...], _Layout]:
        return self.arrays, self.layout

    @classmethod
    def tree_unflatten(cls, layout: _Layout, arrays: tuple[Any, ...]) -> "_Residuals":
        return cls(tuple(arrays), layout)


def score_jacobian(
    score: Score, state: Any, x: Any, t: Any = 0, cond: Any = None, *, precision: str = "highest"
) -> ScoreJacobian:
    """Linearise a score at one point: ``J = ∂s(x, t, c)/∂x = ∇² log p_t(x | c)``.

    Args:
        score: a hashable function ``(state, x, t, cond) -> array shaped like x`` (see `jaxmem.score`).
        state: its parameters, any pytree; passed through, never copied. Floating-point leaves of fewer bits than x are
            handed to the score in x's type (`jaxmem.parameters.widened`).
        x: one point, floating point, any shape.
        t: its timestep, an index of the schedule.
        cond: its condition, any pytree or None.
        precision: of the matrix products. The default is full float32: GPUs and TPUs otherwise use fewer bits.

    Costs one forward pass; each later product costs about one more. Works under `jax.vmap` (inside the mapped
    function). Equal scores share one compilation for all points, timesteps and conditions of a shape.

    Raises:
        ValueError: if the score is not hashable, if x is not floating point, or if the score's output is not an array
            shaped like x.
    """
    x = jnp.asarray(x)
    t = jnp.asarray(t, jnp.result_type(t))  # a Python number is weakly typed otherwise: another program
    check_score(score, state, x, t, cond)
    value, residuals = linearise(score, state, x, t, cond, precision)
    return ScoreJacobian(value, state, residuals.arrays, residuals.layout)


@partial(jax.jit, static_argnames=("score", "precision"))
def linearise_points(
    score: Score, state: Any, x: Array, t: Array, cond: Any, precision: str = "highest"
) -> tuple[Array, _Residuals]:
    """What `batch_jacobian` compiles: the scores at n points, and what their linear maps need beside the parameters."""
    return jax.vmap(lambda x, t, cond: linearise(score, state, x, t, cond, precision))(x, t, cond)


def batch_jacobian(
    score: Score, state: Any, x: Any, t: Any, cond: Any = None, *, precision: str = "highest"
) -> ScoreJacobian:
    """Linearise a score at n points together: their Jacobians as one stack, for `jax.vmap`.

    x, t and the leaves of cond have the points as leading axis; for a conditional and an unconditional score, repeat x
    and stack the conditions. Products of all points go through the network together::

        operators = batch_jacobian(score, state, x, t, cond)
        products = jax.vmap(lambda A, v: A.mv(v), (operators.axes, 0))(operators, vectors)

    The parameters are held once. Everything else is n times what one point needs.

    Raises:
        ValueError: as `score_jacobian`, or if leading axes disagree.
    """
    x, t = jnp.asarray(x), jnp.asarray(t, jnp.result_type(t))
    shapes = [jnp.shape(leaf)[:1] for leaf in jax.tree.leaves((t, cond))]
    if x.ndim < 1 or x.shape[0] < 1 or any(shape != x.shape[:1] for shape in shapes):
        raise ValueError(
            f"x, t, cond: expected the points as leading axis of each, at least one, got shapes {x.shape}, {t.shape}"
            f" and {[jnp.shape(leaf) for leaf in jax.tree.leaves(cond)]}"
        )
    check_score(score, state, *jax.tree.map(lambda leaf: leaf[0], (x, t, cond)))
    value, residuals = linearise_points(score, state, x, t, cond, precision)
    return assemble(state, value, residuals)


def assemble(state: Any, value: Any, residuals: Any) -> ScoreJacobian:
    """The operator of the results of `linearise_points`."""
    return ScoreJacobian(value, state, residuals.arrays, residuals.layout)


def check_timesteps(score: Score, t: Any) -> None:
    """Refuse timesteps outside the schedule of a score that has one: a traced index would be clamped."""
    schedule = getattr(score, "schedule", None)
    if isinstance(schedule, Schedule):
        schedule.check(t)


def check_score(score: Score, state: Any, x: Any, t: Any, cond: Any) -> None:
    """Check a score against the contract at a point by tracing its shapes; see `score_jacobian` for what is raised."""
    try:
        hash(score)
    except TypeError as error:
        raise ValueError(
            f"score: expected a hashable callable (a module-level function, or a frozen dataclass with __call__),"
            f" got {type(score).__name__}: {error}"
        ) from error
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x: expected a floating-point array, got {x.dtype}; convert it first")
    check_timesteps(score, t)
    output = jax.eval_shape(score, widened_shapes(state, x.dtype), x, t, cond)
    shape = getattr(output, "shape", None)
    if shape != x.shape or output.dtype != x.dtype:
        got = f"shape {shape} of {output.dtype}" if shape is not None else type(output).__name__
        raise ValueError(
            f"score: expected an output like x, shape {x.shape} of {x.dtype}, got {got}."
            f" A score maps one example; batch it with jax.vmap outside"
        )


def require_finite(value: Any, where: str) -> None:
    """Raise a ValueError if a score holds NaN or infinity: no spectrum can be right after that."""
    bad = int(np.size(value) - np.isfinite(np.asarray(value)).sum())
    if bad:
        raise ValueError(
            f"score: {bad} of {np.size(value)} entries are NaN or infinite {where};"
            f" check the parameters, the point and the timestep"
        )
