"""A 3×3 convolution that runs at the same speed inside a loop as outside, forwards and transposed.

XLA's CPU compiler brings convolutions into the layout that its fast code wants, but not those inside a loop body.
There the transpose of `jax.lax.conv_general_dilated`, whose kernel JAX hands over as (row, column, out, in), takes a
naive path. Jacobians and Krylov methods are loops, so this primitive is the same convolution with a transposition rule
of its own, which swaps and flips the kernel itself.

On the CPU, `_convolve_on_cpu` chooses by size between XLA's convolution, a matrix product over gathered neighbourhoods
(small images with many features, as in the lower half of Stable Diffusion's UNet) and Winograd's products (batches of
small images, as the tangents of a Jacobian, at the highest precision). ``docs/performance.md`` has the measurements.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv3x3(x: Float[Array, "..."], kernel: Float[Array, "..."]) -> Float[Array, "rows columns out"]:
    """The 3×3 convolution of one image, stride 1, zero padding: ``y[i, j] = sum_ab x[i + a - 1, j + b - 1] k[a, b]``.

    Batch it with `jax.vmap`; differentiable any number of times, in both modes. Under the highest precision, on a CPU,
    rounding may be small in norm only, not sum by sum; see `_winograd`.

    Raises:
        ValueError: for other ranks, a kernel that is not 3×3, or features that disagree.
    """
    if x.ndim != 3 or kernel.ndim != 4 or kernel.shape[:2] != (3, 3) or kernel.shape[2] != x.shape[2]:
        raise ValueError(
            f"conv3x3: expected an image (rows, columns, features) and a kernel (3, 3, features, out), got shapes"
            f" {x.shape} and {kernel.shape}; use jax.vmap for a batch"
        )
    dtype = jnp.promote_types(x.dtype, kernel.dtype)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    # A primitive is lowered outside the caller's `jax.default_matmul_precision`, so it is a parameter.
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return conv3x3_p.bind(x[None], kernel, precision=precision, transposed=False)[0]


def _convolve(x: Array, kernel: Array, *, precision: str | None, transposed: bool) -> Array:
    """The convolution of a batch, or its transpose (in x), which is that with the flipped and swapped kernel."""
    kernel = _flipped(kernel) if transposed else kernel
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=_LAYOUT, precision=precision)


def _flipped(kernel: Array) -> Array:
    return kernel[::-1, ::-1].swapaxes(2, 3)


def _convolve_on_cpu(x: Array, kernel: Array, *, precision: str | None, transposed: bool) -> Array:
    """XLA's convolution, Winograd's, or a matrix product over the nine neighbours of each pixel, whichever is fastest.

    The matrix product wins for at most 256 pixels and at least 512 features. Its transpose takes the kernel as it lies:
    flipping and swapping 59 MB would take longer than the convolution.
    """
    batch, rows, columns, features = x.shape
    if precision == "highest" and _winograd_is_faster(x, kernel):
        return _winograd(x, _flipped(kernel) if transposed else kernel, precision)
    if rows * columns > 256 or features < 512:
        return _convolve(x, kernel, precision=precision, transposed=transposed)
    matrix = kernel.reshape(-1, kernel.shape[3])  # (neighbours and features in, features out)
    around = ((0, 0), (1, 1), (1, 1), (0, 0))
    if transposed:
        parts = _product(x.reshape(-1, features), matrix.T, precision).reshape(batch, rows, columns, 9, -1)
        padded = [jnp.pad(parts[..., i, :], around) for i in range(9)]
        shifted = [part[:, 2 - i // 3 :, 2 - i % 3 :][:, :rows, :columns] for i, part in enumerate(padded)]
        return sum(shifted[1:], shifted[0])
    padded_x = jnp.pad(x, around)
    neighbours = [padded_x[:, i // 3 :, i % 3 :][:, :rows, :columns] for i in range(9)]
    product = _product(jnp.concatenate(neighbours, -1).reshape(-1, 9 * features), matrix, precision)
    return product.reshape(batch, rows, columns, -1)


def _winograd_is_faster(x: Array, kernel: Array) -> bool:
    """Whether `_winograd` takes less time than XLA's convolution, by sizes.

    Few features gain nothing, few pixels neither, and the smallest images are mostly padding. The maps of its parts, at
    least four times as large as x and y, should fit the cache, so x and y may have 4 MB each.

    Compilation takes longer, and a training step gains nothing: the gradients of kernels are no faster.
    So Winograd's products are for the highest precision, which spectra ask for and training does not.
    """
    if any(map(jax.export.is_symbolic_dim, (*x.shape, *kernel.shape))) or x.dtype not in (jnp.float32, jnp.float64):
        return False
    few, many = sorted(kernel.shape[2:])
    pixels = math.prod(x.shape[:3])
    fits = pixels * many * x.dtype.itemsize <= 2**22
    return few >= 32 and many <= 256 and min(x.shape[1:3]) >= 6 and pixels >= 2**10 and fits


def _winograd(x: Array, kernel: Array, precision: str | None) -> Array:
    """Winograd's minimal filtering F(2×2, 3×3) (Lavin and Gray, 2016): 16 products for four pixels instead of 36.

    In one dimension two outputs of the pixels ``d0 … d3`` and taps ``g0, g1, g2`` are ``m0 + m1 + m2`` and
    ``m1 - m2 - m3``, where ``m0 = (d0 - d2) g0``, ``m1 = (d1 + d2) (g0 + g1 + g2) / 2``,
    ``m2 = (d2 - d1) (g0 - g1 + g2) / 2`` and ``m3 = (d1 - d3) g2``. The same along rows, where each of the four
    products is such a filtering along columns.

    In norm, rounding is that of a convolution (up to 256 features within a third). In single sums it is not: where one
    tap or pixel is far larger than the others of its square, they get its rounding error, and the result of zero taps
    is not an exact zero. Pixels further apart do not influence each other.
    """
    batch, rows, columns, features = x.shape
    high, wide = -(-rows // 2), -(-columns // 2)  # squares of four outputs; what sticks out is cut off at the end

    def pixels(d0: Array, d1: Array, d2: Array, d3: Array) -> tuple[Array, ...]:
        return d0 - d2, d1 + d2, d2 - d1, d1 - d3

    def taps(g0: Array, g1: Array, g2: Array) -> tuple[Array, ...]:
        return g0, 0.5 * (g0 + g1 + g2), 0.5 * (g0 - g1 + g2), g2

    def outputs(m0: Array, m1: Array, m2: Array, m3: Array) -> tuple[Array, Array]:
        return m0 + m1 + m2, m1 - m2 - m3

    def along_columns(pairs: Array, taps_of_row: Array) -> tuple[Array, Array]:
        parts = pixels(pairs[:, :, :-1, 0], pairs[:, :, :-1, 1], pairs[:, :, 1:, 0], pairs[:, :, 1:, 1])
        matrices = taps(*taps_of_row)
        products = [_product(p.reshape(-1, features), m, precision) for p, m in zip(parts, matrices, strict=True)]
        return outputs(*(product.reshape(batch, high, wide, -1) for product in products))

    around = ((0, 0), (1, 2 * high + 1 - rows), (1, 2 * wide + 1 - columns), (0, 0))
    padded = jnp.pad(x, around).reshape(batch, high + 1, 2, wide + 1, 2, features)
    parts = pixels(padded[:, :-1, 0], padded[:, :-1, 1], padded[:, 1:, 0], padded[:, 1:, 1])
    left, right = zip(*map(along_columns, parts, taps(*kernel)), strict=True)
    squares = [jnp.stack(pair, 3) for pair in zip(outputs(*left), outputs(*right), strict=True)]  # (left, right) by row
    return jnp.stack(squares, 2).reshape(batch, 2 * high, 2 * wide, -1)[:, :rows, :columns]


def _product(pixels: Array, matrix: Array, precision: str | None) -> Array:
    # XLA's CPU library has a slow path for 49 to 64 rows (64×11520 by 11520×1280 takes 19 ms, with 72 rows 6).
    count = pixels.shape[0]
    pixels = jnp.pad(pixels, ((0, 72 - count if 48 < count <= 64 else 0), (0, 0)))
    return jnp.matmul(pixels, matrix, precision=precision)[:count]


def _transpose_input(cotangent: Array, x: Any, kernel: Array, *, transposed: bool, **options: Any) -> Array:  # noqa: ARG001
    return conv3x3_p.bind(cotangent, kernel, transposed=not transposed, **options)


def _transpose_kernel(cotangent: Array, x: Array, kernel: Any, **options: Any) -> Array:
    (gradient,) = jax.linear_transpose(lambda k: _convolve(x, k, **options), kernel.aval)(cotangent)
    return gradient


def _batch(args: tuple[Any, Any], dims: tuple[Any, Any], **options: Any) -> tuple[Array, int]:
    (x, kernel), (x_dim, kernel_dim) = args, dims
    if kernel_dim is not None:  # a batch of networks: XLA's grouped convolution
        return jax.vmap(lambda x, k: _convolve(x, k, **options), dims)(x, kernel), 0
    x = jnp.moveaxis(x, x_dim, 0)
    y = conv3x3_p.bind(x.reshape(-1, *x.shape[2:]), kernel, **options)
    return y.reshape(*x.shape[:2], *y.shape[1:]), 0


def _shape(x: Any, kernel: Any, *, transposed: bool, **options: Any) -> Any:  # noqa: ARG001
    return jax.core.ShapedArray((*x.shape[:3], kernel.shape[2 if transposed else 3]), x.dtype)


conv3x3_p = Primitive("conv3x3")
conv3x3_p.def_impl(
    jax.jit(
        lambda x, kernel, **options: conv3x3_p.bind(x, kernel, **options), static_argnames=("precision", "transposed")
    )
)
conv3x3_p.def_abstract_eval(_shape)
mlir.register_lowering(conv3x3_p, mlir.lower_fun(_convolve, multiple_results=False))
mlir.register_lowering(conv3x3_p, mlir.lower_fun(_convolve_on_cpu, multiple_results=False), platform="cpu")
ad.defbilinear(conv3x3_p, _transpose_input, _transpose_kernel)
batching.primitive_batchers[conv3x3_p] = _batch
