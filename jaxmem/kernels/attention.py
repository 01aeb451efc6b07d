"""Attention whose value and derivatives never hold more than one block of the queries × keys matrix.

``softmax(q kᵀ) v`` over 4,096 tokens has 16.8 million weights a head (67 MB in float32). Its derivatives keep them:
`jax.linearize` of the plain formula holds the weights of all heads, a gigabyte for one layer of Stable Diffusion at
64×64. Here heads and blocks of queries go one after another, and a block's weights are computed again from q, k and the
normaliser of each row wherever a derivative needs them.

With ``P = exp(q kᵀ − n)``, where n is the logarithm of each row's sum of exponentials, and ``y = P v``:

- tangent: ``dy = W v + P dv − r y`` with ``W = P ∘ (dq kᵀ + q dkᵀ)`` and r the row sums of W;
- cotangent, for u: ``v̄ = Pᵀ u``, ``q̄ = Z k``, ``k̄ = Zᵀ q`` with ``Z = P ∘ (u vᵀ − rowsum(u ∘ y))``.

The three maps are JAX primitives. Were the tangent map ordinary JAX, `jax.linearize` would evaluate P ahead of time and
keep it, transposition would not find the short formula, and `jax.vmap` would turn plain matrix products into batched
ones, which XLA's CPU code runs many times slower: here a batch of points is so many more heads, and a batch of tangents
shares each block of P.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float


def attention(
    q: Float[Array, "heads queries depth"],
    k: Float[Array, "_ _ _"],
    v: Float[Array, "_ _ _"],
    *,
    block: int = 512,
) -> Float[Array, "heads queries _"]:
    """``softmax(q kᵀ / √depth) v`` per head, shape (heads, queries, width), for one example; batch it with `jax.vmap`.

    Memory beyond inputs and output is three ``block × keys`` matrices, in the value, in the product with a
    linearisation and in its transpose. Differentiable any number of times; from the second derivative on it is checked
    and bounded, but no longer fast.

    Args:
        q: queries, (heads, queries, depth).
        k: keys, (heads, keys, depth).
        v: values, (heads, keys, width).
        block: queries taken together, at most; the last block is filled up with zeros. The default was the fastest of
            64 to 1,024 at Stable Diffusion's 4,096 tokens and 8 heads of 40 (``docs/performance.md``).

    Raises:
        ValueError: if the shapes do not fit, or there are no queries, keys or rows of a block.
    """
    if k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2] or v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"attention: expected q (heads, queries, depth), k (heads, keys, depth) and v (heads, keys, width), got"
            f" {q.shape}, {k.shape} and {v.shape}"
        )
    if min(q.shape[1], k.shape[1], block) < 1 or q.shape[2] < 1:
        raise ValueError(
            f"attention: expected at least one query, key and row of a block, got {q.shape[1]}, {k.shape[1]}, {block}"
        )
    dtype = jnp.result_type(q, k, v)
    q, k, v = q.astype(dtype), k.astype(dtype), v.astype(dtype)
    # A primitive is lowered outside the caller's `jax.default_matmul_precision`, so it is a parameter.
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return attention_p.bind(q * q.shape[2] ** -0.5, k, v, block=block, precision=precision)[0]


def _even(rows: int, block: int) -> int:
    """The size of blocks of at most ``block`` rows that are as equal as they can be: 288, not 512 and 64, of 576."""
    count = -(-rows // block)
    return -(-rows // count)


def _blocks(rows: Array, block: int, axis: int = 0) -> Array:
    """Cut an axis into blocks that come first, the last one filled up with zeros."""
    count = -(-rows.shape[axis] // block)
    padding = [(0, 0)] * rows.ndim
    padding[axis] = (0, count * block - rows.shape[axis])
    shape = (*rows.shape[:axis], count, block, *rows.shape[axis + 1 :])
    return jnp.moveaxis(jnp.pad(rows, padding).reshape(shape), axis, 0)


def _unblock(columns: Array, rows: int) -> Array:
    """(blocks, ..., features, block) to (..., rows, features)."""
    whole = jnp.moveaxis(columns, (0, -1), (-3, -2))
    return whole.reshape(*whole.shape[:-3], -1, whole.shape[-1])[..., :rows, :]


# All maps below work on transposed weights, keys × queries: the second product of each is faster with the few features
# of a head as rows and a block of queries as columns.


def _with_ones(v: Array) -> Array:
    """V with a last column of ones, whose products are the row sums of the weights."""
    return jnp.concatenate([v, jnp.ones((v.shape[0], 1), v.dtype)], 1)


def _value(q: Array, k: Array, v: Array, *, block: int, precision: Any) -> list[Array]:
    """``[y, n]`` from q, k, v (heads, ...)."""
    dot = partial(jnp.matmul, precision=precision)

    def head(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        values = _with_ones(v).T

        def columns(q: Array) -> tuple[Array, Array]:
            logits = dot(k, q.T)
            peak = logits.max(0, keepdims=True)
            sums = dot(values, jnp.exp(logits - peak))
            return sums[:-1] / sums[-1:], peak + jnp.log(sums[-1:])

        y, norms = jax.lax.map(columns, _blocks(q, _even(q.shape[0], block)))
        return _unblock(y, q.shape[0]), _unblock(norms, q.shape[0])[:, 0]

    return list(jax.lax.map(lambda arrays: head(*arrays), (q, k, v)))


def _tangent(*arrays: Array, block: int, precision: Any) -> list[Array]:
    """``[dy]`` from q, k, v, n, y (heads, ...) and dq, dk, dv (tangents, heads, ...)."""
    dot = partial(jnp.matmul, precision=precision)

    def head(q: Array, k: Array, v: Array, norms: Array, y: Array, dq: Array, dk: Array, dv: Array) -> Array:
        keys = jnp.concatenate([jnp.broadcast_to(k[None], dk.shape), dk], 2)
        values, dvs = _with_ones(v).T, dv.transpose(0, 2, 1)

        def columns(block: tuple[Array, ...]) -> Array:
            q, norms, y, dq = block
            weights = jnp.exp(dot(k, q.T) - norms[None])

            def one(tangent: tuple[Array, ...]) -> Array:
                dq, keys, dv = tangent
                changed = weights * dot(keys, jnp.concatenate([dq, q], 1).T)
                moved = dot(values, changed)
                return moved[:-1] - moved[-1:] * y.T + dot(dv, weights)

            return jax.lax.map(one, (dq, keys, dvs))

        size = _even(q.shape[0], block)
        parts = (*(_blocks(a, size) for a in (q, norms, y)), _blocks(dq, size, 1))
        return _unblock(jax.lax.map(columns, parts), q.shape[0])

    by_head = [jnp.moveaxis(array, 1, 0) for array in arrays[5:]]
    return [jnp.moveaxis(jax.lax.map(lambda a: head(*a), (*arrays[:5], *by_head)), 0, 1)]


def _cotangent(*arrays: Array, block: int, precision: Any) -> list[Array]:
    """``[q̄, k̄, v̄]`` from q, k, v, n, y (heads, ...) and u (cotangents, heads, ...)."""
    dot = partial(jnp.matmul, precision=precision)

    def head(q: Array, k: Array, v: Array, norms: Array, y: Array, u: Array) -> tuple[Array, ...]:
        values, keys = _with_ones(v), k.T

        def columns(sums: tuple[Array, ...], block: tuple[Array, ...]) -> tuple[tuple[Array, ...], Array]:
            q, norms, y, u = block
            weights = jnp.exp(dot(k, q.T) - norms[None])

            def one(cotangent: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
                u, k_sum, v_sum = cotangent
                shifted = jnp.concatenate([u, -(u * y).sum(1, keepdims=True)], 1)
                changed = weights * dot(values, shifted.T)
                return (k_sum + dot(changed, q), v_sum + dot(weights, u)), dot(keys, changed)

            return jax.lax.map(one, (u, *sums))

        size = _even(q.shape[0], block)
        zeros = tuple(jnp.zeros((u.shape[0], *a.shape), a.dtype) for a in (k, v))
        parts = (*(_blocks(a, size) for a in (q, norms, y)), _blocks(u, size, 1))
        (k_bar, v_bar), q_bar = jax.lax.scan(columns, zeros, parts)
        return _unblock(q_bar, q.shape[0]), k_bar, v_bar

    bars = jax.lax.map(lambda a: head(*a), (*arrays[:5], jnp.moveaxis(arrays[5], 1, 0)))
    return [jnp.moveaxis(bar, 0, 1) for bar in bars]


def _reference(q: Array, k: Array, v: Array, *, block: int, precision: Any) -> Array:
    """The value as ordinary JAX, which all derivatives beyond the first are taken of; each makes blocks again."""

    @partial(jax.checkpoint, prevent_cse=False)  # inside a loop there is nothing to merge with
    def rows(q: Array, k: Array, v: Array) -> Array:
        weights = jax.nn.softmax(jnp.matmul(q, k.T, precision=precision), axis=-1)
        return jnp.matmul(weights, v, precision=precision)

    def head(arrays: tuple[Array, ...]) -> Array:
        q, k, v = arrays
        blocks = jax.lax.map(lambda q: rows(q, k, v), _blocks(q, _even(q.shape[0], block)))
        return blocks.reshape(-1, v.shape[1])[: q.shape[0]]

    return jax.lax.map(head, (q, k, v))


def _tangent_reference(q: Array, k: Array, v: Array, *tangents: Array, **options: Any) -> list[Array]:
    value = partial(_reference, **options)
    return [jax.vmap(lambda *one: jax.jvp(value, (q, k, v), one)[1])(*tangents)]


def _cotangent_reference(q: Array, k: Array, v: Array, u: Array, **options: Any) -> list[Array]:
    return list(jax.vmap(jax.vjp(partial(_reference, **options), q, k, v)[1])(u))


def _primitive(name: str, run: Callable[..., list[Array]], num_primals: int) -> Primitive:
    """A primitive with several results whose first ``num_primals`` arguments have heads as leading axis.

    The others have (tangents, heads). A batch of primals becomes more heads; a batch of others alone more tangents.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(
        jax.jit(lambda *a, **options: primitive.bind(*a, **options), static_argnames=("block", "precision"))
    )
    primitive.def_abstract_eval(
        lambda *avals, **options: [
            jax.core.ShapedArray(out.shape, out.dtype) for out in jax.eval_shape(partial(run, **options), *avals)
        ]
    )
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=True))

    def batch(args: Sequence[Any], dims: Sequence[Any], **options: Any) -> tuple[list[Array], list[int]]:
        mapped = [d is not None for d in dims]
        (size,) = {a.shape[d] for a, d, m in zip(args, dims, mapped, strict=True) if m}
        heads_axis = [0] * num_primals + [1] * (len(args) - num_primals)
        into_tangents = not any(mapped[:num_primals])

        def fold(array: Any, dim: Any, axis: int) -> Array:
            if into_tangents and axis == 0:
                return array
            target = 0 if into_tangents else axis
            if dim is None:
                array = jnp.broadcast_to(
                    jnp.expand_dims(array, target), (*array.shape[:target], size, *array.shape[target:])
                )
            else:
                array = jnp.moveaxis(array, dim, target)
            return array.reshape(*array.shape[:target], -1, *array.shape[target + 2 :])

        folded = [fold(a, d, axis) for a, d, axis in zip(args, dims, heads_axis, strict=True)]
        # Results have a tangents axis where there are tangents.
        axis = 0 if into_tangents or num_primals == len(args) else 1
        results = primitive.bind(*folded, **options)
        return [r.reshape(*r.shape[:axis], size, -1, *r.shape[axis + 1 :]) for r in results], [axis] * len(results)

    batching.primitive_batchers[primitive] = batch
    return primitive


def _instantiate(tangents: Sequence[Any]) -> list[Array]:
    return [ad.instantiate_zeros(tangent) for tangent in tangents]


attention_p = _primitive("attention", _value, 3)
attention_tangent_p = _primitive("attention_tangent", _tangent, 5)
attention_cotangent_p = _primitive("attention_cotangent", _cotangent, 5)


def _attention_jvp(primals: Sequence[Any], tangents: Sequence[Any], **options: Any) -> tuple[list[Any], list[Any]]:
    y, norms = attention_p.bind(*primals, **options)
    stacked = [tangent[None] for tangent in _instantiate(tangents)]
    (dy,) = attention_tangent_p.bind(*primals, norms, y, *stacked, **options)
    return [y, norms], [dy[0], ad.Zero(jax.typeof(norms))]  # n is used by the tangent maps alone, as a constant


def _tangent_jvp(primals: Sequence[Any], tangents: Sequence[Any], **options: Any) -> tuple[list[Any], list[Any]]:
    # n and y are functions of q, k, v: their own tangents have no say.
    if all(isinstance(tangent, ad.Zero) for tangent in tangents[:3]):  # linear in the rest
        linear = _instantiate(tangents[5:])
        return attention_tangent_p.bind(*primals, **options), attention_tangent_p.bind(*primals[:5], *linear, **options)

    def independent(arrays):
        return (*arrays[:3], *arrays[5:])

    changes = tuple(_instantiate(independent(tangents)))
    return jax.jvp(partial(_tangent_reference, **options), independent(primals), changes)


def _cotangent_jvp(primals: Sequence[Any], tangents: Sequence[Any], **options: Any) -> tuple[list[Any], list[Any]]:
    if all(isinstance(tangent, ad.Zero) for tangent in tangents[:3]):
        linear = _instantiate(tangents[5:])
        return attention_cotangent_p.bind(*primals, **options), attention_cotangent_p.bind(
            *primals[:5], *linear, **options
        )
    changes = tuple(_instantiate((*tangents[:3], tangents[5])))
    return jax.jvp(partial(_cotangent_reference, **options), (*primals[:3], primals[5]), changes)


def _tangent_transpose(cotangents: Sequence[Any], *args: Any, **options: Any) -> list[Any]:
    (u,) = cotangents
    bars = attention_cotangent_p.bind(*args[:5], ad.instantiate_zeros(u), **options)
    linear = [bar if ad.is_undefined_primal(arg) else None for bar, arg in zip(bars, args[5:], strict=True)]
    return [None] * 5 + linear


def _cotangent_transpose(cotangents: Sequence[Any], *args: Any, **options: Any) -> list[Any]:
    return [None] * 5 + attention_tangent_p.bind(*args[:5], *_instantiate(cotangents), **options)


ad.primitive_jvps[attention_p] = _attention_jvp
ad.primitive_jvps[attention_tangent_p] = _tangent_jvp
ad.primitive_jvps[attention_cotangent_p] = _cotangent_jvp
ad.primitive_transposes[attention_tangent_p] = _tangent_transpose
ad.primitive_transposes[attention_cotangent_p] = _cotangent_transpose
