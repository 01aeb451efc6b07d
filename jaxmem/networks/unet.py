"""A small class-conditional U-Net for images.

The image is folded into patches before the first layer (28×28 becomes 14×14 with patch 2): a quarter of the pixels for
four times the features of one layer.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmem.diffusion import NoiseSchedule
from jaxmem.kernels.attention import attention
from jaxmem.kernels.convolution import conv3x3
from jaxmem.kernels.normalization import normalise


def fold(x: Float[Array, "height width features"], patch: int) -> Float[Array, "rows columns folded"]:
    """Non-overlapping ``patch × patch`` squares as channels (space to depth)."""
    height, width, features = x.shape
    x = x.reshape(height // patch, patch, width // patch, patch, features)
    return x.transpose(0, 2, 1, 3, 4).reshape(height // patch, width // patch, patch * patch * features)


def unfold(x: Float[Array, "rows columns folded"], patch: int) -> Float[Array, "height width features"]:
    """The inverse of `fold`."""
    rows, columns, folded = x.shape
    x = x.reshape(rows, columns, patch, patch, folded // patch**2)
    return x.transpose(0, 2, 1, 3, 4).reshape(rows * patch, columns * patch, folded // patch**2)


def _beside(x: Float[Array, "rows columns a"], y: Float[Array, "rows columns b"]) -> Float[Array, "rows columns a+b"]:
    """The features of x and then those of y: a concatenation, as a sum of both with zeros around.

    XLA's CPU compiler copies a concatenation for each of its readers, and means of one take its slow path: of 784
    tangents' products with the default U-Net both were 5 % of the time.
    """
    return jnp.pad(x, ((0, 0), (0, 0), (0, y.shape[-1]))) + jnp.pad(y, ((0, 0), (0, 0), (x.shape[-1], 0)))


class Conv3x3(nnx.Module):
    """`conv3x3` with a learned kernel (row, column, in, out) and bias."""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs, zero: bool = False) -> None:
        init = nnx.initializers.zeros if zero else nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, in_features, out_features), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(out_features))

    def __call__(self, x: Float[Array, "rows columns features"]) -> Float[Array, "rows columns out"]:
        return conv3x3(x, self.kernel[...]) + self.bias[...][None, None]


class GroupNorm(nnx.Module):
    """`normalise`, then a learned scale and shift per feature."""

    def __init__(self, num_features: int, num_groups: int) -> None:
        self.num_groups = num_groups
        self.scale = nnx.Param(jnp.ones(num_features))
        self.shift = nnx.Param(jnp.zeros(num_features))

    def __call__(self, x: Float[Array, "rows columns features"]) -> Float[Array, "rows columns features"]:
        return normalise(x, self.num_groups) * self.scale[...][None, None] + self.shift[...][None, None]


class SelfAttention(nnx.Module):
    """``x + out(attention(q, k, v))`` over all pixels, q, k and v linear in norm(x); begins as the identity."""

    def __init__(self, features: int, num_heads: int, groups: int, *, rngs: nnx.Rngs) -> None:
        self.num_heads = num_heads
        self.norm = GroupNorm(features, groups)
        self.qkv = nnx.Linear(features, 3 * features, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(features, features, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x: Float[Array, "rows columns features"]) -> Float[Array, "rows columns features"]:
        features = x.shape[-1]
        split = self.qkv(self.norm(x)).reshape(-1, 3, self.num_heads, features // self.num_heads)
        q, k, v = split.transpose(1, 2, 0, 3)
        return x + self.out(attention(q, k, v).transpose(1, 0, 2).reshape(x.shape))


class ResBlock(nnx.Module):
    """``skip(x) + conv(silu((1 + scale) norm(conv(silu(norm(x)))) + shift))``; the embedding gives scale and shift.

    With heads, self-attention follows.
    """

    def __init__(
        self, in_features: int, out_features: int, embedding: int, groups: int, num_heads: int = 0, *, rngs: nnx.Rngs
    ) -> None:
        self.norm1 = GroupNorm(in_features, groups)
        self.conv1 = Conv3x3(in_features, out_features, rngs=rngs)
        self.modulation = nnx.Linear(embedding, 2 * out_features, rngs=rngs)
        self.groups = groups
        self.conv2 = Conv3x3(out_features, out_features, rngs=rngs, zero=True)
        same = in_features == out_features
        self.skip = None if same else nnx.Linear(in_features, out_features, use_bias=False, rngs=rngs)
        self.attention = SelfAttention(out_features, num_heads, groups, rngs=rngs) if num_heads else None

    def __call__(
        self, x: Float[Array, "rows columns features"], embedding: Float[Array, " embedding"]
    ) -> Float[Array, "rows columns out"]:
        scale, shift = jnp.split(self.modulation(embedding), 2)
        hidden = self.conv1(jax.nn.silu(self.norm1(x)))
        hidden = self.conv2(jax.nn.silu(normalise(hidden, self.groups) * (1 + scale)[None, None] + shift[None, None]))
        hidden = hidden + (x if self.skip is None else self.skip(x))
        return hidden if self.attention is None else self.attention(hidden)


class UNet(nnx.Module):
    """A noise predictor for one image: ``eps(x, t, c) = gate (x - alpha_t image) / sigma_t + residual``.

    The network puts out three maps. ``image`` and ``gate`` are a clean image and how firmly it is believed, pixel by
    pixel, ``residual`` is everything else. Where a pixel is certain (a memorized image, a constant background) the
    true ``∂eps/∂x`` is ``1/sigma_t``, up to 100: the gate states that slope exactly instead of asking convolutions to
    learn it. With ``r = log(alpha_t / sigma_t)`` the gate's logit is ``4 (1 + softplus(r)) output - 2 r``: with output
    0 it is the best linear denoiser of unit-variance pixels, and the factor lets it open as t → 0. r is also the time
    feature, because it resolves the first timesteps (4.6, 4.2, 4.0, ...) and the table index does not.

    The class enters as an embedding that scales and shifts features, as a map at the first layer and as a map on the
    outputs. With the embedding alone, a class of one image in a hundred was still drawn as the common class after 2,300
    steps of 32 images (1,450 with the embedding's present scale); with all of it, not after 2,060. Which part does it
    was not measured.

    ``num_heads`` puts self-attention after every block of a level, ``(0, 2, 4)`` at the two coarser of three; by
    default there is none.

    Bind with ``prediction="eps"`` and the same schedule. All operations are smooth, so Jacobians and second-order
    losses exist. Defaults fit MNIST on two CPU cores: 0.38 M parameters, about 36 MFLOP a call.

    Raises:
        ValueError: at construction for sizes that do not fold, at a call for an image of another shape or a class
            where none was configured (or none where one was).
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (28, 28, 1),
        *,
        num_classes: int = 10,
        schedule: NoiseSchedule | None = None,
        patch: int = 2,
        features: Sequence[int] = (32, 64),
        num_blocks: Sequence[int] = (1, 2),
        num_heads: Sequence[int] | None = None,
        embedding: int = 128,
        groups: int = 8,
        rngs: nnx.Rngs,
    ) -> None:
        height, width, channels = shape
        num_heads = (0,) * len(features) if num_heads is None else tuple(num_heads)
        _check_sizes(shape, patch, features, num_blocks, num_heads, groups)
        self.shape, self.patch, self.num_classes = tuple(shape), patch, num_classes
        self.features, self.num_blocks = tuple(features), tuple(num_blocks)
        self.schedule = NoiseSchedule() if schedule is None else schedule

        self.time1 = nnx.Linear(32, embedding, rngs=rngs)
        self.time2 = nnx.Linear(embedding, embedding, rngs=rngs)
        # Unit variance, not Flax's 1/embedding, so that classes start apart (not enough by itself for a rare one).
        init = nnx.initializers.normal(1.0)
        self.classes = nnx.Embed(num_classes, embedding, embedding_init=init, rngs=rngs) if num_classes else None
        width_in = features[0]
        self.stem = nnx.Linear(patch * patch * channels, width_in, rngs=rngs)
        # Convolutions know the place only through their padding; a memorized image needs it from the first layer.
        maps, grid = max(num_classes, 1), (height // patch, width // patch)
        self.position = nnx.Param(0.5 * jax.random.normal(rngs.params(), (maps, *grid, width_in)))
        self.prior = nnx.Param(jnp.zeros((maps, height, width, 3 * channels)))

        def block(inner: int, outer: int, level: int) -> ResBlock:
            return ResBlock(inner, outer, embedding, groups, num_heads[level], rngs=rngs)

        down, shrink = [], []
        for level, outer in enumerate(features):
            if level:
                shrink.append(nnx.Linear(4 * width_in, outer, rngs=rngs))
                width_in = outer
            down.append(nnx.List([block(outer, outer, level) for _ in range(num_blocks[level])]))
        up, grow = [], []
        for level in reversed(range(len(features) - 1)):
            outer = features[level]
            grow.append(nnx.Linear(width_in, 4 * outer, use_bias=False, rngs=rngs))
            up.append(nnx.List([block(outer if i else 2 * outer, outer, level) for i in range(num_blocks[level])]))
            width_in = outer
        self.down, self.shrink = nnx.List(down), nnx.List(shrink)
        self.up, self.grow = nnx.List(up), nnx.List(grow)
        self.norm = GroupNorm(width_in, groups)
        self.modulation = nnx.Linear(embedding, 2 * width_in, rngs=rngs)
        self.out = Conv3x3(width_in, 3 * patch * patch * channels, rngs=rngs, zero=True)

    def _embed(self, log_snr: Float[Array, ""], cond: Int[Array, ""] | int | None) -> Float[Array, " embedding"]:
        # log(alpha / sigma) spans about 10: wavelengths from 25 (the whole range) down to 0.8.
        angles = log_snr * jnp.geomspace(0.25, 8.0, 16)
        hidden = self.time2(jax.nn.silu(self.time1(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)]))))
        if self.classes is not None:
            hidden = hidden + self.classes.embedding[...][cond]
        return jax.nn.silu(hidden)

    def __call__(
        self, x: Float[Array, "height width channels"], t: Int[Array, ""] | int, cond: Int[Array, ""] | int | None
    ) -> Float[Array, "height width channels"]:
        if x.shape != self.shape:
            raise ValueError(f"x: expected one image of shape {self.shape}, got {x.shape}; use jax.vmap for a batch")
        if (cond is None) == (self.num_classes > 0):
            wanted = f"a class from 0 to {self.num_classes - 1}" if self.num_classes else "None (num_classes is 0)"
            raise ValueError(f"cond: expected {wanted}, got {cond}")
        if not isinstance(cond, jax.core.Tracer) and cond is not None and not 0 <= int(cond) < self.num_classes:
            raise ValueError(f"cond: expected a class from 0 to {self.num_classes - 1}, got {cond}")
        alpha, sigma = self.schedule.at(t, x.dtype)
        log_snr = jnp.log(alpha / sigma)
        embedding = self._embed(log_snr, cond)

        row = 0 if cond is None else cond
        hidden = self.stem(fold(x, self.patch)) + self.position[...][row]
        skips: list[Array] = []
        for level, blocks in enumerate(self.down):
            if level:
                skips.append(hidden)
                hidden = self.shrink[level - 1](fold(hidden, 2))
            for block in blocks:
                hidden = block(hidden, embedding)
        for grow, blocks in zip(self.grow, self.up, strict=True):
            hidden = _beside(unfold(grow(hidden), 2), skips.pop())
            for block in blocks:
                hidden = block(hidden, embedding)
        scale, shift = jnp.split(self.modulation(embedding), 2)
        hidden = self.norm(hidden) * (1 + scale)[None, None] + shift[None, None]
        # The factor is a learning rate: under Adam the maps move four times as fast as other weights.
        maps = unfold(self.out(jax.nn.silu(hidden)), self.patch) + 4 * self.prior[...][row]
        logit, image, residual = jnp.split(maps, 3, axis=-1)
        gate = jax.nn.sigmoid(4 * (1 + jax.nn.softplus(log_snr)) * logit - 2 * log_snr)
        return gate * (x - alpha * image) / sigma + residual


def _check_sizes(
    shape: tuple[int, int, int],
    patch: int,
    features: Sequence[int],
    num_blocks: Sequence[int],
    num_heads: tuple[int, ...],
    groups: int,
) -> None:
    """Refuse sizes that do not fold, and levels that do not agree."""
    height, width, _ = shape
    stride = patch * 2 ** (len(features) - 1)
    if height % stride or width % stride:
        raise ValueError(
            f"shape: height and width must be multiples of {stride} (patch {patch}, {len(features)} levels),"
            f" got {height}×{width}"
        )
    if len(num_blocks) != len(features):
        raise ValueError(f"num_blocks: expected one number per level ({len(features)}), got {tuple(num_blocks)}")
    if len(num_heads) != len(features) or any(h < 0 or (h and f % h) for h, f in zip(num_heads, features, strict=True)):
        raise ValueError(
            f"num_heads: expected one number per level that divides its features {tuple(features)}, or 0 for no"
            f" attention there, got {num_heads}"
        )
    if any(f % groups for f in features):
        raise ValueError(f"features: expected multiples of groups={groups}, got {tuple(features)}")
