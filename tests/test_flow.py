"""Rectified flow: its schedule, and its sampler against diffusers' and against the exact flow of a Gaussian."""

import math
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmem
from jaxmem.diffusion import FlowSchedule, NoiseSchedule, to_output, to_score
from jaxmem.oracles import GaussianMixtureScore, gaussian
from jaxmem.samplers import DDIM, FlowEuler, Sampler
from jaxmem.sampling import sample, sample_path

FLOW = FlowSchedule()
EVERYWHERE = np.unique(np.concatenate([np.geomspace(1, 1e6, 400), 1e6 - np.geomspace(1, 9e5, 400)]).round()).astype(int)
MEAN = np.array([1.0, -1.0, 0.5])
FACTOR = np.array([[0.8, 0.1], [0.2, -0.5], [-0.3, 0.4]])
VARIANCES, AXES = np.linalg.eigh(0.05 * np.eye(3) + FACTOR @ FACTOR.T)


class TestSchedule:
    @pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1.3e-7), ("bfloat16", 2**-8), ("float16", 2**-10)])
    def test_scales_are_right_to_the_last_digit(self, dtype, rtol, request):
        """Two roundings in float32, one more in half precision; numpy has no bfloat16 of its own."""
        if dtype == "float16":
            request.getfixturevalue("float16")
        sigma = np.array([t / 1_000_000 for t in EVERYWHERE.tolist()])
        alpha = np.array([max((1_000_000 - t) / 1_000_000, 2**-12) for t in EVERYWHERE.tolist()])
        np.testing.assert_array_equal(FLOW.sigma[EVERYWHERE], sigma)
        np.testing.assert_array_equal(FLOW.alpha[EVERYWHERE], alpha)
        for at in (FLOW.at, jax.jit(FLOW.at, static_argnums=1)):
            found = at(jnp.asarray(EVERYWHERE, jnp.int32), jnp.dtype(dtype))
            assert [scale.dtype for scale in found] == [dtype, dtype]
            smallest = 2**-14 if dtype == "float16" else 0  # below, half precision has fewer digits
            for scale, exact in zip(found, (alpha, sigma), strict=True):
                shown = exact > smallest
                np.testing.assert_allclose(np.asarray(scale, np.float64)[shown], exact[shown], rtol=rtol)

    def test_no_table_is_in_a_compiled_program(self):
        program = jax.jit(FLOW.at).lower(jax.ShapeDtypeStruct((), jnp.int32)).as_text()
        assert len(program) < 5000  # a million numbers would be megabytes

    @pytest.mark.parametrize("t", [0, 1_000_001, np.array([5, -1])])
    def test_what_is_no_timestep_is_refused(self, t):
        with pytest.raises(ValueError, match=r"t: expected 1 to 1000000 \(millionths of sigma\), got (0|1000001|-1)"):
            FLOW.at(t)
        with pytest.raises(ValueError, match="t: expected 1 to 1000000"):
            jaxmem.score_jacobian(GaussianMixtureScore(FLOW), gaussian(MEAN, FACTOR), jnp.zeros(3), t=0)

    def test_a_sigma_is_no_timestep(self):
        with pytest.raises(ValueError, match="t: expected an integer timestep, 1 to 1000000, got float"):
            FLOW.at(0.5)

    def test_it_is_told_from_other_schedules(self):
        assert asdict(FLOW) == {"kind": "flow", "num_timesteps": 1_000_000}
        assert hash(FLOW) == hash(FlowSchedule())
        assert FlowSchedule() == FLOW
        # what runs of before are known by
        assert asdict(NoiseSchedule()) == {
            "kind": "linear",
            "num_timesteps": 1000,
            "beta_start": 1e-4,
            "beta_end": 0.02,
            "trained_betas": (),
            "zero_terminal_snr": False,
        }

    def test_add_noise(self):
        x = FLOW.add_noise(jnp.ones(3), jnp.full(3, 2.0), 250_000)
        np.testing.assert_allclose(x, 0.75 + 2 * 0.25, rtol=1e-6)

    def test_the_usual_timestep_has_the_same_noise_for_the_same_signal(self):
        usual = NoiseSchedule.stable_diffusion()
        for t in (41, 281, 481, 501, 981):
            sigma = usual.sigma[t] / (usual.alpha[t] + usual.sigma[t])  # of alpha = 1 - sigma, the ratio the same
            assert FLOW.usual_timestep(round(1e6 * sigma)) == pytest.approx(t, abs=0.01)
        assert FLOW.usual_timestep(1_000_000) == 999
        assert FLOW.usual_timestep(1) == 0
        assert [usual.usual_timestep(t) for t in (0, 281, 999)] == [0, 281, 999]
        assert NoiseSchedule(num_timesteps=500).usual_timestep(250) == 500
        with pytest.raises(ValueError, match="t: expected 1 to 1000000"):
            FLOW.usual_timestep(0)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "flow", "score"])
def test_the_output_behind_a_score(prediction):
    output, x = np.array([1.0, -2.0, 0.5]), np.array([0.3, 0.1, -0.7])
    for alpha, sigma in ((0.8, 0.6), (0.3, 0.7), (2**-12, 1.0)):
        score = to_score(prediction, output, x, alpha, sigma)
        np.testing.assert_allclose(to_output(prediction, score, x, alpha, sigma), output, rtol=1e-11)


@pytest.mark.parametrize("t", [20_000, 500_000, 970_000, 1_000_000])
def test_the_velocity_of_a_gaussian(t):
    """``E[eps - x_0 | x]`` by their joint covariance, against the oracle's score; and its Hessian."""
    alpha, sigma = FLOW.alpha[t], FLOW.sigma[t]
    covariance = AXES @ np.diag(VARIANCES) @ AXES.T
    of_x = alpha**2 * covariance + sigma**2 * np.eye(3)
    x = np.array([0.3, -1.2, 0.8])
    velocity = -MEAN + (sigma * np.eye(3) - alpha * covariance) @ np.linalg.solve(of_x, x - alpha * MEAN)
    score, state = GaussianMixtureScore(FLOW), gaussian(MEAN, FACTOR, 0.05)
    found = np.asarray(score(state, jnp.asarray(x, jnp.float32), t), np.float64)
    # float32 scores: the velocity is their difference from -x, over alpha.
    np.testing.assert_allclose(to_output("flow", found, x, alpha, sigma), velocity, atol=1e-6 / alpha)
    np.testing.assert_allclose(score.hessian(state, x, t), -np.linalg.inv(of_x), rtol=1e-6, atol=1e-9)


def their_sigmas(diffusers, kind, steps):
    """What a pipeline of diffusers gives to its scheduler and gets from it: the scheduler, after ``set_timesteps``."""
    make = diffusers.FlowMatchEulerDiscreteScheduler
    if kind == "sd3":
        scheduler = make(shift=3.0)
        scheduler.set_timesteps(steps)
        return scheduler
    scheduler = make(shift=3.0, use_dynamic_shifting=kind == "flux-dev")
    if kind == "flux-schnell":
        scheduler = make()
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist(), mu=1.15 if kind == "flux-dev" else None)
    return scheduler


OURS = {
    "sd3": dict(shift=3.0, last=3 / 1002),
    "flux-dev": dict(shift=math.exp(1.15)),
    "flux-schnell": dict(),
}


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("steps", [1, 4, 28, 50])
def test_sigmas_equal_diffusers(kind, steps, diffusers):
    scheduler = their_sigmas(diffusers, kind, steps)
    found = FlowEuler.spaced(steps, **OURS[kind])
    # theirs are float32
    np.testing.assert_allclose([*found.sigmas, 0.0], scheduler.sigmas.numpy(), atol=2e-7)
    np.testing.assert_allclose(found.timesteps / 1000, scheduler.timesteps.numpy(), atol=1e-3)
    exact = FlowEuler(scheduler.sigmas[:-1].tolist())
    np.testing.assert_allclose(exact.timesteps / 1e6, scheduler.sigmas[:-1].numpy(), atol=5.01e-7)


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_samples_equal_diffusers_step_by_step(kind, precision, diffusers, torch):
    """Theirs from the exact velocity at their own sigmas, in their float32; ours from the score alone."""
    scheduler = their_sigmas(diffusers, kind, 28)
    sampler = FlowEuler(scheduler.sigmas[:-1].tolist())
    assert isinstance(sampler, Sampler)
    start = np.random.default_rng(0).normal(size=(4, 3))
    theirs = [torch.tensor(start, dtype=torch.float32)]
    for sigma, t in zip(scheduler.sigmas[:-1].tolist(), scheduler.timesteps, strict=True):
        alpha, x = 1 - sigma, theirs[-1].numpy().astype(np.float64)
        scaled = (sigma - alpha * VARIANCES) / (alpha**2 * VARIANCES + sigma**2)
        velocity = ((x - alpha * MEAN) @ AXES * scaled) @ AXES.T - MEAN
        theirs.append(scheduler.step(torch.tensor(velocity, dtype=torch.float32), t, theirs[-1]).prev_sample)
    with jax.enable_x64(precision == "float64"):
        dtype = jnp.dtype(precision)
        state = gaussian(jnp.asarray(MEAN, dtype), jnp.asarray(FACTOR, dtype), 0.05)
        path = sample_path(GaussianMixtureScore(FLOW), state, jnp.asarray(start, dtype), sampler=sampler)
        ours = [np.asarray(x) for _, x in path]
    # In float64 what is left is their float32, 28 steps of values up to 3, our timesteps' 5e-7, and at the first step
    # alpha = 2⁻¹² for 0. In float32 a velocity is known to 1e-7 / alpha there, over a step of 1/28.
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other.numpy(), atol=2e-5 if precision == "float64" else 1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_many_steps_follow_the_exact_flow_of_a_gaussian(shift, x64):
    """Along the flow each axis keeps its place in units of the deviation: ``alpha m + s_sigma / s_1 (x - alpha m)``."""
    state = gaussian(jnp.asarray(MEAN), jnp.asarray(FACTOR), 0.05)
    start = np.random.default_rng(1).normal(size=(4, 3))
    errors = []
    for steps in (200, 400):
        sampler = FlowEuler.spaced(steps, shift)
        t = int(sampler.timesteps[steps // 2])
        x0, path = sample(GaussianMixtureScore(FLOW), state, jnp.asarray(start), sampler=sampler, keep=(t,))
        alpha, sigma = FLOW.alpha[t], FLOW.sigma[t]
        deviation = np.sqrt(alpha**2 * VARIANCES + sigma**2)
        half = (start @ AXES * deviation) @ AXES.T + alpha * MEAN
        end = (start @ AXES * np.sqrt(VARIANCES)) @ AXES.T + MEAN
        errors.append([np.abs(path[t] - half).max(), np.abs(x0 - end).max()])
    assert np.max(errors[1]) < 0.02
    # Euler's method is of first order.
    np.testing.assert_allclose(np.array(errors[0]) / np.array(errors[1]), 2, rtol=0.1)


def test_the_last_step_goes_to_the_posterior_mean(x64):
    """One step from pure noise: ``x_0 = x - v = E[x_0]``, whatever x was, up to alpha = 2⁻¹² for 0."""
    state = gaussian(jnp.asarray(MEAN), jnp.asarray(FACTOR), 0.05)
    x0, _ = sample(GaussianMixtureScore(FLOW), state, jnp.ones((1, 3)), sampler=FlowEuler((1.0,)))
    np.testing.assert_allclose(x0[0], MEAN, atol=2e-3)


def test_timesteps_of_the_sampler():
    sampler = FlowEuler((1.0, 0.75, 0.2500004))
    assert sampler.timesteps.tolist() == [1_000_000, 750_000, 250_000]
    assert sampler.nearest([0, 600_000, 999_999]) == [250_000, 750_000, 1_000_000]
    np.testing.assert_allclose(sampler.scales()[:, 2], [-0.25, -0.4999996, -0.2500004], rtol=1e-12)
    assert FlowEuler([1.0, 0.5]) == FlowEuler((1.0, 0.5))
    assert hash(FlowEuler([1.0, 0.5])) == hash(FlowEuler((1.0, 0.5)))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: FlowEuler(()), r"sigmas: expected descending numbers.*got \(\)"),
        (lambda: FlowEuler((1.0, 0.5, 0.0)), r"got \(1, 0.5, 0\); the step to 0 is the last one by itself"),
        (lambda: FlowEuler((0.5, 1.0)), "sigmas: expected descending numbers"),
        (lambda: FlowEuler((1.5, 1.0)), "sigmas: expected descending numbers, at most 1"),
        (lambda: FlowEuler((0.5, 0.4999999)), "that differ in millionths"),
        (lambda: FlowEuler((0.5, 1e-7)), "sigmas: expected descending numbers"),
        (lambda: FlowEuler((float("nan"),)), "sigmas: expected descending numbers"),
        (lambda: FlowEuler(np.linspace(0.9, 0, 10).tolist()), "got 10 of them, 0.9, 0.8, 0.7, 0.2, 0.1, 0; the step"),
        (lambda: FlowEuler.spaced(0), "num_steps: expected at least 1, got 0"),
        (lambda: FlowEuler.spaced(4, shift=0), "shift: expected a positive number, 1 for none, got 0"),
        (lambda: DDIM(FLOW), "schedule: expected a NoiseSchedule, got FlowSchedule; .*FlowEuler"),
        (lambda: to_output("epsilon", 1.0, 1.0, 1.0, 1.0), "prediction: expected one of"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()
