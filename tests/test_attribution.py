"""Which words carry a prompt, on a model whose score says it in closed form, and on the shipped one by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmem as jm
from jaxmem.attribution import attribute, condition_gradient
from jaxmem.data import verbatim_model

STRENGTHS = {"a": 0.1, "red": 0.5, "zorbl": 4.0, "cat": 1.0}
CALLS: list = []


def score(state, x, t, cond):
    """A standard normal around the sum of the prompt's words."""
    jax.debug.callback(lambda _: CALLS.append(None), x[0] + cond[0])
    return state * (cond - x)


class Words(jm.Model):
    """Each word moves the mean along an axis of its own."""

    schedule, score, state = jm.NoiseSchedule(), staticmethod(score), jnp.float32(1)
    shape, has_pairs, condition, guidance = (4,), True, "prompt", 2.0

    def conditions(self, prompts):
        axes = dict(zip(STRENGTHS, np.eye(4, dtype=np.float32), strict=True))
        words = [[STRENGTHS[word] * axes[word] for word in prompt.split()] for prompt in prompts]
        return np.array([np.sum(one, 0) if one else np.zeros(4, np.float32) for one in words])


@pytest.mark.parametrize("guidance", [None, 1.0, 0.0])
def test_what_is_lost_is_its_closed_form(guidance):
    model, prompt = Words(), "a zorbl red cat"
    CALLS.clear()
    found = attribute(model, prompt, key=jax.random.key(0), noises=3, num_steps=10, guidance=guidance)
    jax.effects_barrier()
    assert len(CALLS) == found.num_evaluations
    strengths = np.array([STRENGTHS[word] for word in prompt.split()])
    whole = np.linalg.norm(strengths)
    lost = np.array([whole - np.sqrt(whole**2 - one**2) for one in strengths])
    sigma = np.mean([model.schedule.sigma[t] for t in model.sampler(10).timesteps[:5]])
    np.testing.assert_allclose(found.left_out, sigma * lost, rtol=1e-4, atol=1e-6)
    assert found.ranked() == ["zorbl", "cat", "red", "a"]
    assert found.gradient is None
    with pytest.raises(ValueError, match="by: expected left_out"):
        found.ranked("gradient")
    with pytest.raises(ValueError, match="by: expected left_out or gradient, got 'wen'"):
        found.ranked("wen")


def test_the_gradient_of_a_word_is_that_of_its_tokens():
    model = jm.StableDiffusion.load(verbatim_model()[0])
    prompt = "the amber anchor"
    rows = model.token_rows(prompt)
    assert rows == [slice(1, 4), slice(4, 9), slice(9, 15)]  # bytes, after the token that starts a text
    found = attribute(model, prompt, key=jax.random.key(3), timesteps=[961], noises=1)
    key = jax.random.fold_in(jax.random.key(3), 0)
    noise = jax.random.normal(key, model.shape)[None]
    x = next(x[0] for t, x in model.path(noise, [prompt]) if t == 961)
    cond, uncond = model.embed([prompt, ""])
    tokens = condition_gradient(model.score, model.state, x, 961, cond, uncond, float(model.schedule.sigma[961]))
    expected = [np.linalg.norm(tokens[row]) for row in rows]
    np.testing.assert_allclose(found.gradient, expected, rtol=1e-3)
    twice = attribute(model, prompt, key=jax.random.key(3), timesteps=[961], noises=2)
    both = jnp.stack([noise[0], jax.random.normal(jax.random.fold_in(jax.random.key(3), 1), model.shape)])
    points = next(x for t, x in model.path(both, [prompt] * 2) if t == 961)
    each = [
        condition_gradient(model.score, model.state, x, 961, cond, uncond, float(model.schedule.sigma[961]))
        for x in points
    ]
    expected = np.mean([[np.linalg.norm(tokens[row]) for row in rows] for tokens in each], 0)
    np.testing.assert_allclose(twice.gradient, expected, rtol=1e-3)
    plain = attribute(model, prompt, key=jax.random.key(3), timesteps=[961], noises=1, guidance=1.0)
    assert plain.num_evaluations == found.num_evaluations - 1
    # Guidance of the shipped model is 7.5: one step of two evaluations, then three words, two prompts, one gradient.
    assert found.num_evaluations == 2 + (3 + 2) + 3


def test_without_guidance_a_step_is_one_evaluation(monkeypatch):
    def refused(*_):
        raise AssertionError("guidance of 1 needs no score without the prompt")

    monkeypatch.setattr("jaxmem.stable_diffusion.pipeline.with_guidance", refused)
    model = jm.StableDiffusion.load(verbatim_model()[0])
    noise = jax.random.normal(jax.random.key(0), model.shape)[None]
    path = dict(zip(range(2), model.path(noise, ["the amber anchor"], guidance=1.0), strict=False))
    score = model.score(model.state, noise[0], path[0][0], model.embed(["the amber anchor"])[0])
    alpha, sigma = (np.asarray(array, np.float64) for array in (model.schedule.alpha, model.schedule.sigma))
    t, then = path[0][0], path[1][0]
    eps = -sigma[t] * np.asarray(score, np.float64)
    expected = alpha[then] * (np.asarray(noise[0]) - sigma[t] * eps) / alpha[t] + sigma[then] * eps  # DDIM
    np.testing.assert_allclose(path[1][1][0], expected, atol=1e-4)


def test_words_beyond_the_encoders_length_have_no_tokens():
    model = jm.StableDiffusion.load(verbatim_model()[0])
    rows = model.token_rows("word " * 30)
    assert rows[0] == slice(1, 5)
    assert rows[18:20] == [slice(73, 76), slice(76, 76)]  # the end token comes last, whatever is cut
    with pytest.raises(ValueError, match="prompt: expected one that the model reads to its end"):
        attribute(model, "word " * 30, key=jax.random.key(0))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("cat", {}, "prompt: expected a text of at least two words"),
        (["a cat"], {}, "prompt: expected a text of at least two words"),
        ("a cat", {"timesteps": [981.5]}, r"timesteps: expected some of those that 50 steps visit, got \[981.5\]"),
        ("a cat", {"guidance": np.nan}, "score: NaN or infinity at t ="),
        ("a cat", {"timesteps": [3]}, r"timesteps: expected some of those that 50 steps visit, got \[3\]"),
        ("a cat", {"timesteps": []}, "timesteps: expected some of those that 50 steps visit, got none"),
        ("a cat", {"noises": 0}, "at least one noise"),
        ("a cat", {"key": None}, "expected a random key"),
    ],
)
def test_what_cannot_be_attributed_is_refused(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        attribute(Words(), prompt, **{"key": jax.random.key(0)} | options)


def test_a_model_without_prompts_is_refused():
    model = jm.ClassConditional(score, jnp.float32(1), jm.NoiseSchedule(), (4,), {"one": 1, "two": 2})
    with pytest.raises(ValueError, match="model: expected one with prompts"):
        attribute(model, "one two", key=jax.random.key(0))
