"""Models of live diffusers pipelines: their settings, their weights, and what changes their function beside both."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmem.diffusion import NoiseSchedule
from jaxmem.runs.progress import Say
from jaxmem.stable_diffusion import adapters, weights

NETWORKS = ("unet", "text_encoder", "vae")
_PARTS = (*NETWORKS, "tokenizer", "scheduler")
_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
_HARMLESS = {"progress_bar", "set_progress_bar_config", "run_safety_checker", "check_inputs"}  # methods of a pipeline
_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate")  # whose own hooks look on, or move tensors
# The same function in another order of operations; any other may have another function or weights of its own.
_PROCESSORS = {"AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor"}
# Two float32 programs of a whole network differ by 1e-6 to 1e-4 of the largest entry, the more the sharper its
# attention is; a merged token, a cached block, an adapter of ordinary strength change it by 1e-2 and more.
_TOLERANCE = 1e-3
# Of schedulers' tables: diffusers multiplies factors in float32, each of which and each product is off by 2⁻²⁴ at most;
# at the end of a schedule of zero terminal SNR it has 0 or 2⁻²⁴, of which jaxmem has the second.
_ROUNDING, _LAST_ROUNDING = 2.0**-23, 1e-6
_SIDE = 16  # of the autoencoder's latents in the comparison, at most: it is convolutional, and its images are large


def check_class(name: Any, where: str, remedy: str) -> None:
    """Refuse pipelines whose function is more than that of UNet, text encoder and autoencoder.

    Raises:
        ValueError: ``name`` is not of a text-to-image pipeline of Stable Diffusion 1.x or 2.x.
    """
    if name not in _PIPELINES:
        raise ValueError(
            f"{where}: expected a {' or '.join(_PIPELINES)}, got {name!r}; jaxmem reads Stable Diffusion 1.x and 2.x"
            f" from text to image, and the function that it would audit is not the one that this pipeline runs; where"
            f" such a model is in it, {remedy} is the model alone"
        )


def check(pipeline: Any) -> None:
    """Refuse what is no such pipeline, and one whose function was changed outside its settings and weights.

    Raises:
        ValueError: naming what is missing, or every change.
    """
    missing = [part for part in _PARTS if getattr(pipeline, part, None) is None]
    if missing:
        raise ValueError(
            f"model: expected a folder, a hub id or a diffusers StableDiffusionPipeline, got {type(pipeline).__name__}"
            f" without {', '.join(missing)}; of a pipeline with parts left out, set them to those of the model it was"
            f" made from"
        )
    check_class(type(pipeline).__name__, "live pipeline", "StableDiffusionPipeline.from_pipe(pipe)")
    problems = []
    for name, one in (("pipe", pipeline), ("pipe.scheduler", pipeline.scheduler)):
        methods = sorted(key for key in vars(one).keys() - _HARMLESS if callable(getattr(type(one), key, None)))
        if methods:
            problems.append(
                f"{name}: {', '.join(methods)} replaced, which jaxmem does not run; for the model without:"
                f" {'; '.join(f'del {name}.{method}' for method in methods)}"
            )
    for part in NETWORKS:
        problems += _changes(getattr(pipeline, part), part)
    if problems:
        raise ValueError(
            "live pipeline: jaxmem cannot see or does not support these changes:\n  " + "\n  ".join(problems)
        )


def _changes(module: Any, part: str) -> list[str]:
    """What was done to a network beside its weights, as far as it can be seen; `compare` notices the rest."""
    if hasattr(module, "_orig_mod"):
        return [f"{part}: compiled by torch.compile; give it back with pipe.{part} = pipe.{part}._orig_mod"]
    processors = {type(one).__name__ for one in getattr(module, "attn_processors", {}).values()}
    if (
        getattr(module, "_hf_peft_config_loaded", False)
        or any("lora" in name.lower() for name in processors)
        or adapters.is_lora(name for name, _ in module.named_parameters())
    ):
        return [f"{part}: LoRA layers that are not merged, also where they are disabled; call {adapters.MERGE_LIVE}"]
    if getattr(module, "encoder_hid_proj", None) is not None or any("IPAdapter" in name for name in processors):
        return [f"{part}: an IP-Adapter, or another input beside the prompt; call pipe.unload_ip_adapter()"]
    problems = []
    for block in getattr(module, "up_blocks", ()):
        if any(getattr(block, name, None) is not None for name in ("b1", "b2", "s1", "s2")):
            problems.append(f"{part}: FreeU is on; call disable_freeu()")
            break
    strange = sorted(processors - _PROCESSORS)
    if strange:
        problems.append(
            f"{part}: attention processors {', '.join(strange)}; call pipe.{part}.set_attn_processor("
            f"diffusers.models.attention_processor.AttnProcessor2_0())"
        )
    # accelerate's hooks, which move a network from device to device, replace it too, and leave a mark.
    replaced = [name or part for name, one in module.named_modules() if "forward" in vars(one) and not _is_moved(one)]
    if replaced:
        more = f" and {len(replaced) - 3} more" if len(replaced) > 3 else ""
        problems.append(
            f"{part}: the forward of {', '.join(replaced[:3])}{more} was replaced (caches such as DeepCache do so);"
            f" switch that off, or load the pipeline anew"
        )
    return problems


def _is_moved(module: Any) -> bool:
    return type(getattr(module, "_hf_hook", None)).__module__.startswith("accelerate.")


def config(pipeline: Any, part: str, _: str = "") -> dict[str, Any]:
    """The settings of a part, under the class that it is of: a scheduler made by hand does not say it itself."""
    component = getattr(pipeline, part)
    found = component.config
    settings = dict(found.to_dict() if hasattr(found, "to_dict") else found)
    # A default of the scheduler's class is not the user's word: with it absent, DDIM's default holds, as in diffusers.
    for name in settings.get("_use_default_values", ()) if part == "scheduler" else ():
        settings.pop(name, None)
    return settings | {"_class_name": type(component).__name__}


def check_schedule(scheduler: Any, schedule: NoiseSchedule) -> None:
    """Compare the table of a live scheduler, which its settings do not have to make, with the one that was read.

    Raises:
        ValueError: ``alphas_cumprod``, where the scheduler has one, is not ``alpha²``.
    """
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        return
    found = np.asarray(table.detach().cpu().double() if hasattr(table, "detach") else table, np.float64)
    ours = schedule.alpha**2
    if found.shape != ours.shape:
        problem = f"{found.shape} entries, where its settings make {ours.shape}"
    else:
        difference = np.abs(found - ours)
        # NaN is no agreement.
        wrong = ~(difference <= _ROUNDING * schedule.num_timesteps * ours + _LAST_ROUNDING)
        if not wrong.any():
            return
        problem = (
            f"entries that differ by up to {difference[wrong].max():.1e} (at t = {np.flatnonzero(wrong)[0]} first)"
        )
    raise ValueError(
        f"live scheduler: expected the table alphas_cumprod of its settings, got {problem}: it was changed by hand, and"
        f" jaxmem reads the settings; make the scheduler of its betas instead: pipe.scheduler ="
        f" type(pipe.scheduler).from_config(pipe.scheduler.config, trained_betas=betas.tolist()), or without"
        f" trained_betas for the table of its settings"
    )


def tensors(pipeline: Any, part: str, _: weights.Layout) -> list[weights.Tensor]:
    """The tensors of a part."""
    return weights.from_torch(getattr(pipeline, part).state_dict(), f"live {part}")


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


def unproven(module: Any, part: str) -> str | None:
    """A warning of what is in a network that two random points may not show: it can act at other timesteps only."""
    seen = _seen(module)
    if not seen:
        return None
    return (
        f"live {part}: compared at two random points at most, which does not show what acts at other timesteps or in"
        f" guidance's batch of two only; jaxmem does not run what the network has beside its weights, so that numbers"
        f" may be of another function than the pipeline's. Remove it where it does more than look on:{seen}"
    )


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
        yield _decode, lambda vae, z: vae.decode(z / scale, return_dict=False)[0], (latent,)
        image = random.uniform(-1, 1, (side * config.downscale,) * 2 + (config.in_channels,)).astype(np.float32)
        yield _encode, lambda vae, image: scale * vae.encode(image).latent_dist.mean, (image,)


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


@partial(jax.jit, static_argnums=0)
def _decode(graphdef: nnx.GraphDef, state: nnx.State, latent: Any) -> Any:
    return nnx.merge(graphdef, state).decode(latent)


@partial(jax.jit, static_argnums=0)
def _encode(graphdef: nnx.GraphDef, state: nnx.State, image: Any) -> Any:
    return nnx.merge(graphdef, state).encode(image)[0]
