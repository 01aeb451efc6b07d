import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.diffusion import NoiseSchedule
from jaxmem.networks.mlp import MLP
from jaxmem.score import bind

SCHEDULE = NoiseSchedule()
TIMESTEPS = [0, 20, 300, 999]
X = jnp.array([0.7, -1.3])


def network(seed=0, **changes):
    return MLP(2, **dict(width=16, depth=2, rngs=nnx.Rngs(seed)) | changes)


def with_output(logit, centre, residual):
    """A network that puts out these numbers whatever its input: the last layer's kernel begins at zero."""
    module = network()
    module.out.bias[...] = jnp.array([logit, *centre, *residual], jnp.float32)
    return module


def disturbed(seed=0, **changes):
    """A network with a last layer that is not zero, as after training."""
    module = network(seed, **changes)
    module.out.kernel[...] = 0.3 * jax.random.normal(jax.random.key(7), module.out.kernel.shape)
    return module


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("t", TIMESTEPS)
def test_it_begins_as_the_best_denoiser_of_unit_variance(t):
    # Unit-variance data under a variance-preserving schedule stay N(0, I), whose score is -x.
    score, state = bind(network(), SCHEDULE, "eps")
    np.testing.assert_allclose(score(state, X, t, None), -X, rtol=2e-5)  # float32: alpha/sigma through log and back
    jacobian = jax.jacfwd(lambda x: score(state, x, t, None))(X)
    np.testing.assert_allclose(jacobian, -np.eye(2), atol=2e-5)


@pytest.mark.parametrize("t", TIMESTEPS)
def test_an_open_gate_is_the_score_of_a_point(t):
    # The steepest Hessian there is, -I/sigma², up to -10,000: reached exactly, at every timestep.
    point = np.array([6.0, 5.0])
    score, state = bind(with_output(20.0, point / 4, (0, 0)), SCHEDULE, "eps")
    alpha, sigma = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
    x = jnp.asarray(alpha * point + sigma * np.array([0.4, -1.1]), jnp.float32)
    exact = -(np.asarray(x, np.float64) - alpha * point) / sigma**2
    # x is about 8 and rounded to 5e-7; at t = 0 that is divided by sigma² = 1e-4, so compared with 1/sigma: 5e-5.
    np.testing.assert_allclose(score(state, x, t, None), exact, atol=2e-4 / sigma)
    jacobian = jax.jacfwd(lambda x: score(state, x, t, None))(x)
    np.testing.assert_allclose(sigma**2 * jacobian, -np.eye(2), atol=1e-5)


@pytest.mark.parametrize("t", TIMESTEPS)
def test_a_closed_gate_leaves_the_residual(t):
    found = with_output(-20.0, (3.0, 3.0), (0.25, -0.5))(X, t, None)
    np.testing.assert_allclose(found, [0.25, -0.5], rtol=1e-6)


@pytest.mark.parametrize("t", TIMESTEPS)
def test_it_is_its_formula_in_double_precision(t):
    module = disturbed()
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(module, nnx.Param)))

    def dense(layer, x):
        return x @ layer["kernel"] + layer["bias"]

    alpha, sigma, x = SCHEDULE.alpha[t], SCHEDULE.sigma[t], np.asarray(X, np.float64)
    angles = np.log(alpha / sigma) * 0.25 * 32 ** (np.arange(16) / 15)
    time = np.concatenate([np.sin(angles), np.cos(angles)])
    hidden = dense(weights["first"], np.concatenate([x, time]))
    for i in range(2):
        modulation = dense(weights["modulations"][i], time)
        hidden = hidden + dense(weights["hidden"][i], silu(hidden * (1 + modulation[:16]) + modulation[16:]))
    out = dense(weights["out"], silu(hidden))
    gate = 1 / (1 + np.exp(-10 * out[0]) * alpha**2 / sigma**2)
    exact = gate * (x - alpha * 4 * out[1:3]) / sigma + out[3:]
    # Angles reach 37, so their sine is known to 4e-6 in float32; the gate multiplies that by 10, and 1/sigma by 100.
    np.testing.assert_allclose(module(X, t, None), exact, rtol=2e-3, atol=2e-4)


def test_parameters_follow_from_the_seed_and_the_score_from_the_architecture():
    (score, state), (again, same) = (bind(network(3), SCHEDULE, "eps") for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, state, same)
    other, different = bind(network(4), SCHEDULE, "eps")
    assert score == again == other
    assert hash(score) == hash(other)
    assert not np.array_equal(jax.tree.leaves(state)[1], jax.tree.leaves(different)[1])
    assert score != bind(network(3, width=8), SCHEDULE, "eps")[0]


@pytest.mark.parametrize("t", TIMESTEPS)
def test_every_parameter_has_a_finite_gradient_through_the_jacobian(t):
    # What the second-order loss differentiates. Only the last bias may be without effect on ∂s/∂x.
    score, state = bind(disturbed(), SCHEDULE, "eps")
    gradient = jax.grad(lambda state: jnp.sum(jax.jacfwd(lambda x: score(state, x, t, None))(X) ** 2))(state)
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(leaf).all()
        assert np.any(leaf != 0)


def test_its_schedule_is_the_one_it_is_given():
    schedule = NoiseSchedule.stable_diffusion()
    score, state = bind(network(schedule=schedule), schedule, "eps")
    np.testing.assert_allclose(score(state, X, 0, None), -X, rtol=2e-5)
    mixed, state = bind(network(schedule=schedule), SCHEDULE, "eps")
    assert not np.allclose(mixed(state, X, 0, None), -X, rtol=0.1)


def test_misuse_is_named():
    with pytest.raises(ValueError, match=r"x: expected one vector of shape \(2,\), got \(3,\); use jax.vmap"):
        network()(jnp.zeros(3), 0, None)
    with pytest.raises(ValueError, match="cond: expected None"):
        network()(X, 0, jnp.int32(1))
