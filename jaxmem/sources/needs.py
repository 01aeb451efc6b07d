"""What a pipeline's parameters need, from the heads of its files: known before one of them is read."""

from pathlib import Path
from typing import NamedTuple

from jaxmem.runs import memory
from jaxmem.stable_diffusion.tensors import files_read, read_file

_NETWORKS = ("unet", "transformer")  # what runs in JAX; the other parts stay in torch
_BASENAMES = ("diffusion_pytorch_model", "model")  # diffusers' files and those of transformers
BYTES_EACH = {"float32": 4, "bfloat16": 2}


class Needs(NamedTuple):
    """Numbers of parameters of a pipeline's parts."""

    parts: dict[str, int]

    def torch_bytes(self) -> int:
        """Of all parts in torch, in float32."""
        return 4 * sum(self.parts.values())

    def jax_bytes(self, parameters: str) -> int:
        """Of the network in JAX, whose parameters have this type."""
        return BYTES_EACH[parameters] * sum(self.parts.get(part, 0) for part in _NETWORKS)

    def opening_bytes(self, parameters: str) -> int:
        """While the network is copied, when torch's copy and JAX's are there."""
        return self.torch_bytes() + self.jax_bytes(parameters)

    def kept_bytes(self, parameters: str) -> int:
        """Afterwards: the network in JAX, the other parts in torch."""
        return self.jax_bytes(parameters) + 4 * sum(n for part, n in self.parts.items() if part not in _NETWORKS)

    def line(self, parameters: str) -> str:
        """The needs as a line."""
        counts = ", ".join(f"{part} {_count(number)}" for part, number in self.parts.items())
        opening, kept = (memory.gigabytes(f(parameters)) for f in (self.opening_bytes, self.kept_bytes))
        return (
            f"numbers of parameters: {counts}; the network in {parameters} takes"
            f" {memory.gigabytes(self.jax_bytes(parameters))}; opening takes {opening}, with torch's copy, and {kept}"
            f" stay, of {memory.gigabytes(memory.available_bytes())} free"
        )

    def require(self, parameters: str) -> None:
        """Refuse what does not fit.

        Raises:
            ValueError: there is less memory than opening takes.
        """
        remedy = "use a larger machine"
        if parameters == "float32" and self.opening_bytes("bfloat16") <= memory.available_bytes():
            remedy += ", or keep rounded ones with `parameters='bfloat16'`"
        what = f"the parameters of the model, {_count(sum(self.parts.values()))} in torch and in JAX"
        memory.require(self.opening_bytes(parameters), what, remedy)


def needs(folder: Path) -> Needs:
    """Count the parameters of each part of a diffusers folder; no number is read.

    Raises:
        ValueError: a file is damaged.
    """
    parts = {}
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = [file for basename in _BASENAMES for file in files_read(part, basename)]
        if files:
            parts[part.name] = sum(tensor.size for file in files for tensor in read_file(file))
    return Needs(parts)


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e8 else f"{number / 1e6:.2f} million"
