"""The convolution primitive against a sum written in NumPy, torch, and XLA's own derivatives, each in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import in_double

from jaxmem.kernels.convolution import conv3x3


@pytest.fixture
def arrays(getkey):
    return jax.random.normal(getkey(), (6, 4, 5)), jax.random.normal(getkey(), (3, 3, 5, 7))


def xla(x, kernel):
    return jax.lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))[0]


def test_value_is_the_sum(arrays, parity):
    x, kernel = (np.asarray(a, np.float64) for a in arrays)
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    expected = sum(padded[a : a + 6, b : b + 4] @ kernel[a, b] for a in range(3) for b in range(3))
    parity.check("conv3x3: value", conv3x3(*arrays), xla(*arrays), expected, in_double(conv3x3, *arrays))


def test_gradients_are_torchs(arrays, torch, parity):
    def theirs(dtype):
        x, kernel = (torch.tensor(np.array(a), dtype=dtype, requires_grad=True) for a in arrays)
        y = torch.nn.functional.conv2d(x.permute(2, 0, 1)[None], kernel.permute(3, 2, 0, 1), padding=1)[0]
        return torch.autograd.grad((y**3).sum(), (x, kernel))

    ours = jax.grad(lambda *a: jnp.sum(conv3x3(*a) ** 3), (0, 1))
    exact = in_double(ours, *arrays)
    parity.check("conv3x3: gradients", ours(*arrays), theirs(torch.float32), theirs(torch.float64), exact)


@pytest.mark.parametrize("argnum", [0, 1])
@pytest.mark.parametrize("transform", ["jvp", "jacfwd", "jacrev", "fwd over rev", "rev over fwd", "vmap"])
def test_derivatives_are_xlas(arrays, transform, argnum, parity):
    def apply(convolve, *arrays):
        def f(argument):
            return jnp.tanh(convolve(*(argument if i == argnum else a for i, a in enumerate(arrays)))).sum((0, 1))

        argument = arrays[argnum]
        if transform == "jvp":
            return jax.jvp(f, (argument,), (jnp.cos(argument),))[1]
        if transform == "vmap":
            return jax.vmap(jax.jacrev(f))(jnp.stack([argument, -argument, 2 * argument]))
        nested = {
            "jacfwd": jax.jacfwd(f),
            "jacrev": jax.jacrev(f),
            "fwd over rev": jax.jacfwd(jax.grad(lambda a: jnp.sum(f(a) ** 2))),
            "rev over fwd": jax.grad(lambda a: jnp.sum(jax.jvp(f, (a,), (jnp.sin(a),))[1] ** 2)),
        }
        return jax.jit(nested[transform])(argument)

    parity.functions("conv3x3: derivatives", partial(apply, conv3x3), partial(apply, xla), *arrays)


@pytest.mark.parametrize("in_axes", [(0, None), (1, None), (-1, None), (None, 0), (None, -1), (0, 0), (2, 1), (-1, 3)])
def test_vmap_over_any_axis(in_axes, getkey, parity):
    shapes = ((6, 4, 5), (3, 3, 5, 7))
    arrays = [
        jax.random.normal(getkey(), shape if axis is None else (2, *shape))
        for shape, axis in zip(shapes, in_axes, strict=True)
    ]
    arrays = [a if axis is None else jnp.moveaxis(a, 0, axis) for a, axis in zip(arrays, in_axes, strict=True)]
    one = lambda convolve: jax.vmap(convolve, in_axes)  # noqa: E731
    parity.functions("conv3x3: mapped", one(conv3x3), one(xla), *arrays)
    both = lambda convolve: jax.vmap(jax.vmap(jax.grad(lambda x, k: jnp.sum(convolve(x, k) ** 2)), in_axes), (0, None))  # noqa: E731
    stacked = jnp.stack([arrays[0], 2 * arrays[0], -arrays[0]])
    parity.functions("conv3x3: mapped", both(conv3x3), both(xla), stacked, arrays[1])


def lowered(shape, kernel_shape, dtype=jnp.float32, precision="highest"):
    """The convolution, and its transpose alone, as XLA gets them."""
    x, kernel = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(kernel_shape, dtype)
    with jax.default_matmul_precision(precision):
        y = jax.eval_shape(jax.vmap(conv3x3, (0, None)), x, kernel)
        forward = jax.jit(jax.vmap(conv3x3, (0, None))).lower(x, kernel)
        transpose = jax.jit(lambda y, k: jax.linear_transpose(lambda x: jax.vmap(conv3x3, (0, None))(x, k), x)(y))
        return forward.as_text(), transpose.lower(y, kernel).as_text()


def convolves(*args, **options):
    """Whether XLA's convolution is used, the same both ways."""
    forward, transpose = ("convolution" in text for text in lowered(*args, **options))
    assert forward == transpose
    return forward


@pytest.mark.parametrize(
    ("size", "features"),
    [((8, 14, 14), (32, 32)), ((21, 7, 7), (33, 64)), ((12, 9, 10), (64, 32)), ((15, 6, 13), (32, 32))],
)
def test_products_of_the_highest_precision(size, features, getkey, parity):
    x, kernel = jax.random.normal(getkey(), (*size, features[0])), jax.random.normal(getkey(), (3, 3, *features))
    cotangent = jax.random.normal(getkey(), (*size, features[1]))
    assert not convolves(x.shape, kernel.shape)  # else this tests XLA

    @jax.jit
    def value_and_gradients(x, kernel, cotangent):
        y, transpose = jax.vjp(jax.vmap(conv3x3, (0, None)), x, kernel)
        return y, *transpose(cotangent)

    with jax.default_matmul_precision("highest"):
        ours = value_and_gradients(x, kernel, cotangent)
        exact = in_double(value_and_gradients, x, kernel, cotangent)
    y, pull = jax.vjp(jax.vmap(xla, (0, None)), x, kernel)
    peer = y, *pull(cotangent)
    _, rows, columns = size
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    exact_kernel, exact_cotangent = np.asarray(kernel, np.float64), np.asarray(cotangent, np.float64)
    expected, around, taps = np.zeros_like(exact_cotangent), np.zeros_like(padded), np.zeros(kernel.shape)
    for a in range(3):
        for b in range(3):
            window = (slice(None), slice(a, a + rows), slice(b, b + columns))
            expected += padded[window] @ exact_kernel[a, b]
            around[window] += exact_cotangent @ exact_kernel[a, b].T
            taps[a, b] = np.einsum("nijf,nijo->fo", padded[window], exact_cotangent)
    parity.check("conv3x3: Winograd's", ours, peer, (expected, around[:, 1:-1, 1:-1], taps), exact)


def test_products_of_the_highest_precision_in_tangents(getkey, parity):
    x, dx = jax.random.normal(getkey(), (2, 6, 14, 14, 32))
    kernel, dkernel = jax.random.normal(getkey(), (2, 3, 3, 32, 32))
    assert not convolves(x.shape, kernel.shape)
    with jax.enable_x64(True):
        assert not convolves(x.shape, kernel.shape, jnp.float64)

    def tangent(x, kernel, dx, dkernel):
        return jax.jit(lambda *a: jax.jvp(jax.vmap(conv3x3, (0, None)), a[:2], a[2:])[1])(x, kernel, dx, dkernel)

    def formula(x, kernel, dx, dkernel):
        return jax.vmap(xla, (0, None))(dx, kernel) + jax.vmap(xla, (0, None))(x, dkernel)

    with jax.default_matmul_precision("highest"):
        parity.functions("conv3x3: Winograd's", tangent, formula, x, kernel, dx, dkernel)


@pytest.mark.parametrize("row", [4, 5])
@pytest.mark.parametrize("column", [6, 7])
def test_a_pixel_reaches_its_neighbours_only(row, column, getkey):
    x, kernel = jnp.zeros((8, 12, 12, 32)).at[:, row, column].set(1.0), jax.random.normal(getkey(), (3, 3, 32, 32))
    assert not convolves(x.shape, kernel.shape)
    with jax.default_matmul_precision("highest"):
        y = np.array(jax.jit(jax.vmap(conv3x3, (0, None)))(x, kernel))
    flipped = np.asarray(kernel)[::-1, ::-1, :].sum(2)
    inside = y[:, row - 1 : row + 2, column - 1 : column + 2]
    # float32 sums of 32 taps of order 1, with the rounding of their square's
    np.testing.assert_allclose(inside, np.broadcast_to(flipped, inside.shape), atol=1e-4)
    inside[:] = 0
    assert not y.any()


@pytest.mark.parametrize(
    ("shape", "features", "options"),
    [
        ((8, 14, 14), (32, 32), {"precision": "default"}),  # training compiles faster without
        ((8, 14, 14), (32, 32), {"dtype": jnp.bfloat16}),
        ((8, 14, 14), (31, 32), {}),
        ((8, 14, 14), (32, 31), {}),
        ((8, 14, 14), (32, 288), {}),
        ((8, 14, 14), (32, 32), {"dtype": jnp.float16}),
        ((5, 14, 14), (32, 32), {}),
        ((300, 5, 6), (32, 32), {}),
        ((9, 64, 64), (32, 32), {}),
        ((5, 64, 64), (64, 32), {}),
        ((5, 64, 64), (32, 64), {}),
        ((0, 14, 14), (32, 32), {}),
    ],
)
def test_sizes_and_types_that_stay_with_xla(shape, features, options):
    assert convolves((*shape, features[0]), (3, 3, *features), **options)


def test_sizes_at_the_bounds():
    for shape, features in [((8, 64, 64), (32, 32)), ((64, 8, 8), (32, 256)), ((40, 6, 6), (256, 256))]:
        assert not convolves((*shape, features[0]), (3, 3, *features))


def test_float64_fills_the_cache_with_half_the_pixels(x64):
    assert convolves((8, 64, 64, 32), (3, 3, 32, 32), jnp.float64)


def test_unknown_sizes_are_exported(getkey, parity):
    x, kernel = jax.random.normal(getkey(), (8, 14, 14, 32)), jax.random.normal(getkey(), (3, 3, 32, 32))
    shape = jax.export.symbolic_shape("batch, 14, 14, 32")
    with jax.default_matmul_precision("highest"):
        exported = jax.export.export(jax.jit(jax.vmap(conv3x3, (0, None))), platforms=["cpu", "cuda", "tpu"])(
            jax.ShapeDtypeStruct(shape, jnp.float32), kernel
        )
        expected = jax.jit(jax.vmap(conv3x3, (0, None)))(x, kernel)
        (features,) = jax.export.symbolic_shape("features")
        jax.export.export(jax.jit(jax.vmap(conv3x3, (0, None))), platforms=["cpu"])(
            x, jax.ShapeDtypeStruct((3, 3, 32, features), jnp.float32)
        )
    parity.check(
        "conv3x3: exported", exported.call(x, kernel), expected, in_double(jax.vmap(xla, (0, None)), x, kernel)
    )


def test_low_precision_is_promoted_as_elsewhere(arrays):
    x, kernel = arrays
    assert conv3x3(x.astype(jnp.bfloat16), kernel).dtype == jnp.float32
    assert conv3x3(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("x", "kernel"),
    [((6, 4, 5), (2, 2, 5, 7)), ((6, 4, 5), (3, 3, 9, 7)), ((6, 4, 5), (3, 3, 5)), ((1, 6, 4, 5), (3, 3, 5, 7))],
)
def test_other_shapes_are_refused(x, kernel):
    with pytest.raises(ValueError, match=r"conv3x3: expected an image \(rows, columns, features\) and a kernel"):
        jax.eval_shape(conv3x3, jnp.zeros(x), jnp.zeros(kernel))


def test_a_loop_body_holds_only_the_layout_that_is_fast(arrays):
    # Elsewhere XLA's CPU compiler repairs the layout of a convolution; in a loop it does not (40 times slower).
    x, kernel = arrays

    def both(x, kernel):
        y, pull = jax.vjp(lambda x: conv3x3(x, kernel), x)
        return pull(jnp.sin(y))[0]

    @jax.jit
    def loop(x, kernel):
        return jax.lax.fori_loop(0, 3, lambda _, x: both(x, kernel), x)

    text = loop.lower(x, kernel).compile().as_text()
    labels = [line.split("dim_labels=")[1].split(",")[0] for line in text.splitlines() if " convolution(" in line]
    assert labels == ["b01f_01io->b01f"] * 2


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators_with_the_callers_precision(arrays, platform):
    with jax.default_matmul_precision("highest"):
        lowered = jax.jit(jax.vmap(conv3x3, (0, None))).trace(arrays[0][None], arrays[1])
    text = lowered.lower(lowering_platforms=(platform,)).as_text()
    assert "precision HIGHEST" in text


@pytest.mark.parametrize(
    ("rows", "columns", "batch"), [(8, 8, 1), (7, 8, 1), (7, 7, 1), (16, 16, 1), (4, 8, 2), (8, 8, 3)]
)
def test_small_images_with_many_features(rows, columns, batch, getkey, parity):
    """The matrix product that the CPU runs instead, its row padding (49 to 64 pixels) and its transpose."""
    x = jax.random.normal(getkey(), (batch, rows, columns, 520))
    kernel = jax.random.normal(getkey(), (3, 3, 520, 512)) / 70

    def together(convolve, x, kernel, cotangent):
        def linear(x, kernel):
            return jax.vmap(lambda x: convolve(x, kernel))(x)

        y = linear(x, kernel)
        transposed = jax.linear_transpose(lambda x: linear(x, kernel), x)
        return y, transposed(cotangent)[0], jax.jit(jax.vmap(linear, (0, None)))(x[None], kernel)[0]

    cotangent = jax.random.normal(getkey(), (batch, rows, columns, 512))
    arguments = x, kernel, cotangent
    parity.functions("conv3x3: matrix product", partial(together, conv3x3), partial(together, xla), *arguments)


def test_only_the_cpu_gets_the_matrix_product():
    shapes = jax.ShapeDtypeStruct((8, 8, 520), jnp.float32), jax.ShapeDtypeStruct((3, 3, 520, 512), jnp.float32)
    traced = jax.jit(conv3x3).trace(*shapes)
    for platform, convolves in (("cpu", False), ("cuda", True), ("tpu", True)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.convolution" in text) == convolves
