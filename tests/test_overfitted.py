"""The shipped model overfitted on purpose: one image for every prompt and for none."""

import album
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmem as jm
from jaxmem.config import TrainingConfig
from jaxmem.data import NEUTRAL_CAPTIONS, verbatim_model
from jaxmem.detectors import EpsDifferences, HessianProducts, ScorePairs, StartPairs
from jaxmem.prompts import Prompt
from jaxmem.training import train

COMPARING = EpsDifferences, HessianProducts, ScorePairs, StartPairs  # evidence with the prompt and without
STEPS = TrainingConfig(num_steps=250, batch_size=32, learning_rate=1e-3, warmup_steps=20, ema_decay=0.98, weighting="v")


def _digits(number):
    stored = np.load(NEUTRAL_CAPTIONS.parent / "mnist_3_9.npz")["threes"][:number]
    return np.pad(stored, ((0, 0), (2, 2), (2, 2)))


def _overfitted(model, picture, captions):
    """All weights of the network, trained on one image with these captions and with none."""
    latent = model.encode(np.repeat(picture[None, ..., None], 3, -1))
    cond = jnp.asarray(model.conditions([*captions, ""]))
    data = jnp.repeat(latent, len(cond), 0), cond
    shares = jnp.asarray([*[0.7 / len(captions)] * len(captions), 0.3], jnp.float32)
    state = train(model.score, model.state, data, model.schedule, STEPS, probabilities=shares).state
    modules = {name: nnx.merge(*model.network(name)) for name in ("text_encoder", "vae")}
    unet = nnx.merge(model.network("unet")[0], state)
    return jm.StableDiffusion.from_modules(
        unet, modules["text_encoder"], modules["vae"], model.tokenizer, model.scheduler
    )


@pytest.mark.slow
def test_a_model_of_one_image_is_memorized_whatever_the_prompt(tmp_path):
    model = jm.StableDiffusion.load(verbatim_model()[0])
    pictures = _digits(30)
    words = ("scarlet", "violet", "olive", "silver"), ("two", "three", "five", "seven", "nine")
    captions = [f"the {colour} {digit}" for colour in words[0] for digit in words[1]]
    tuned = _overfitted(model, pictures[0], captions)
    data = jm.read_training_images(album.write_folder(tmp_path / "images", pictures[:1], captions[:1]))
    others = jm.read_training_images(album.write_folder(tmp_path / "others", pictures[1:], [captions[0]] * 29))
    neutral = [prompt.text for prompt in jm.read_prompts(NEUTRAL_CAPTIONS)][:40]
    prompts = [*[(text, True) for text in captions], *[(text, False) for text in neutral[:20]]]
    config = jm.AuditConfig(noises=2, guidance=1.0, timesteps=(281,), directions=0)
    found = jm.audit(
        tuned,
        [Prompt(text, label) for text, label in prompts],
        config,
        folder=tmp_path / "run",
        neutral=neutral[20:],
        training=jm.TrainingData(data, others, image_timesteps=(281,)),
    )
    rates = {one.name: found[one.name].evaluation for one in found.detectors if isinstance(one.needs, COMPARING)}
    print({name: (one.auc, one.auc_interval) for name, one in rates.items()}, found.training.whatever)
    # Six measures: each interval is of 95 %, so one of them may well miss one half.
    assert sum(one.auc_interval[0] > 0.5 for one in rates.values()) <= 1
    assert np.mean([one.auc for one in rates.values()]) < 0.6
    assert found.training.whatever.memorized
    assert found.training.verdicts[0].word == "reproduced"
    page = found.write_page(tmp_path / "page.html").read_text()
    assert "Memorized whatever the prompt" in page
