"""How much memory compiled programs take, and how much there is, before anything large is allocated."""

from typing import Any

import jax
import psutil


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays, or shapes, of a pytree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def program_bytes(compiled: Any) -> tuple[int, int]:
    """``(results, scratch)`` of a compiled program in bytes, by the compiler's own account; its arguments not counted.

    ``compiled`` is what ``jax.jit(f).lower(...).compile()`` gives.
    """
    analysis = compiled.memory_analysis()
    return analysis.output_size_in_bytes - analysis.alias_size_in_bytes, analysis.temp_size_in_bytes


def available_bytes() -> int:
    """Bytes that the default device can still give: of the machine for a CPU, of the device otherwise."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return psutil.virtual_memory().available


def require(needed: int, what: str, remedy: str) -> None:
    """Raise a ValueError if ``needed`` bytes are not there."""
    available = available_bytes()
    if needed > available:
        raise ValueError(
            f"{what}: needs about {gigabytes(needed)}, of which this machine has {gigabytes(available)} free; {remedy}"
        )


def gigabytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 5e7 else f"{count / 1e6:.1f} MB"
