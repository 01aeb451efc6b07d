"""Comparison of a live pipeline's networks with what was read of them, at random points."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmem.runs.progress import Say
from jaxmem.stable_diffusion.components import NETWORKS
from jaxmem.stable_diffusion.vae import decode_latents, mean_latents

_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate")  # whose own hooks look on, or move tensors
# Two float32 programs of a whole network differ by 1e-6 to 1e-4 of the largest entry, the more the sharper its
# attention is; a merged token, a cached block, an adapter of ordinary strength change it by 1e-2 and more.
_TOLERANCE = 1e-3
_SIDE = 16  # of the autoencoder's latents in the comparison, at most: it is convolutional, and its images are large


def load_compared(
    pipeline: Any, part: str, load: Callable[[], tuple[nnx.GraphDef, nnx.State]], say: Say
) -> tuple[nnx.GraphDef, nnx.State]:
    """Copy a part's parameters and `compare` what they make with what the pipeline has.

    Raises:
        ValueError: as `load` and `compare`.
    """
    graphdef, state = load()
    say(f"{part}: compared with the live pipeline's at two random points")
    compare(getattr(pipeline, part), part, graphdef, state)
    return graphdef, state


def compare(module: Any, part: str, graphdef: nnx.GraphDef, state: nnx.State) -> None:
    """Compare a network with the PyTorch module that it was read from, at two random points, in float32.

    The first point is at a timestep of much noise, the second, which also shows what a module keeps from one call to
    the next, at one of little: caches and guidance often act in one part of the sampling only. The module is put back
    as it was: its mode, its precision, PyTorch's random numbers. Half-precision modules are compared in float32, as
    jaxmem computes.

    Raises:
        ValueError: ``max |ours - theirs| > 1e-3 max |theirs|`` in any output.
    """
    worst = 0.0
    with _as_compared(module) as run, jax.default_matmul_precision("highest"):
        for seed in range(2):
            for forward, call, arguments in _points(part, nnx.merge(graphdef, state).config, seed):
                ours = np.asarray(forward(graphdef, state, *map(jnp.asarray, arguments)))
                try:
                    theirs = run(call, arguments)
                except Exception as error:  # of whatever was put into the module
                    raise ValueError(
                        f"live {part}: expected what diffusers' own network does, got an error from the pipeline's at a"
                        f" random point ({type(error).__name__}: {error}); {_CAUSES}{_seen(module)}"
                    ) from error
                scale = max(float(np.abs(theirs).max()), 1e-30)  # of a network that gives zeros
                difference = float(np.abs(ours - theirs).max()) / scale if ours.shape == theirs.shape else np.inf
                worst = max(worst, difference) if np.isfinite(difference) else np.inf
    if worst > _TOLERANCE:
        raise ValueError(
            f"live {part}: expected the function of its settings and weights, got one that differs by {worst:.1e} of"
            f" its largest output at a random point (rounding is at most {_TOLERANCE:.0e}): an audit would be of"
            f" another function; {_CAUSES}{_seen(module)}"
        )


_CAUSES = (
    "what usually causes it: a replaced forward or class of a block (token merging, caching), hooks, attention control."
    " Undo it, or load the pipeline anew"
)


def unproven(pipeline: Any) -> list[str]:
    """Warnings of what is in networks that two random points may not show: it can act at other timesteps only."""
    return [
        f"live {part}: compared at two random points at most, which does not show what acts at other timesteps or in"
        f" guidance's batch of two only; jaxmem does not run what the network has beside its weights, so that numbers"
        f" may be of another function than the pipeline's. Remove it where it does more than look on:{seen}"
        for part in NETWORKS
        if (seen := _seen(getattr(pipeline, part)))
    ]


def _seen(module: Any) -> str:
    """What may be the cause, of what can be seen."""
    classes = {f"{type(one).__module__}.{type(one).__name__}" for one in module.modules() if _is_foreign(type(one))}
    hooked = [
        name or type(one).__name__
        for name, one in module.named_modules()
        if any(map(_is_foreign, (*one._forward_hooks.values(), *one._forward_pre_hooks.values())))
    ]
    return "".join(
        f"\n  {label}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for label, names in (("classes of other packages", sorted(classes)), ("hooks on", hooked))
        if names
    )


def _is_foreign(one: Any) -> bool:
    """Whether a class, a function or an object that is called was made in none of the libraries."""
    while isinstance(one, partial):
        one = one.func
    return (getattr(one, "__module__", None) or type(one).__module__).split(".")[0] not in _LIBRARIES


def _points(part: str, config: Any, seed: int) -> Iterator[tuple[Callable, Callable, tuple[np.ndarray, ...]]]:
    """Our function, the call of theirs (as the pipeline makes it) and random arguments, ours without a batch."""
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32)

    if part == "unet":
        side = config.sample_size
        x, cond = normal(side, side, config.in_channels), normal(77, config.cross_attention_dim)
        call = lambda unet, x, t, cond: unet(x, t[0], encoder_hidden_states=cond, return_dict=False)[0]  # noqa: E731
        yield _apply, call, (x, np.asarray(1 if seed else random.integers(500, 1000)), cond)
    elif part == "text_encoder":
        tokens = random.integers(config.vocab_size, size=config.max_position_embeddings)
        yield _apply, lambda encoder, tokens: encoder(tokens, attention_mask=None)[0], (tokens,)
    else:
        side = max(min(_SIDE, config.sample_size // config.downscale), 1)
        latent = normal(side, side, config.latent_channels)
        scale = config.scaling_factor
        yield decode_latents, lambda vae, z: vae.decode(z / scale, return_dict=False)[0], (latent,)
        image = random.uniform(-1, 1, (side * config.downscale,) * 2 + (config.in_channels,)).astype(np.float32)
        yield mean_latents, lambda vae, image: scale * vae.encode(image).latent_dist.mean, (image,)


@contextmanager
def _as_compared(module: Any) -> Iterator[Callable]:
    """Give a function that calls the module on NumPy arrays in float32 and evaluation mode; put all back afterwards."""
    import torch

    device = next(module.parameters()).device
    modes = [(one, one.training) for one in module.modules()]
    kept = [
        (tensor, tensor.data)
        for tensor in (*module.parameters(), *module.buffers())
        if tensor.is_floating_point() and tensor.dtype != torch.float32
    ]
    precision = torch.get_float32_matmul_precision()

    def run(call: Callable, arguments: tuple[np.ndarray, ...]) -> np.ndarray:
        given = [torch.tensor(np.asarray(a)[None], device=device) for a in arguments]  # a copy, with a batch of one
        given = [a.movedim(-1, 1).contiguous() if a.ndim == 4 else a for a in given]
        out = call(module, *given)[0].float().cpu().numpy()
        return out.transpose(1, 2, 0) if out.ndim == 3 else out

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        if device.type == "cuda":
            stack.enter_context(torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False))
        try:
            torch.set_float32_matmul_precision("highest")
            module.eval()
            for tensor, data in kept:
                tensor.data = data.float()
            yield run
        finally:
            for tensor, data in kept:
                tensor.data = data
            for one, training in modes:
                one.training = training
            torch.set_float32_matmul_precision(precision)


@partial(jax.jit, static_argnums=0)
def _apply(graphdef: nnx.GraphDef, state: nnx.State, *arguments: Any) -> Any:
    return nnx.merge(graphdef, state)(*arguments)
