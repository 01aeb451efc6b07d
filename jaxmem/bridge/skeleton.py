"""A torch module without its numbers: what is left is compared, hashed, and run on JAX arrays."""

import copy
import hashlib
import io
import json
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from types import FunctionType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxmem.bridge.environment import environment

# Running swaps a module's tensors for the given ones, and random numbers are the environment's.
_one_at_a_time = RLock()


def unwrapped(module: Any) -> Any:
    """The module itself, where `torch.compile` made another of it."""
    return getattr(module, "_orig_mod", module)


def tensors_of(module: Any) -> dict[str, Any]:
    """Parameters, buffers and other tensors that are attributes of a module or of one inside it, by name."""
    import torch

    found = dict(module.named_parameters()) | dict(module.named_buffers())
    known = {id(tensor) for tensor in found.values()}
    for prefix, one in module.named_modules():
        for name, value in vars(one).items():
            if isinstance(value, torch.Tensor) and id(value) not in known:
                known.add(id(value))
                found[f"{prefix}.{name}" if prefix else name] = value
    return found


class Skeleton:
    """The structure of a module, with tensors of shapes alone; equal if classes, settings and shapes are."""

    def __init__(self, module: Any) -> None:
        self.name = type(module).__name__
        self.settings = _settings(module)  #: SHA-256 of its settings, the same in every process
        self._module = _without_numbers(module)
        self._key = _key(self._module)

    def run(self, call: Callable[..., Any], batched: bool, state: dict[str, Array], x: Array, t: Any, cond: Any) -> Any:
        """The module's output at one example, with these parameters; ``batched`` gives it a batch of one.

        Raises:
            ValueError: the module draws random numbers, changes its own tensors, needs values while it is traced, or
                has an operator that torchax does not have.
        """
        from torch.nn.utils.stateless import _reparametrize_module

        env = environment()
        given = {name: array.astype(x.dtype) if _is_float(array) else array for name, array in state.items()}
        arguments = x, jnp.asarray(t), cond
        if batched:
            arguments = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], arguments)
        tensors, wrapped = env.j2t_iso(given), [_as_tensors(env, argument) for argument in arguments]
        with _one_at_a_time, self._told():
            key = env.prng_key
            with restored(self._module), _as_torch(env):
                with _reparametrize_module(self._module, tensors, tie_weights=True):
                    output = first_output(call(self._module, *wrapped))
                found = env.t2j_iso(output)
            drew = env.prng_key is not key
        changed = sorted(name for name, array in given.items() if tensors[name].jax() is not array)
        if changed or drew:
            what = f"changes its own {', '.join(changed[:3])}" if changed else "draws random numbers"
            raise ValueError(
                f"module: expected the same output for the same input, got {self.name}, which {what} as it runs; give a"
                f" `call` that switches that off"
            )
        return found[0] if batched else found

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Errors of a module that does not run on JAX arrays, as one message."""
        from torchax.tensor import OperatorNotFound

        try:
            yield
        except OperatorNotFound as error:
            expected, got = "operators that torchax has in JAX", f"{self.name}: {error}"
            cause = error
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
            expected = "a module whose path does not depend on values"
            got, cause = f"{self.name}, which asks for one while it is traced ({_first_line(error)})", error
        except AssertionError as error:
            expected = "parameters, buffers and attributes for all tensors of a module"
            got, cause = f"{self.name}, which has others, as in lists or closures ({_first_line(error)})", error
        except Exception as error:  # of any kind: it is the user's code, on arrays that it was not written for
            expected, got = "a module that runs on JAX arrays", f"{self.name}: {type(error).__name__}: {error!s:.300}"
            cause = error
        else:
            return
        raise ValueError(
            f"module: expected {expected}, got {got}; keep it in torch with jaxmem.TorchOperator"
        ) from cause

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
def _as_torch(env: Any) -> Iterator[None]:
    """Torch's functions on JAX arrays; JAX broadcasts, and shortens whole numbers of 64 bits, without a word."""
    import torch

    with env, torch.device("jax"), torch.no_grad(), jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Explicitly requested dtype", UserWarning)
        yield


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


class restored:
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
        self._tensors: dict[int, tuple[int, Any]] = {}  # by id: number, so that tied ones are told, and the tensor

    def persistent_id(self, value: Any) -> Any:
        import torch

        if isinstance(value, torch.Tensor):
            number, _ = self._tensors.setdefault(id(value), (len(self._tensors), value))
            # One that is in no state is part of the program: inside a list, or an object.
            content = b"" if value.is_meta else value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
            return number, tuple(value.shape), str(value.dtype), hashlib.sha256(content).hexdigest()
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
    except Exception:  # of `__getstate__` and the like, which are anybody's
        return id(skeleton)  # which is kept as long as the key is
    modules = list(skeleton.modules())
    of_classes = tuple((type(one).forward, _class_values(type(one))) for one in modules)
    return hashlib.sha256(stream.getvalue()).hexdigest(), tuple(structure.code), of_classes


def _class_values(cls: type) -> tuple[Any, ...]:
    """Numbers and texts that a module's class has, which its methods may read."""
    import torch

    own = [one for one in cls.__mro__ if issubclass(one, torch.nn.Module) and one is not torch.nn.Module]
    return tuple(
        (one, name, value) for one in own for name, value in vars(one).items() if _is_plain(value) and name[:2] != "__"
    )


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _settings(module: Any) -> str:
    """SHA-256 of the classes and plain settings of a module and of those inside it, the same in every process."""
    found = {
        path: [f"{type(one).__module__}.{type(one).__qualname__}", _plain_settings(vars(one))]
        for path, one in module.named_modules()
    }
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _plain_settings(value: Any) -> Any:
    """The numbers and texts of settings, in whatever holds them; others are left out."""
    if isinstance(value, dict):
        names = (name for name in value if isinstance(name, str) and name != "training" and name[:1] != "_")
        return {name: _plain_settings(value[name]) for name in names}
    if isinstance(value, list | tuple):
        return [_plain_settings(one) for one in value]
    return value if value is None or _is_plain(value) else None
