"""A model of pictures with a closed form: captions that are one picture each, and one whose pictures vary."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image

import jaxmem as jm
from jaxmem.oracles import GaussianMixture, GaussianMixtureScore

SIDE = 6
SINGLE = ("first", "second", "third")
MANY = "many"
VARIANCE = 0.3  # of each pixel of the varied pictures
_exact = GaussianMixtureScore(jm.NoiseSchedule())


def _score(state, x, t, cond):
    return _exact(state._replace(log_weights=cond), x.ravel(), t).reshape(x.shape)


class Album(jm.Model):
    """Each of ``SINGLE`` gives its picture; ``MANY`` varies about grey; without a caption, ``weights`` of them."""

    schedule, score = _exact.schedule, staticmethod(_score)
    shape, condition, has_pairs = (SIDE, SIDE, 1), "class", True

    def __init__(self, pictures, without=(0.0, 0.0, 0.0, 1.0)):
        size = SIDE * SIDE
        means = np.concatenate([np.asarray(pictures, np.float32).reshape(3, size) / 127.5 - 1, np.zeros((1, size))])
        variances = jnp.array([0.0, 0.0, 0.0, VARIANCE], jnp.float32)
        factors = jnp.zeros((4, size, 1), jnp.float32)
        self.state = GaussianMixture(jnp.zeros(4), jnp.asarray(means, jnp.float32), factors, variances)
        rows = {name: np.eye(4)[i] for i, name in enumerate((*SINGLE, MANY))} | {"": np.array(without)}
        with np.errstate(divide="ignore"):
            self.log_weights = {name: np.maximum(np.log(row), -1e6) for name, row in rows.items()}

    def conditions(self, prompts):
        if unknown := set(prompts) - self.log_weights.keys():
            raise ValueError(f"prompts: expected {', '.join(self.log_weights)}, got {min(unknown)!r}")
        return jnp.array([self.log_weights[prompt] for prompt in prompts], jnp.float32)


def single_pictures(seed=0):
    """Three pictures, uint8, (3, SIDE, SIDE)."""
    return np.random.default_rng(seed).integers(20, 235, (3, SIDE, SIDE)).astype(np.uint8)


def varied_pictures(number, seed):
    """Draws of ``MANY``, rounded to grey levels."""
    values = np.random.default_rng(seed).normal(0, VARIANCE**0.5, (number, SIDE, SIDE))
    return np.round(np.clip(127.5 * (values + 1), 0, 255)).astype(np.uint8)


def write_folder(folder: Path, pictures, captions):
    """PNG files with their captions in metadata.jsonl."""
    folder.mkdir(parents=True)
    rows = []
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        name = f"{number:03d}.png"
        Image.fromarray(picture).save(folder / name)
        rows.append(json.dumps({"file_name": name, "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder
