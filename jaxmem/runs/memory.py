"""Memory that compiled programs need and memory that is free, before anything large is allocated."""

from typing import Any

import jax
import psutil


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays, or shapes (`jax.ShapeDtypeStruct`), of a pytree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def program_bytes(compiled: Any) -> tuple[int, int]:
    """Bytes of a compiled program's results and of its temporary arrays, as the compiler counts them.

    The arguments are not counted. ``compiled`` is the result of ``jax.jit(f).lower(...).compile()``.
    """
    analysis = compiled.memory_analysis()
    return analysis.output_size_in_bytes - analysis.alias_size_in_bytes, analysis.temp_size_in_bytes


def available_bytes() -> int:
    """Free bytes of the default device: the machine's for a CPU."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return psutil.virtual_memory().available


def require(needed: int, what: str, remedy: str, *, of_host: bool = False) -> None:
    """Raise a ValueError if fewer than ``needed`` bytes are free: "what: needs about …; remedy".

    ``of_host``: of the machine, where it is for NumPy, and not of the default device.
    """
    available = psutil.virtual_memory().available if of_host else available_bytes()
    if needed > available:
        raise ValueError(
            f"{what}: needs about {gigabytes(needed)}, of which this machine has {gigabytes(available)} free; {remedy}"
        )


def gigabytes(count: int) -> str:
    """A number of bytes as text, in GB or MB."""
    return f"{count / 1e9:.1f} GB" if count >= 5e7 else f"{count / 1e6:.1f} MB"
