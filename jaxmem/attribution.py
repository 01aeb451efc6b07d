"""Which words of a prompt carry its memorization: by gradients, by columns of ∂s/∂c, and by leaving words out.

Functions of one point, `jax.vmap` outside; `attribute` runs them over a prompt's sampling trajectory. Nothing here
needs a label: a word stands out among the others of its prompt.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmem.condition import ConditionJacobian
from jaxmem.detectors.published import eps_difference
from jaxmem.model import Model
from jaxmem.parameters import widened
from jaxmem.samplers import nearest
from jaxmem.score import Score, ScorePair

AGREEING = 16  #: scores that differ by so many eps of their norm differ by the rounding of two programs


class ColumnNorms(NamedTuple):
    """``‖C_i‖`` (Frobenius) of the columns of ∂s/∂c that belong to each token i."""

    values: Any  #: a pytree like the condition without its last axis, float64
    standard_errors: Any  #: of an estimate; 0 where all products were taken
    num_products: int


def column_norms(
    jacobian: ConditionJacobian, *, max_products: int | None = None, key: Any = None, chunk: int = 56
) -> ColumnNorms:
    """How far each token moves the score: ``‖C_i‖`` (Frobenius), C_i the columns of ∂s/∂c of token i.

    From all d products with unit vectors it is exact. From m < d products with Rademacher vectors w, the mean of the
    squares of ``Cᵀ w`` has ``‖C_i‖²`` as expectation, and their spread is the error. Squares are in the products' type,
    at least float32, which has them for entries between 1e-19 and 1e19.

    Args:
        jacobian: made by `condition_jacobian`.
        max_products: products that may be spent; all d by default.
        key: random key, for an estimate.
        chunk: products taken together.

    Raises:
        ValueError: fewer than two products, no key for an estimate, or a product that is NaN or infinite.
    """
    jacobian.check()
    size = jacobian.shape[0]
    number = size if max_products is None else min(max_products, size)
    if number < min(2, size) or chunk < 1:
        raise ValueError(f"max_products, chunk: expected at least 2 and 1, got {max_products} and {chunk}")
    exact = number == size
    if key is None and not exact:
        raise ValueError("key: expected a random key for an estimate, got none; give jax.random.key(0)")
    keys = jnp.arange(size) if exact else jax.random.split(key, number)
    squares = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64), _squares(jacobian, keys, exact, min(chunk, number))
    )
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(squares)):
        raise ValueError("jacobian: a product holds NaN or infinity; check the parameters, the point and the timestep")
    if exact:
        values = jax.tree.map(lambda leaf: np.sqrt(leaf.sum(0)), squares)
        return ColumnNorms(values, jax.tree.map(np.zeros_like, values), number)
    values = jax.tree.map(lambda leaf: np.sqrt(leaf.mean(0)), squares)
    errors = jax.tree.map(
        # of a square root: half of the error of the square over the root
        lambda leaf, value: leaf.std(0, ddof=1) / np.sqrt(number) / (2 * np.where(value > 0, value, 1)),
        squares,
        values,
    )
    return ColumnNorms(values, errors, number)


@partial(jax.jit, static_argnames=("exact", "chunk"))
def _squares(jacobian: ConditionJacobian, keys: Array, exact: bool, chunk: int) -> Any:
    """Sums of squares over the last axis of ``Cᵀ w``, one for each vector w."""
    size, dtype = jacobian.shape[0], jacobian.dtype

    def one(key: Array) -> Any:
        vector = jax.nn.one_hot(key, size, dtype=dtype) if exact else jax.random.rademacher(key, (size,), dtype)
        return jax.tree.map(_over_features, jacobian.unravel(jacobian.rmv(vector)))

    return jax.lax.map(one, keys, batch_size=chunk)


def _over_features(leaf: Array) -> Array:
    """Sum of squares over the last axis, in at least float32: half precision overflows."""
    squares = jnp.square(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)))
    return squares.sum(-1) if leaf.ndim else squares


def condition_gradient(
    score: Score, state: Any, x: Any, t: Any, cond: Any, uncond: Any, sigma: Any, *, precision: str = "highest"
) -> Any:
    """Wen et al.: ``‖∂ ‖ε_c - ε_u‖₂ / ∂c_i‖₂`` of each token i. High where the token carries the difference.

    As published it is of the conditional embedding's rows. As released, rows of the conditional and of the empty
    prompt are swapped at the steps that count (its author agrees); here they are not. One backward pass.

    Args:
        score: the score function, of one example.
        state: its parameters.
        x: one point.
        t: its timestep.
        cond: the prompt's condition, (tokens, features), or a pytree of such arrays.
        uncond: that of the empty prompt.
        sigma: noise level of t.
        precision: of the matrix products.

    Returns:
        A pytree like ``cond`` without its last axis. Zero where the scores agree to rounding (`AGREEING` eps of their
        norm): the difference has no direction then, and its norm no gradient.
    """
    x = jnp.asarray(x)
    wide = widened(state, x.dtype)

    def given(of: Any) -> Array:
        with jax.default_matmul_precision(precision):
            return score(wide, x, t, of)

    value, back = jax.vjp(given, cond)
    pair = ScorePair(value, given(uncond))
    norm, size = eps_difference(pair, 1), eps_difference(ScorePair(value, jnp.zeros_like(value)), 1)
    differ = norm > AGREEING * jnp.finfo(x.dtype).eps * size
    (gradient,) = back(pair.difference * jnp.where(differ, sigma / jnp.where(differ, norm, 1), 0))
    return jax.tree.map(lambda leaf: jnp.sqrt(_over_features(leaf)), gradient)


def left_out(
    score: Score,
    state: Any,
    x: Any,
    t: Any,
    cond: Any,
    without: Any,
    uncond: Any,
    sigma: Any,
    *,
    precision: str = "highest",
) -> Float[Array, " words"]:
    """What ``‖ε_c - ε_u‖₂`` loses without each word: ``‖ε_c - ε_u‖ - ‖ε_{c without i} - ε_u‖``.

    Args:
        score: the score function, of one example.
        state: its parameters.
        x: one point.
        t: its timestep.
        cond: the prompt's condition.
        without: conditions of the prompt without each of its words, stacked.
        uncond: that of the empty prompt.
        sigma: noise level of t.
        precision: of the matrix products.
    """
    x = jnp.asarray(x)
    wide = widened(state, x.dtype)

    def one(of: Any) -> Array:
        with jax.default_matmul_precision(precision):
            return score(wide, x, t, of)

    absent = one(uncond)

    def strength(of: Any) -> Array:
        return eps_difference(ScorePair(one(of), absent), sigma)

    return strength(cond) - jax.lax.map(strength, without)


class Attribution(NamedTuple):
    """The words of a prompt, in its order, and how much of its memorization each carries, by two measures."""

    words: tuple[str, ...]
    left_out: np.ndarray  #: (words,) what ``‖ε_c - ε_u‖`` loses without the word, mean over points
    gradient: np.ndarray | None  #: (words,) Wen's gradient, its norm over the word's tokens, mean over points; or None
    num_evaluations: int  #: of the score, sampling included; a backward pass counts as one

    def ranked(self, by: str = "left_out") -> list[str]:
        """The words, the one that carries most first, by ``"left_out"`` or ``"gradient"``.

        Raises:
            ValueError: another measure, or one that this model does not have.
        """
        if by not in ("left_out", "gradient"):
            raise ValueError(f"by: expected left_out or gradient, got {by!r}")
        measure = getattr(self, by)
        if measure is None:
            raise ValueError("by: expected left_out, as the tokens of this model belong to no words, got gradient")
        return [self.words[i] for i in np.argsort(-measure, kind="stable")]


def attribute(
    model: Model,
    prompt: str,
    *,
    key: Any,
    timesteps: Any = None,
    noises: int = 4,
    guidance: float | None = None,
    num_steps: int = 50,
) -> Attribution:
    """Which words of a prompt carry its memorization, over points of its sampling trajectories.

    A word that stands in the prompt twice is left out once at a time, so each copy may look harmless.

    Args:
        model: one with prompts and a score without (`jaxmem.Model`).
        prompt: a text of at least two words, which white space separates, all of which the model reads.
        key: random key of the starting noises.
        timesteps: sampling steps to look at; by default the first five.
        noises: trajectories.
        guidance: of sampling, by default the model's.
        num_steps: sampling steps.

    Raises:
        ValueError: a model without prompts or without a score of none, fewer than two words, a prompt that the model
            cuts, timesteps that are not visited, or a score that is NaN or infinite.
    """
    if not isinstance(prompt, str) or len(prompt.split()) < 2:
        raise ValueError(f"prompt: expected a text of at least two words, one of which can be left out, got {prompt!r}")
    if model.condition != "prompt" or not model.has_pairs:
        got = f"conditions of kind {model.condition!r}" if model.condition != "prompt" else "no score without a prompt"
        raise ValueError(f"model: expected one with prompts, and with a score without one, got {got}")
    if key is None or noises < 1:
        raise ValueError(f"key, noises: expected a random key and at least one noise, got {key!r} and {noises}")
    if model.truncated([prompt])[0]:
        raise ValueError("prompt: expected one that the model reads to its end, got a longer one; shorten it")
    visited = [int(t) for t in model.sampler(num_steps).timesteps]
    wanted = visited[:5] if timesteps is None else list(timesteps)
    strangers = [t for t in wanted if t not in visited]
    if strangers or not wanted:
        near = nearest(np.array(visited), [int(t) for t in strangers] or visited[:1])
        raise ValueError(
            f"timesteps: expected some of those that {num_steps} steps visit, got {strangers or 'none'}; the nearest"
            f" are {near}"
        )
    words, rows = prompt.split(), model.token_rows(prompt)
    shorter = [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))]
    every = jax.tree.map(jnp.asarray, model.conditions([prompt, "", *shorter]))
    if rows is not None and len(jax.tree.leaves(every)) != 1:
        raise ValueError("model: expected conditions of one array where `token_rows` says which rows words have")
    cond, uncond, without = (jax.tree.map(lambda leaf, i=i: leaf[i], every) for i in (0, 1, slice(2, None)))
    keys = [jax.random.fold_in(key, i) for i in range(noises)]
    noise = jnp.stack([jax.random.normal(one, model.shape, jnp.float32) for one in keys])
    lost, gradients = [], []
    for t, x in model.path(noise, [prompt] * noises, guidance=guidance, num_steps=num_steps):
        if t in wanted:
            sigma = jnp.asarray(model.schedule.sigma[t], x.dtype)
            point = model.state, x, jnp.asarray(t, jnp.int32), cond
            lost.append(np.asarray(_lost(model.score, *point, without, uncond, sigma), np.float64))
            if not np.isfinite(lost[-1]).all():
                raise ValueError(
                    f"score: NaN or infinity at t = {t}; check the parameters, the guidance and the prompt"
                )
            if rows is not None:
                (tokens,) = jax.tree.leaves(_gradients(model.score, *point, uncond, sigma))
                tokens = np.asarray(tokens, np.float64)
                if not np.isfinite(tokens).all():
                    raise ValueError(f"score: NaN or infinity in its derivative by the condition at t = {t}")
                gradients.append(np.stack([np.linalg.norm(tokens[:, row], axis=1) for row in rows], -1))
        if t == min(wanted):
            break
    guided = (model.guidance if guidance is None else guidance) != 1
    sampled = visited.index(min(wanted)) * noises * (2 if guided else 1)
    looked = len(lost) * noises * (len(words) + 2 + (0 if rows is None else 3))
    by_word = np.mean(gradients, (0, 1)) if rows is not None else None
    return Attribution(tuple(words), np.mean(lost, (0, 1)), by_word, sampled + looked)


@partial(jax.jit, static_argnames="score")
def _lost(score: Score, state: Any, x: Array, t: Array, cond: Any, without: Any, uncond: Any, sigma: Array) -> Array:
    return jax.vmap(lambda x: left_out(score, state, x, t, cond, without, uncond, sigma))(x)


@partial(jax.jit, static_argnames="score")
def _gradients(score: Score, state: Any, x: Array, t: Array, cond: Any, uncond: Any, sigma: Array) -> Array:
    return jax.vmap(lambda x: condition_gradient(score, state, x, t, cond, uncond, sigma))(x)
