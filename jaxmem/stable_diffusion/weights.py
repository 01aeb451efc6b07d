"""Weights of a diffusers folder, in and out: strict, one error for all that is wrong, one tensor in memory at a time.

A parameter's path is its key in the checkpoint, and its type says how the array lies there; beyond that there are only
the spellings of older files (`Layout`). There is no lenient mode: a tensor too many, too few, of another shape or not
floating point is an error, because each is how a model silently becomes another function.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save

from jaxmem.runs.durable import write_atomically
from jaxmem.stable_diffusion import adapters
from jaxmem.stable_diffusion.layers import ConvWeight, LinearWeight, PointwiseWeight
from jaxmem.stable_diffusion.tensors import Tensor, refuse

_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Layout:
    """How keys are spelt in a component's files, beside today's spelling: ``rename`` gives today's, or None to skip."""

    basename: str  #: of the files, without ``.safetensors``
    rename: Callable[[str], str | None] = lambda key: key
    saved_prefix: str = ""  #: what export writes before each key
    old_pointwise: bool = False  #: whether linear layers under an old spelling may be kept as 1×1 convolutions


def _rename_text_encoder(key: str) -> str | None:
    # A buffer, 0, 1, 2, ...; and a matrix behind the last hidden state, which CLIPTextModel does not have.
    unused = ("text_model.embeddings.position_ids", "embeddings.position_ids", "text_projection.weight")
    return None if key in unused else key.removeprefix("text_model.")


def _rename_vae(key: str) -> str:
    head, name, rest = key.rpartition(".attentions.0.")
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        if name and rest.startswith(old + "."):
            return head + name + new + rest.removeprefix(old)
    return key


UNET = Layout("diffusion_pytorch_model")
VAE = Layout("diffusion_pytorch_model", _rename_vae, old_pointwise=True)
# transformers before version 5 knows only the prefixed spelling, later ones both
TEXT_ENCODER = Layout("model", _rename_text_encoder, "text_model.")


def _to_ours(kind: type, array: np.ndarray) -> np.ndarray:
    # In NumPy: XLA's CPU transpositions took four times as long, plus a compilation per shape.
    if kind is LinearWeight or kind is PointwiseWeight:
        return np.ascontiguousarray(array.reshape(array.shape[:2]).T)
    if kind is ConvWeight:
        out, features, rows, columns = array.shape
        # Two passes that each read or write long runs are faster than one that does neither.
        turned = np.ascontiguousarray(array.reshape(out, -1).T).reshape(features, rows, columns, out)
        return np.ascontiguousarray(turned.transpose(1, 2, 0, 3))
    return array


def _to_theirs(kind: type, array: np.ndarray) -> np.ndarray:
    if kind is ConvWeight:
        array = array.transpose(3, 2, 0, 1)
    elif kind is LinearWeight or kind is PointwiseWeight:
        array = array.T[:, :, None, None] if kind is PointwiseWeight else array.T
    return np.ascontiguousarray(array)


def _their_shape(variable: nnx.Variable) -> tuple[int, ...]:
    """The shape a parameter has in a file."""
    kind, shape = type(variable), variable.get_value().shape
    if kind is LinearWeight:
        return shape[::-1]
    if kind is PointwiseWeight:
        return (*shape[::-1], 1, 1)
    return (shape[3], shape[2], shape[0], shape[1]) if kind is ConvWeight else shape


@lru_cache(maxsize=16)
def shapes(make: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, nnx.State]:
    """A module's structure and the shapes of its parameters, none of which is made; not to be written to.

    Tracing the initialisation of Stable Diffusion's UNet takes seconds, so makers that are equal are traced once.
    """
    return nnx.split(nnx.eval_shape(make))


def load_state(
    make: Callable[[], nnx.Module], tensors: Sequence[Tensor], layout: Layout, where: str
) -> tuple[nnx.GraphDef, nnx.State]:
    """Fill a module's parameters from a checkpoint; float32, whatever floating-point type the file has.

    The module is made abstractly: no parameter exists twice, and one tensor is read at a time.

    Raises:
        ValueError: naming every tensor that is unknown, missing, given twice, of another shape or no float, and every
            one that holds NaN or infinity.
    """
    graphdef, abstract = shapes(make)
    state = jax.tree.map(lambda leaf: leaf, abstract)  # variables of its own, to be filled
    targets = _by_key(state)
    nonfinite = []
    for key, tensor in _match(targets, tensors, layout, where).items():
        with np.errstate(over="ignore"):  # of float64; looked at in the next line
            turned = _to_ours(type(targets[key]), tensor.read()).astype(np.float32, copy=False)
        if not np.isfinite(turned).all():
            nonfinite.append(f"{tensor.name} ({tensor.where}): holds NaN, infinity or numbers beyond float32")
        targets[key].set_value(jax.device_put(_aligned(turned)).block_until_ready())
    refuse(nonfinite, where)
    return graphdef, state


def _aligned(array: np.ndarray) -> np.ndarray:
    """The array where JAX can take its memory over on a CPU, at a multiple of 64 bytes, instead of copying it."""
    if array.ctypes.data % 64 == 0:
        return array
    buffer = np.empty(array.nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    moved = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    moved[...] = array
    return moved


def check(make: Callable[[], nnx.Module], tensors: Sequence[Tensor], layout: Layout, where: str) -> None:
    """Raise what `load_state` would raise before it reads a number."""
    _match(_by_key(shapes(make)[1]), tensors, layout, where)


def _by_key(state: nnx.State) -> dict[str, Any]:
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def _match(targets: Mapping[str, Any], tensors: Sequence[Tensor], layout: Layout, where: str) -> dict[str, Tensor]:
    """Which tensor fills which parameter, in the order of the files, or one error with all that does not fit."""
    adapters.refuse_unmerged((tensor.name for tensor in tensors), where)
    problems: list[str] = []
    sources: dict[str, Tensor] = {}
    for tensor in tensors:
        key = layout.rename(tensor.name)
        at = f"{tensor.name} ({tensor.where})"
        if key is None:
            continue
        if key in sources:
            problems.append(f"{at}: given twice, also as {sources[key].name} ({sources[key].where})")
            continue
        sources[key] = tensor
        if key not in targets:
            problems.append(f"{at}: unknown, the configuration has no such parameter")
            continue
        shape = _their_shape(targets[key])
        old = layout.old_pointwise and key != tensor.name and type(targets[key]) is LinearWeight
        if tensor.shape != shape and not (old and tensor.shape == (*shape, 1, 1)):
            problems.append(f"{at}: expected shape {shape}, got {tensor.shape}")
        elif tensor.dtype not in _FLOATS:
            problems.append(f"{at}: expected one of {', '.join(_FLOATS)}, got {tensor.dtype}")
    problems += [
        f"{key}: missing, expected shape {_their_shape(targets[key])}" for key in targets if key not in sources
    ]
    refuse(problems, where)
    return sources


def fingerprint(states: Iterable[nnx.State]) -> str:
    """SHA-256 over parameters, as float32, of each network in the order of keys."""
    digest = hashlib.sha256()
    for state in states:
        for path, variable in sorted(nnx.to_flat_state(state), key=lambda item: tuple(map(str, item[0]))):
            digest.update(".".join(map(str, path)).encode())
            digest.update(np.ascontiguousarray(variable.get_value()).data)
    return digest.hexdigest()


def save_state(state: nnx.State, path: Path, layout: Layout, dtype: Any = np.float32) -> None:
    """Write parameters as one safetensors file in today's diffusers layout; whole or not at all.

    Raises:
        ValueError: ``dtype`` is no float, or a parameter does not fit into it: it would become infinite.
        OSError: the file cannot be written.
    """
    if np.dtype(dtype) not in (np.float16, np.float32, np.float64):
        raise ValueError(f"dtype: expected float16, float32 or float64, got {np.dtype(dtype)}")
    arrays = {}
    for keys, variable in nnx.to_flat_state(state):
        key = layout.saved_prefix + ".".join(map(str, keys))
        with np.errstate(over="ignore"):  # looked at in the next line
            array = _to_theirs(type(variable), np.asarray(variable.get_value())).astype(dtype)
        if not np.isfinite(array).all():
            raise ValueError(f"{key}: expected numbers within {np.dtype(dtype)}, got larger ones; export as float32")
        arrays[key] = array
    write_atomically(path, lambda stream: stream.write(save(arrays, {"format": "pt"})))
