"""A torch module without its numbers: what is left is compared, hashed, and run on JAX arrays."""

import copy
import hashlib
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxmem.bridge.environment import environment


def unwrapped(module: Any) -> Any:
    """The module itself, where `torch.compile` made another of it."""
    return getattr(module, "_orig_mod", module)


def tensors_of(module: Any) -> dict[str, Any]:
    """Parameters, buffers and other tensors that are attributes of a module or of one inside it, by name."""
    import torch

    found = dict(module.named_parameters()) | dict(module.named_buffers())
    for prefix, one in module.named_modules():
        plain = {name: value for name, value in vars(one).items() if isinstance(value, torch.Tensor)}
        found |= {f"{prefix}.{name}" if prefix else name: value for name, value in plain.items()}
    return found


class Skeleton:
    """The structure of a module, with tensors of shapes alone; equal if classes, settings and shapes are."""

    def __init__(self, module: Any) -> None:
        self.name = type(module).__name__
        self._module = _without_numbers(module)
        self._key = _key(self._module)

    def run(self, call: Callable[..., Any], batched: bool, state: dict[str, Array], x: Array, t: Any, cond: Any) -> Any:
        """The module's output at one example, with these parameters; ``batched`` gives it a batch of one.

        Raises:
            ValueError: the module draws random numbers, changes its own tensors, needs values while it is traced, or
                has an operator that torchax does not have.
        """
        import torch
        from torch.nn.utils.stateless import _reparametrize_module
        from torchax.tensor import OperatorNotFound

        env = environment()
        given = {name: array.astype(x.dtype) if _is_float(array) else array for name, array in state.items()}
        arguments = x, jnp.asarray(t, jnp.int32), cond
        if batched:
            arguments = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], arguments)
        tensors, wrapped = env.j2t_iso(given), [_as_tensors(env, argument) for argument in arguments]
        key = env.prng_key
        try:
            # torch's whole numbers have 64 bits, which JAX warns of; timesteps and indices need no more than 32.
            with _restored(self._module), env, torch.device("jax"), torch.no_grad(), _as_torch():
                with _reparametrize_module(self._module, tensors, tie_weights=True):
                    output = first_output(call(self._module, *wrapped))
                found = env.t2j_iso(output)
        except OperatorNotFound as error:
            raise ValueError(
                f"module: expected operators that torchax has in JAX, got {error}; keep {self.name} in torch with"
                f" jaxmem.TorchOperator"
            ) from error
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
            raise ValueError(
                f"module: expected a module whose path does not depend on values, got {self.name}, which asks for one"
                f" while it is traced ({str(error).splitlines()[0]}); keep it in torch with jaxmem.TorchOperator"
            ) from error
        changed = sorted(name for name, array in given.items() if tensors[name].jax() is not array)
        if changed or env.prng_key is not key:
            what = f"changes its own {', '.join(changed[:3])}" if changed else "draws random numbers"
            raise ValueError(
                f"module: expected the same output for the same input, got {self.name}, which {what} as it runs; give a"
                f" `call` that switches that off"
            )
        return found[0] if batched else found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Skeleton) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def first_output(output: Any) -> Any:
    """The tensor of an output: itself, the first of several, or the ``sample`` of diffusers' models."""
    if hasattr(output, "sample"):
        return output.sample
    return output[0] if isinstance(output, tuple | list) else output


def _as_tensors(env: Any, tree: Any) -> Any:
    return jax.tree.map(lambda leaf: env.j2t_iso(jnp.asarray(leaf)), tree)


def _is_float(array: Any) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def _without_numbers(module: Any) -> Any:
    """A copy of a module in which every tensor is one of shape and type alone; plain tensors become buffers."""
    import torch

    memo: dict[int, Any] = {}
    for tensor in tensors_of(module).values():
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty(tensor.shape, dtype=dtype, device="meta")
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    skeleton = copy.deepcopy(module, memo).eval()
    for one in list(skeleton.modules()):
        for name in [name for name, value in vars(one).items() if isinstance(value, torch.Tensor)]:
            value = vars(one).pop(name)
            one.register_buffer(name, value, persistent=False)
    return skeleton


@contextmanager
def _as_torch() -> Iterator[None]:
    """Let JAX take shapes and whole numbers of 64 bits as torch does: broadcast, and shortened, without a word."""
    with jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Explicitly requested dtype", UserWarning)
        yield


class _restored:
    """What a module keeps in its attributes as it runs is gone afterwards: a traced array must not stay."""

    def __init__(self, module: Any) -> None:
        self._before = [(one, dict(vars(one))) for one in module.modules()]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        for one, attributes in self._before:
            vars(one).clear()
            vars(one).update(attributes)


class _Structure(pickle.Pickler):
    """Pickles tensors as their shapes and types, and classes and functions as what they are.

    By their names two would be one: a class that was defined again, as in a notebook, has the name of the first.
    """

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.code: list[Any] = []  #: classes and functions, in the order of the stream

    def persistent_id(self, value: Any) -> Any:
        import torch

        if isinstance(value, torch.Tensor):
            return tuple(value.shape), str(value.dtype)
        if isinstance(value, type | FunctionType):
            self.code.append(value)
            return "code"
        return None


def _key(skeleton: Any) -> Any:
    """What skeletons are compared by: settings and shapes, classes and functions; one that cannot be pickled itself."""
    stream = io.BytesIO()
    structure = _Structure(stream)
    try:
        structure.dump(skeleton)
    except (pickle.PicklingError, TypeError, AttributeError):
        return id(skeleton)  # which is kept as long as the key is
    forwards = tuple(type(one).forward for one in skeleton.modules())
    return hashlib.sha256(stream.getvalue()).hexdigest(), tuple(structure.code), forwards
