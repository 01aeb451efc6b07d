"""A score's linearisation at n points and the products with it, compiled: for scores whose products take seconds.

The programs are compiled before the parameters are needed, so what they will take is known first.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmem.jacobian import ScoreJacobian, assemble, check_score, linearise_points
from jaxmem.krylov import Factorization, absorb, next_vector
from jaxmem.runs import memory
from jaxmem.score import Score
from jaxmem.spectra.driver import Step


class Programs(NamedTuple):
    """A score's linearisation at n points and the products with it, compiled."""

    linearise: Callable[..., Any]
    forward: Callable[[ScoreJacobian, Array], Array]  #: (operators, vectors (n, d)) to products with J
    transposed: Callable[[ScoreJacobian, Array], Array] | None  #: the same with Jᵀ
    parameter_bytes: int
    peak_bytes: int  #: beside the parameters

    def operators(self, state: Any, x: Array, t: Array, cond: Any) -> ScoreJacobian:
        """The Jacobians at n points, as `jaxmem.jacobian.batch_jacobian` gives them."""
        return assemble(state, *self.linearise(state, x, t, cond))

    def step(self, operators: ScoreJacobian) -> Step:
        """One product with each of n operators, for `jaxmem.spectra.driver.drive`."""

        def step(factorizations: Factorization) -> Factorization:
            products = self.multiply(operators, _next(factorizations))
            return _absorb(factorizations, products, self.transposed is not None)

        return step

    def multiply(self, operators: ScoreJacobian, vectors: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """Products with J, or with ½(J + Jᵀ) where the transposed program is there."""
        forward = self.forward(operators, vectors)
        if self.transposed is None:
            return forward
        return 0.5 * (forward + self.transposed(operators, vectors))


def compile_programs(score: Score, state: Any, x: Any, t: Any, cond: Any, *, symmetric: bool) -> Programs:
    """Compile for arrays, or `jax.ShapeDtypeStruct`, of these shapes; n points are the leading axis of x, t, cond."""
    first = jax.eval_shape(lambda *a: jax.tree.map(lambda leaf: leaf[0], a), x, t, cond)
    check_score(score, state, *first)
    linearise = linearise_points.lower(score, state, x, t, cond).compile()
    operators = assemble(state, *jax.eval_shape(partial(linearise_points, score), state, x, t, cond))
    vectors = jax.ShapeDtypeStruct((x.shape[0], operators.value.size // x.shape[0]), x.dtype)

    def compiled(product: Callable[[ScoreJacobian, Array], Array]) -> Any:
        return jax.jit(jax.vmap(product, (operators.axes, 0))).lower(operators, vectors).compile()

    forward = compiled(lambda operator, vector: operator.mv(vector))
    transposed = compiled(lambda operator, vector: operator.rmv(vector)) if symmetric else None
    kept, scratch = memory.program_bytes(linearise)
    products = [sum(memory.program_bytes(program)) for program in (forward, transposed) if program is not None]
    peak = kept + max(scratch, *products)
    return Programs(linearise, forward, transposed, memory.tree_bytes(state), peak)


@partial(jax.jit, static_argnames="symmetric")
def _absorb(factorizations: Factorization, products: Array, symmetric: bool) -> Factorization:
    return jax.vmap(partial(absorb, symmetric=symmetric))(factorizations, products)


@jax.jit
def _next(factorizations: Factorization) -> Array:
    return jax.vmap(next_vector)(factorizations)


class Measured(NamedTuple):
    """Rounding and asymmetry of n operators, each by one random vector."""

    noise: np.ndarray  #: ‖J v − J(3v)/3‖ for unit v, at least eps ‖J v‖
    asymmetry: np.ndarray  #: ‖J v − Jᵀ v‖ / ‖J v‖; NaN without the transposed program
    num_products: int  #: spent, per point


def measure(programs: Programs, operators: ScoreJacobian, vectors: Float[Array, "n d"]) -> Measured:
    """What a few products with given vectors tell about the operators (see `jaxmem.spectra.measure.Probe`)."""
    units = vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)
    product, again = (np.asarray(programs.forward(operators, c * units), np.float64) / c for c in (1, 3))
    norm = np.linalg.norm(product, axis=1)
    noise = np.maximum(np.linalg.norm(product - again, axis=1), np.finfo(np.float32).eps * norm)
    if programs.transposed is None:
        return Measured(noise, np.full(len(norm), np.nan), 2)
    gap = np.linalg.norm(product - np.asarray(programs.transposed(operators, units), np.float64), axis=1)
    return Measured(noise, gap / np.where(norm > 0, norm, 1), 3)
