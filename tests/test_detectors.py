"""Detectors against closed forms, matrices, torch, and loops in float64."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem import ScorePair, score_jacobian
from jaxmem.detectors import published as detectors
from jaxmem.diffusion import NoiseSchedule
from jaxmem.memorization.sharpness import negative_trace_of_cube
from jaxmem.oracles import GaussianMixtureScore, gaussian
from jaxmem.score import NetworkScore, bind

SCHEDULE = NoiseSchedule()
T = 300
ALPHA, SIGMA = float(SCHEDULE.alpha[T]), float(SCHEDULE.sigma[T])


@dataclass(frozen=True)
class ConditionalGaussian:
    """The condition is the Gaussian."""

    oracle: GaussianMixtureScore

    def __call__(self, state: Any, x: Any, t: Any, cond: Any) -> Any:
        return self.oracle(cond, x, t)


SCORE = ConditionalGaussian(GaussianMixtureScore(SCHEDULE))


def pair_at(x: Any, cond: Any, uncond: Any) -> ScorePair:
    return ScorePair(SCORE(None, x, T, cond), SCORE(None, x, T, uncond))


@pytest.mark.parametrize("rank", [2, 12])
@pytest.mark.parametrize("t", [1, 281, 981])
def test_hessian_difference_equals_that_of_the_matrices(getkey, t: int, rank: int):
    # Two Gaussians that share neither mean nor eigenvectors, at the last, a middle and the first step of Stable
    # Diffusion (sigma 0.04, 0.61, 0.997); of rank 2 they are flat in most directions, where the Hessians agree.
    schedule = NoiseSchedule.stable_diffusion()
    score = ConditionalGaussian(GaussianMixtureScore(schedule))
    d, alpha, sigma = 12, float(schedule.alpha[t]), float(schedule.sigma[t])
    means, factors = jax.random.normal(getkey(), (2, d)), jax.random.normal(getkey(), (2, d, rank))
    x = jax.random.normal(getkey(), (d,))
    cond, uncond = (gaussian(mean, 0.3 * factor) for mean, factor in zip(means, factors, strict=True))
    hessians, scores = [], []
    for mean, factor in zip(np.float64(means), np.float64(factors), strict=True):
        hessians.append(-np.linalg.inv(alpha**2 * 0.09 * factor @ factor.T + sigma**2 * np.eye(d)))
        scores.append(hessians[-1] @ (np.float64(x) - alpha * mean))
    delta = scores[0] - scores[1]
    expected = np.linalg.norm((hessians[0] - hessians[1]) @ delta)
    # float32 solves: an error of 1e-7 times the covariances' condition (1e3 at t = 1), and at least of what cancels
    condition = max(np.linalg.cond(one) for one in hessians)
    cancelled = max(np.linalg.norm(one, 2) for one in hessians) * np.linalg.norm(delta)
    tolerance = dict(rtol=1e-7 * condition, atol=1e-6 * cancelled)
    assert tolerance["atol"] + tolerance["rtol"] * expected < 1e-3 * expected  # it can fail
    found = detectors.hessian_difference(score, None, x, t, cond, uncond)
    np.testing.assert_allclose(found, expected, **tolerance)
    # from Jacobians that are there already, and inside a compiled and mapped function
    pair = (score_jacobian(score, None, x, t, one) for one in (cond, uncond))
    np.testing.assert_allclose(detectors.linearised_difference(*pair), expected, **tolerance)
    mapped = jax.jit(jax.vmap(lambda x, cond: detectors.hessian_difference(score, None, x, t, cond, uncond), (0, None)))
    np.testing.assert_allclose(mapped(jnp.stack([x, 2 * x]), cond)[0], expected, **tolerance)
    assert detectors.hessian_difference(score, None, x, t, cond, cond) == 0


def test_the_identities_of_gaussians_by_sampling(getkey):
    # Common mean, commuting covariances: E‖s_Δ‖² = Σ(λ-λ_c)²/λ_c, E‖H_Δ s_Δ‖² = Σ(λ-λ_c)⁴/λ_c over p_t(x|c).
    stds = np.array([[0.05, 0.1, 0.3, 0.6, 1.0], [1.0, 0.8, 1.2, 0.6, 0.2]])
    cond, uncond = (gaussian(jnp.zeros(5), jnp.diag(jnp.asarray(std, jnp.float32))) for std in stds)
    sharp_c, sharp = 1 / (ALPHA**2 * stds**2 + SIGMA**2)
    x = jax.random.normal(getkey(), (20_000, 5)) / jnp.asarray(sharp_c**0.5, jnp.float32)[None]

    @jax.jit
    @jax.vmap
    def both(x: Any) -> Any:
        pair = pair_at(x, cond, uncond)
        hessian = detectors.hessian_difference(SCORE, None, x, T, cond, uncond)
        score = score_jacobian(SCORE, None, x, T, cond)
        product = score.mv(score.value)
        return detectors.eps_difference(pair, SIGMA), hessian, jnp.square(score.value).sum(), jnp.square(product).sum()

    eps, hessian, score, product = (np.float64(one) for one in both(x))
    for samples, expected in (
        ((eps / SIGMA) ** 2, ((sharp - sharp_c) ** 2 / sharp_c).sum()),
        (hessian**2, ((sharp - sharp_c) ** 4 / sharp_c).sum()),
        (score, sharp_c.sum()),
        (product, negative_trace_of_cube(-sharp_c)),
    ):
        # four standard errors, 1 in 16,000; they are below 2 % of the value, so the test can see an error of 10 %
        error = samples.std() / len(samples) ** 0.5
        assert error < 0.02 * expected
        assert abs(samples.mean() - expected) < 4 * error


@dataclass(frozen=True)
class SmallNetwork:
    """``s = -(W₂ tanh(W₁ x + b + c)) / sigma``."""

    def __call__(self, state: Any, x: Any, t: Any, cond: Any) -> Any:
        first, bias, second = state
        hidden = jnp.tanh(jnp.matmul(first, x, precision="highest") + bias + cond)
        return -jnp.matmul(second, hidden, precision="highest") / SCHEDULE.at(t, x.dtype)[1]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, on first use
@pytest.mark.parametrize("t", [0, T, 999])
def test_hessian_difference_equals_the_jvp_of_torch_over_the_stacked_pair(torch, getkey, t: int):
    shapes = ((32, 10), (32,), (10, 32), (10,), (32,))
    *state, x, cond = (jax.random.normal(getkey(), shape) for shape in shapes)
    found = detectors.hessian_difference(SmallNetwork(), tuple(state), x, t, cond, jnp.zeros(32))
    first, bias, second, point, condition = (torch.from_numpy(np.float64(one)) for one in (*state, x, cond))
    both = torch.stack([torch.zeros(32, dtype=torch.float64), condition])

    def scores(pair: Any) -> Any:
        return -torch.tanh(pair @ first.T + bias + both) @ second.T / float(SCHEDULE.sigma[t])

    pair = torch.stack([point, point])
    uncond, conditional = scores(pair)
    tangent = (conditional - uncond).expand(2, -1)
    _, (of_uncond, of_cond) = torch.func.jvp(scores, (pair,), (tangent,))
    # float32 against float64: four sums of 32 terms or fewer, at most 4 · 32 · 6e-8 of terms that partly cancel
    np.testing.assert_allclose(found, torch.linalg.norm(of_cond - of_uncond).item(), rtol=1e-4)


class Linear(nnx.Module):
    """``ε = A x + c`` as it is or, of the same model, as the v that stands for it."""

    def __init__(self, matrix: Any, alpha: float, sigma: float, as_v: bool) -> None:
        self.matrix, self.scales, self.as_v = nnx.Param(matrix), (alpha, sigma), as_v

    def __call__(self, x: Any, t: Any, cond: Any) -> Any:
        alpha, sigma = self.scales
        eps = jnp.matmul(self.matrix[...], x, precision="highest") * (1 + cond.sum()) + cond
        return (eps - sigma * x) / alpha if self.as_v else eps


def test_models_of_eps_and_of_v_have_one_hessian_difference(getkey):
    # At small sigma, where a wrong sign of the v term (as in the released code) multiplies it by 1/sigma².
    matrix, x, cond = jax.random.normal(getkey(), (6, 6)), *jax.random.normal(getkey(), (2, 6))
    found = []
    for as_v in (False, True):
        alpha, sigma = float(SCHEDULE.alpha[20]), float(SCHEDULE.sigma[20])
        score, state = bind(Linear(matrix, alpha, sigma, as_v), SCHEDULE, "v" if as_v else "eps")
        assert isinstance(score, NetworkScore)
        found.append(float(detectors.hessian_difference(score, state, x, 20, cond, jnp.zeros(6))))
    A, c = np.float64(matrix), np.float64(cond)
    delta = -(A @ np.float64(x) * c.sum() + c) / sigma
    expected = np.linalg.norm(-A * c.sum() / sigma @ delta)
    # float32; v = (ε - σx)/α and back loses a digit
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_the_norm_of_huge_and_tiny_differences(scale: float):
    rng = np.random.default_rng(3)
    cond, uncond = (scale * rng.normal(size=(2, 4, 4, 3))).astype(np.float32)
    found = detectors.eps_difference(ScorePair(jnp.asarray(cond), jnp.asarray(uncond)), 0.5)
    # the difference is rounded once in float32; 48 squares are summed: at most 48/2 · 6e-8 in any order
    np.testing.assert_allclose(found, 0.5 * np.linalg.norm(np.float64(cond) - np.float64(uncond)), rtol=2e-6)


def test_the_norm_of_nothing_and_of_what_is_not_finite():
    zero = jnp.zeros((3, 2))
    assert detectors.eps_difference(ScorePair(zero, zero), 1.0) == 0
    for bad in (jnp.nan, jnp.inf):
        assert not np.isfinite(detectors.eps_difference(ScorePair(zero.at[0, 0].set(bad), zero), 1.0))


@pytest.mark.usefixtures("float16")
def test_half_precision_scores_are_squared_in_float32():
    # 300² is beyond float16, whose largest number is 65,504
    pair = ScorePair(jnp.full((8, 8), 300, jnp.float16), jnp.zeros((8, 8), jnp.float16))
    found = detectors.eps_difference(pair, 1.0)
    assert found.dtype == jnp.float32
    assert found == 2400
    evolution = detectors.score_evolution(jnp.stack([pair.uncond, pair.cond, pair.cond]))
    assert evolution == 64 * 300**2


def test_wen_is_a_mean_over_steps():
    values = np.arange(20.0).reshape(2, 10)
    values[1, 4] = np.nan
    np.testing.assert_array_equal(detectors.wen(values[..., :1]), values[..., 0])
    np.testing.assert_array_equal(detectors.wen(values[..., :5]), [2, np.nan])


@pytest.mark.parametrize("channel_axis", [-1, 0])
def test_anisotropy_follows_its_formula(channel_axis: int):
    rng = np.random.default_rng(4)
    scores = rng.normal(size=(4, 5, 6, 4)).astype(np.float32)  # first cond, uncond; late cond, uncond
    scores[2, 0, 0] = scores[3, 0, 0]  # one pixel without a difference has no direction: it counts as 0
    cosines = []
    for i in range(5):
        for j in range(6):
            eps_u = -0.2 * np.float64(scores[3, i, j])
            delta = -0.2 * (np.float64(scores[2, i, j]) - scores[3, i, j])
            product = np.linalg.norm(eps_u) * np.linalg.norm(delta)
            cosines.append(eps_u @ delta / product if product else 0.0)
    expected = 1.5 * 0.9 * np.linalg.norm(np.float64(scores[0]) - scores[1]) + 0.7 * np.mean(cosines)
    moved = jnp.moveaxis(jnp.asarray(scores), -1, 1) if channel_axis == 0 else jnp.asarray(scores)
    first, late = ScorePair(moved[0], moved[1]), ScorePair(moved[2], moved[3])
    found = detectors.anisotropy(first, late, 0.9, weights=(1.5, 0.7), channel_axis=channel_axis)
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32 sums of 120 terms: at most 120 · 6e-8 in any order
    # aligned everywhere and opposed everywhere: the norm, plus and minus the second weight, 2
    still, zero = jnp.ones((5, 6, 4)), jnp.zeros((5, 6, 4))
    aligned = detectors.anisotropy(ScorePair(zero, zero), ScorePair(3 * still, still), 0.9)
    opposed = detectors.anisotropy(ScorePair(zero, zero), ScorePair(zero, still), 0.9)
    np.testing.assert_allclose([aligned, opposed], [2, -2], rtol=2e-6)  # 30 equal terms


def test_score_evolution_follows_its_formula():
    rng = np.random.default_rng(5)
    s_delta = rng.normal(size=(5, 4, 4, 2)).astype(np.float32)
    expected = sum(np.sum((np.float64(s_delta[k + 1]) - s_delta[k]) ** 2) for k in (0, 1))
    np.testing.assert_allclose(detectors.score_evolution(jnp.asarray(s_delta)), expected, rtol=5e-6)  # 64 terms
    np.testing.assert_allclose(detectors.score_evolution(jnp.asarray(s_delta[:3])), expected, rtol=5e-6)
    with pytest.raises(ValueError, match="s_delta: expected the first 3 steps of the sampler or more, got 2"):
        detectors.score_evolution(jnp.asarray(s_delta[:2]))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_tiled_l2_equals_loops_over_tiles_and_pairs(dtype: Any):
    rng = np.random.default_rng(6)
    images = rng.integers(0, 256, (4, 8, 16, 3)).astype(dtype)
    scale = 255 if dtype == np.uint8 else 1
    expected = np.zeros((4, 4))
    for a in range(4):
        for b in range(4):
            for top in range(0, 8, 2):
                for left in range(0, 16, 4):
                    window = np.s_[top : top + 2, left : left + 4]
                    difference = (np.float64(images[a][window]) - np.float64(images[b][window])) / scale
                    expected[a, b] = max(expected[a, b], np.sqrt(np.mean(difference**2)))
    found = detectors.tiled_l2(images)
    np.testing.assert_allclose(found, expected.sum(1) / 3, rtol=1e-12)  # float64
    pairs = expected[np.triu_indices(4, 1)]
    np.testing.assert_allclose(found.mean(), pairs.mean(), rtol=1e-12)


def test_tiled_l2_is_small_for_copies_only():
    rng = np.random.default_rng(7)
    image = rng.integers(0, 256, (16, 16, 3), np.uint8)
    assert detectors.tiled_l2(np.stack([image] * 3)).tolist() == [0, 0, 0]
    inset = image.copy()
    inset[4:8, 4:8] = 255 - inset[4:8, 4:8]  # one tile of sixteen: a mean over the image would hide it
    whole = 255 - image
    for other in (inset, whole):
        found = detectors.tiled_l2(np.stack([image, other]))
        assert found[0] == found[1] > 0.5


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 8, 8, 3)), r"images: expected two or more, .*got shape \(1, 8, 8, 3\)"),
        (np.zeros((2, 8, 8)), r"images: expected two or more, .*got shape \(2, 8, 8\)"),
        (np.zeros((2, 8, 10, 3)), r"multiples of 4 \(tiles per side\), got 8 × 10"),
    ],
)
def test_tiled_l2_refuses_other_images(images: Any, message: str):
    with pytest.raises(ValueError, match=message):
        detectors.tiled_l2(images)
