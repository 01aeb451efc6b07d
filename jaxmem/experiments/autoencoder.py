"""Train the autoencoder of a small latent diffusion model: reconstruction and a weak prior on the latents."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from jaxmem.config import AutoencoderConfig
from jaxmem.runs.checkpoints import restore_checkpoint, save_checkpoint
from jaxmem.runs.identity import fingerprint
from jaxmem.runs.progress import Progress
from jaxmem.stable_diffusion.configs import VAEConfig
from jaxmem.stable_diffusion.vae import VAE

CHECKPOINT_EVERY = 250
# Of the divergence from a standard normal, beside the sum of squared errors of a picture in [-1, 1]: latents get a
# scale and neighbours of a latent decode alike, while the picture is nearly all that counts.
PRIOR_WEIGHT = 0.01


class _Progressing(NamedTuple):
    parameters: Any
    optimizer: Any


def autoencoder_loss(
    graphdef: nnx.GraphDef, state: Any, image: Float[Array, "height width channels"], eps: Float[Array, "..."]
) -> Float[Array, ""]:
    """``‖decode(m + s eps) - image‖² + w ½ Σ (m² + s² - 1 - log s²)`` for one image, w = `PRIOR_WEIGHT`."""
    vae = nnx.merge(graphdef, state)
    mean, deviation = vae.encode(image)
    error = jnp.sum((vae.decode(mean + deviation * eps) - image) ** 2)
    mean, deviation = mean / vae.config.scaling_factor, deviation / vae.config.scaling_factor
    prior = 0.5 * jnp.sum(mean**2 + deviation**2 - 1 - 2 * jnp.log(deviation))
    return error + PRIOR_WEIGHT * prior


@partial(jax.jit, static_argnames=("graphdef", "batch_size", "latent_shape", "optimizer"), donate_argnames="now")
def _step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    now: _Progressing,
    images: Array,
    key: Array,
    batch_size: int,
    latent_shape: tuple[int, ...],
) -> tuple[_Progressing, Array]:
    keys = jax.random.split(key)
    batch = images[jax.random.randint(keys[0], (batch_size,), 0, len(images))]
    batch = jnp.repeat(batch.astype(jnp.float32)[..., None] / 127.5 - 1, 3, axis=-1)
    eps = jax.random.normal(keys[1], (batch_size, *latent_shape))

    def loss(parameters: Any) -> Array:
        return jax.vmap(partial(autoencoder_loss, graphdef, parameters))(batch, eps).mean()

    value, gradient = jax.value_and_grad(loss)(now.parameters)
    updates, state = optimizer.update(gradient, now.optimizer, now.parameters)
    return _Progressing(optax.apply_updates(now.parameters, updates), state), value


def train_autoencoder(
    architecture: VAEConfig,
    config: AutoencoderConfig,
    images: np.ndarray,
    *,
    folder: Path,
    progress: Progress,
) -> tuple[nnx.GraphDef, Any]:
    """Train on grey images (n, side, side), uint8, shown as three equal channels; resumes from its checkpoints.

    Adam, warm-up over a tenth of the steps, then cosine decay to zero; a step's batch and noise follow from its number
    and the seed.

    Raises:
        ValueError: a damaged checkpoint or one of another training, or a loss that is not finite.
    """
    graphdef, state = nnx.split(VAE(architecture, rngs=nnx.Rngs(config.seed)))
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, max(config.num_steps // 10, 1), config.num_steps + 1
    )
    optimizer = optax.adam(rate)
    recipe = asdict(config) | {"data": fingerprint(images)[:12]}
    first, now = 0, _Progressing(state, optimizer.init(state))
    if found := restore_checkpoint(folder, now, recipe):
        first, now = found
    side = architecture.sample_size // architecture.downscale
    shape = (side, side, architecture.latent_channels)
    data = jnp.asarray(images)
    progress("train the autoencoder", first, config.num_steps)
    for step in range(first, config.num_steps):
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        now, value = _step(graphdef, optimizer, now, data, key, config.batch_size, shape)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == config.num_steps:
            if not np.isfinite(value):
                raise ValueError(
                    f"autoencoder: the loss became {value} before step {step + 1}; lower its learning rate"
                )
            save_checkpoint(folder, step + 1, now, recipe)
        progress("train the autoencoder", step + 1, config.num_steps)
    return graphdef, now.parameters


@partial(jax.jit, static_argnums=0)
def _encode(graphdef: nnx.GraphDef, state: Any, images: Array) -> Array:
    batch = jnp.repeat(images.astype(jnp.float32)[..., None] / 127.5 - 1, 3, axis=-1)
    return jax.vmap(lambda image: nnx.merge(graphdef, state).encode(image)[0])(batch)


def encode_all(graphdef: nnx.GraphDef, state: Any, images: np.ndarray, batch_size: int = 250) -> np.ndarray:
    """The mean latents of grey images (n, side, side), uint8."""
    padded = np.concatenate([images, np.repeat(images[-1:], -len(images) % batch_size, axis=0)])
    parts = [_encode(graphdef, state, jnp.asarray(part)) for part in np.split(padded, len(padded) // batch_size)]
    return np.concatenate(parts)[: len(images)]


def standardise(graphdef: nnx.GraphDef, state: Any, latents: np.ndarray) -> tuple[Any, np.ndarray]:
    """Parameters of the same autoencoder whose latents have mean 0 and variance 1 in each channel, and those latents.

    The two 1 × 1 convolutions between encoder, latents and decoder take it up: nothing else changes. Stable Diffusion
    divides by one number instead and leaves the means where they are.
    """
    mean, deviation = latents.mean((0, 1, 2)), latents.std((0, 1, 2))
    vae = nnx.merge(graphdef, state)
    channels = len(mean)
    before, after = vae.quant_conv, vae.post_quant_conv
    scale = np.concatenate([1 / deviation, np.ones(channels)])  # of the means; the log variances are shifted
    shift = np.concatenate([-mean / deviation, -2 * np.log(deviation)])
    before.weight[...] = before.weight[...] * scale[None]
    before.bias[...] = before.bias[...] * scale + shift
    after.bias[...] = after.bias[...] + mean @ after.weight[...]
    after.weight[...] = after.weight[...] * deviation[:, None]
    return nnx.state(vae), (latents - mean) / deviation
