import copy
import pickle
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.diffusion import NoiseSchedule
from jaxmem.jacobian import score_jacobian
from jaxmem.score import NetworkScore, ScorePair, bind


class Affine(nnx.Module):
    """The smallest network of the contract: W x + t-dependent shift."""

    def __init__(self, size, *, rngs):
        self.linear = nnx.Linear(size, size, rngs=rngs)

    def __call__(self, x, t, cond):
        return self.linear(x) + jnp.sin(t.astype(x.dtype))


SCHEDULE, VARIANCE = NoiseSchedule(), 0.3


class WithSettings(Affine):
    def __init__(self, settings, *, rngs):
        super().__init__(2, rngs=rngs)
        self.settings = settings


@dataclass
class Settings:
    factor: float = 2.0


@pytest.mark.parametrize("settings", [Settings(), nnx.static({"factor": 2.0}), {1, 2}, slice(1, 2)])
def test_networks_with_unhashable_attributes_are_equal_by_value(settings):
    modules = [WithSettings(copy.copy(settings), rngs=nnx.Rngs(seed)) for seed in (0, 1)]
    first, second = (bind(module, SCHEDULE, "eps")[0] for module in modules)
    assert first == second
    assert hash(first) == hash(second)
    assert first != bind(WithSettings("others", rngs=nnx.Rngs(0)), SCHEDULE, "eps")[0]


class Factor(WithSettings):
    def __call__(self, x, t, cond):
        return self.settings.factor * x


def test_what_changes_in_the_module_does_not_reach_its_score():
    module = Factor(Settings(), rngs=nnx.Rngs(0))
    score, state = bind(module, SCHEDULE, "score")
    x = jnp.ones(2)
    np.testing.assert_array_equal(score_jacobian(score, state, x).to_dense(), 2 * np.eye(2))
    module.settings.factor = 3.0
    np.testing.assert_array_equal(score_jacobian(score, state, x).to_dense(), 2 * np.eye(2))
    later, state = bind(module, SCHEDULE, "score")
    np.testing.assert_array_equal(score_jacobian(later, state, x).to_dense(), 3 * np.eye(2))


class ListPadding(nnx.Module):
    def __init__(self, *, rngs):
        self.conv = nnx.Conv(1, 1, (3, 3), padding=[(1, 1), (1, 1)], rngs=rngs)

    def __call__(self, x, t, cond):
        return self.conv(x)


def test_a_convolution_with_its_padding_as_a_list():
    score, state = bind(ListPadding(rngs=nnx.Rngs(0)), SCHEDULE, "score")
    matrix = score_jacobian(score, state, jnp.ones((3, 3, 1))).to_dense()
    kernel = np.asarray(state["conv"]["kernel"][...])[..., 0, 0]
    assert matrix[4] == pytest.approx(kernel.reshape(-1), rel=1e-6)  # the middle pixel sees the kernel as it lies


def test_a_score_from_another_process_has_the_hash_of_this_one():
    score, _ = bind(Affine(2, rngs=nnx.Rngs(0)), SCHEDULE, "eps")
    object.__setattr__(score, "_hash", hash(score) + 1)  # as one made where strings hash otherwise
    here = bind(Affine(2, rngs=nnx.Rngs(0)), SCHEDULE, "eps")[0]
    received = pickle.loads(pickle.dumps(score))
    assert received == here
    assert hash(received) == hash(here)


def test_a_graph_definition_of_no_module_still_prints():
    score = NetworkScore(nnx.split(lambda x, t, cond: x)[0], SCHEDULE, "score")
    assert repr(score) == f"NetworkScore({SCHEDULE}, 'score')"


def test_scores_of_networks_whose_attributes_cannot_be_compared_are_told_apart():
    modules = [WithSettings(settings, rngs=nnx.Rngs(0)) for settings in ((1, 2), np.float32(2))]
    scores = {bind(module, SCHEDULE, "eps")[0] for module in modules}
    assert len(scores) == 2  # comparing them asks NumPy for the truth of an array


@dataclass
class Exact:
    """What a perfect network of each kind puts out for the data distribution N(0, VARIANCE I)."""

    prediction: str

    def __call__(self, x, t):
        alpha, sigma = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
        total = alpha**2 * VARIANCE + sigma**2
        x0, eps = alpha * VARIANCE / total * x, sigma / total * x  # E[x0 | x], E[eps | x]
        return {"eps": eps, "v": alpha * eps - sigma * x0, "x0": x0, "flow": eps - x0, "score": -x / total}[
            self.prediction
        ]


class Constant(nnx.Module):
    """A network whose output is a parameter."""

    def __init__(self, value):
        self.value = nnx.Param(jnp.asarray(value, jnp.float32))

    def __call__(self, x, t, cond):
        return self.value[...]


@pytest.mark.parametrize("t", [0, 40, 999])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "flow", "score"])
def test_a_perfect_network_of_each_kind_gives_the_closed_form(prediction, t):
    x = np.array([0.1, -0.4, 2.0])
    score, state = bind(Constant(Exact(prediction)(x, t)), SCHEDULE, prediction)
    exact = -x / (SCHEDULE.alpha[t] ** 2 * VARIANCE + SCHEDULE.sigma[t] ** 2)
    # float32; at t = 0 an x0 network's score is a difference of nearly equal numbers over sigma² = 1e-4.
    tolerance = 3e-3 if (prediction, t) == ("x0", 0) else 1e-4
    np.testing.assert_allclose(score(state, jnp.asarray(x, jnp.float32), jnp.int32(t), None), exact, rtol=tolerance)


@pytest.mark.usefixtures("unchecked")
def test_unknown_predictions_are_refused():
    with pytest.raises(ValueError, match=r"prediction: expected one of .*got 'epsilon'"):
        bind(Affine(3, rngs=nnx.Rngs(0)), SCHEDULE, "epsilon")


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
        "flow": (np.asarray(x) + alpha * out) / (alpha + sigma),
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


class Times(nnx.Module):
    """Networks that differ in a number that is no parameter."""

    def __init__(self, settings):
        self.settings = settings
        self.offset = nnx.Param(jnp.zeros(()))

    def __call__(self, x, t, cond):
        return self.settings.factor * x + self.offset[...]


def test_scores_of_one_hash_are_not_taken_for_each_other():
    # Of a network that cannot be hashed, the hash knows how many parameters there are: the rest is left to equality.
    bound = [bind(Times(Settings(factor)), SCHEDULE, "score") for factor in (2.0, 3.0, 2.0)]
    scores = [score for score, _ in bound]
    assert len({hash(score) for score in scores}) == 1
    assert scores[0] != scores[1]
    assert scores[0] == scores[2]
    x = jnp.ones(3)
    for (score, state), factor in zip(bound, (2.0, 3.0, 2.0), strict=True):
        np.testing.assert_array_equal(score_jacobian(score, state, x).to_dense(), factor * np.eye(3))


def test_a_bound_network_is_printed_in_one_line():
    score, _ = bind(Affine(3, rngs=nnx.Rngs(0)), SCHEDULE, "eps")
    assert repr(score) == f"NetworkScore(Affine, {SCHEDULE}, 'eps')"


def test_pair_differences_and_guidance():
    pair = ScorePair(cond=jnp.array([2.0, 0.0]), uncond=jnp.array([1.0, 1.0]))
    np.testing.assert_array_equal(pair.difference, [1.0, -1.0])
    np.testing.assert_array_equal(pair.guided(1.0), pair.cond)
    np.testing.assert_array_equal(pair.guided(0.0), pair.uncond)
    np.testing.assert_array_equal(pair.guided(7.5), [8.5, -6.5])
    assert len(jax.tree.leaves(pair)) == 2
