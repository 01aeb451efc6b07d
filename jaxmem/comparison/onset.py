"""When did memorization begin? A rule that is written down here, and printed on the page.

A checkpoint shows a *sign* if a generation returns a training image, or if more images stand out among the held-out
ones than chance gives: the probability of as many, were no image memorized, is at most `CHANCE` over the number of
checkpoints that are compared. A group of duplicates counts once, by its first image.

"Stop before step S" is said of a series if S is the first checkpoint with a sign, at least one before it has none, at
least one after it has one, and the signs stay: all later ones have one, and where images were reproduced they still
are. Otherwise it is said why not.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from jaxmem.comparison.checkpoint import Checkpoint
from jaxmem.memorization.chance import is_beyond, level_of, num_beyond
from jaxmem.training_images.duplicates import first_of_groups

CHANCE = 0.05  #: that any checkpoint shows a sign by images that stand out, were none memorized


class Sign(NamedTuple):
    """What one checkpoint shows; groups of duplicates count once."""

    reproduced: int | None  #: images that generations return; None where nothing was drawn from the captions
    standing_out: int | None  #: images that stand out among held-out ones; None without enough of these
    expected: float  #: of them, were none memorized
    probability: float  #: that as many stand out, were none memorized; NaN where nobody can say
    there: bool | None  #: whether it is a sign; None: it cannot be told


class Advice(NamedTuple):
    """What is said of one series."""

    series: str
    stop_before: int | None  #: the first step with a sign, where the data carries it
    last_without: int | None  #: the step before it
    reason: str


def sign(checkpoint: Checkpoint, number: int) -> Sign:
    """What a checkpoint shows, one of ``number`` that are compared."""
    chosen = [checkpoint.evidence[i] for i in first_of_groups(checkpoint.groups)]
    reproduced = checkpoint.reproduced
    drawn = checkpoint.drawn and any(one.drawn and one.comparable for one in chosen)
    standing, expected, probability = _standing_out(
        np.array([one.p_value for one in chosen]), chosen[0].held_out if chosen else 0
    )
    beyond = probability <= CHANCE / number
    there = True if reproduced or beyond else False if drawn or standing is not None else None
    return Sign(reproduced if drawn or reproduced else None, standing, expected, probability, there)


def probability_by_chance(standing_out: int, images: int, held_out: int) -> float:
    """Probability that so many of some images have a p-value up to the level, were they as the held-out ones are.

    The p-value of an image is its rank among the held-out images, so all images are compared with the same ones: the
    share that passes is Beta distributed, and the number that passes Beta-binomial. For one measure that is exact.
    """
    ranks = _ranks(held_out)
    return float(scipy.stats.betabinom.sf(standing_out - 1, images, ranks, held_out + 1 - ranks))


def _ranks(held_out: int) -> int:
    """How many of the ranks among held-out images have a p-value up to the level that their number allows."""
    level = level_of(held_out)
    return 0 if level is None else num_beyond(level, held_out)


def _standing_out(p_values: np.ndarray, held_out: int) -> tuple[int | None, float, float]:
    there, level = p_values[~np.isnan(p_values)], level_of(held_out)
    if not there.size or level is None:
        return None, float("nan"), float("nan")
    number = int(is_beyond(there, level).sum())
    expected = len(there) * _ranks(held_out) / (held_out + 1)
    return number, expected, probability_by_chance(number, len(there), held_out)


def advise(series: str, steps: Sequence[int], signs: Sequence[Sign]) -> Advice:
    """What is said of a series, whose checkpoints come in the order of their steps."""
    told = [(step, one) for step, one in zip(steps, signs, strict=True) if one.there is not None]
    out = len(steps) - len(told)
    note = f" {out} checkpoint{'s' if out > 1 else ''} cannot tell and {'are' if out > 1 else 'is'} left out." * bool(
        out
    )
    begun = next((i for i, (_, one) in enumerate(told) if one.there), None)

    def none(reason: str) -> Advice:
        return Advice(series, None, None, reason + note)

    if not told:
        return none(
            "Nothing that was drawn from the captions was compared with the images, and too few images were held out."
        )
    if begun is None:
        return none(
            f"No checkpoint up to step {told[-1][0]} shows a sign. That is no proof that none is memorized there."
        )
    first = told[begun][0]
    if begun == 0:
        return none(f"The first checkpoint that can tell, step {first}, shows a sign: it began before, unseen.")
    before = told[begun - 1][0]
    if begun == len(told) - 1:
        return none(
            f"Only the last checkpoint, step {first}, shows a sign (step {before} does not). One more after it would"
            f" have to confirm it."
        )
    if lost := _lost(told[begun:]):
        return none(f"Step {first} is the first that shows a sign, but {lost}: the signs do not stay.")
    return Advice(
        series,
        first,
        before,
        f"Step {first} is the first that shows a sign, and every later one does ({len(told) - begun - 1});"
        f" step {before}, the last before it, shows none. It began between the two.{note}",
    )


def _lost(told: Sequence[tuple[int, Sign]]) -> str:
    """Where a sign that was there is there no more, in words; empty where all stay."""
    seen = False
    for step, one in told:
        if not one.there:
            return f"step {step} shows none"
        if seen and one.reproduced == 0:
            return f"at step {step} no image is reproduced any more"
        seen = seen or bool(one.reproduced)
    return ""
