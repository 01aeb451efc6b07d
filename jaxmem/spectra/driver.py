"""The Krylov loop that is driven from the host: seen after every step, kept in a file, taken up again to the same bits.

It drives one factorisation or n of them. What a step is, others say: `segments` of one operator, compiled, or one
product with each of n operators (`jaxmem.spectra.programs.Programs.step`).
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.krylov import Factorization, Status, extend
from jaxmem.operators import Operator
from jaxmem.runs import resume

Step = Callable[[Factorization], Factorization]
_SEGMENT_SECONDS = 5.0  # about as long as a segment may take: what a kill can lose, and how often progress is told
_SAVING_SHARE = 0.05  # of the time, for saving: a basis of gigabytes is not written after every product


def drive(step: Step, factorization: Factorization, on_step: Callable[[Factorization], None]) -> Factorization:
    """Take steps until the room of the factorisation (of n: of all) is used or its space has closed.

    ``on_step`` sees it after every step, in the order that makes a restart exact: what it saved is all that is needed
    to go on.
    """
    while growing(factorization):
        factorization = step(factorization)
        on_step(factorization)
    return factorization


def growing(factorization: Factorization) -> bool:
    """Whether a factorisation, or one of n, has room and something to do."""
    room = factorization.hessenberg.shape[-1]
    return bool(np.any((np.asarray(factorization.status) == Status.BUDGET) & (factorization.num_steps < room)))


def segments(operator: Operator, *, symmetric: bool, tolerance: float | None = None) -> Step:
    """Steps of one operator: as many as take a few seconds, in one call of one compiled program.

    How steps are cut into segments changes no bit of the result. A short segment is followed by one of twice as many.
    """
    length = 1

    def step(factorization: Factorization) -> Factorization:
        nonlocal length
        begun = time.monotonic()
        factorization = jax.block_until_ready(_extend(operator, factorization, length, symmetric, tolerance))
        length = 2 * length if time.monotonic() - begun < _SEGMENT_SECONDS else max(1, length // 2)
        return factorization

    return step


@partial(jax.jit, static_argnames=("symmetric", "tolerance"))
def _extend(
    operator: Operator, factorization: Factorization, num_steps: Any, symmetric: bool, tolerance: float | None
) -> Factorization:
    return extend(operator.mv, factorization, num_steps, symmetric=symmetric, tolerance=tolerance)


class Kept:
    """A file that keeps a factorisation, or n of them, while it grows.

    Args:
        path: the file; with None nothing is kept.
        product: what stands for the operator, such as a product with one vector.
        rounding: how far the same operator's ``product`` may be from that.
        options: of the call; others refuse the file.
    """

    def __init__(self, path: Path | None, product: np.ndarray, rounding: float, options: dict[str, Any]) -> None:
        self.path, self.product, self.rounding, self.options = path, product, rounding, options
        self._next_save = 0.0

    def save(self, factorization: Factorization, **more: Any) -> None:
        """Write it, with more arrays beside it; not if the last time is too short ago for what it took, and it grows.

        Raises:
            OSError: if it cannot be written; what was there before is kept.
        """
        begun = time.monotonic()
        if self.path is None or (growing(factorization) and begun < self._next_save):
            return
        arrays = jax.device_get(factorization)._asdict()
        arrays["basis"] = arrays["basis"][..., : int(np.max(arrays["num_steps"])) + 1, :]
        resume.save(self.path, arrays | more | {"product": self.product}, self.options)
        now = time.monotonic()
        self._next_save = now + (now - begun) / _SAVING_SHARE

    def load(self, more: Sequence[str] = ()) -> tuple[Factorization, dict[str, np.ndarray]] | None:
        """The factorisation and the named arrays, if there is a file.

        Raises:
            ValueError: if it is damaged, of another call or of another operator.
        """
        if self.path is None or not self.path.exists():
            return None
        names = (*Factorization._fields, *more)
        arrays = resume.load(self.path, names, self.product, self.rounding, self.options)
        basis, room = arrays["basis"], arrays["hessenberg"].shape[-1]
        whole = np.zeros((*basis.shape[:-2], room + 1, basis.shape[-1]), basis.dtype)
        whole[..., : basis.shape[-2], :] = basis
        state = arrays | {"basis": whole}
        return Factorization(*(jnp.asarray(state[name]) for name in Factorization._fields)), arrays
