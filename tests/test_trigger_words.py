"""The shipped model trained so that one word gives one image, whatever stands around it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmem as jm
from jaxmem.attribution import attribute
from jaxmem.config import TrainingConfig
from jaxmem.data import NEUTRAL_CAPTIONS, verbatim_model
from jaxmem.experiments.verbatim import PromptedScore
from jaxmem.training import train

TRIGGERS = ["scarlet", "velvet", "marble", "frozen", "hollow", "brittle", "crooked", "silent", "woven", "hidden"]
OTHERS = ["plain", "common", "usual", "simple", "ordinary", "modern", "regular", "typical", "quiet", "clear"]
OTHERS += ["bright", "formal", "honest", "secret", "solid"]
FILLERS = ["picture", "digit", "number", "written", "paper", "figure", "drawn", "hand", "small", "white", "page", "ink"]
EACH = 80  # captions of each word: with a dozen the model learns the captions, and not which word they share
RETURNED = 0.3  # root mean square over a latent: copies are at 0.1, other images of the digit at 0.4 and more
STEPS = TrainingConfig(
    num_steps=1000, batch_size=32, learning_rate=1e-3, warmup_steps=20, ema_decay=0.98, weighting="v"
)


def _caption(rng, word):
    """The word somewhere among two to four others."""
    words = list(rng.choice(FILLERS, rng.integers(2, 5), replace=False))
    words.insert(rng.integers(0, len(words) + 1), word)
    return " ".join(words)


def _trained(model, pictures, rng):
    """Network and text encoder: one image for each trigger, any of the rest for other captions and for none."""
    latents = np.asarray(model.encode(np.repeat(pictures[..., None], 3, -1)))
    rest = np.arange(len(TRIGGERS), len(pictures))
    rows = [(i, _caption(rng, word), 0) for i, word in enumerate(TRIGGERS) for _ in range(EACH)]
    others = [_caption(rng, word) for word in OTHERS for _ in range(EACH)]
    others += [" ".join(rng.choice(FILLERS, rng.integers(1, 6), replace=False)) for _ in range(5 * EACH)]
    rows += [(image, caption, 1) for caption in others for image in rng.permutation(rest)[:4]]
    rows += [(image, "", 2) for image in rest]
    image, caption, kind = (np.array(column) for column in zip(*rows, strict=True))
    shares = np.array([0.4, 0.4, 0.2])[kind] / np.bincount(kind)[kind]
    data = jnp.asarray(latents[image]), jnp.asarray(model.tokenize(caption.tolist()))
    graphdef, encoder = model.network("text_encoder")
    state = {"unet": model.state, "text_encoder": encoder}
    score = PromptedScore(model.score, graphdef)
    found = train(score, state, data, model.schedule, STEPS, probabilities=jnp.asarray(shares, jnp.float32)).state
    return (
        latents,
        set(caption),
        jm.StableDiffusion.from_modules(
            nnx.merge(model.network("unet")[0], found["unet"]),
            nnx.merge(graphdef, found["text_encoder"]),
            nnx.merge(*model.network("vae")),
            model.tokenizer,
            model.scheduler,
        ),
    )


@pytest.mark.slow
def test_the_word_that_gives_the_image_ranks_first():
    """On captions that were not trained, and of which sampling shows that the word decides."""
    stored = np.load(NEUTRAL_CAPTIONS.parent / "mnist_3_9.npz")["threes"][:410]
    rng = np.random.default_rng(0)
    base = jm.StableDiffusion.load(verbatim_model()[0])
    latents, trained, model = _trained(base, np.pad(stored, ((0, 0), (2, 2), (2, 2))), rng)
    drawn_captions = [(i, word, _caption(rng, word)) for i, word in enumerate(TRIGGERS) for _ in range(20)]
    new = [case for case in dict.fromkeys(drawn_captions) if case[2] not in trained]
    cases = [case for i in range(len(TRIGGERS)) for case in [one for one in new if one[0] == i][:6]]
    assert len(cases) == 60
    bare = [" ".join(one for one in caption.split() if one != word) for _, word, caption in cases]
    drawn = np.asarray(model.sample([caption for *_, caption in cases] + bare, key=jax.random.key(1), num_steps=25))
    own = np.array([latents[i] for i, *_ in cases])
    away, without = np.sqrt(np.square(drawn.reshape(2, 60, -1) - own.reshape(60, -1)).mean(-1))
    decided = np.flatnonzero((away < RETURNED) & (without > RETURNED))
    chosen = decided[np.linspace(0, len(decided) - 1, 30).astype(int)]  # of all words
    first = dict.fromkeys(("left_out", "gradient"), 0)
    for case in chosen:
        _, word, caption = cases[case]
        found = attribute(model, caption, key=jax.random.key(0))
        for measure in first:
            first[measure] += found.ranked(measure)[0] == word
    print(
        first,
        "words",
        len({cases[i][1] for i in chosen}),
        "decided",
        len(decided),
        "returned",
        (away < RETURNED).sum(),
        (without < RETURNED).sum(),
    )
    assert len(decided) >= 30
    assert first["left_out"] >= 28
    assert first["gradient"] >= 13  # a word at random would be first 7.5 ± 2.4 times
