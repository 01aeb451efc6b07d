"""How many prompts a reference list lets stand out by chance, whatever the measures have to do with each other."""

import itertools
from typing import Any

import numpy as np
import pytest

from jaxmem.memorization.chance import LEVELS, Listing, conformal_p, list_prompts, num_beyond


def brute(prompt: np.ndarray, reference: np.ndarray, signs: list[int]) -> float:
    """By counting, one at a time, products of places in place of sums of logarithms."""
    pool = [*reference.tolist(), prompt.tolist()]
    products = []
    for one in pool:
        product = 1
        for d, sign in enumerate(signs):
            product *= sum(sign * other[d] >= sign * one[d] for other in pool)
        products.append(product)
    return sum(product <= products[-1] for product in products) / len(pool)


@pytest.mark.parametrize("ties", [False, True])
def test_p_values_are_those_of_counting(ties: bool):
    rng = np.random.default_rng(1)
    scores, reference = rng.normal(size=(25, 3)), rng.normal(size=(17, 3))
    if ties:
        scores, reference = scores.round(), reference.round()
    found = conformal_p(scores, reference, memorized_is=["high", "low", "high"])
    np.testing.assert_allclose(found, [brute(one, reference, [1, -1, 1]) for one in scores], rtol=1e-12)


def test_p_values_of_one_pool_are_uniform():
    """Each of eleven points held against the ten others: without ties p is each of 1/11 to 11/11 once."""
    pool = np.random.default_rng(2).normal(size=(11, 1))
    found = [conformal_p(pool[[i]], np.delete(pool, i, 0), memorized_is=["low"])[0] for i in range(11)]
    np.testing.assert_allclose(sorted(found), np.arange(1, 12) / 11)


@pytest.mark.parametrize("correlation", [0.0, 0.7, 0.99])
@pytest.mark.parametrize("num_reference", [19, 30, 60, 99, 150])
def test_false_listings_are_at_most_the_rate(correlation: float, num_reference: int):
    """Six measures, one of them a count with ties; 400 lists of 20 prompts, each with a reference of its own."""
    rng = np.random.default_rng(3)
    shares = []
    for _ in range(400):
        common = rng.normal(size=(20 + num_reference, 1))
        points = np.sqrt(correlation) * common + np.sqrt(1 - correlation) * rng.normal(size=(20 + num_reference, 6))
        points[:, 0] = points[:, 0].round()
        found = list_prompts(points[:20], points[20:], memorized_is=["low", *["high"] * 5])
        assert found.level is not None
        shares.append(found.listed.mean())
    # Prompts of one list share its reference: the lists are what is independent.
    error = np.std(shares) / np.sqrt(len(shares))
    assert np.mean(shares) <= found.rate + 3 * error
    assert np.mean(shares) >= 0.5 * found.rate - 3 * error  # and the rule is not empty
    assert found.rate <= found.level
    assert found.by_chance == pytest.approx(20 * found.rate)


def test_memorized_prompts_are_listed_all_the_same():
    rng = np.random.default_rng(4)
    reference, scores = rng.normal(size=(30, 5)), rng.normal(size=(8, 5))
    scores[:3] += 8
    found = list_prompts(scores, reference, memorized_is=["high"] * 5)
    assert found.listed[:3].all()
    np.testing.assert_allclose(found.p[:3], 1 / 31)
    one = scores.copy()
    one[3, 2] = 50.0  # extreme by a single measure
    assert conformal_p(one, reference, memorized_is=["high"] * 5)[3] < found.p[3]


@pytest.mark.parametrize(
    ("number", "level", "rate"),
    [(0, None, 0), (18, None, 0), (19, 0.05, 1 / 20), (30, 0.05, 1 / 31), (98, 0.05, 4 / 99), (99, 0.01, 1 / 100)],
)
def test_the_level_is_the_first_that_the_reference_can_reach(number: int, level: float | None, rate: float):
    reference = np.arange(float(number))[:, None]
    found = list_prompts(np.array([[1e3], [-1.0]]), reference, memorized_is=["high"])
    assert (found.level, found.num_reference) == (level, number)
    assert found.rate == pytest.approx(rate)
    assert found.listed.tolist() == [level is not None, False]


def test_counts_at_a_level_have_no_rounding():
    for level, number in itertools.product(LEVELS, range(1, 500)):
        assert num_beyond(level, number) == max(
            k for k in range(number + 2) if k * 100 <= round(100 * level) * (number + 1)
        )


def test_what_is_missing_is_not_judged():
    reference = np.arange(21.0).reshape(21, 1) * np.ones(2)
    reference[:2, 1] = np.nan
    found: Listing = list_prompts(np.array([[99.0, np.nan], [99.0, 99.0]]), reference, memorized_is=["high", "high"])
    assert found.num_reference == 19
    assert np.isnan(found.p[0])
    assert found.listed.tolist() == [False, True]
    assert found.by_chance == pytest.approx(1 / 20)  # of the one that is judged
    for scores, listed in ((np.zeros((2, 0)), np.zeros((5, 0))), (np.zeros((2, 1)), np.zeros((0, 1)))):
        nothing = list_prompts(scores, listed, memorized_is=["high"] * scores.shape[1])
        assert np.isnan(nothing.p).all()
        assert nothing.level is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conformal_p(np.zeros(3), np.zeros((3, 1)), memorized_is=["high"]), r"expected shapes \(N, 1\)"),
        (lambda: conformal_p(np.zeros((3, 1)), np.zeros((3, 2)), memorized_is=["high"]), r"got \(3, 1\) and \(3, 2\)"),
        (lambda: conformal_p(np.zeros((3, 1)), np.zeros((3, 1)), memorized_is=["up"]), "memorized_is: expected"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_misuse_is_refused(call: Any, message: str):
    with pytest.raises(ValueError, match=message):
        call()
