"""What is put into a model beside its files: LoRA with their scales, textual inversions."""

import math
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from jaxmem.stable_diffusion import adapters

_LORA_FILE = "pytorch_lora_weights.safetensors"  # that diffusers' training scripts save


class Lora(NamedTuple):
    """A file of low-rank additions, and what they are multiplied by."""

    path: Path
    scale: float


class Additions(NamedTuple):
    """What is put into a model, in this order: words, then LoRA."""

    lora: tuple[Lora, ...] = ()
    embedding: tuple[Path, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.lora or self.embedding)

    @property
    def files(self) -> frozenset[Path]:
        """All of them, with links followed."""
        return frozenset(path.resolve() for path in (*(lora.path for lora in self.lora), *self.embedding))

    @classmethod
    def read(cls, lora: Iterable[str | Path], embedding: Iterable[str | Path]) -> "Additions":
        """Look at what was given: the files are there, and they are what they are given as.

        Raises:
            ValueError: naming the file and what it is instead.
        """
        return cls(tuple(map(_lora, lora)), tuple(map(_embedding, embedding)))


def _lora(text: str | Path) -> Lora:
    path, scale = Path(os.path.expanduser(text)), 1.0
    if not path.exists() and isinstance(text, str):  # a file may have a colon in its name
        head, _, tail = text.rpartition(":")
        with suppress(ValueError):  # a colon of the path's
            path, scale = (Path(os.path.expanduser(head)), float(tail)) if head else (path, scale)
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"lora: expected a finite scale other than 0 after the colon, got {text!r}")
    if path.is_dir() and (path / _LORA_FILE).is_file():
        path /= _LORA_FILE
    return Lora(_require("lora", path, adapters.LORA), scale)


def _embedding(path: str | Path) -> Path:
    return _require("embedding", Path(os.path.expanduser(path)), adapters.INVERSION)


def _require(name: str, path: Path, kind: str) -> Path:
    """The file that was given as an argument, if it is of the kind that it has to be.

    Raises:
        ValueError: it is not there, a pickle, or something else.
    """
    if not path.is_file():
        raise ValueError(f"{name}: expected a .safetensors file of {kind}, got {path}, which is no file")
    found = adapters.kind_of(path)
    if path.suffix.lower() in adapters.PICKLES or found == adapters.PEFT:
        raise ValueError(f"{name}: expected a .safetensors file, got {path}; {adapters.remedy(found or kind, path)}")
    if found != kind:
        raise ValueError(f"{name}: expected a file of {kind}, got {path}, which is {found or 'something else'}")
    return path
