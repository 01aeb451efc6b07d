import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.diffusion import NoiseSchedule
from jaxmem.score import ScorePair, bind


class Affine(nnx.Module):
    """The smallest network of the contract: W x + t-dependent shift."""

    def __init__(self, size, *, rngs):
        self.linear = nnx.Linear(size, size, rngs=rngs)

    def __call__(self, x, t, cond):
        return self.linear(x) + jnp.sin(t.astype(x.dtype))


SCHEDULE = NoiseSchedule()


@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "flow", "score"])
def test_bound_network_is_its_own_formula(prediction):
    module = Affine(3, rngs=nnx.Rngs(0))
    score, state = bind(module, SCHEDULE, prediction)
    x, t = jnp.array([0.1, -0.4, 2.0]), jnp.int32(40)
    out = np.asarray(module(x, t, None), np.float64)
    alpha, sigma = SCHEDULE.alpha[40], SCHEDULE.sigma[40]
    eps = {
        "eps": out,
        "v": alpha * out + sigma * np.asarray(x),
        "x0": (np.asarray(x) - alpha * out) / sigma,
        "flow": np.asarray(x) + alpha * out,
        "score": -sigma * out,
    }[prediction]
    np.testing.assert_allclose(score(state, x, t, None), -eps / sigma, rtol=2e-5, atol=1e-5)


def test_two_binds_of_one_architecture_are_one_score():
    first, _ = bind(Affine(3, rngs=nnx.Rngs(0)), SCHEDULE, "eps")
    second, _ = bind(Affine(3, rngs=nnx.Rngs(1)), NoiseSchedule(), "eps")
    assert first == second
    assert hash(first) == hash(second)
    assert first != bind(Affine(3, rngs=nnx.Rngs(0)), SCHEDULE, "v")[0]
    assert first != bind(Affine(4, rngs=nnx.Rngs(0)), SCHEDULE, "eps")[0]


def test_pair_differences_and_guidance():
    pair = ScorePair(cond=jnp.array([2.0, 0.0]), uncond=jnp.array([1.0, 1.0]))
    np.testing.assert_array_equal(pair.difference, [1.0, -1.0])
    np.testing.assert_array_equal(pair.guided(1.0), pair.cond)
    np.testing.assert_array_equal(pair.guided(0.0), pair.uncond)
    np.testing.assert_array_equal(pair.guided(7.5), [8.5, -6.5])
    assert len(jax.tree.leaves(pair)) == 2
