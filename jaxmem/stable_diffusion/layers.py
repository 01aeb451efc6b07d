"""The layers that the UNet, the text encoder and the autoencoder share, for one example, channels last.

Attributes are named as the keys of a diffusers checkpoint, so a parameter's path is its key; the *type* of a parameter
says how its array is laid out there (`jaxmem.stable_diffusion.weights` turns it).
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmem.kernels.attention import attention
from jaxmem.kernels.convolution import conv3x3
from jaxmem.kernels.normalization import normalise


class LinearWeight(nnx.Param):
    """(in, out) here, (out, in) in a checkpoint."""


class PointwiseWeight(nnx.Param):
    """The kernel of a 1×1 convolution: (in, out) here, (out, in, 1, 1) in a checkpoint."""


class ConvWeight(nnx.Param):
    """(row, column, in, out) here, (out, in, row, column) in a checkpoint."""


def _initial(rngs: nnx.Rngs, shape: tuple[int, ...]) -> Array:
    """Variance 1 / fan-in: uniform in ±sqrt(3 / fan-in), for training from nothing."""
    return nnx.initializers.lecun_uniform()(rngs.params(), shape, jnp.float32)


def _add_bias(x: Array, bias: nnx.Param | None) -> Array:
    return x if bias is None else x + bias[...].reshape((1,) * (x.ndim - 1) + (-1,))


# The two activations have derivatives of their own because of what a linearisation keeps of each: one array per input,
# the slope, where JAX's derivative of the formula keeps its factors, two and a half times as much.


@jax.custom_jvp
def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x sigmoid(x)``."""
    return x * jax.nn.sigmoid(x)


@silu.defjvp
def _silu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    s = jax.nn.sigmoid(x)
    slope = s * (1 + x * (1 - s))
    return x * s, slope * dx


@jax.custom_jvp
def gelu_gate(value: Float[Array, "..."], gate: Float[Array, "..."]) -> Float[Array, "..."]:
    """``value gelu(gate)`` with the exact GELU, ``gelu(g) = g Φ(g)``."""
    return value * jax.nn.gelu(gate, approximate=False)


@gelu_gate.defjvp
def _gelu_gate_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    value, gate = primals
    gelu = jax.nn.gelu(gate, approximate=False)
    normal = 0.5 * (1 + jax.lax.erf(gate * 0.5**0.5))
    density = jnp.exp(-0.5 * gate * gate) * (0.5 / math.pi) ** 0.5
    slope = value * (normal + gate * density)
    return value * gelu, gelu * tangents[0] + slope * tangents[1]


class Linear(nnx.Module):
    """``x W + b`` on the last axis."""

    weight_type: type[nnx.Param] = LinearWeight

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, rngs: nnx.Rngs) -> None:
        self.weight = self.weight_type(_initial(rngs, (in_features, out_features)))
        self.bias = nnx.Param(jnp.zeros(out_features)) if bias else None

    def __call__(self, x: Float[Array, "*rows features"]) -> Float[Array, "*rows out"]:
        return _add_bias(jnp.matmul(x, self.weight[...]), self.bias)


class Pointwise(Linear):
    """A 1×1 convolution, which is a linear layer on the features of each pixel."""

    weight_type = PointwiseWeight


class Conv(nnx.Module):
    """A 3×3 convolution with padding 1."""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs) -> None:
        self.weight = ConvWeight(_initial(rngs, (3, 3, in_features, out_features)))
        self.bias = nnx.Param(jnp.zeros(out_features))

    def __call__(self, x: Float[Array, "rows columns features"]) -> Float[Array, "rows columns out"]:
        return _add_bias(conv3x3(x, self.weight[...]), self.bias)


class Embedding(nnx.Module):
    """Rows of a table."""

    def __init__(self, num_rows: int, features: int, *, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(0.02 * jax.random.normal(rngs.params(), (num_rows, features)))

    def __call__(self, index: Int[Array, " tokens"]) -> Float[Array, "tokens features"]:
        return self.weight[...][index]


class GroupNorm(nnx.Module):
    """`normalise` over groups of features, then a learned scale and shift."""

    def __init__(self, features: int, groups: int, epsilon: float) -> None:
        self.groups, self.epsilon = groups, epsilon
        self.weight = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, x: Float[Array, "rows columns features"]) -> Float[Array, "rows columns features"]:
        scaled = normalise(x, self.groups, self.epsilon) * self.weight[...][None, None]
        return _add_bias(scaled, self.bias)


class LayerNorm(nnx.Module):
    """Zero mean and unit variance of each row, in two passes, then a learned scale and shift; epsilon is PyTorch's."""

    def __init__(self, features: int, epsilon: float = 1e-5) -> None:
        self.epsilon = epsilon
        self.weight = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, x: Float[Array, "rows features"]) -> Float[Array, "rows features"]:
        centred = x - x.mean(-1, keepdims=True)
        deviation = jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + self.epsilon)
        return _add_bias(centred * deviation * self.weight[...][None], self.bias)


class Attention(nnx.Module):
    """Multi-head attention of x over a context, without bias on q, k and v unless asked."""

    def __init__(
        self, features: int, context_features: int, num_heads: int, *, bias: bool = False, rngs: nnx.Rngs
    ) -> None:
        self.num_heads = num_heads
        self.to_q = Linear(features, features, bias=bias, rngs=rngs)
        self.to_k = Linear(context_features, features, bias=bias, rngs=rngs)
        self.to_v = Linear(context_features, features, bias=bias, rngs=rngs)
        self.to_out = nnx.List([Linear(features, features, rngs=rngs)])

    def __call__(
        self, x: Float[Array, "tokens features"], context: Float[Array, "context_tokens context_features"]
    ) -> Float[Array, "tokens features"]:
        mixed = attention(self._heads(self.to_q(x)), self._heads(self.to_k(context)), self._heads(self.to_v(context)))
        return self.to_out[0](mixed.transpose(1, 0, 2).reshape(x.shape))

    def weights(
        self, x: Float[Array, "tokens features"], context: Float[Array, "context_tokens context_features"]
    ) -> Float[Array, "heads tokens context_tokens"]:
        """``softmax(q kᵀ / √depth)``, which the attention itself never holds as a whole."""
        q, k = self._heads(self.to_q(x)), self._heads(self.to_k(context))
        return jax.nn.softmax(jnp.einsum("hqd,hkd->hqk", q * q.shape[-1] ** -0.5, k), axis=-1)

    def _heads(self, projected: Array) -> Array:
        return projected.reshape(projected.shape[0], self.num_heads, -1).transpose(1, 0, 2)


class ResnetBlock(nnx.Module):
    """``shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + time)))``; the autoencoder's have no time."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        time_features: int | None,
        groups: int,
        epsilon: float,
        rngs: nnx.Rngs,
    ) -> None:
        self.norm1 = GroupNorm(in_features, groups, epsilon)
        self.conv1 = Conv(in_features, out_features, rngs=rngs)
        self.time_emb_proj = None if time_features is None else Linear(time_features, out_features, rngs=rngs)
        self.norm2 = GroupNorm(out_features, groups, epsilon)
        self.conv2 = Conv(out_features, out_features, rngs=rngs)
        same = in_features == out_features
        self.conv_shortcut = None if same else Pointwise(in_features, out_features, rngs=rngs)

    def __call__(
        self, x: Float[Array, "rows columns features"], time: Float[Array, " time_features"] | None = None
    ) -> Float[Array, "rows columns out"]:
        hidden = self.conv1(silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            hidden = hidden + self.time_emb_proj(silu(time))[None, None]
        hidden = self.conv2(silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nnx.Module):
    """A 3×3 convolution with stride 2, of an image padded by ``before`` rows and columns in front and one behind.

    It is written as one matrix product: XLA's strided convolutions are slow in loops once differentiated (see
    `jaxmem.kernels.convolution`), and this is where the image becomes small.
    """

    def __init__(self, features: int, *, before: int, rngs: nnx.Rngs) -> None:
        self.before = before
        self.conv = Conv(features, features, rngs=rngs)

    def __call__(self, x: Float[Array, "rows columns features"]) -> Float[Array, "half_rows half_columns features"]:
        rows, columns = ((length + self.before + 1 - 3) // 2 + 1 for length in x.shape[:2])
        x = jnp.pad(x, ((self.before, 1), (self.before, 1), (0, 0)))
        taps = [x[a : a + 2 * rows - 1 : 2, b : b + 2 * columns - 1 : 2] for a in range(3) for b in range(3)]
        neighbours = jnp.stack(taps, 2).reshape(rows, columns, 3, 3, -1)
        # The kernel as it is: a linearisation would keep a reshaped one as a copy.
        return _add_bias(jnp.tensordot(neighbours, self.conv.weight[...], 3), self.conv.bias)


class Upsample(nnx.Module):
    """Every pixel twice in each direction, the last ones beyond ``size`` left out, then a 3×3 convolution."""

    def __init__(self, features: int, *, rngs: nnx.Rngs) -> None:
        self.conv = Conv(features, features, rngs=rngs)

    def __call__(
        self, x: Float[Array, "rows columns features"], size: tuple[int, ...] | None = None
    ) -> Float[Array, "..."]:
        rows, columns, features = x.shape
        x = jnp.broadcast_to(x[:, None, :, None], (rows, 2, columns, 2, features))
        x = x.reshape(2 * rows, 2 * columns, features)
        return self.conv(x if size is None else x[: size[0], : size[1]])
