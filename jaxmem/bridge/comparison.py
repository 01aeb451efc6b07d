"""A module in JAX held against itself in torch, at a random point: its value, and one derivative by differences."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.bridge.numbers import arrays_of
from jaxmem.bridge.skeleton import Skeleton, first_output, restored
from jaxmem.diffusion import Schedule

# Two float32 programs of a whole network differ by 1e-7 to 1e-4 of the largest entry; another function, as by a buffer
# that is lost or an operator that means something else, by 1e-2 and more.
VALUE_TOLERANCE = 1e-3
_SLOPE_TOLERANCE = 3e-2  # beside ten times what halving the step of the differences changes
_STEP = 1e-2  # of x, whose entries are of size one: rounding of a difference is then about 1e-5, its bend 1e-4


def compare(
    module: Any,
    skeleton: Skeleton,
    call: Callable[..., Any],
    state: Any,
    x: Any,
    schedule: Schedule,
    cond: Any,
    seed: int = 0,
) -> bool:
    """Compare, and return whether the module takes a batch of one rather than one example.

    The timestep is the middle one; that the module takes the first and the last is asked of torch alone. A module whose
    output is zero, as before a training, is compared with random numbers added to its parameters.

    Args:
        module: the torch module, of parameters in float32 or float64.
        skeleton: the same without its numbers.
        call: how both are called.
        state: the parameters in JAX.
        x: shape and type of one example.
        schedule: its timesteps.
        cond: shapes and types of its condition, or arrays, which are taken as they are.
        seed: of the random point.

    Raises:
        ValueError: the outputs, or the derivatives, differ; the module cannot be run, or gives another output at a
            second call.
    """
    rng = np.random.default_rng(seed)
    point = rng.standard_normal(x.shape).astype(x.dtype)
    direction = rng.standard_normal(x.shape).astype(x.dtype)
    given, cond = cond, jax.tree.map(lambda leaf: _some(leaf, rng), cond)
    first, t, last = schedule.first, schedule.num_timesteps // 2, schedule.first + schedule.num_timesteps - 1
    with restored(module), in_evaluation(module):
        batched, value = find_convention(module, call, point, t, cond)
        again, plus, minus, half_plus, half_minus = (
            _at(module, call, batched, point + step * direction, t, cond)
            for step in (0, _STEP, -_STEP, _STEP / 2, -_STEP / 2)
        )
        for end in (first, last):
            _require_timestep(module, call, batched, point, end, cond)
    size = np.abs(value).max()
    if not np.isfinite(value).all() or np.abs(again - value).max() > VALUE_TOLERANCE * size:
        what = "NaN or infinity" if not np.isfinite(value).all() else "another output at the second call"
        raise ValueError(f"module: expected the same finite output for the same input, got {what}")
    if not size and seed == 0:
        moved = _moved(module, rng)
        return compare(moved, skeleton, call, arrays_of(moved), x, schedule, given, seed=1)
    ours, slope = _in_jax(skeleton, call, batched, state, point, direction, t, cond)
    slopes = [(up - down) / (2 * step) for up, down, step in ((plus, minus, _STEP), (half_plus, half_minus, _STEP / 2))]
    apart, bend = np.abs(slope - slopes[1]).max(), np.abs(slopes[0] - slopes[1]).max()
    difference = np.abs(ours - value).max()
    if difference > VALUE_TOLERANCE * size or apart > _SLOPE_TOLERANCE * np.abs(slopes[1]).max() + 10 * bend:
        raise ValueError(
            f"module: expected in JAX what {skeleton.name} computes in torch, got at a random point an output that"
            f" differs by {difference:.1e} (of {size:.1e}) and a derivative that differs by {apart:.1e} (of"
            f" {np.abs(slopes[1]).max():.1e}); if the module was not changed since, keep it in torch with"
            f" jaxmem.TorchOperator"
        )
    return batched


def _require_timestep(module: Any, call: Callable[..., Any], batched: bool, x: np.ndarray, t: int, cond: Any) -> None:
    """JAX takes an index that is out of range for another; torch says so."""
    try:
        _at(module, call, batched, x, t, cond)
    except Exception as error:  # of any kind: it is the user's code
        raise ValueError(
            f"module: expected one that takes every timestep of its schedule, got {type(error).__name__} at t = {t}:"
            f" {error!s:.300}"
        ) from error


def _moved(module: Any, rng: np.random.Generator) -> Any:
    """A copy of a module with random numbers added to its parameters."""
    import torch

    moved = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in moved.parameters():
            if parameter.is_floating_point():
                noise = torch.as_tensor(0.1 * rng.standard_normal(tuple(parameter.shape)))
                parameter.add_(noise.to(parameter.device, parameter.dtype))
    return moved


def _some(leaf: Any, rng: np.random.Generator) -> np.ndarray:
    """Values for a condition of which shapes are known: random numbers, zeros of whole ones, or a mask of all."""
    if not isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
        return np.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return rng.standard_normal(leaf.shape).astype(leaf.dtype)
    # A mask of nothing would leave nothing to attend to.
    return np.full(leaf.shape, jnp.issubdtype(leaf.dtype, jnp.bool_), leaf.dtype)


def find_convention(module: Any, call: Callable[..., Any], x: np.ndarray, t: Any, cond: Any) -> tuple[bool, np.ndarray]:
    """Whether a module takes a batch of one, and its output: torch's networks do, functions of one example do not."""
    errors = []
    for batched in (True, False):
        try:
            found = _at(module, call, batched, x, t, cond)
        except Exception as error:  # of any kind: it is the user's code
            errors.append(f"{type(error).__name__}: {error}")
            continue
        if found.shape == x.shape:
            return batched, found
        errors.append(f"an output of shape {found.shape}")
    raise ValueError(
        f"module: expected an output like x, of shape {x.shape}, got with a batch of one {errors[0]:.300}; and with one"
        f" example {errors[1]:.300}; say with `call(module, x, t, cond)` how it is called, and what of its output"
        f" counts"
    )


def _at(module: Any, call: Callable[..., Any], batched: bool, x: np.ndarray, t: Any, cond: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        output = first_output(call(module, *as_tensors(module, batched, (x, np.asarray(t), cond))))
    found = output.detach().cpu().double().numpy()
    return found[0] if batched else found


def as_tensors(module: Any, batched: bool, tree: Any) -> Any:
    """Arrays as tensors of a module's device and, if they are floating point, type; with ``batched`` a batch of one."""
    import torch

    parameter = next((one for one in module.parameters() if one.is_floating_point()), None)
    device, dtype = ("cpu", torch.float32) if parameter is None else (parameter.device, parameter.dtype)

    def tensor(leaf: Any) -> Any:
        made = torch.as_tensor(np.array(leaf), device=device)
        made = made.to(dtype) if made.is_floating_point() else made
        return made[None] if batched else made

    return jax.tree.map(tensor, tree)


@contextmanager
def in_evaluation(module: Any) -> Any:
    """Without dropout and the like; afterwards each part is in the mode in which it was."""
    modes = [(one, one.training) for one in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for one, mode in modes:
            one.training = mode


def _in_jax(
    skeleton: Skeleton, call: Callable[..., Any], batched: bool, state: Any, x: Any, v: Any, t: int, cond: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Value and derivative along v."""
    x64 = jax.config.jax_enable_x64  # type: ignore[attr-defined]

    @jax.jit
    def both(state: Any, x: Any, v: Any, t: Any, cond: Any) -> Any:
        return jax.jvp(lambda x: skeleton.run(call, batched, state, x, t, cond), (x,), (v,))

    def compute() -> tuple[np.ndarray, np.ndarray]:
        with jax.enable_x64(x64), jax.default_matmul_precision("highest"):
            value, slope = both(state, *map(jnp.asarray, (x, v)), jnp.asarray(t), jax.tree.map(jnp.asarray, cond))
            return np.asarray(value, np.float64), np.asarray(slope, np.float64)

    # The first call of a score is often traced, and in that thread everything would be.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(compute).result()
