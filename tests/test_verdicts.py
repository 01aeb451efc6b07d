"""Verdicts on training images, by the rules that are written down."""

from dataclasses import replace

import numpy as np
import pytest

from jaxmem.memorization.verdicts import COPY, FEWEST_HELD_OUT, SIMILAR, Evidence, copies, judge

NAN = float("nan")
GENERAL = Evidence(
    drawn=4, copies=0, foreign=0, comparable=True, closest=1.6, similarity=NAN, looked=True, p_value=0.4,
    held_out=40, held_out_given=True, free=9.0, at_least_free=9.0,
)  # fmt: skip


def _word(**changes):
    return judge(replace(GENERAL, **changes)).word


class TestJudge:
    def test_nothing_found(self):
        found = judge(GENERAL)
        assert found.word == "no sign"
        assert found.reasons == ("none of 4 generations returns it", "p = 0.4 among 40 held-out images")

    def test_a_generation_returns_it(self):
        found = judge(replace(GENERAL, copies=3, foreign=1, closest=0.12))
        assert found.word == "reproduced"
        assert found.reasons == ("3 generations return it, calibrated ℓ2 0.12", "1 of them without its caption")

    @pytest.mark.parametrize(
        ("held_out", "p_value", "word"),
        [
            (19, 0.05, "isolated"),  # beyond all of the fewest that can tell
            (19, 0.10, "no sign"),
            (98, 0.04, "isolated"),
            (99, 0.02, "no sign"),  # the level is 0.01 there
            (99, 0.01, "isolated"),
            (18, 1 / 19, "not decided"),  # beyond all of too few
            (40, NAN, "not decided"),
        ],
    )
    def test_isolation_among_held_out_images(self, held_out, p_value, word):
        assert FEWEST_HELD_OUT == 19
        assert _word(held_out=held_out, p_value=p_value) == word

    @pytest.mark.parametrize(
        ("free", "at_least", "word"),
        [
            (0.0, 0.0, "isolated"),
            (1.0, 1.0, "no sign"),
            (NAN, 2.0, "no sign"),  # Ritz values that found some prove that there are some
            (NAN, 0.0, "not decided"),  # and none is no proof
            (NAN, NAN, "not decided"),
        ],
    )
    def test_isolation_without_held_out_images(self, free, at_least, word):
        assert _word(held_out=0, held_out_given=False, p_value=NAN, free=free, at_least_free=at_least) == word

    def test_what_was_not_looked_at_or_is_not_done_is_not_decided(self):
        assert judge(replace(GENERAL, looked=False)).reasons == ("it is not among the images that were looked at",)
        assert judge(replace(GENERAL, held_out=6)).word == "not decided"  # so far
        assert judge(replace(GENERAL, p_value=NAN)).reasons == ("the look at it is not done",)

    def test_isolation_needs_no_generation_and_its_absence_does(self):
        assert _word(drawn=0, p_value=0.001, held_out=999) == "isolated"
        assert _word(drawn=0) == "not decided"

    def test_distances_that_cannot_be_judged_leave_it_undecided(self):
        found = judge(replace(GENERAL, comparable=False, closest=NAN))
        assert found.word == "not decided"
        assert "too few training images" in found.reasons[0]


def test_copies_are_by_pixels_or_by_descriptors():
    index = np.array([0, 1, 2, 3, -1])
    calibrated = np.array([COPY, COPY + 0.01, NAN, 0.1, NAN])
    similar = np.array([5, 6, 7, 8, -1])
    similarity = np.array([NAN, SIMILAR - 0.01, SIMILAR, 0.9, NAN])
    assert copies(index, calibrated, similar, similarity).tolist() == [0, -1, 7, 3, -1]
