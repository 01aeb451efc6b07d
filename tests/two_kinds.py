"""A model of two kinds of pictures with a score in closed form: one picture that is repeated, pictures that vary."""

import jax.numpy as jnp

import jaxmem as jm

exact = jm.oracles.GaussianMixtureScore(jm.NoiseSchedule())


def score(state, x, t, cond):
    return exact(state._replace(log_weights=cond), x.ravel(), t).reshape(x.shape)


class TwoKinds(jm.Model):
    """Prompts are a kind and a word that changes nothing much: "copied cat", "varied dog"."""

    schedule, score = exact.schedule, staticmethod(score)
    shape, condition, has_pairs = (4, 4, 1), "prompt", True
    state = jm.oracles.GaussianMixture(
        jnp.zeros(2), jnp.outer(jnp.array([0.5, -0.5]), jnp.ones(16)), jnp.zeros((2, 16, 1)), jnp.array([0.0, 0.1])
    )

    def conditions(self, prompts):
        weights = {"copied": (0.0, -99.0), "varied": (-3.0, 0.0), "": (0.0, 0.0)}
        shifts = [0.05 * (sum(map(ord, prompt)) % 16) for prompt in prompts]
        found = [weights[prompt.partition(" ")[0]] for prompt in prompts]
        return jnp.array([(a + shift, b) for (a, b), shift in zip(found, shifts, strict=True)])
