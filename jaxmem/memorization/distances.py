"""How far samples are from the training set, and Carlini's calibrated distance: is a sample clearly new?"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Nearest(NamedTuple):
    """The nearest training example of each sample: its index and its distance, and those of the next ones."""

    index: Int[Array, " n"]  # type: ignore[assignment]
    distance: Float[Array, " n"]
    indices: Int[Array, "n k"]
    distances: Float[Array, "n k"]


def nearest_training(
    x: Float[Array, "n d"], training: Float[Array, "m d"], *, num_neighbours: int = 1, chunk: int = 4096
) -> Nearest:
    """The ``num_neighbours`` nearest training examples of each sample, ``d(x, y) = ‖x − y‖₂``, nearest first.

    Distances are sums of squared differences: ‖x‖² + ‖y‖² − 2 xᵀy would cost less and lose a near copy in float32
    (its error is about 1e-7 ‖x‖² whatever the distance). Of equal distances the lower index comes first.

    Args:
        x: samples, flattened, in the same units as ``training``.
        training: the training set, flattened.
        num_neighbours: how many to return in ``indices`` and ``distances``.
        chunk: training examples compared at once; at most ``chunk * d`` differences are in memory (13 MB for
            MNIST by default).

    Raises:
        ValueError: different sizes of the two, or more neighbours than training examples.
    """
    _check(x, training, num_neighbours, chunk)
    squares, indices = _search(x, training, num_neighbours, min(chunk, len(training)))
    distances = jnp.sqrt(squares)
    return Nearest(indices[:, 0], distances[:, 0], indices, distances)


def calibrated_l2(
    x: Float[Array, "n d"],
    training: Float[Array, "m d"],
    *,
    num_neighbours: int = 50,
    alpha: float = 0.5,
    chunk: int = 4096,
) -> Float[Array, " n"]:
    """Carlini's calibrated distance ``ℓ(x) = d(x, y₁) / (alpha · mean of d(x, y_i) over the 50 nearest y_i)``.

    y₁ is the nearest training example, d the ℓ2 distance. A copy gives 0; a sample that is as far from its nearest
    as from its 50th gives 1 / alpha = 2. Repeated training examples must be given once: 50 copies of one image would
    give 2 for a sample beside it. Defaults: Carlini et al. 2023, "Extracting training data from diffusion models",
    section 4 (50 neighbours, alpha = 0.5).

    Raises:
        ValueError: different sizes of the two, fewer training examples than neighbours, or alpha not positive.
    """
    if not alpha > 0:
        raise ValueError(f"alpha: expected a positive number, got {alpha}; the published value is 0.5")
    distances = nearest_training(x, training, num_neighbours=num_neighbours, chunk=chunk).distances
    mean = distances.mean(1)
    return jnp.where(mean > 0, distances[:, 0] / (alpha * jnp.where(mean > 0, mean, 1.0)), 0.0)


def _check(x: Array, training: Array, num_neighbours: int, chunk: int) -> None:
    if x.ndim != 2 or training.ndim != 2 or x.shape[1] != training.shape[1]:
        raise ValueError(
            f"x and training: expected shapes (n, d) and (m, d), got {x.shape} and {training.shape}; flatten the images"
        )
    if not 1 <= num_neighbours <= len(training):
        raise ValueError(
            f"num_neighbours: expected 1 to {len(training)}, the number of training examples, got {num_neighbours}"
        )
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")


@partial(jax.jit, static_argnames=("k", "chunk"))
def _search(x: Array, training: Array, k: int, chunk: int) -> tuple[Array, Array]:
    """The k smallest squared distances and their indices, in blocks of the training set with a running best."""
    m, d = training.shape
    num_blocks = -(-m // chunk)
    padded = jnp.pad(training, ((0, num_blocks * chunk - m), (0, 0))).reshape(num_blocks, chunk, d)
    offsets = jnp.arange(num_blocks, dtype=jnp.int32) * chunk

    def one(sample: Array) -> tuple[Array, Array]:
        def step(best: tuple[Array, Array], block: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
            examples, offset = block
            index = offset + jnp.arange(chunk, dtype=jnp.int32)
            squares = jnp.square(examples - sample[None]).sum(1)
            squares = jnp.concatenate([best[0], jnp.where(index < m, squares, jnp.inf)])
            smallest, where = jax.lax.top_k(-squares, k)
            return (-smallest, jnp.concatenate([best[1], index])[where]), None

        none = jnp.full(k, jnp.inf, training.dtype), jnp.full(k, -1, jnp.int32)
        return jax.lax.scan(step, none, (padded, offsets))[0]

    return jax.lax.map(one, x)
