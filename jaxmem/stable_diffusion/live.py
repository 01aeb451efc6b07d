"""Models of live diffusers pipelines: their settings, their weights, and what changes their function beside both."""

from typing import Any

from jaxmem.stable_diffusion import weights

_PARTS = ("unet", "text_encoder", "vae", "tokenizer", "scheduler")


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
    problems = []
    for block in getattr(pipeline.unet, "up_blocks", ()):
        if any(getattr(block, name, None) is not None for name in ("b1", "b2", "s1", "s2")):
            problems.append("unet: FreeU is on; call disable_freeu()")
            break
    processors = {type(one).__name__ for one in getattr(pipeline.unet, "attn_processors", {}).values()}
    strange = sorted(processors - {"AttnProcessor", "AttnProcessor2_0"})
    if strange:
        problems.append(f"unet: attention processors {', '.join(strange)}; call set_default_attn_processor()")
    added = getattr(pipeline.tokenizer, "added_tokens_encoder", {})
    if any(f"{token}_1" in added for token in added):
        problems.append("tokenizer: a textual inversion of several vectors, which diffusers expands in prompts")
    if problems:
        raise ValueError(
            "live pipeline: jaxmem can not see or does not support these changes:\n  " + "\n  ".join(problems)
        )


def config(pipeline: Any, part: str, _: str = "") -> dict[str, Any]:
    """The settings of a part, under the class that it is of: a scheduler made by hand does not say it itself."""
    component = getattr(pipeline, part)
    found = component.config
    settings = dict(found.to_dict() if hasattr(found, "to_dict") else found)
    # A default of the scheduler's class is not the user's word: with it absent, DDIM's default holds, as in diffusers.
    for name in settings.get("_use_default_values", ()) if part == "scheduler" else ():
        settings.pop(name, None)
    return settings | {"_class_name": type(component).__name__}


def tensors(pipeline: Any, part: str, _: weights.Layout) -> list[weights.Tensor]:
    """The tensors of a part."""
    return weights.from_torch(getattr(pipeline, part).state_dict(), f"live {part}")
