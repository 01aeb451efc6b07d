"""Torch operators on JAX arrays, by torchax, with this package's kernels where those are faster or need less memory."""

import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxmem.extras import require
from jaxmem.kernels.attention import attention
from jaxmem.kernels.convolution import conv3x3

_LONG = 1024  # keys from which attention goes in blocks: below, its matrices are smaller than the features around them


@cache
def environment() -> Any:
    """The torchax environment of this package; the user's own, `torchax.default_env`, stays as it is.

    Raises:
        MissingExtra: torch or torchax are not installed.
    """
    require("torch", "a network of torch")
    import torch

    _name_removed_overloads(torch.ops.aten)
    from torchax.tensor import Environment

    env = Environment()
    functions = torch.nn.functional
    env.override_op_definition(functions.linear, _of_tensors(env, _linear))
    env.override_op_definition(functions.conv2d, _of_tensors(env, _conv2d))
    env.override_op_definition(functions.group_norm, _of_tensors(env, _group_norm))
    in_blocks = _of_tensors(env, _attention)
    plain = partial(env._ops[functions.scaled_dot_product_attention].func, env=env)

    def attend(*args: Any, **kwargs: Any) -> Any:
        return (in_blocks if _is_long(*args, **kwargs) else plain)(*args, **kwargs)

    env.override_op_definition(functions.scaled_dot_product_attention, attend)
    return env


def _of_tensors(env: Any, function: Callable[..., Array]) -> Callable[..., Any]:
    """A function of JAX arrays as one of torchax's tensors."""

    def call(*args: Any, **kwargs: Any) -> Any:
        arrays, named = env.t2j_iso((args, kwargs))
        return env.j2t_iso(function(*arrays, **named))

    return call


def _linear(input: Array, weight: Array, bias: Any = None) -> Array:
    """``x Wᵀ + b`` of W as it lies: a transposed copy would be kept beside it by every linearisation."""
    y = jax.lax.dot_general(input, weight, (((input.ndim - 1,), (1,)), ((), ())))
    return y if bias is None else y + bias


def _conv2d(
    input: Array, weight: Array, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Array:
    """A convolution of (batch, features, rows, columns), computed with the features last, as XLA's CPU code wants."""
    stride, dilation = _two(stride), _two(dilation)
    x = jnp.moveaxis(input, -3, -1)
    batched = x if x.ndim == 4 else x[None]
    kernel = weight.transpose(2, 3, 1, 0)
    if kernel.shape[:2] == (3, 3) and padding in (1, (1, 1), [1, 1]) and stride == dilation == (1, 1) and groups == 1:
        y = jax.vmap(conv3x3, (0, None))(batched, kernel)
    else:
        around = {"valid": "VALID", "same": "SAME"}[padding] if isinstance(padding, str) else _pairs(_two(padding))
        y = jax.lax.conv_general_dilated(
            batched,
            kernel,
            stride,
            around,
            rhs_dilation=dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
    y = y if bias is None else y + bias
    return jnp.moveaxis(y if x.ndim == 4 else y[0], -1, -3)


def _two(value: Any) -> tuple[int, int]:
    first, *rest = value if isinstance(value, Sequence) else [value]
    return (first, *rest) if rest else (first, first)


def _pairs(padding: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    return (padding[0], padding[0]), (padding[1], padding[1])


def _group_norm(input: Array, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Array:
    """Group normalisation in two passes: torchax's maps over all groups, in a loop."""
    x = input
    grouped = x.reshape(x.shape[0], num_groups, -1)
    centred = grouped - grouped.mean(-1, keepdims=True)
    y = (centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + eps)).reshape(x.shape)
    features = (1, -1) + (1,) * (x.ndim - 2)
    y = y if weight is None else y * weight.reshape(features)
    return y if bias is None else y + bias.reshape(features)


def _is_long(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,  # noqa: ARG001
    enable_gqa: bool = False,
) -> bool:
    """Whether attention goes in blocks: there are many keys, and no mask."""
    plain = attn_mask is None and not dropout_p and not is_causal and not enable_gqa
    same = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    return plain and same and key.shape[-2] >= _LONG


def _attention(query: Array, key: Array, value: Array, *_: Any, scale: float | None = None, **__: Any) -> Array:
    """Attention in blocks: the whole matrix of weights is never in memory."""
    query = query if scale is None else query * (scale * query.shape[-1] ** 0.5)
    heads = [array.reshape(-1, *array.shape[-2:]) for array in (query, key, value)]
    return attention(*heads).reshape(*query.shape[:-1], value.shape[-1])


def _name_removed_overloads(aten: Any) -> None:
    """Give names to the overloads that torchax registers and this torch does not have.

    torchax 0.0.13 names overloads of ``Dimname``, which torch removed in 2.13; without them its import fails. Nothing
    can call what the placeholders stand for.
    """
    spec = find_spec("torchax")
    assert spec is not None  # `require` was asked
    sources = [path.read_text(encoding="utf-8") for path in Path(str(spec.origin)).parent.rglob("*.py")]
    for operator, overload in sorted(set(re.findall(r"torch\.ops\.aten\.(\w+)\.(\w+)", "".join(sources)))):
        packet = getattr(aten, operator, None)
        if packet is not None and not hasattr(packet, overload):
            setattr(packet, overload, f"aten.{operator}.{overload}, removed from torch")
