"""Models of live diffusers pipelines: their settings, their weights, and what changes their function beside both."""

from functools import partial
from typing import Any

import numpy as np

from jaxmem.diffusion import NoiseSchedule
from jaxmem.runs.progress import Say
from jaxmem.stable_diffusion import adapters, weights
from jaxmem.stable_diffusion.components import NETWORKS, Parts, check_class, read_parts
from jaxmem.stable_diffusion.live_comparison import load_compared
from jaxmem.stable_diffusion.settings import Reading
from jaxmem.stable_diffusion.tensors import Tensor, from_torch

_PARTS = (*NETWORKS, "tokenizer", "scheduler")
_HARMLESS = {"progress_bar", "set_progress_bar_config", "run_safety_checker", "check_inputs"}  # methods of a pipeline
# The same function in another order of operations; any other may have another function or weights of its own.
_PROCESSORS = {"AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor"}
# Of schedulers' tables: diffusers multiplies factors in float32, each of which and each product is off by 2⁻²⁴ at most;
# at the end of a schedule of zero terminal SNR it has 0 or 2⁻²⁴, of which jaxmem has the second.
_ROUNDING, _LAST_ROUNDING = 2.0**-23, 1e-6


def read_live(pipeline: Any, reading: Reading, say: Say) -> Parts:
    """The parts of a live pipeline; each network is compared with the pipeline's own when it is loaded.

    Raises:
        ValueError: as `StableDiffusion.load`.
    """
    check(pipeline)
    parts = read_parts(partial(config, pipeline), partial(tensors, pipeline), lambda: pipeline.tokenizer, reading)
    check_schedule(pipeline.scheduler, parts.configs[-1].schedule)
    components = {
        part: component._replace(load=partial(load_compared, pipeline, part, component.load, say))
        for part, component in parts.components.items()
    }
    return parts._replace(components=components)


def check(pipeline: Any, *, with_lora: bool = False) -> None:
    """Refuse what is no such pipeline, and one whose function was changed outside its settings and weights.

    LoRA layers are such a change, unless they are still to be fused (``with_lora``).

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
        problems += _changes(getattr(pipeline, part), part, with_lora)
    if problems:
        raise ValueError(
            "live pipeline: jaxmem cannot see or does not support these changes:\n  " + "\n  ".join(problems)
        )


def _changes(module: Any, part: str, with_lora: bool) -> list[str]:
    """What was done to a network beside its weights, as far as it can be seen; a comparison notices the rest."""
    if hasattr(module, "_orig_mod"):
        return [f"{part}: compiled by torch.compile; give it back with pipe.{part} = pipe.{part}._orig_mod"]
    processors = {type(one).__name__ for one in getattr(module, "attn_processors", {}).values()}
    if not with_lora and (
        getattr(module, "_hf_peft_config_loaded", False)
        or any("lora" in name.lower() for name in processors)
        or adapters.is_lora(name for name, _ in module.named_parameters())
    ):
        return [
            f"{part}: LoRA layers that are not merged, also where they are disabled; jaxmem.load merges the active ones"
            f" in a copy, or call {adapters.MERGE_LIVE}"
        ]
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


def tensors(pipeline: Any, part: str, _: weights.Layout) -> list[Tensor]:
    """The tensors of a part."""
    return from_torch(getattr(pipeline, part).state_dict(), f"live {part}")
