"""A 3×3 convolution that runs at the same speed inside a loop as outside, forwards and transposed.

XLA's CPU compiler brings convolutions into the layout its fast code wants, but not those inside a loop body: there a
transposed `jax.lax.conv_general_dilated`, whose kernel JAX hands over as (row, column, out, in), runs on a naive path,
40 times slower (two cores, 14×14 pixels, 32 features). Jacobians and Krylov methods are loops. So this primitive is
the same convolution with a transposition rule of its own, that swaps and flips the kernel itself.

Small images with many features (the lower half of Stable Diffusion's UNet) are one matrix product over gathered
neighbourhoods on the CPU, where that was measured to be faster than XLA's convolution; see `_convolve_on_cpu`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv3x3(x: Float[Array, "..."], kernel: Float[Array, "..."]) -> Float[Array, "rows columns out"]:
    """The 3×3 convolution of one image, stride 1, zero padding: ``y[i, j] = sum_ab x[i + a - 1, j + b - 1] k[a, b]``.

    Batch it with `jax.vmap`; differentiable any number of times, in both modes.

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
    if transposed:
        kernel = kernel[::-1, ::-1].swapaxes(2, 3)
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=_LAYOUT, precision=precision)


def _convolve_on_cpu(x: Array, kernel: Array, *, precision: str | None, transposed: bool) -> Array:
    """XLA's convolution, or a matrix product over the nine neighbours of each pixel: which is a matter of sizes.

    Two cores, milliseconds by convolution and by product: 16×16 pixels and 1280 features 42 and 18, 8×8 and 1280 29 and
    20, 16×16 and 640 5.1 and 4.5; but 32×32 and 640 18 and 31, 64×64 and 320 15 and 41, 16×16 and 64 0.11 and 0.15.
    Transposed, the product takes the kernel as it lies, where flipping and swapping 59 MB takes longer than convolving.
    """
    batch, rows, columns, features = x.shape
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
    if kernel_dim is not batching.not_mapped:  # a batch of networks: XLA's grouped convolution
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
