"""Training of the autoencoder: its loss in closed form, resumption, and standard latents that decode as before."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from killing import Stopped

from jaxmem.config import AutoencoderConfig
from jaxmem.experiments.autoencoder import PRIOR_WEIGHT, autoencoder_loss, encode_all, standardise, train_autoencoder
from jaxmem.stable_diffusion.configs import VAEConfig
from jaxmem.stable_diffusion.vae import VAE

ARCHITECTURE = VAEConfig(
    sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, scaling_factor=1.0
)
CONFIG = AutoencoderConfig(num_steps=4, batch_size=4)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (10, 8, 8)).astype(np.uint8)


def train(images, folder, config=CONFIG, steps=None):
    def progress(task, step, total):
        if step == steps:
            raise Stopped

    try:
        return train_autoencoder(ARCHITECTURE, config, images, folder=folder, progress=progress)
    except Stopped:
        return None


def test_the_loss_is_squared_error_and_divergence():
    graphdef, state = nnx.split(VAE(ARCHITECTURE, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(1)
    image = random.uniform(-1, 1, (8, 8, 3)).astype(np.float32)
    eps = random.normal(size=(4, 4, 4)).astype(np.float32)
    mean, deviation = (np.asarray(part, np.float64) for part in nnx.merge(graphdef, state).encode(jnp.asarray(image)))
    decoded = nnx.merge(graphdef, state).decode(jnp.asarray(mean + deviation * eps, jnp.float32))
    variance = deviation**2
    divergence = 0.5 * (mean**2 + variance - 1 - np.log(variance)).sum()
    expected = ((np.asarray(decoded, np.float64) - image) ** 2).sum() + PRIOR_WEIGHT * divergence
    got = autoencoder_loss(graphdef, state, jnp.asarray(image), jnp.asarray(eps))
    np.testing.assert_allclose(got, expected, rtol=1e-5)  # sums of 192 float32 terms


@pytest.mark.slow  # fast: test_training.py, whose loop it is
def test_an_interrupted_training_ends_with_the_same_bits(images, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxmem.experiments.autoencoder.CHECKPOINT_EVERY", 1)
    _, whole = train(images, tmp_path / "whole")
    assert train(images, tmp_path / "parts", steps=2) is None
    _, resumed = train(images, tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_a_checkpoint_of_another_training_is_refused(images, tmp_path):
    train(images, tmp_path)
    with pytest.raises(ValueError, match=r"the same call, got another one \(learning_rate: there 0\.002, now 0\.001\)"):
        train(images, tmp_path, replace(CONFIG, learning_rate=1e-3))


def test_a_loss_that_is_not_finite_ends_the_training(images, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxmem.experiments.autoencoder.PRIOR_WEIGHT", float("nan"))
    with pytest.raises(ValueError, match=r"autoencoder: the loss became nan before step 4"):
        train(images, tmp_path, replace(CONFIG, seed=1, batch_size=5))


def test_standard_latents_decode_to_the_same_images(images, tmp_path):
    graphdef, state = train(images, tmp_path)
    latents = encode_all(graphdef, state, images, batch_size=4)
    assert latents.shape == (10, 4, 4, 4)
    before = jax.vmap(nnx.merge(graphdef, state).decode)(jnp.asarray(latents))
    deviation = np.asarray(jax.vmap(lambda image: nnx.merge(graphdef, state).encode(image)[1])(_shown(images)))
    standard, moved = standardise(graphdef, state, latents)
    np.testing.assert_allclose(moved.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(moved.std((0, 1, 2)), 1, rtol=1e-5)
    after = jax.vmap(nnx.merge(graphdef, standard).decode)(jnp.asarray(moved))
    np.testing.assert_allclose(after, before, atol=2e-5)  # float32 through ten layers
    mean, spread = jax.vmap(nnx.merge(graphdef, standard).encode)(_shown(images))
    np.testing.assert_allclose(mean, moved, atol=2e-5)
    np.testing.assert_allclose(spread, deviation / latents.std((0, 1, 2)), rtol=1e-4)


def _shown(images):
    return jnp.repeat(jnp.asarray(images, jnp.float32)[..., None] / 127.5 - 1, 3, axis=-1)
