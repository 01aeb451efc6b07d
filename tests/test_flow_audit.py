"""Audits of models that are not Stable Diffusion's: rectified flow, and pixels that DDIM clips; from closed forms."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from html import unescape
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmem as jm
from jaxmem.audit.plan import ModelFacts, Plan
from jaxmem.audit.steps import require_steps
from jaxmem.diffusion import FlowSchedule, NoiseSchedule, to_score
from jaxmem.oracles import GaussianMixture, GaussianMixtureScore
from jaxmem.samplers import DDIM, FlowEuler
from jaxmem.sampling import sample

FLOW = FlowSchedule()
EXACT = GaussianMixtureScore(FLOW)
# One picture, and pictures of any shade around another; without a class one in five is the picture.
MIXTURE = GaussianMixture(
    jnp.zeros(2), jnp.outer(jnp.array([0.5, -0.5]), jnp.ones(16)), jnp.zeros((2, 16, 1)), jnp.array([0.0, 1.0])
)
SHARES = np.array([[1.0, 0.0], [0.0, 1.0], [0.2, 0.8]])
STATE = MIXTURE, jnp.asarray(np.log(np.maximum(SHARES, 1e-40)), jnp.float32)
CONFIG = jm.AuditConfig(noises=3, ddim_steps=20, batch=4)


def kinds(state: Any, x: Any, t: Any, cond: Any) -> Any:
    mixture, log_shares = state
    return EXACT(mixture._replace(log_weights=log_shares[cond]), x.ravel(), t).reshape(x.shape)


@dataclass(frozen=True, eq=False)
class Paired(jm.ClassConditional):
    has_pairs = True


def flow_model(make: Any = jm.ClassConditional, **options: Any) -> Any:
    classes = {"copied": 0, "varied": 1} | ({"": 2} if make is Paired else {})
    return make(kinds, STATE, FLOW, (4, 4, 1), classes, **options)


def usual_places(sigmas):
    """The timesteps of Stable Diffusion's table with the nearest noise-to-signal ratio, from its betas."""
    table = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    ratios = np.log(np.sqrt((1 - table) / table))
    return [int(np.abs(ratios - np.log(s / max(1 - s, 2**-12))).argmin()) for s in sigmas]


@pytest.mark.parametrize("make", [jm.ClassConditional, Paired])
def test_an_audit_of_a_flow_model_to_its_page(make, tmp_path):
    said: list[str] = []
    found = jm.audit(flow_model(make), ["copied", "varied"], CONFIG, folder=tmp_path / "run", say=said.append)
    sigmas = 1 - np.arange(20) / 20
    np.testing.assert_array_equal(found.timesteps, np.round(1e6 * sigmas))
    np.testing.assert_allclose(found.sigma, sigmas, atol=1e-12)
    assert np.isfinite(found.scores).all()
    # the step after pure noise, and those with the noise that 481, 281 and 41 have of Stable Diffusion
    places = np.array(usual_places(sigmas))
    late = [int(found.timesteps[np.abs(places - t).argmin()]) for t in (481, 281, 41)]
    assert found.spectral_timesteps.tolist() == [950_000, *late]
    assert 281 - 40 < places[found.timesteps == late[1]][0] < 281 + 40

    for t in found.spectral_timesteps.tolist():
        alpha, sigma = 1 - t / 1e6, t / 1e6
        eigenvalues = found.eigenvalues[:, :, found.spectral_timesteps.tolist().index(t)]
        np.testing.assert_allclose(eigenvalues[0], -1 / sigma**2, rtol=1e-5)
        np.testing.assert_allclose(eigenvalues[1], -1 / (alpha**2 + sigma**2), rtol=1e-5)
    np.testing.assert_array_equal(found[f"tangent-count@t{late[1]}"].scores, [[0] * 3, [16] * 3])
    # one picture again and again, and another each time
    assert found.images is not None
    np.testing.assert_allclose(found.images[0], round(255 * 0.75), atol=1)
    assert found.images[1].std() > 30
    assert found["tiled-l2"].scores[0].max() < 0.01 < found["tiled-l2"].scores[1].min()
    assert found.directions is not None
    assert found.directions.timestep == late[1]
    np.testing.assert_array_equal(found.directions.point[:, 0], [0, 1])

    page = unescape(found.write_page(tmp_path / "page.html").read_text())
    assert "20, timesteps 1000000 to 50000, millionths of sigma" in page
    assert f"at timestep {late[1]}" in " ".join(page.split())
    assert "1 of 2</strong> classes leave" in " ".join(page.split())
    assert "DDIM" not in page.partition('id="manifest"')[0]
    assert not any("DDIM" in line for line in said)
    names = {detector.name for detector in found.detectors}
    assert (make is Paired) == ("wen-1" in names)
    # a finished run is read, not made again; another sampler is another run
    again = jm.audit(flow_model(make), ["copied", "varied"], CONFIG, folder=tmp_path / "run")
    np.testing.assert_array_equal(again.scores, found.scores)


def test_scores_of_pairs_at_the_first_step_are_those_of_the_closed_form(tmp_path):
    """With alpha = 2⁻¹² the scores differ by 2⁻¹² of what their means differ by, and float32 still holds that."""
    found = jm.audit(flow_model(Paired), ["copied", "varied"], CONFIG, folder=tmp_path / "run")
    alpha, means = 2**-12, np.asarray(MIXTURE.means, np.float64)
    noise = [
        np.asarray(jax.random.normal(jax.random.fold_in(jax.random.key(0), j), (16,)), np.float64) for j in range(3)
    ]
    exact = np.empty((2, 3))
    for j, x in enumerate(noise):
        components = np.stack([-(x - alpha * mean) / (alpha**2 * v + 1) for mean, v in zip(means, (0, 1), strict=True)])
        log_density = [
            -0.5 * ((x - alpha * m) ** 2).sum() / (alpha**2 * v + 1) for m, v in zip(means, (0, 1), strict=True)
        ]
        weights = SHARES[2] * np.exp(np.array(log_density) - max(log_density))
        exact[:, j] = np.linalg.norm(components - weights @ components / weights.sum(), axis=1)
    # 6e-8 of |x|, in each of the two scores, against 2⁻¹² of 0.2 or 0.8
    np.testing.assert_allclose(found["wen-1"].scores, exact, rtol=2e-3)
    assert (found["wen-1"].scores[0] > found["wen-1"].scores[1]).all()
    for name in ("wen-5", "wen-all", "score-evolution"):
        assert found[name].scores[0].mean() > found[name].scores[1].mean()
    for name in ("jeon", "anisotropy"):
        assert np.isfinite(found[name].scores).all()


def linear_velocity(state: Any, x: Any, t: Any, cond: Any) -> Any:
    """The score of a network whose velocity is ``(1 + 0.1 c) x + c``: its Jacobian is another for each condition."""
    alpha, sigma = FLOW.at(t, x.dtype)
    return to_score("flow", (1 + cond * state) * x + cond, x, alpha, sigma)


def taken_for_x0(state: Any, x: Any, t: Any, cond: Any) -> Any:
    """The same network's output, taken for the clean image."""
    alpha, sigma = FLOW.at(t, x.dtype)
    return to_score("x0", (1 + cond * state) * x + cond, x, alpha, sigma)


@dataclass(frozen=True, eq=False)
class Linear(jm.Model):
    score: Any = linear_velocity
    prediction: Any = "flow"
    state: Any = field(default_factory=lambda: np.full((), 0.1, np.float32))
    schedule: Any = FLOW
    shape: tuple[int, ...] = (8, 8, 1)
    has_pairs: bool = True

    def conditions(self, prompts: Sequence[str]) -> Any:
        return jnp.array([{"strong": 1.0, "weak": 0.3, "": 0.0}[prompt] for prompt in prompts])


FEW = jm.AuditConfig(noises=2, ddim_steps=10, method="none")


def test_hessian_products_at_the_first_step(tmp_path):
    """``H_c s_Δ - H_u s_Δ`` of linear velocities, where H is ``-(1 + alpha (1 + 0.1 c)) / (1 + alpha)``."""
    found = jm.audit(Linear(), ["weak", "strong"], FEW, folder=tmp_path / "run")
    assert not found.warnings
    alpha = 2**-12
    for n, c in enumerate((0.3, 1.0)):
        for j in range(2):
            x = np.asarray(jax.random.normal(jax.random.fold_in(jax.random.key(0), j), (64,)), np.float64)
            difference = alpha / (1 + alpha) * c * (0.1 * x + 1)
            exact = alpha / (1 + alpha) * 0.1 * c * np.linalg.norm(difference)
            assert found["wen-1"].scores[n, j] == pytest.approx(np.linalg.norm(difference), rel=2e-3)
            # what a product differs by is 2⁻¹² · 0.1 c of its size, of which float32 holds two digits
            assert found["jeon"].scores[n, j] == pytest.approx(exact, rel=0.02)


def test_a_flow_network_that_is_taken_for_another_is_noticed(tmp_path):
    model = Linear(taken_for_x0, "x0")
    (warning,) = jm.audit(model, ["weak"], replace(FEW, steps_run=1), folder=tmp_path / "run").warnings
    assert "It looks like 'eps' (or 'flow')." in warning


@pytest.mark.parametrize("method", ["eigh", "lanczos"])
def test_default_timesteps_leave_out_what_float32_cannot_see(method):
    config = jm.AuditConfig(method=method, num_steps=5)

    def spectral(schedule: Any, sampler: Any) -> tuple[int, ...]:
        model = jm.Unconditional(EXACT, MIXTURE, schedule, (4, 4, 1))
        return Plan.of(ModelFacts.of(model, sampler), config, 1).spectral_timesteps

    assert spectral(FLOW, FlowEuler.spaced(50, 3.0))[0] == round(1e6 * 3 * 0.98 / 2.96)
    zero = NoiseSchedule("scaled_linear", 1000, 0.00085, 0.012, zero_terminal_snr=True)
    assert spectral(zero, DDIM(zero, 50, spacing="trailing"))[0] == 979
    usual = NoiseSchedule.stable_diffusion()
    rest = (481, 281, 41) if method == "eigh" else ()
    assert spectral(usual, DDIM(usual, 50, steps_offset=1)) == (981, *rest)
    half = NoiseSchedule("scaled_linear", 500, 0.00085, 0.024)
    assert spectral(half, DDIM(half, 50)) == (490, *((240, 140, 20) if method == "eigh" else ()))
    assert spectral(FLOW, FlowEuler((1.0,))) == (1_000_000,)  # there is no other


PIXELS = GaussianMixtureScore(NoiseSchedule())
# Pictures whose posterior mean leaves the range of pixels.
SHADES = GaussianMixture(jnp.zeros(1), jnp.full((1, 16), 0.9), jnp.zeros((1, 16, 1)), jnp.array([0.5]))


def shades(state: Any, x: Any, t: Any, cond: Any) -> Any:
    return PIXELS(state, x.ravel(), t).reshape(x.shape)


@dataclass(frozen=True, eq=False)
class Pixels(jm.Unconditional):
    clip: float | None = 1.0
    eta: float = 0.0

    def sampler(self, num_steps: int = 50) -> DDIM:
        return DDIM(self.schedule, num_steps, clip=self.clip, eta=self.eta)


def pixels(**options: Any) -> Any:
    return Pixels(shades, SHADES, PIXELS.schedule, (4, 4, 1), **options)


@pytest.mark.parametrize("clip", [1.0, None])
def test_an_audit_samples_with_the_clipping_of_its_model(clip, tmp_path):
    config = jm.AuditConfig(noises=4, ddim_steps=10)
    model = pixels(clip=clip)
    found = jm.audit(model, config=config, folder=tmp_path / "run")
    noise = jnp.stack([jax.random.normal(jax.random.fold_in(jax.random.key(0), j), (4, 4, 1)) for j in range(4)])
    x0, _ = sample(shades, SHADES, noise, sampler=model.sampler(10))
    assert found.images is not None
    # uint8, and float32 of two programs
    np.testing.assert_allclose(found.images[0].astype(int), model.decode(x0).astype(int), atol=1)
    assert (np.abs(np.asarray(x0)).max() > 1) == (clip is None)
    assert np.isfinite(found.scores).all()
    assert "no unconditional" not in found.write_page(tmp_path / "page.html").read_text()
    with pytest.raises(ValueError, match=r"expected a run of the same config, got another one .*sampler"):
        jm.audit(pixels(clip=0.5), config=config, folder=tmp_path / "run")


@dataclass(frozen=True)
class Twice(FlowEuler):
    """Heun's method, by its first half alone."""

    def step(self, score: Any, x: Any, t: Any, scales: Any, key: Any) -> Any:
        return x + scales[2] * (score(x, t) + score(x + score(x, t), t))


@dataclass(frozen=True)
class Elsewhere(FlowEuler):
    def step(self, score: Any, x: Any, t: Any, scales: Any, key: Any) -> Any:
        return x + scales[2] * score(2 * x, t)


@dataclass(frozen=True)
class Half(FlowEuler):
    def step(self, score: Any, x: Any, t: Any, scales: Any, key: Any) -> Any:
        return (x + score(x, t))[:2]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("sampler", "match"),
    [
        (DDIM(NoiseSchedule(), 10, eta=0.5), "and no noise, .* got DDIM: key: DDIM with eta=0.5 draws noise"),
        (Twice((1.0, 0.5)), "sampler: expected one evaluation of the score in each step.*got Twice: a step evaluates"),
        (Elsewhere((1.0, 0.5)), "sampler: expected one evaluation .* got Elsewhere: a step evaluates the score twice"),
        (Half((1.0, 0.5)), r"sampler: expected a step to return an array like x, shape \(4, 4, 1\)"),
        (object(), "sampler: expected `timesteps`, `scales` and `step`"),
    ],
)
def test_samplers_that_an_audit_cannot_use_are_refused(sampler, match):
    with pytest.raises(ValueError, match=match):
        require_steps(sampler, (4, 4, 1))


def test_such_a_sampler_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="sampler: expected one evaluation of the score in each step"):
        jm.audit(pixels(eta=1.0), config=jm.AuditConfig(noises=2, ddim_steps=5), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_model_of_a_flow_schedule(tmp_path):
    model = flow_model()
    assert model.sampler(4) == FlowEuler((1.0, 0.75, 0.5, 0.25))
    assert model.identity(["copied"])["schedule"] == asdict(FLOW)
    x = model.sample(["copied", "varied"], key=jax.random.key(0), num_steps=20)
    np.testing.assert_allclose(x[0], 0.5, atol=1e-4)
    with pytest.raises(ValueError, match=r"until: expected a timestep that 4 steps visit, got 700000; .* is 750000"):
        model.sample(["copied"], key=jax.random.key(0), num_steps=4, until=700_000)
    with pytest.raises(ValueError, match=r"timesteps: expected .*250000, millionths of sigma\), got 281; .* 250000"):
        jm.audit(model, config=jm.AuditConfig(ddim_steps=4, timesteps=(281,)), folder=tmp_path / "run")
