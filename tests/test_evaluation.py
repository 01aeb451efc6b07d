"""AUC, rates, intervals and thresholds against counting pairs, trying all thresholds, and repeating prompts."""

from typing import Any

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics

from jaxmem.memorization import bootstrap, splits
from jaxmem.memorization.bootstrap import mean_interval, resampled_rates
from jaxmem.memorization.evaluation import evaluate, evaluate_categories, roc
from jaxmem.memorization.splits import threshold_split
from jaxmem.memorization.standing import percentile, rank
from jaxmem.runs.durable import as_json

DIRECTIONS = ("high", "low")


def accepts(scores: np.ndarray, threshold: float, memorized_is: str) -> np.ndarray:
    return scores >= threshold if memorized_is == "high" else scores <= threshold


def brute_auc(positive: np.ndarray, negative: np.ndarray, memorized_is: str) -> float:
    """Mann-Whitney: the share of pairs in the right order, ties half."""
    total = 0.0
    for p in positive:
        for n in negative:
            total += 0.5 if p == n else float(p > n) if memorized_is == "high" else float(p < n)
    return total / (len(positive) * len(negative))


def brute_tpr(positive: np.ndarray, negative: np.ndarray, memorized_is: str, limit: float) -> float:
    """Every score as threshold, and none accepted."""
    best = 0.0
    for threshold in np.concatenate([positive, negative]):
        if accepts(negative, threshold, memorized_is).sum() / len(negative) <= limit:
            best = max(best, accepts(positive, threshold, memorized_is).sum() / len(positive))
    return best


def problem(kind: str, seed: int = 0, prompts: tuple[int, int] = (30, 45), noises: int = 4) -> tuple[Any, Any]:
    """Scores that tie a lot, that never do, or of which some are not done."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(sum(prompts)) < prompts[0])
    scores = rng.normal(size=(len(labels), 1)) + rng.normal(size=(len(labels), noises)) + 1.5 * labels[:, None]
    if kind == "counts":
        scores = np.maximum(np.round(scores), 0)
    if kind == "partial":
        scores[rng.uniform(size=scores.shape) < 0.2] = np.nan
        scores[3] = np.nan
    return scores, labels


@pytest.mark.parametrize("memorized_is", DIRECTIONS)
@pytest.mark.parametrize("kind", ["continuous", "counts", "partial"])
def test_auc_and_rates_equal_brute_force(kind: str, memorized_is: str):
    scores, labels = problem(kind)
    if memorized_is == "low":
        scores = -scores
    found = evaluate(scores, labels, memorized_is=memorized_is, num_resamples=50)
    positive, negative = (scores[labels == flag].ravel() for flag in (True, False))
    positive, negative = positive[~np.isnan(positive)], negative[~np.isnan(negative)]
    # the one is a sum of trapezoids, the other a count, both in float64
    np.testing.assert_allclose(found.auc, brute_auc(positive, negative, memorized_is), rtol=1e-12)
    assert found.tpr_at_1 == brute_tpr(positive, negative, memorized_is, 0.01)
    assert found.tpr_at_3 == brute_tpr(positive, negative, memorized_is, 0.03)
    assert (found.num_positive, found.num_negative) == (len(positive), len(negative))
    done = ~np.isnan(scores).all(1)
    assert (found.num_positive_prompts, found.num_negative_prompts) == (labels[done].sum(), (~labels[done]).sum())
    assert found.auc_interval[0] < found.auc < found.auc_interval[1]
    for rate, (low, high) in zip((found.tpr_at_1, found.tpr_at_3), found.tpr_intervals, strict=True):
        assert low <= rate <= high


def test_the_direction_is_turned_exactly_and_never_by_the_data():
    scores, labels = problem("counts")
    up = evaluate(scores, labels, memorized_is="high", num_resamples=100)
    assert evaluate(-scores, labels, memorized_is="low", num_resamples=100) == up
    wrong = evaluate(scores, labels, memorized_is="low", num_resamples=100)
    assert wrong.auc < 0.5
    np.testing.assert_allclose(wrong.auc, 1 - up.auc, rtol=1e-12)


def test_a_rate_is_at_most_its_limit_where_the_nearest_threshold_would_exceed_it():
    # 100 negatives, of which two tie at the top: an FPR of 2 % is nearer to 1 % than 0 is not, but it is too much.
    negative = np.concatenate([np.full(2, 5.0), np.zeros(98)])
    positive = np.array([6.0, 5.0, 5.0, 1.0])
    scores, labels = np.concatenate([positive, negative]), np.arange(104) < 4
    found = evaluate(scores, labels, memorized_is="high", num_resamples=1)
    assert (found.tpr_at_1, found.tpr_at_3) == (0.25, 1.0)
    # one false positive of 100 is 1 % exactly, and allowed
    scores[4] = 4.5
    assert evaluate(scores, labels, memorized_is="high", num_resamples=1).tpr_at_1 == 0.75
    # intermediate points of the curve count: the first negative comes after two runs of positives
    steps = np.concatenate([[9.0, 8.0, 7.0], [6.0], np.zeros(99)])
    assert evaluate(steps, np.arange(103) < 3, memorized_is="high", num_resamples=1).tpr_at_1 == 1


@pytest.mark.parametrize(("negatives", "estimable"), [(33, (False, False)), (34, (False, True)), (100, (True, True))])
def test_rates_that_the_negatives_cannot_resolve_are_not_estimable(negatives: int, estimable: tuple[bool, bool]):
    labels = np.arange(negatives + 10) < 10
    found = evaluate(labels.astype(float), labels, memorized_is="high", num_resamples=20)
    rates = (found.tpr_at_1, found.tpr_at_3)
    assert tuple(rate is not None for rate in rates) == estimable
    assert tuple(one is not None for one in found.tpr_intervals) == estimable
    assert found.auc == 1
    assert found.auc_interval == (1, 1)
    # 25 prompts of four noises are 100 points, and 25 means
    scores, labels = problem("continuous", prompts=(5, 25))
    assert evaluate(scores, labels, memorized_is="high", num_resamples=1).tpr_at_1 is not None
    assert evaluate(scores, labels, memorized_is="high", num_resamples=1, per="prompt").tpr_at_3 is None


def test_one_kind_alone_gives_nothing_and_one_prompt_of_a_kind_no_interval():
    scores = np.arange(8.0).reshape(4, 2)
    nothing = evaluate(scores, np.ones(4, bool), memorized_is="high")
    assert nothing[:5] == (None, None, None, None, (None, None))
    assert (nothing.num_positive, nothing.num_negative_prompts) == (8, 0)
    waiting = np.where(np.arange(4)[:, None] < 2, np.nan, scores)
    assert evaluate(waiting, np.arange(4) < 2, memorized_is="high").auc is None
    single = evaluate(scores, np.arange(4) == 3, memorized_is="high")
    assert (single.auc, single.auc_interval) == (1.0, None)
    assert as_json(single._asdict(), "evaluation")["tpr_intervals"] == [None, None]


def test_per_prompt_is_the_mean_over_the_noises():
    scores, labels = problem("partial")
    found = evaluate(scores, labels, memorized_is="high", per="prompt", num_resamples=50)
    whole = ~np.isnan(scores).any(1)
    assert found == evaluate(scores[whole].mean(1), labels[whole], memorized_is="high", num_resamples=50)
    assert found.num_positive == found.num_positive_prompts == labels[whole].sum()


@pytest.mark.parametrize("kind", ["counts", "partial"])
def test_resampled_rates_equal_those_of_repeated_prompts(kind: str, monkeypatch):
    scores, labels = problem(kind, prompts=(6, 9))
    there = ~np.isnan(scores).all(1)
    scores, labels = scores[there], labels[there]
    monkeypatch.setattr(bootstrap, "_CHUNK", 130)  # several blocks, the last one shorter
    found = resampled_rates(scores, labels, (0.1, 0.3), seed=5, num_resamples=23)
    rng, times = np.random.default_rng(5), np.zeros((23, len(labels)), int)
    for kind_of in (labels, ~labels):
        number = int(kind_of.sum())
        times[:, kind_of] = rng.multinomial(number, np.full(number, 1 / number), 23)
    for row, one in zip(found, times, strict=True):
        chosen = np.repeat(np.arange(len(labels)), one)
        values, flags = scores[chosen].ravel(), np.repeat(labels[chosen], scores.shape[1])
        values, flags = values[~np.isnan(values)], flags[~np.isnan(values)]
        positive, negative = values[flags], values[~flags]
        rates = [brute_tpr(positive, negative, "high", limit) for limit in (0.1, 0.3)]
        # sums of trapezoids in another order, float64
        np.testing.assert_allclose(row, [metrics.roc_auc_score(flags, values), *rates], rtol=1e-12)


def test_copies_of_a_noise_add_nothing_to_what_is_known():
    # The interval is over prompts: four equal noises are one. Resampling points would halve it.
    scores, labels = problem("continuous", noises=1)
    once = evaluate(scores, labels, memorized_is="high", num_resamples=200)
    often = evaluate(np.repeat(scores, 4, 1), labels, memorized_is="high", num_resamples=200)
    np.testing.assert_allclose(often.auc_interval, once.auc_interval, rtol=1e-12)
    mean, ends = mean_interval(scores)
    again, same = mean_interval(np.repeat(scores, 4, 1))
    np.testing.assert_allclose([again, *same], [mean, *ends], rtol=1e-12)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    # Prompt effects and noise effects of variance 1 each: AUC = Φ(1.5 / √(2 · 2)).
    truth = scipy.stats.norm.cdf(1.5 / 2)
    covered = 0
    for seed in range(200):
        scores, labels = problem("continuous", seed=seed)
        low, high = evaluate(scores, labels, memorized_is="high", num_resamples=200, seed=seed).auc_interval
        covered += low <= truth <= high
    # 92.5 % of 1,000 such trials did, less two standard errors of 200 (3.7 %); it is 77 % of intervals that take the
    # noises for independent
    assert covered >= 0.888 * 200


def test_the_mean_and_its_interval():
    rng = np.random.default_rng(2)
    scores = rng.normal(size=(400, 1)) + rng.normal(size=(400, 3))
    scores[7, 1], scores[9] = np.nan, np.nan
    mean, (low, high) = mean_interval(scores, num_resamples=4000)
    assert mean == pytest.approx(np.nanmean(scores), rel=1e-12)
    # of 399 prompts the normal interval, ±1.96 σ/√n, is right to a few per cent; 4,000 resamples add as much
    half = 1.96 * np.nanstd(np.nanmean(np.delete(scores, 9, 0), 1)) / 399**0.5
    np.testing.assert_allclose([mean - low, high - mean], [half, half], rtol=0.1)
    assert mean_interval(scores, seed=1) == mean_interval(scores, seed=1) != mean_interval(scores, seed=2)


def test_categories_are_held_against_all_negatives():
    scores, flags = problem("counts")
    labels: list[bool | None] = flags.tolist()
    memorized = np.flatnonzero(flags)
    categories: list[str | None] = ["none"] * len(labels)
    for i, name in zip(memorized, ["verbatim", "template", None] * 10, strict=True):
        categories[i] = name
    labels[memorized[0]] = labels[np.flatnonzero(~flags)[0]] = None  # not labelled after all
    found = evaluate_categories(scores, labels, categories, memorized_is="high", num_resamples=20)
    assert sorted(found) == ["all", "template", "verbatim"]
    negative = np.array([one is False for one in labels])
    for name, one in found.items():
        positive = np.array([bool(i) and name in ("all", c) for i, c in zip(labels, categories, strict=True)])
        chosen = positive | negative
        assert one == evaluate(scores[chosen], positive[chosen], memorized_is="high", num_resamples=20)
        assert one.num_negative_prompts == 44
    assert [found[name].num_positive_prompts for name in ("all", "verbatim", "template")] == [29, 9, 10]


@pytest.mark.parametrize("memorized_is", DIRECTIONS)
@pytest.mark.parametrize("kind", ["continuous", "counts", "partial"])
def test_thresholds_are_fixed_on_one_half_and_reported_on_the_other(kind: str, memorized_is: str):
    scores, labels = problem(kind, prompts=(31, 62))
    if memorized_is == "low":
        scores = -scores
    categories = [("a", "b")[i % 2] if flag else None for i, flag in enumerate(labels)]
    split = threshold_split(scores, labels, memorized_is=memorized_is, categories=categories, limit=0.05, seed=3)
    first = splits._halves(labels, categories, 3)
    for kind_of in (~labels, *(np.array([one == name for one in categories]) for name in ("a", "b"))):
        assert first[kind_of].sum() == -(-kind_of.sum() // 2)

    def part(chosen: np.ndarray) -> np.ndarray:
        return scores[chosen][~np.isnan(scores[chosen])]

    halves = [[part(side & flag) for flag in (labels, ~labels)] for side in (first, ~first)]
    rates = [[accepts(values, split.threshold, memorized_is).mean() for values in half] for half in halves]
    assert [[split.fitted_tpr, split.fitted_fpr], [split.tpr, split.fpr]] == rates
    # the largest TPR within the limit on the first half, which no laxer threshold keeps
    assert split.fitted_fpr <= 0.05
    assert split.fitted_tpr == brute_tpr(*halves[0], memorized_is, 0.05)
    values = np.concatenate(halves[0])
    rejected = values[~accepts(values, split.threshold, memorized_is)]
    laxer = rejected.max() if memorized_is == "high" else rejected.min()
    assert accepts(halves[0][1], laxer, memorized_is).mean() > 0.05
    # midway between two scores
    accepted = values[accepts(values, split.threshold, memorized_is)]
    stricter = accepted.min() if memorized_is == "high" else accepted.max()
    np.testing.assert_allclose(split.threshold, (laxer + stricter) / 2, rtol=1e-12)
    assert (split.num_positive, split.num_negative) == tuple(tuple(len(half[i]) for half in halves) for i in (0, 1))
    for name in ("a", "b"):
        values = part(~first & np.array([one == name for one in categories]))
        assert split.tpr_by_category[name] == accepts(values, split.threshold, memorized_is).mean()


def test_a_threshold_between_neighbouring_numbers_still_rejects_the_lower():
    # Nothing lies between 1 and the next float64: the midpoint would round to 1, which is 100 negatives.
    above = np.nextafter(1.0, 2.0)
    scores, labels = np.where(np.arange(220) < 20, above, 1.0), np.arange(220) < 20
    split = threshold_split(scores, labels, memorized_is="high")
    assert (split.threshold, split.fitted_fpr, split.fpr, split.tpr) == (above, 0, 0, 1)


def test_thresholds_that_accept_nothing_and_halves_that_resolve_nothing():
    labels = np.arange(220) < 20
    useless = threshold_split(np.zeros(220), labels, memorized_is="low")
    assert (useless.threshold, useless.fitted_tpr, useless.tpr, useless.fpr) == (None, 0, 0, 0)
    assert threshold_split(np.zeros(218), labels[:218], memorized_is="low") is None  # 99 negatives in the first half
    assert threshold_split(np.zeros(220), np.arange(220) < 1, memorized_is="low") is None  # no other memorized prompt
    assert threshold_split(np.zeros(218), labels[:218], memorized_is="low", limit=0.03) is not None


@pytest.mark.parametrize("memorized_is", DIRECTIONS)
def test_ranks_and_percentiles_equal_brute_force(memorized_is: str):
    rng = np.random.default_rng(1)
    scores, reference = rng.integers(0, 6, 40).astype(float), rng.integers(0, 6, 25).astype(float)
    scores[4], reference[3] = np.nan, np.nan
    sign = 1 if memorized_is == "high" else -1
    places, found = rank(scores, memorized_is=memorized_is), percentile(scores, reference, memorized_is=memorized_is)
    known, listed = scores[~np.isnan(scores)], reference[~np.isnan(reference)]
    for value, place, one in zip(scores, places, found, strict=True):
        if np.isnan(value):
            assert np.isnan(place)
            assert np.isnan(one)
            continue
        assert place == 1 + (sign * known > sign * value).sum()
        below, equal = (sign * listed < sign * value).sum(), (listed == value).sum()
        np.testing.assert_allclose(one, 100 * (below + equal / 2) / 24, rtol=1e-15)
    assert percentile([9.0, -9.0], reference, memorized_is="high").tolist() == [100, 0]


def test_the_curve_is_whole_and_in_the_units_of_the_detector():
    curve = roc(np.array([3.0, 1.0, 2.0, 2.0]), np.array([False, True, True, False]), memorized_is="low")
    assert curve.thresholds.tolist() == [-np.inf, 1, 2, 3]
    assert curve.fpr.tolist() == [0, 0, 0.5, 1]
    assert curve.tpr.tolist() == [0, 0.5, 1, 1]


ONE, FLAGS = np.arange(4.0), np.arange(4) < 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evaluate(ONE, FLAGS, memorized_is="up"), "memorized_is: expected 'high' or 'low', got 'up'"),
        (lambda: rank(ONE, memorized_is="up"), "memorized_is: expected 'high' or 'low', got 'up'"),
        (
            lambda: evaluate(ONE, FLAGS, memorized_is="high", per="noise"),
            "per: expected 'point' or 'prompt', got 'noise'",
        ),
        (lambda: evaluate(ONE, FLAGS[:3], memorized_is="high"), r"expected shapes .* got \(4,\) and \(3,\) of bool"),
        (lambda: evaluate(ONE, FLAGS * 1, memorized_is="high"), r"\(N,\) of booleans, got \(4,\) and \(4,\) of int64"),
        (lambda: evaluate(ONE[None, None], FLAGS, memorized_is="high"), r"shapes \(N, M\) or \(N,\)"),
        (lambda: evaluate(np.array([np.inf, 1, 2, 3]), FLAGS, memorized_is="high"), "1 infinite"),
        (
            lambda: evaluate(ONE, FLAGS, memorized_is="high", num_resamples=0),
            "num_resamples: expected at least 1, got 0",
        ),
        (lambda: mean_interval(ONE, num_resamples=0), "num_resamples: expected at least 1, got 0"),
        (lambda: mean_interval(np.array([1.0, np.nan])), "expected two prompts or more with a score, got 1"),
        (lambda: mean_interval(np.array([1.0, np.inf])), r"scores: expected finite .*\(2,\) with 1 infinite"),
        (lambda: roc(ONE, FLAGS * 1, memorized_is="high"), r"expected finite numbers and booleans .* of int64"),
        (lambda: roc(ONE * np.nan, FLAGS, memorized_is="high"), "4 scores not finite"),
        (lambda: roc(ONE, FLAGS | True, memorized_is="high"), "labels: expected both kinds, got 4 memorized of 4"),
        (
            lambda: evaluate_categories(ONE, [True, False], [None] * 4, memorized_is="high"),
            "labels and categories: expected one for each of 4 prompts, got 2 and 4",
        ),
        (
            lambda: evaluate_categories(ONE, [True, False] * 2, ["all"] * 4, memorized_is="high"),
            "categories: expected another name than 'all'",
        ),
        (
            lambda: threshold_split(ONE, FLAGS, memorized_is="high", categories=["a"]),
            "categories: expected one for each of 4 prompts, got 1",
        ),
        (lambda: threshold_split(ONE, FLAGS, memorized_is="high", limit=1.0), r"limit: expected a rate .* got 1\.0"),
        (lambda: percentile(ONE, [np.nan], memorized_is="high"), "reference: expected at least one score"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_misuse_is_refused(call: Any, message: str):
    with pytest.raises(ValueError, match=message):
        call()
