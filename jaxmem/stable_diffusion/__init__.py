"""Stable Diffusion in Flax, from diffusers weights."""
