"""What a diffusers folder's JSON files say, read strictly: a setting that is not understood is never passed over.

Each ``from_diffusers`` names every field that it cannot honour in one error. A field is either used, or has to be at
the value that changes nothing, or is inert by the rule of `jaxmem.stable_diffusion.settings`.
"""

from jaxmem.stable_diffusion.configs.scheduler import SchedulerConfig
from jaxmem.stable_diffusion.configs.text_encoder import TextEncoderConfig
from jaxmem.stable_diffusion.configs.unet import UNetConfig
from jaxmem.stable_diffusion.configs.vae import VAEConfig

__all__ = ["SchedulerConfig", "TextEncoderConfig", "UNetConfig", "VAEConfig"]
