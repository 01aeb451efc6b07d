"""A torch module as a score: `from_torch` gives a pure JAX function and its parameters."""

from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmem.bridge.comparison import compare
from jaxmem.bridge.environment import environment
from jaxmem.bridge.numbers import arrays_of, in_single
from jaxmem.bridge.skeleton import Skeleton, unwrapped
from jaxmem.diffusion import Prediction, Schedule, to_score
from jaxmem.runs.functions import captured, name_of

Call = Callable[[Any, Any, Any, Any], Any]  #: ``(module, x, t, cond) -> output``, of torch tensors


def call_module(module: Any, x: Any, t: Any, cond: Any) -> Any:
    """Call a module as ``module(x, t, cond)``, or ``module(x, t)`` where there is no condition."""
    return module(x, t) if cond is None else module(x, t, cond)


class TorchScore:
    """The score of a torch module, ``s = to_score(module(x, t, cond))``, as a function of JAX arrays.

    Equal for modules of equal structure, one schedule, prediction and way to call them: these share one compilation.
    """

    def __init__(self, module: Any, schedule: Schedule, prediction: Prediction, call: Call, state: Any) -> None:
        self.schedule, self.prediction, self._call = schedule, prediction, call
        self._skeleton = Skeleton(module)
        self._batched = True  # the module takes a batch of one; found out by the comparison
        self._uncompared: Any = module, state  # until then; afterwards the user's module may go

    def __call__(self, state: Any, x: Float[Array, "*shape"], t: Any, cond: Any) -> Float[Array, "*shape"]:
        alpha, sigma = self.schedule.at(t, x.dtype)
        return to_score(self.prediction, self.network(state, x, t, cond), x, alpha, sigma)

    def network(self, state: Any, x: Float[Array, "*shape"], t: Any, cond: Any) -> Float[Array, "*shape"]:
        """The module's output at one example.

        Raises:
            ValueError: as `from_torch`, at the first call.
        """
        self.compare(x, cond)
        return self._skeleton.run(self._call, self._batched, state, x, t, cond)

    def compare(self, x: Any, cond: Any) -> None:
        """Compare with the module in torch at a random point of these shapes, once."""
        if self._uncompared is not None:
            module, state = self._uncompared
            rounds = any(array.dtype == jnp.bfloat16 for array in state.values())
            module = in_single(module, rounds)
            self._batched = compare(module, self._skeleton, self._call, state, x, self.schedule, cond)
            self._uncompared = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TorchScore) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[Any, ...]:
        return self._skeleton, self.schedule, self.prediction, self._call

    def __repr__(self) -> str:  # what a run knows a score by
        call = f"{name_of(self._call)} {captured(self._call)[:12]}"
        settings = f"settings {self._skeleton.settings[:12]}"
        return f"TorchScore({self._skeleton.name}, {settings}, {self.schedule}, {self.prediction!r}, {call})"


def from_torch(
    module: Any,
    schedule: Schedule,
    prediction: Prediction,
    *,
    call: Call = call_module,
    x: Any = None,
    cond: Any = None,
    parameters: Any = None,
) -> tuple[TorchScore, dict[str, Array]]:
    """Make a score and its parameters of any `torch.nn.Module`: ``score(state, x, t, cond)`` of one example.

    The module runs on JAX arrays by torchax: it is traced, compiled, differentiated and batched as any JAX function, in
    evaluation mode (without dropout) and in the data type of x. What is changed in the module afterwards does not reach
    the score. It is compared with the module in torch, at a random point, by its output and one directional derivative
    (central differences): at once where an example is given, else when it is first called.

    Args:
        module: called with a batch of one; if it does not take that, with one example.
        schedule: noise schedule that the module was trained with.
        prediction: what it puts out: ``"eps"``, ``"v"``, ``"x0"``, ``"flow"`` or ``"score"``.
        call: how the module is called, ``call(module, x, t, cond)`` on torch tensors, and what of its output counts; by
            default ``module(x, t, cond)``, or ``module(x, t)`` if cond is None. It must be hashable: a function of a
            module, or a frozen dataclass. Of a tuple the first is taken, of diffusers' outputs the ``sample``.
        x: an example, or its `jax.ShapeDtypeStruct`, for a comparison at once.
        cond: the condition of that example.
        parameters: ``jnp.bfloat16`` rounds the module's parameters, not its buffers, to that type, in which they take
            half the memory; the score still computes in the data type of x. That is another model than the module:
            it is compared with the module whose parameters are rounded, too.

    Returns:
        The score, and its parameters, buffers and other tensors by name: float32, or float64 where JAX has
        ``jax_enable_x64``, but for what ``parameters`` rounds.

    Raises:
        MissingExtra: torch or torchax are not installed.
        ValueError: ``module`` is no `torch.nn.Module`; an unknown prediction or type of parameters; an output of
            another shape; a module that draws random numbers, changes itself, depends on values in its path or has an
            operator that torchax lacks; or one that differs in JAX from itself in torch.
    """
    environment()
    import torch

    if not isinstance(module, torch.nn.Module):
        raise ValueError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    if prediction not in get_args(Prediction):
        raise ValueError(f"prediction: expected one of {get_args(Prediction)}, got {prediction!r}")
    if parameters is not None and parameters != jnp.bfloat16:
        raise ValueError(f"parameters: expected None or jnp.bfloat16, got {parameters!r}")
    try:
        hash(call)
    except TypeError as error:
        raise ValueError(f"call: expected a hashable function, such as a frozen dataclass, got one: {error}") from None
    module = unwrapped(module)
    state = arrays_of(module, rounds=parameters is not None)
    score = TorchScore(module, schedule, prediction, call, state)
    if x is not None:
        example = x if isinstance(x, jax.ShapeDtypeStruct) else np.asarray(x)
        score.compare(example, cond)
    return score, state
