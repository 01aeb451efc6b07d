"""Blockwise attention against the plain formula, JAX's derivatives of it, and torch, each in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import in_double

from jaxmem.kernels.attention import attention


def plain(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("hqd,hkd->hqk", q, k) / q.shape[-1] ** 0.5, axis=-1)
    return jnp.einsum("hqk,hkd->hqd", weights, v)


def random_qkv(heads, queries, keys, depth, width, seed=0):
    # Factor 2: logits spread over ±10, so that a few weights dominate; uniform attention would hide faults.
    rng = np.random.default_rng(seed)
    shapes = ((heads, queries, depth), (heads, keys, depth), (heads, keys, width))
    return tuple(jnp.asarray(2 * rng.normal(size=shape), jnp.float32) for shape in shapes)


CASES = [(2, 64, 64, 8, 8, 16), (2, 50, 77, 8, 6, 16), (3, 10, 7, 4, 4, 64), (1, 1, 5, 4, 4, 1)]


@pytest.mark.parametrize(("heads", "queries", "keys", "depth", "width", "block"), CASES)
def test_value_is_the_float64_sum(heads, queries, keys, depth, width, block, parity):
    arrays = random_qkv(heads, queries, keys, depth, width)
    q, k, v = (np.asarray(a, np.float64) for a in arrays)
    logits = q @ k.swapaxes(1, 2) / np.sqrt(depth)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ v

    def blockwise(q, k, v):
        return attention(q, k, v, block=block)

    exact = in_double(blockwise, *arrays)
    parity.check("attention: value", blockwise(*arrays), plain(*arrays), expected, exact)


@pytest.mark.parametrize(("heads", "queries", "keys", "depth", "width", "block"), CASES)
def test_derivatives_are_those_of_the_plain_formula(heads, queries, keys, depth, width, block, parity):
    arrays = random_qkv(heads, queries, keys, depth, width)
    tangents = random_qkv(heads, queries, keys, depth, width, seed=1)

    def blockwise(q, k, v):
        return attention(q, k, v, block=block)

    def products(arrays, tangents, cotangent):
        """Tangent and cotangents by jvp and vjp, by a linearisation and its transpose, and the tangent batched."""
        linear = jax.jit(lambda *a: jax.linearize(blockwise, *a)[1])(*arrays)
        batched = jax.vmap(linear)(*(jnp.stack([a, 2 * a]) for a in tangents))
        tangents_out = [jax.jvp(blockwise, arrays, tangents)[1], linear(*tangents), batched[1] / 2]
        return tangents_out, [
            jax.vjp(blockwise, *arrays)[1](cotangent),
            jax.linear_transpose(linear, *arrays)(cotangent),
        ]

    def formula(arrays, tangents, cotangent):
        return [jax.jvp(plain, arrays, tangents)[1]] * 3, [jax.vjp(plain, *arrays)[1](cotangent)] * 2

    cotangent = random_qkv(heads, queries, keys, width, width, seed=2)[0]
    parity.functions("attention: derivatives", products, formula, arrays, tangents, cotangent)


def test_batches_of_points_and_of_tangents(getkey, parity):
    """Under vmap points become heads, and tangents of one point share its weights; both in either order."""
    qkv = [jax.random.normal(key, (3, 2, 10, 4)) for key in jax.random.split(getkey(), 3)]
    tangents = [jax.random.normal(key, (5, 3, 2, 10, 4)) for key in jax.random.split(getkey(), 3)]

    def products(f, q, k, v, tangents):
        linear = jax.linearize(f, q, k, v)[1]
        transposed = jax.linear_transpose(linear, q, k, v)
        return jax.vmap(linear)(*tangents), jax.vmap(transposed)(tangents[0])

    def blockwise(q, k, v):
        return attention(q, k, v, block=4)

    at = (0, 0, 0, 1)
    ours, theirs = (jax.vmap(lambda *a, f=f: products(f, *a), at) for f in (blockwise, plain))
    parity.functions("attention: points together", ours, theirs, *qkv, tangents)
    # Only q varies from point to point, as when several latents share a prompt.
    ours, theirs = (jax.vmap(f, (0, None, None)) for f in (blockwise, plain))
    parity.functions("attention: points together", ours, theirs, qkv[0], qkv[1][0], qkv[2][0])


def test_derivatives_of_derivatives(getkey, x64):
    """What second-order score matching and its training need, against the plain formula in float64."""
    arrays = tuple(jax.random.normal(key, (2, 6, 4), jnp.float64) for key in jax.random.split(getkey(), 3))
    v = tuple(jax.random.normal(key, (2, 6, 4), jnp.float64) for key in jax.random.split(getkey(), 3))

    def loss(f, *arrays):  # of a product, as in the sliced loss
        return jnp.sum(jnp.sin(jax.jvp(f, arrays, v)[1]))

    def energy(f, *arrays):
        return jnp.sum(jnp.sin(f(*arrays)))

    def programs(f):
        yield jax.grad(lambda *a: loss(f, *a), (0, 1, 2))(*arrays)  # reverse over forward
        gradient = jax.grad(lambda *a: energy(f, *a), (0, 1, 2))
        yield jax.jvp(gradient, arrays, v)[1]  # forward over reverse
        yield jax.grad(lambda *a: jnp.sum(jnp.cos(gradient(*a)[1])), (0, 1, 2))(*arrays)  # reverse over reverse
        yield jax.jvp(lambda *a: jax.jvp(f, a, v)[1], arrays, v)[1]  # forward over forward
        yield jax.vmap(lambda s: jax.grad(lambda *a: loss(f, *a))(s * arrays[0], *arrays[1:]))(jnp.array([0.5, 2.0]))

    for ours, theirs in zip(programs(lambda *a: attention(*a, block=4)), programs(plain), strict=True):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_constant_queries_keys_and_values(parity):
    """Tangents and cotangents of some arguments only: cross-attention has constant keys and values."""
    arrays = random_qkv(2, 6, 5, 4, 3)
    for i in range(3):

        def only(f, arrays, x, i=i):
            return f(*(x if j == i else array for j, array in enumerate(arrays)))

        def products(f, arrays, tangent, cotangent, only=only, i=i):
            linear = jax.linearize(lambda x: only(f, arrays, x), arrays[i])[1]
            return linear(tangent), jax.linear_transpose(linear, arrays[i])(cotangent)

        ours, theirs = (partial(products, f) for f in (attention, plain))
        cotangent = random_qkv(2, 6, 5, 3, 3, seed=1)[0]
        parity.functions("attention: constant arguments", ours, theirs, arrays, jnp.cos(arrays[i]), cotangent)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, at its first forward-mode product
def test_value_and_jvp_are_torchs(torch, parity):
    arrays, tangents = random_qkv(2, 50, 77, 8, 8), random_qkv(2, 50, 77, 8, 8, seed=1)

    def peer(q, k, v):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the fused one has no forward mode
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def theirs(dtype):
        return torch.func.jvp(
            peer, *(tuple(torch.tensor(np.array(a), dtype=dtype) for a in p) for p in (arrays, tangents))
        )

    def ours(arrays, tangents):
        return jax.jvp(lambda *a: attention(*a, block=16), arrays, tangents)

    exact = in_double(ours, arrays, tangents)
    parity.check("attention: torch", ours(arrays, tangents), theirs(torch.float32), theirs(torch.float64), exact)


def largest(jaxpr):
    """Most numbers in one array of a jaxpr, nested ones included."""
    sizes = [int(np.prod(v.aval.shape)) for eqn in jaxpr.eqns for v in eqn.outvars]
    inner = [getattr(value, "jaxpr", value) for eqn in jaxpr.eqns for value in eqn.params.values()]
    return max(sizes + [largest(part) for part in inner if hasattr(part, "eqns")], default=0)


def test_no_derivative_holds_more_than_a_block_of_weights():
    heads, tokens, depth, block = 4, 256, 8, 16
    arrays = random_qkv(heads, tokens, tokens, depth, depth)

    def f(q, k, v):
        return attention(q, k, v, block=block)

    bound = max(heads * tokens * 2 * depth, block * tokens)  # the inputs (keys beside their tangents), or one block
    linear = jax.linearize(f, *arrays)[1]
    # Kept for later: q, k and v, and whatever equals them after a reshape; the weights alone would be 32 times one.
    assert sum(leaf.size for leaf in jax.tree.leaves(linear)) <= 6 * heads * tokens * depth
    for program in (f, linear, lambda *a: jax.vjp(f, *a)[1](a[0]), lambda *a: jax.linear_transpose(linear, *a)(a[0])):
        assert largest(jax.make_jaxpr(program)(*arrays).jaxpr) <= bound
    assert largest(jax.make_jaxpr(plain)(*arrays).jaxpr) == heads * tokens**2  # the measure itself sees such an array


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators(platform):
    traced = jax.jit(attention).trace(*random_qkv(2, 64, 64, 8, 8))
    assert "func.func" in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(q=(2, 8, 5)), r"attention: expected q \(heads, queries, depth\), .* got \(2, 8, 5\)"),
        (dict(v=(2, 9, 4)), r"attention: expected q \(heads, queries, depth\)"),
        (dict(block=0), "attention: expected at least one query, key and row of a block, got 8, 8, 0"),
        (dict(q=(2, 0, 4)), "attention: expected at least one query, key and row of a block, got 0, 8, 4"),
        (dict(k=(2, 0, 4), v=(2, 0, 4)), "attention: expected at least one query, .* got 8, 0, 4"),
    ],
)
def test_bad_input_is_named(change, match):
    shapes = dict(q=(2, 8, 4), k=(2, 8, 4), v=(2, 8, 4)) | change
    arrays = [jnp.zeros(shapes[name]) for name in "qkv"]
    with pytest.raises(ValueError, match=match):
        attention(*arrays, block=shapes.get("block", 4))
