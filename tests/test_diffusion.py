import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.diffusion import NoiseSchedule, to_eps, to_score
from jaxmem.oracles import GaussianMixtureScore, gaussian

KINDS = {
    "linear": (NoiseSchedule("linear"), dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)),
    "scaled_linear": (
        NoiseSchedule.stable_diffusion(),
        dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    ),
    "cosine": (NoiseSchedule("cosine"), dict(beta_schedule="squaredcos_cap_v2")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tables_equal_diffusers(kind, diffusers):
    ours, theirs = KINDS[kind]
    table = diffusers.DDIMScheduler(**theirs).alphas_cumprod.numpy()
    # Theirs is a float32 running product of 1,000 factors: 1e-5 relative; where sigma² is 1e-4 its absolute rounding.
    np.testing.assert_allclose(ours.alpha**2, table, rtol=3e-5, atol=1e-7)
    np.testing.assert_allclose(ours.alpha**2 + ours.sigma**2, 1, rtol=1e-14)


def test_first_sigma_is_exact_to_double_precision():
    schedule = NoiseSchedule()
    assert schedule.sigma[0] == pytest.approx(0.01, rel=1e-12)
    assert 1 / schedule.sigma[0] ** 2 == pytest.approx(1e4, rel=1e-12)
    stable = NoiseSchedule.stable_diffusion()
    # The design's published values for Stable Diffusion.
    np.testing.assert_allclose(
        stable.sigma[[981, 801, 501, 101, 21, 1]], [0.9971, 0.9816, 0.8515, 0.3271, 0.1401, 0.0413], atol=5e-5
    )


@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "flow", "score"])
def test_each_parametrisation_gives_the_closed_form_score(prediction):
    # One data point x0: the noised score is -(x - alpha x0) / sigma², and each network output has one exact value.
    alpha, sigma = 0.8, 0.6
    x0, eps = np.array([1.0, -2.0, 0.5]), np.array([0.3, 0.1, -0.7])
    x = alpha * x0 + sigma * eps
    exact = -(x - alpha * x0) / sigma**2
    output = {"eps": eps, "v": alpha * eps - sigma * x0, "x0": x0, "flow": eps - x0, "score": exact}[prediction]
    np.testing.assert_allclose(to_score(prediction, output, x, alpha, sigma), exact, rtol=1e-12)
    np.testing.assert_allclose(to_eps(prediction, output, x, alpha, sigma), eps, rtol=1e-12)


@pytest.mark.parametrize("sigma", [0.2, 0.5, 0.9])
def test_rectified_flow_gives_the_score_of_a_gaussian(sigma):
    # alpha = 1 - t, sigma = t. For x0 ~ N(0, v): the velocity E[eps - x0 | x] and the score are linear in x.
    alpha, variance = 1 - sigma, 0.7
    total = alpha**2 * variance + sigma**2
    x = np.linspace(-2, 2, 5)
    velocity = (sigma - alpha * variance) / total * x
    np.testing.assert_allclose(to_score("flow", velocity, x, alpha, sigma), -x / total, rtol=1e-12)


def test_flow_sign_matters():
    # Two published codes have x - (1 - t) v: it is a different number.
    assert to_eps("flow", np.array(1.0), np.array(2.0), 0.5, 0.5) == 2.5


@pytest.mark.parametrize("t", [0, np.int64(999), jnp.int32(7), np.array([0, 999])])
def test_timesteps_are_looked_up(t):
    schedule = NoiseSchedule()
    alpha, sigma = schedule.at(t)
    np.testing.assert_allclose(alpha, schedule.alpha[np.asarray(t)], rtol=1e-6)
    np.testing.assert_allclose(sigma, schedule.sigma[np.asarray(t)], rtol=1e-6)
    np.testing.assert_array_equal(jax.jit(schedule.at)(t), (alpha, sigma))


def test_add_noise():
    schedule = NoiseSchedule()
    x = schedule.add_noise(jnp.ones(3), jnp.full(3, 2.0), 100)
    np.testing.assert_allclose(x, schedule.alpha[100] + 2 * schedule.sigma[100], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: NoiseSchedule("quadratic"), "schedule kind: expected one of"),
        (lambda: NoiseSchedule(num_timesteps=0), "num_timesteps: expected at least 1"),
        (lambda: NoiseSchedule(beta_start=0.5, beta_end=0.1), "expected 0 < beta_start"),
        (lambda: NoiseSchedule().add_noise(jnp.full(3, 200, jnp.uint8), jnp.ones(3), 5), "x0: expected floating point"),
        (lambda: NoiseSchedule().at(1000), "t: expected 0 to 999 .*got 1000"),
        (lambda: NoiseSchedule().at(jnp.array([3, -1])), "t: expected 0 to 999 .*got -1"),
        (lambda: NoiseSchedule().at(0.5), "t: expected an integer timestep, 0 to 999, got float"),
        (lambda: jax.jit(NoiseSchedule().at)(0.5), "t: expected an integer timestep"),
        (
            lambda: GaussianMixtureScore(NoiseSchedule()).hessian(gaussian(jnp.ones(2), jnp.ones((2, 1))), [0, 0], -1),
            "t: expected 0 to 999 .*got -1",
        ),
        (lambda: to_score("epsilon", jnp.ones(1), jnp.ones(1), 1.0, 1.0), "prediction: expected one of"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()
