"""Samples against closed forms: of a Gaussian every sampler here is a linear map, or a Gaussian of known covariance."""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_diffusion import KINDS

import jaxmem
from jaxmem.diffusion import NoiseSchedule
from jaxmem.oracles import GaussianMixtureScore, gaussian
from jaxmem.samplers import DDIM, Sampler
from jaxmem.sampling import sample, sample_path

SCHEDULE = NoiseSchedule()
MEAN = np.array([1.0, -1.0, 0.5])
FACTOR = np.array([[0.8, 0.1], [0.2, -0.5], [-0.3, 0.4]])
STATE = gaussian(jnp.asarray(MEAN), jnp.asarray(FACTOR), 0.05)
COVARIANCE = 0.05 * np.eye(3) + FACTOR @ FACTOR.T
SCORE = GaussianMixtureScore(SCHEDULE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("steps", "offset", "to_one"), [(50, 1, False), (50, 0, True), (7, 0, True), (1000, 0, False)])
@pytest.mark.parametrize("clip", [None, 0.7])
def test_ddim_equals_diffusers_step_by_step(kind, steps, offset, to_one, clip, diffusers, torch):
    schedule, theirs = KINDS[kind]
    scheduler = diffusers.DDIMScheduler(
        **theirs,
        steps_offset=offset,
        set_alpha_to_one=to_one,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(steps)
    sampler = DDIM(schedule, steps, offset, to_one, clip)
    np.testing.assert_array_equal(sampler.timesteps, scheduler.timesteps.numpy())

    # A smooth data distribution of unit scale keeps the trajectory bounded, so errors are comparable at every step.
    state = gaussian(jnp.array([0.3, -0.2, 0.1]), jnp.array([[0.5], [0.2], [-0.3]]), 0.1)
    score = GaussianMixtureScore(schedule)
    noise = jax.random.normal(jax.random.key(0), (4, 3))
    shown = steps if steps <= 50 else 60  # the first 60 of 1,000: the rest is the same arithmetic
    step_score = jax.jit(jax.vmap(score, (None, 0, None)))
    for (t, x), (_, after), _ in zip(
        list(sample_path(score, state, noise, sampler=sampler))[:-1],
        list(sample_path(score, state, noise, sampler=sampler))[1:],
        range(shown),
        strict=False,
    ):
        eps = -schedule.sigma[t] * np.asarray(step_score(state, x, jnp.int32(t)), np.float64)
        peer = scheduler.step(torch.tensor(eps), t, torch.tensor(np.asarray(x, np.float64)), eta=0.0).prev_sample
        # float32 on our side; at cosine's last timestep alpha is 5e-5 of x, hence the division by alpha in atol.
        np.testing.assert_allclose(after, peer.numpy(), rtol=2e-4, atol=2e-5 + 1e-7 / schedule.alpha[t])


def gaussian_scales(sampler):
    """Of a step's start and end alpha and sigma², in float64, from the schedule's betas alone."""
    alpha_squared = np.cumprod(1 - SCHEDULE.betas)
    for t in sampler.timesteps:
        before = t - SCHEDULE.num_timesteps // sampler.num_steps
        now, then = alpha_squared[t], alpha_squared[before] if before >= 0 else 1.0
        yield np.sqrt(now), 1 - now, np.sqrt(then), 1 - then


def ddim_factors(sampler, variance):
    """What each step of DDIM multiplies ``x - alpha mean`` with, along an axis of this variance.

    ``E[x0 | x]`` is ``alpha v x / (alpha² v + sigma²)``, and ``E[eps | x]`` is ``sigma x / (alpha² v + sigma²)``.
    """
    for alpha, sigma2, then, then2 in gaussian_scales(sampler):
        yield (then * alpha * variance + np.sqrt(then2 * sigma2)) / (alpha**2 * variance + sigma2)


def test_ddim_of_a_gaussian_is_its_linear_map_at_every_step():
    sampler = DDIM(SCHEDULE, 20)
    variances, axes = np.linalg.eigh(COVARIANCE)
    noise = jax.random.normal(jax.random.key(0), (5, 3))
    x0, path = sample(SCORE, STATE, noise, sampler=sampler, keep=sampler.timesteps.tolist())
    assert list(path) == sampler.timesteps.tolist()
    alpha = SCHEDULE.alpha[sampler.timesteps]
    centred = (np.asarray(noise, np.float64) - alpha[0] * MEAN) @ axes
    after = [*(path[t] for t in sampler.timesteps[1:].tolist()), x0]
    for factors, scale, x in zip(
        zip(*(ddim_factors(sampler, v) for v in variances), strict=True), [*alpha[1:], 1.0], after, strict=True
    ):
        centred = centred * np.array(factors)
        # 20 float32 steps, of which the first divides by alpha = 0.01: 6e-8 / 0.01 of values of order 1.
        np.testing.assert_allclose(x, centred @ axes.T + scale * MEAN, atol=2e-5)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_samples_with_noise_have_the_mean_and_covariance_of_their_chain(eta):
    """DDPM's own posterior (Ho et al. 2020, Equations 6 and 7) for eta = 1; 0.5 has half of its deviation."""
    sampler, count = DDIM(SCHEDULE, 10, eta=eta), 40_000
    noise = jax.random.normal(jax.random.key(1), (count, 3))
    x0, _ = sample(SCORE, STATE, noise, sampler=sampler, key=jax.random.key(2))
    variances, axes = np.linalg.eigh(COVARIANCE)
    start = SCHEDULE.alpha[sampler.timesteps[0]] * MEAN
    mean, spread = -start @ axes, np.ones(3)  # of x - alpha mean, along the axes
    for alpha, sigma2, then, then2 in gaussian_scales(sampler):
        added = 1 - (alpha / then) ** 2  # the beta of this step
        posterior = then2 / sigma2 * added
        shrink = alpha * variances / (alpha**2 * variances + sigma2)  # E[x0 | x] / x
        if eta == 1:
            factor = then * added / sigma2 * shrink + alpha / then * then2 / sigma2
        else:
            factor = then * shrink + np.sqrt(then2 - eta**2 * posterior) * (1 - alpha * shrink) / np.sqrt(sigma2)
        mean, spread = factor * mean, factor**2 * spread + eta**2 * posterior
    found = np.asarray(x0, np.float64)
    # Five standard errors: of a mean sqrt(v / n), of a covariance at most sqrt(2) v / sqrt(n).
    np.testing.assert_allclose(found.mean(0), axes @ mean + MEAN, atol=5 * np.sqrt(spread.max() / count))
    np.testing.assert_allclose(
        np.cov(found.T), axes @ np.diag(spread) @ axes.T, atol=5 * np.sqrt(2 / count) * spread.max()
    )


def test_many_ancestral_steps_sample_the_distribution_itself():
    x0, _ = sample(
        SCORE,
        STATE,
        jax.random.normal(jax.random.key(3), (10_000, 3)),
        sampler=DDIM(SCHEDULE, 1000, eta=1.0),
        key=jax.random.key(4),
    )
    # Five standard errors, and 1/1,000 from the steps.
    atol = 5 * np.sqrt(2 / 10_000) * np.linalg.norm(COVARIANCE, 2) + 1e-3
    np.testing.assert_allclose(np.cov(np.asarray(x0, np.float64).T), COVARIANCE, atol=atol)
    np.testing.assert_allclose(x0.mean(0), MEAN, atol=atol)


def test_noisy_steps_equal_diffusers(diffusers, torch, x64):
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False, set_alpha_to_one=False
    )
    scheduler.set_timesteps(50)
    # Their table is a float32 product; ours is what the steps are compared with.
    scheduler.alphas_cumprod = torch.tensor(SCHEDULE.alpha**2)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    sampler = DDIM(SCHEDULE, 50, final_alpha_one=False, eta=0.7)
    x = jax.random.normal(jax.random.key(5), (3,), jnp.float64)
    for t, scales in list(zip(sampler.timesteps.tolist(), sampler.scales(), strict=True))[::7]:
        key = jax.random.key(t)
        z, eps = jax.random.normal(key, (3,), jnp.float64), jnp.sin(x + t)
        ours = sampler.step(lambda x, t, eps=eps: -eps / SCHEDULE.sigma[t], x, t, jnp.asarray(scales), key)
        theirs = scheduler.step(
            torch.tensor(np.asarray(eps)),
            t,
            torch.tensor(np.asarray(x)),
            eta=0.7,
            variance_noise=torch.tensor(np.asarray(z)),
        )
        np.testing.assert_allclose(ours, theirs.prev_sample, rtol=1e-10)


@pytest.mark.parametrize("steps", [20, 40])
def test_a_sampler_of_ones_own(steps, x64):
    """Heun's method on the probability flow ODE, two evaluations per step: far nearer to the flow than DDIM's Euler."""

    @dataclass(frozen=True)
    class Heun:
        schedule: NoiseSchedule
        num_steps: int

        @property
        def timesteps(self):
            return np.linspace(900, 100, self.num_steps).astype(int)

        def scales(self):  # alpha and sigma of t and of the next timestep, and that timestep
            t = self.timesteps
            then = np.append(t[1:], 99)
            alpha, sigma = self.schedule.alpha, self.schedule.sigma
            return np.stack([alpha[t], sigma[t], alpha[then], sigma[then], then], 1)

        def step(self, score, x, t, scales, key):
            alpha, sigma, alpha1, sigma1, then = scales
            y, change = x / alpha, sigma1 / alpha1 - sigma / alpha  # dy/d(sigma/alpha) = eps
            eps = -sigma * score(x, t)
            guess = alpha1 * (y + change * eps)
            eps1 = -sigma1 * score(guess, then.astype(jnp.int32))
            return alpha1 * (y + change * (eps + eps1) / 2)

    state = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), STATE)
    variances, axes = np.linalg.eigh(COVARIANCE)
    start = np.random.default_rng(0).normal(size=(4, 3))

    def exact(t):
        scales = [np.sqrt(SCHEDULE.alpha[s] ** 2 * variances + SCHEDULE.sigma[s] ** 2) for s in (900, t)]
        centred = (start - SCHEDULE.alpha[900] * MEAN) @ axes
        return (centred * scales[1] / scales[0]) @ axes.T + SCHEDULE.alpha[t] * MEAN

    heun = Heun(SCHEDULE, steps)
    assert isinstance(heun, Sampler)
    x, path = jaxmem.sample(SCORE, state, jnp.asarray(start), sampler=heun, keep=(100,))
    euler, ddim = jnp.asarray(start), DDIM(SCHEDULE)
    for t, then in zip(heun.timesteps[:-1], heun.timesteps[1:], strict=True):
        scales = jnp.array([SCHEDULE.alpha[t], SCHEDULE.sigma[t], SCHEDULE.alpha[then], SCHEDULE.sigma[then]])
        euler = jax.vmap(lambda x, t=t, row=scales: ddim.step(partial(SCORE, state), x, t, row, None))(euler)
    errors = [np.abs(found - exact(100)).max() for found in (path[100], euler)]
    assert errors[0] < errors[1] / 5
    assert errors[0] < 0.5 / steps  # and near to the truth
    np.testing.assert_allclose(x, exact(99), atol=0.5 / steps)


def mean_score(state: Any, x: Any, t: Any, cond: Any) -> Any:
    """Of N(cond, variance I), the variance being the state."""
    alpha, sigma = SCHEDULE.at(t, x.dtype)
    return -(x - alpha * cond) / (alpha**2 * state + sigma**2)


def test_guidance_of_gaussians_moves_the_mean():
    # Two Gaussians of one variance: the guided score is that of the mean u + g (c - u).
    given, absent = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32), np.array([-1.0, 0.5], np.float32)
    noise, sampler = jax.random.normal(jax.random.key(6), (2, 2)), DDIM(SCHEDULE, 20)
    options = dict(sampler=sampler, keep=(50,))
    pull = dict(guidance=3.0, uncond=jnp.asarray(absent))
    guided, path = sample(mean_score, 0.3, noise, jnp.asarray(given), **options, **pull)
    moved = absent + 3 * (given - absent)
    expected, along = sample(mean_score, 0.3, noise, jnp.asarray(moved), **options)
    np.testing.assert_allclose(guided, expected, atol=1e-4)  # float32, divided by alpha = 0.01 in the first step
    np.testing.assert_allclose(path[50], along[50], atol=1e-4)


def test_one_program_serves_all_steps_and_batches_of_a_size():
    traces = []

    def score(state, x, t, cond):
        traces.append(None)
        return -x

    sampler = DDIM(SCHEDULE, 7)
    sample(score, None, jnp.ones((2, 3)), sampler=sampler)
    first = len(traces)
    sample(score, None, jnp.zeros((2, 3)), sampler=DDIM(SCHEDULE, 7), keep=(0,))
    assert len(traces) == first == 2  # once to check its shape, once in the program


def test_what_an_example_draws_depends_neither_on_the_batch_nor_on_where_one_resumes():
    sampler, key = DDIM(SCHEDULE, 6, eta=1.0), jax.random.key(7)
    noise = jax.random.normal(jax.random.key(8), (4, 3))
    whole = list(sample_path(SCORE, STATE, noise, sampler=sampler, key=key))
    few, _ = sample(SCORE, STATE, noise[:2], sampler=sampler, key=key)
    np.testing.assert_allclose(few, whole[-1][1][:2], atol=1e-5)  # two programs
    rest = list(sample_path(SCORE, STATE, whole[3][1], sampler=sampler, key=key, first=3))
    assert [t for t, _ in rest] == [t for t, _ in whole[3:]]
    np.testing.assert_array_equal(rest[-1][1], whole[-1][1])
    other, _ = sample(SCORE, STATE, noise, sampler=sampler, key=jax.random.key(9))
    assert np.abs(np.asarray(other - whole[-1][1])).max() > 0.1
    assert np.abs(np.diff(np.asarray(other), axis=0)).min() > 1e-4  # each example has noise of its own


def test_a_pair_of_conditions_is_a_pytree():
    class Two(NamedTuple):
        mean: Any
        label: Any

    def score(state, x, t, cond):
        return mean_score(state, x, t, cond.mean + cond.label)

    noise, sampler = jnp.ones((2, 3)), DDIM(SCHEDULE, 4)
    cond = Two(jnp.zeros((2, 3)), jnp.array([1, 2], jnp.int32))
    absent = Two(jnp.zeros(3), 7)
    same, _ = sample(score, 0.3, noise, cond, sampler=sampler, guidance=1.0, uncond=absent)
    plain, _ = sample(score, 0.3, noise, cond, sampler=sampler)
    np.testing.assert_allclose(same, plain, atol=1e-4)


def test_nearest():
    assert DDIM(SCHEDULE, 50).nearest([0, 1, 99, 999]) == [0, 0, 100, 980]


@dataclass(frozen=True)
class Faulty:
    steps: tuple[Any, ...] = (10, 0)
    rows: int = 2
    slice: bool = False

    @cached_property
    def timesteps(self):
        return np.array(self.steps)

    def scales(self):
        return np.zeros((self.rows, 1))

    def step(self, score, x, t, scales, key):
        return x[:1] if self.slice else x


class Unhashable(Faulty):
    __hash__ = None


def pull(state: Any, x: Any, t: Any, cond: Any) -> Any:
    return -x


def sampled(sampler: Any = None, noise: Any = None, cond: Any = None, score: Any = pull, **options: Any) -> Any:
    noise = jnp.ones((2, 3)) if noise is None else noise
    return lambda: sample(score, 0.3, noise, cond, sampler=sampler or DDIM(SCHEDULE, 10), **options)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: DDIM(SCHEDULE, 0), "num_steps: expected 1 to 1000"),
        (lambda: DDIM(SCHEDULE, 1000, 1), "steps_offset: the first timestep would be 1000"),
        (lambda: DDIM(SCHEDULE, 10, clip=-1.0), "clip: expected a positive number or None"),
        (lambda: DDIM(SCHEDULE, 10, eta=1.5), r"eta: expected 0 \(deterministic\) to 1 \(ancestral\), got 1.5"),
        (sampled(noise=jnp.ones((1, 2), jnp.int32)), "noise: expected floating point, got int32"),
        (
            sampled(keep=(5, 300, 999)),
            r"keep: expected timesteps that the sampler visits, 10 from 900 to 0, got \[5, 999\]; the nearest are"
            r" \[0, 900\]",
        ),
        (sampled(DDIM(SCHEDULE, 10, eta=1.0)), "key: DDIM with eta=1.0 draws noise; expected a random key"),
        (sampled(cond=jnp.ones((3, 3))), r"cond: expected leaves with 2 rows, one per noise, got .*3"),
        (sampled(guidance=2.0), "uncond: expected the condition of one example.*guidance needs both"),
        (sampled(cond=jnp.ones((2, 3)), guidance=2.0), "uncond: expected the condition of one example"),
        (
            sampled(cond=jnp.ones((2, 3)), guidance=2.0, uncond=jnp.ones((2, 3))),
            r"uncond: .*like cond without its batch axis \(shapes \(3,\)\), got shapes \(2, 3\)",
        ),
        (sampled(cond=jnp.ones((2, 3)), uncond=jnp.ones(3)), "uncond: expected None without guidance"),
        (sampled(score=lambda state, x, t, cond: x[:1]), r"score: expected an output like x, shape \(3,\)"),
        (sampled(NoiseSchedule()), "sampler: expected .* got NoiseSchedule without timesteps, scales, step"),
        (sampled(Unhashable()), "sampler: expected a hashable object"),
        (sampled(Faulty((0.5, 0.1))), "sampler: expected distinct whole numbers as timesteps"),
        (sampled(Faulty((3, 3))), "sampler: expected distinct whole numbers as timesteps"),
        (sampled(Faulty(rows=3)), r"sampler: expected scales of shape \(2, any\).*got \(3, 1\)"),
        (sampled(Faulty(slice=True)), r"sampler: expected a step to return an array like x, shape \(3,\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.usefixtures("unchecked")
def test_timesteps_to_keep_come_from_any_iterable():
    _, path = sample(SCORE, STATE, jnp.zeros((2, 3)), sampler=DDIM(SCHEDULE, 10), keep=(t for t in [500, 100]))
    assert list(path) == [500, 100]
    with pytest.raises(ValueError, match=r"keep: expected timesteps that the sampler visits.*got \[500.7\]"):
        sample(SCORE, STATE, jnp.zeros((2, 3)), sampler=DDIM(SCHEDULE, 10), keep=(500.7,))


@pytest.mark.parametrize("t", [1000, -1])
def test_points_outside_the_schedule_are_refused(t):
    match = r"t: expected 0 to 999, got|t: expected"
    with pytest.raises(ValueError, match=match):
        jaxmem.score_jacobian(SCORE, STATE, jnp.zeros(3), t)
    with pytest.raises(ValueError, match=match):
        jaxmem.batch_spectra(SCORE, STATE, jnp.zeros((2, 3)), np.array([5, t]))
