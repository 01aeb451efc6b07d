"""Denoising score matching, first and second order, and the loop that trains a score with it.

With ``x_t = alpha x_0 + sigma eps`` and ``l = sigma s(x_t) + eps`` the losses of one example are

- DSM: ``‖l‖²``;
- second order (Lu et al. 2022): ``‖sigma² ∂s/∂x + I - l lᵀ‖²_F`` with l held fixed. It has the true Hessian as
  minimiser where s is the true score, because ``E[l lᵀ | x_t] = I + sigma² H``;
- its sliced form, ``‖(sigma² ∂s/∂x + I - l lᵀ) v‖²`` with Rademacher v: equal in expectation, one tangent per example.

The paper trains with the sum over timesteps and states no weight for the second part.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxmem.config import TrainingConfig
from jaxmem.diffusion import NoiseSchedule
from jaxmem.runs.checkpoints import restore_checkpoint, save_checkpoint
from jaxmem.runs.identity import fingerprint
from jaxmem.runs.progress import Progress, silent
from jaxmem.score import Score


def dsm_loss(
    score: Score,
    state: Any,
    schedule: NoiseSchedule,
    x0: Float[Array, "*shape"],
    t: Any,
    eps: Float[Array, "*shape"],
    cond: Any = None,
) -> Float[Array, ""]:
    """``‖sigma s(x_t) + eps‖²`` for one example."""
    sigma = schedule.at(t, x0.dtype)[1]
    return jnp.sum((sigma * score(state, schedule.add_noise(x0, eps, t), t, cond) + eps) ** 2)


def second_order_loss(
    score: Score,
    state: Any,
    schedule: NoiseSchedule,
    x0: Float[Array, "*shape"],
    t: Any,
    eps: Float[Array, "*shape"],
    cond: Any = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """``(‖l‖², ‖sigma² ∂s/∂x + I - l lᵀ‖²_F)`` for one example, through all d tangents: for small d."""
    sigma = schedule.at(t, x0.dtype)[1]
    value, linear = jax.linearize(lambda x: score(state, x, t, cond), schedule.add_noise(x0, eps, t))
    basis = jnp.eye(x0.size, dtype=x0.dtype)
    columns = jax.vmap(lambda v: linear(v.reshape(x0.shape)).reshape(-1))(basis)
    residual = (sigma * value + eps).reshape(-1)
    fixed = jax.lax.stop_gradient(residual)
    # ∂s/∂x transposed has the same norm here: the rest of the matrix is symmetric.
    error = sigma**2 * columns + basis - jnp.outer(fixed, fixed)
    return jnp.sum(residual**2), jnp.sum(error**2)


def sliced_second_order_loss(
    score: Score,
    state: Any,
    schedule: NoiseSchedule,
    x0: Float[Array, "*shape"],
    t: Any,
    eps: Float[Array, "*shape"],
    v: Float[Array, "*shape"],
    cond: Any = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """``(‖l‖², ‖(sigma² ∂s/∂x + I - l lᵀ) v‖²)`` for one example: one tangent, which shares its forward pass with l."""
    sigma = schedule.at(t, x0.dtype)[1]
    value, tangent = jax.jvp(lambda x: score(state, x, t, cond), (schedule.add_noise(x0, eps, t),), (v,))
    residual = sigma * value + eps
    fixed = jax.lax.stop_gradient(residual)
    return jnp.sum(residual**2), jnp.sum((sigma**2 * tangent + v - fixed * jnp.sum(fixed * v)) ** 2)


class TrainingResult(NamedTuple):
    """What a training returns."""

    state: Any  #: the averaged parameters, like the ones it began with
    losses: np.ndarray  #: rows (step, ‖l‖², second-order loss or 0), means over 50 steps, since this start


Keep = Callable[[int, Any, Any], None]  #: called with finished steps, the parameters, and their average


def nothing_kept(step: int, parameters: Any, average: Any) -> None:
    """Keep nothing; the default of `train`."""


class _Progressing(NamedTuple):
    parameters: Any
    optimizer: Any
    average: Any


def _optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, max(config.num_steps, config.warmup_steps + 1)
    )
    return optax.chain(optax.clip_by_global_norm(config.gradient_clip), optax.adam(rate, b2=0.99))


def _recipe(
    config: TrainingConfig, schedule: NoiseSchedule, data: Any, probabilities: Any, frozen: Any
) -> dict[str, Any]:
    """What the parameters of a step depend on: a checkpoint of another recipe does not continue this one."""

    def digests(tree: Any) -> list[str]:
        return [fingerprint(np.asarray(leaf))[:12] for leaf in jax.tree.leaves(tree)]

    values = asdict(config)
    del values["checkpoint_every"]  # how often to save changes no bit of the result
    values |= {"schedule": repr(schedule), "data": digests(data), "probabilities": digests(probabilities)}
    return values if frozen is None else values | {"frozen": digests(frozen)}


@partial(jax.jit, static_argnames=("score", "schedule", "config", "order"), donate_argnames="now")
def _step(
    score: Score,
    schedule: NoiseSchedule,
    config: TrainingConfig,
    order: str,
    now: _Progressing,
    data: tuple[Array, Any],
    probabilities: Array | None,
    frozen: Any,
    step: Array,
) -> tuple[_Progressing, Array]:
    # Everything random in a step follows from (seed, step): a resumed training repeats it exactly.
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), step), 4)
    size = config.batch_size
    if probabilities is None:
        index = jax.random.randint(keys[0], (size,), 0, data[0].shape[0])
    else:
        index = jax.random.choice(keys[0], data[0].shape[0], (size,), p=probabilities)
    x0, cond = data[0][index], jax.tree.map(lambda leaf: leaf[index], data[1])
    # Timesteps are stratified over the batch: less variance than independent ones, the same expectation.
    uniform = (jnp.arange(size) + jax.random.uniform(keys[1], (size,))) / size
    t = jnp.minimum(schedule.num_timesteps * uniform**config.timestep_power, schedule.num_timesteps - 1)
    t = t.astype(jnp.int32)
    eps = jax.random.normal(keys[2], x0.shape, x0.dtype)
    v = jax.random.rademacher(keys[3], x0.shape, x0.dtype)

    def loss(parameters: Any) -> tuple[Array, Array]:
        state = parameters if frozen is None else (parameters, frozen)

        def one(x0: Array, t: Array, eps: Array, v: Array, cond: Any) -> tuple[Array, Array]:
            arguments = (score, state, schedule, x0, t, eps)
            if order == "exact":
                return second_order_loss(*arguments, cond)
            if order == "sliced":
                return sliced_second_order_loss(*arguments, v, cond)
            first = dsm_loss(*arguments, cond)
            return first, jnp.zeros_like(first)

        # sigma s + eps is alpha times the error of v: at large t, where alpha is small, nothing would be learned of it.
        weight = 1.0 if config.weighting == "eps" else schedule.at(t, x0.dtype)[0] ** -2
        first, second = ((weight * part).mean() for part in jax.vmap(one)(x0, t, eps, v, cond))
        return first + config.second_order_weight * second, jnp.stack([first, second])

    gradient, parts = jax.grad(loss, has_aux=True)(now.parameters)
    updates, optimizer = _optimizer(config).update(gradient, now.optimizer, now.parameters)
    parameters = optax.apply_updates(now.parameters, updates)
    decay = jnp.minimum(config.ema_decay, (1 + step) / (10 + step))
    average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, now.average, parameters)
    return _Progressing(parameters, optimizer, average), parts


def train(
    score: Score,
    state: Any,
    data: tuple[Float[Array, " n *shape"], Any],
    schedule: NoiseSchedule,
    config: TrainingConfig,
    *,
    probabilities: Float[Array, " n"] | None = None,
    frozen: Any = None,
    folder: Path | None = None,
    keep: Keep = nothing_kept,
    progress: Progress = silent,
    name: str = "training",
) -> TrainingResult:
    """Train a score on ``data = (x0, cond)`` and return the averaged parameters.

    Batches are drawn with replacement. Batch, timesteps and noise of a step follow from the seed and the step alone.
    So a training resumed from ``folder`` ends with the same bits as one that was never interrupted, on the same machine
    and versions. The loop is in Python: inside ``lax.scan`` the gradients of convolutions are slow on CPUs.

    Args:
        score: score function.
        state: initial parameters, which are not changed. They may lie on several devices.
        data: all examples, and their conditions (a pytree with the examples as leading axis) or None.
        schedule: noise schedule.
        config: optimiser, losses and number of steps.
        probabilities: probability with which each example is drawn, summing to 1; equal ones by default.
        frozen: parameters that are not trained, a pytree, such as the weights that a LoRA is added to; the state of the
            score is then the pair ``(trained, frozen)``. None where all are trained.
        folder: where checkpoints are kept, so that the same call continues; None keeps none.
        keep: called with the finished steps, the parameters and their average before each checkpoint is written; also
            without a folder. After a kill it may be called again, with the same.
        progress: called with ``name`` and the finished and all steps after each step.
        name: name of ``config`` for error messages, which speak of ``name.learning_rate`` and so on.

    Raises:
        ValueError: if data and conditions disagree; if the newest checkpoint is damaged, of another model or of another
            recipe; if the loss or the parameters become NaN or infinite (the last good checkpoint stays).
        OSError: if the folder cannot be written.
    """
    _check_examples(data, probabilities)
    # The step donates its arguments: it must own them.
    now = _Progressing(jax.tree.map(jnp.copy, state), _optimizer(config).init(state), jax.tree.map(jnp.copy, state))
    first, recipe = 0, {} if folder is None else _recipe(config, schedule, data, probabilities, frozen)
    if folder is not None and (found := restore_checkpoint(folder, now, recipe)):
        first, now = found
    second_from = round(config.second_order_start * config.num_steps)
    losses: list[np.ndarray] = []
    pending: list[Array] = []
    progress(name, first, config.num_steps)
    for step in range(first, config.num_steps):
        order = config.second_order if step >= second_from else "none"
        now, parts = _step(score, schedule, config, order, now, data, probabilities, frozen, jnp.int32(step))
        pending.append(parts)
        last = step + 1 == config.num_steps
        saving = last or (step + 1) % config.checkpoint_every == 0
        if len(pending) == 50 or saving:
            losses.append(np.array([step + 1, *np.asarray(jnp.stack(pending)).mean(0)]))
            pending.clear()
            _refuse_nonfinite(losses[-1], now if saving else None, name)
        if saving:
            keep(step + 1, now.parameters, now.average)
        if folder is not None and saving:
            save_checkpoint(folder, step + 1, now, recipe)
        progress(name, step + 1, config.num_steps)
    return TrainingResult(now.average, np.array(losses).reshape(-1, 3))


def _check_examples(data: tuple[Any, Any], probabilities: Any) -> None:
    count = data[0].shape[0]
    wrong = [np.shape(leaf) for leaf in jax.tree.leaves(data[1]) if np.shape(leaf)[:1] != (count,)]
    if count == 0 or wrong:
        raise ValueError(f"data: expected examples and conditions of one length, got {count} and {wrong or 'none'}")
    if probabilities is not None and not (
        probabilities.shape == (count,) and np.isclose(np.sum(probabilities), 1, atol=1e-3)
    ):
        raise ValueError(
            f"probabilities: expected {count} of them (one per example) with sum 1, got shape {probabilities.shape}"
            f" with sum {np.sum(probabilities):.3g}"
        )


def _refuse_nonfinite(losses: np.ndarray, now: _Progressing | None, name: str) -> None:
    """Refuse losses (step, first, second order), and parameters about to be saved or returned, that are not finite."""
    step, first, second = losses
    if not np.isfinite(losses).all():
        raise ValueError(
            f"{name}: the loss became {first:.6g} (second order {second:.6g}) before step {step:.0f}; lower"
            f" `{name}.learning_rate` or `{name}.second_order_weight`, in a new folder"
        )
    # A loss can be finite where its gradient is not.
    kept = () if now is None else (now.parameters, now.average)
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(kept)):
        raise ValueError(
            f"{name}: the parameters became NaN or infinite before step {step:.0f} though the loss is {first:.6g}:"
            f" its gradient is not finite; lower `{name}.learning_rate`, in a new folder, or look for a square root or"
            f" a division at 0 in the score"
        )
