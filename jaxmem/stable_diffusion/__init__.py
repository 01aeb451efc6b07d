"""Stable Diffusion in Flax, from diffusers weights."""

from jaxmem.extras import require

require("audit", "Stable Diffusion")
