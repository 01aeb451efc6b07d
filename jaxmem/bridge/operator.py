"""The Jacobian of a module's score, with products made by torch: for models that have to stay there."""

import warnings
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxmem.bridge.comparison import as_tensors, find_convention, in_evaluation
from jaxmem.bridge.score import Call, call_module
from jaxmem.bridge.skeleton import first_output, unwrapped
from jaxmem.diffusion import Prediction, Schedule, to_score
from jaxmem.extras import require_package
from jaxmem.jacobian import require_finite
from jaxmem.operators import Operator


@jax.tree_util.register_pytree_node_class
class TorchOperator(Operator):
    """``J = ∂s/∂x`` of a torch module at one point; every product is computed by torch, on the module's own device.

    ``J v`` takes forward mode (`torch.func.jvp`). Where an operator of the module lacks it, as attention and group
    normalisation on GPUs can, ``J v`` is the derivative of ``u ↦ Jᵀ u``, which is linear, along v: reverse mode twice,
    over one graph that is kept. ``Jᵀ v`` is reverse mode. Attention takes torch's plain kernels: the fused ones have no
    second derivative.

    Products run on the host, one vector after another: every method of `jaxmem.spectrum` takes the operator, and
    `jax.vmap` gives it its vectors in turn. `from_torch` is faster where it can be had.

    Args:
        module: the network; it is called in evaluation mode, with a batch of one if it takes that.
        x: one point, floating point, an array or a tensor.
        t: its timestep.
        cond: its condition, a pytree of arrays or tensors, or None. Module and parameters must not change while the
            operator is used.
        schedule: with a ``prediction`` other than "score", the noise schedule.
        prediction: what the module puts out; with the default its output is the score itself.
        call: how the module is called, as in `from_torch`.

    Raises:
        MissingExtra: torch is not installed.
        ValueError: an output of another shape, or a prediction without its schedule.
    """

    is_symmetric = False

    def __init__(
        self,
        module: Any,
        x: Any,
        t: Any = 0,
        cond: Any = None,
        *,
        schedule: Schedule | None = None,
        prediction: Prediction = "score",
        call: Call = call_module,
    ) -> None:
        require_package("torch", "a network of torch")
        import torch

        if not isinstance(module, torch.nn.Module):
            raise ValueError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
        if prediction != "score" and schedule is None:
            raise ValueError(f"schedule: expected the noise schedule for prediction {prediction!r}, got none")
        alpha, sigma = 1.0, 1.0
        if schedule is not None:
            schedule.check(np.asarray(t))
            alpha, sigma = float(schedule.alpha[t]), float(schedule.sigma[t])
        module = unwrapped(module)
        point = np.asarray(x.detach().cpu().float() if isinstance(x, torch.Tensor) else x)
        if not np.issubdtype(point.dtype, np.floating):
            raise ValueError(f"x: expected a floating-point array, got {point.dtype}; convert it first")
        with in_evaluation(module):
            batched, _ = find_convention(module, call, point, t, cond)
        self._products = _Products(module, call, batched, (point, t, cond), (prediction, alpha, sigma))

    @property
    def value(self) -> np.ndarray:
        """The score at the point, shaped like x."""
        return self._products.value

    @property
    def forward_mode(self) -> bool:
        """Whether ``J v`` is computed in forward mode."""
        return self._products.forward_mode

    @property
    def size(self) -> int:
        return self.value.size

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    def check(self) -> None:
        require_finite(self.value, "at this point")

    def mv(self, vector: Float[Array, " d"]) -> Float[Array, " d"]:
        return _on_host(self._products, vector, transposed=False)

    def rmv(self, vector: Float[Array, " d"]) -> Float[Array, " d"]:
        return _on_host(self._products, vector, transposed=True)

    def tree_flatten(self) -> tuple[tuple[()], Any]:
        return (), self._products

    @classmethod
    def tree_unflatten(cls, products: Any, _: tuple[()]) -> "TorchOperator":
        operator = object.__new__(cls)
        operator._products = products
        return operator


# Compiled once for an operator: a callback outside a compiled function is a new program each time.
@partial(jax.jit, static_argnames=("products", "transposed"))
def _on_host(products: "_Products", vector: Array, transposed: bool) -> Array:
    result = jax.ShapeDtypeStruct((products.value.size,), products.value.dtype)
    product = products.transposed if transposed else products.forward
    return jax.pure_callback(product, result, vector, vmap_method="sequential")


class _Products:
    """Products with the Jacobian of a score in torch at one point."""

    def __init__(
        self,
        module: Any,
        call: Call,
        batched: bool,
        point: tuple[np.ndarray, Any, Any],
        output: tuple[Prediction, float, float],
    ) -> None:
        import torch

        self._module, self._batched = module, batched
        self._x, *rest = as_tensors(module, batched, point)
        prediction, alpha, sigma = output

        def score(x: Any) -> Any:
            with in_evaluation(module):
                found = first_output(call(module, x, *rest))
            return to_score(prediction, found, x, alpha, sigma)

        self._score = score
        parameters = list(module.parameters())
        wanted = [parameter.requires_grad for parameter in parameters]
        for parameter in parameters:  # the graph is of x alone
            parameter.requires_grad_(False)
        try:
            with _plain_attention():
                self._x.requires_grad_(True)
                self._value = score(self._x)
        finally:
            for parameter, want in zip(parameters, wanted, strict=True):
                parameter.requires_grad_(want)
        self.value = self._array(self._value.detach()).reshape(self._shape)
        self.forward_mode = True
        self._pullback: Any = None
        try:
            self.forward(np.zeros(self.value.size, self.value.dtype))
        except (
            RuntimeError
        ):  # torch's word for an operator without forward mode, or with one that fails on its tangents
            self.forward_mode = False
            u = torch.zeros_like(self._value, requires_grad=True)
            (back,) = torch.autograd.grad(self._value, self._x, u, create_graph=True)
            self._pullback = u, back

    @property
    def _shape(self) -> tuple[int, ...]:
        return tuple(self._x.shape[1:] if self._batched else self._x.shape)

    def forward(self, vector: Any) -> np.ndarray:
        """``J v``."""
        import torch

        v = self._tensor(vector)
        if not self.forward_mode:
            u, back = self._pullback
            (found,) = torch.autograd.grad(back, u, v, retain_graph=True)
            return self._array(found)
        with _plain_attention(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of torch itself, at its first forward mode
            return self._array(torch.func.jvp(self._score, (self._x.detach(),), (v,))[1])

    def transposed(self, vector: Any) -> np.ndarray:
        """``Jᵀ v``."""
        import torch

        (found,) = torch.autograd.grad(self._value, self._x, self._tensor(vector), retain_graph=True)
        return self._array(found)

    def _tensor(self, vector: Any) -> Any:
        return as_tensors(self._module, False, np.asarray(vector)).reshape(self._x.shape)

    def _array(self, tensor: Any) -> np.ndarray:
        # JAX computes in float32 unless it is told otherwise, and torch may compute in half precision.
        wide = jax.config.jax_enable_x64  # type: ignore[attr-defined]
        dtype = np.float64 if wide and tensor.element_size() == 8 else np.float32
        return tensor.detach().cpu().numpy().astype(dtype).reshape(-1)


def _plain_attention() -> Any:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)
