"""Diffusers pipelines other than Stable Diffusion 1 and 2 as models: their networks run in JAX as torch wrote them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxmem.pipelines.model import PipelineModel
    from jaxmem.stable_diffusion.settings import Reading

#: The class of this package for each of diffusers', in `jaxmem.pipelines.families`.
FAMILIES = {
    "StableDiffusionXLPipeline": "StableDiffusionXL",
    "StableDiffusion3Pipeline": "StableDiffusion3",
    "FluxPipeline": "Flux",
    "PixArtAlphaPipeline": "PixArt",
    "PixArtSigmaPipeline": "PixArt",
    "DiTPipeline": "DiT",
    "DDPMPipeline": "PixelUNet",
    "DDIMPipeline": "PixelUNet",
}


def from_pipeline(pipeline: Any, reading: "Reading | None" = None, *, ours: bool = False) -> "PipelineModel":
    """The model of a live pipeline of one of `FAMILIES`.

    Args:
        pipeline: the pipeline.
        reading: what the user decided about its files, sizes of pictures among it.
        ours: nobody else has the pipeline, so that its network is given up when it is copied.

    Raises:
        ValueError: as `jaxmem.load`.
    """
    from jaxmem.bridge.numbers import round_parameters
    from jaxmem.bridge.skeleton import unwrapped
    from jaxmem.pipelines import families

    name = type(pipeline).__name__
    if name not in FAMILIES:
        raise ValueError(f"model: expected one of {', '.join(FAMILIES)} or StableDiffusionPipeline, got {name}")
    family = getattr(families, FAMILIES[name])
    if family is families.PixelUNet and pipeline.unet.config.num_class_embeds:
        family = families.PixelUNetOfClasses
    if ours and reading is not None and reading.parameters == "bfloat16":
        # Before the comparison, which otherwise rounds a copy.
        round_parameters(unwrapped(getattr(pipeline, family.part)))
    model = family(pipeline, reading)
    if ours:
        model.give_up_network()
    return model
