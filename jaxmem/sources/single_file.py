"""A checkpoint in one file, in the layout of the program that Stable Diffusion was trained with."""

from pathlib import Path

from jaxmem.stable_diffusion import adapters


def is_checkpoint(path: Path) -> bool:
    """Whether a file is a whole model; pickles are not looked at."""
    return path.suffix.lower() == ".safetensors" and adapters.kind_of(path) == adapters.CHECKPOINT
