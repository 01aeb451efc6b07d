"""The numbers of torch modules as JAX arrays, and modules whose parameters are rounded to bfloat16."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxmem.bridge.skeleton import tensors_of


def is_rounded(tensor: Any) -> bool:
    """Whether rounding parameters rounds this tensor: buffers, such as tables of angles, keep their digits."""
    import torch

    return isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point()


def round_parameters(module: Any) -> None:
    """Round a module's parameters to bfloat16, in place; they keep their type."""
    import torch

    with torch.no_grad():
        for parameter in module.parameters():
            if is_rounded(parameter):
                parameter.copy_(parameter.to(torch.bfloat16))


def in_single(module: Any, rounds: bool) -> Any:
    """The module as it computes in float32, its parameters rounded if ``rounds``: a copy where that is another.

    Half precision's own rounding of what is computed would hide differences from another program.
    """
    is_half = any(one.is_floating_point() and one.element_size() < 4 for one in module.parameters())
    if not is_half and not (rounds and any(map(_changes, module.parameters()))):
        return module
    copied = copy.deepcopy(module)
    if rounds:
        round_parameters(copied)
    return copied.float() if is_half else copied


def _changes(parameter: Any) -> bool:
    import torch

    return is_rounded(parameter) and not torch.equal(parameter.to(torch.bfloat16).to(parameter.dtype), parameter)


def arrays_of(module: Any, *, rounds: bool = False) -> dict[str, Array]:
    """Copies of a module's tensors as JAX arrays, by name."""
    return {name: _array(tensor, rounds) for name, tensor in tensors_of(module).items()}


def _array(tensor: Any, rounds: bool) -> Array:
    """A copy of a tensor as a JAX array: float32 or float64, int32, bool; rounded parameters as bfloat16."""
    import torch

    if rounds and is_rounded(tensor):
        # NumPy has no such type of its own: the bits go as whole numbers.
        bits = tensor.detach().to(torch.bfloat16).view(torch.int16).cpu().numpy()
        return jnp.array(bits.view(jnp.bfloat16))
    if tensor.is_floating_point():
        wide = jax.config.jax_enable_x64  # type: ignore[attr-defined]
        tensor = tensor.double() if wide else tensor.float()
    return jnp.array(tensor.detach().cpu().numpy())
