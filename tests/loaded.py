"""A tiny model for tests of `jaxmem.load`, and comparisons of a model with a pipeline of diffusers."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_diffusion as tiny
from conftest import optional_import
from flax import nnx

import jaxmem as jm

PROMPT = "the cat"
# Two float32 programs of a network whose attention is sharpened to be unkind, relative to its largest output.
CLOSE = 1e-4


@pytest.fixture(scope="module")
def peers(torch, diffusers):
    return torch, diffusers, optional_import("transformers")


@pytest.fixture(scope="module")
def original(peers, tmp_path_factory):
    return tiny.make_pipeline(*peers, tmp_path_factory.mktemp("original"), **tiny.SMALLEST)[1]


@pytest.fixture(scope="module")
def base(original):
    return jm.load(original)


@pytest.fixture
def pipe(original, diffusers):
    return open_with_diffusers(diffusers, original)


def open_with_diffusers(diffusers, folder, **parts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, **parts)
    made.set_progress_bar_config(disable=True)
    return made


def their_embedding(pipe, prompt=PROMPT, **options):
    return pipe.encode_prompt(prompt, "cpu", 1, False, **options)[0][0].detach().numpy()


def their_unet(torch, unet, x, cond):
    with torch.no_grad():
        made = unet(torch.tensor(x.transpose(2, 0, 1)[None]), torch.tensor(501), torch.tensor(cond[None]))
    return made.sample[0].numpy().transpose(1, 2, 0)


def our_unet(model, x, cond):
    return np.asarray(nnx.merge(*model.network("unet"))(jnp.asarray(x), 501, jnp.asarray(cond)))


def close(ours, theirs, tolerance=CLOSE):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def same_as(torch, model, pipe, prompt=PROMPT):
    """Text encoder and UNet of a model are those of a pipeline."""
    cond = their_embedding(pipe, prompt)
    close(model.embed([prompt])[0], cond)
    x = np.random.default_rng(0).standard_normal(model.shape).astype(np.float32)
    close(our_unet(model, x, cond), their_unet(torch, pipe.unet, x, cond))
