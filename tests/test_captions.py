"""The captioned digits: what each caption was given, and that templates vary as said."""

import numpy as np
import pytest

from jaxmem.data.captions import (
    _DIGITS,
    _HALVES,
    CATEGORIES,
    NUM_VARIANTS,
    _measures,
    captioned_digits,
    general_captions,
    unique_captions,
)
from jaxmem.data.mnist import Mnist


@pytest.fixture(scope="module")
def mnist() -> Mnist:
    """Six hundred different pictures, sixty of each label; more ink with the index."""
    random = np.random.default_rng(0)
    images = random.integers(1, 255, (600, 28, 28)).astype(np.uint8)
    images[:, :4] = images[:, -4:] = 0
    images = (images * np.linspace(0.4, 1, 600)[:, None, None]).astype(np.uint8)
    return Mnist(images, np.arange(600).astype(np.uint8) % 10, images[:0], np.zeros(0, np.uint8))


@pytest.fixture(scope="module")
def data(mnist):
    return captioned_digits(mnist, seed=3)


def test_thirty_captions_in_each_category_and_none_twice(data):
    assert len(set(data.captions)) == len(data.captions) == 90
    assert [data.categories.count(name) for name in CATEGORIES] == [30, 30, 30]
    assert set(general_captions()) & set(unique_captions()) == set()
    assert len(data.images) == len(data.caption)
    assert data.caption.max() == 89
    assert (np.bincount(data.caption)[30:60] == 1).all()


def test_matching_captions_have_one_image_that_no_other_caption_has(data):
    flat = data.images.reshape(len(data.images), -1)
    for caption in range(30, 60):
        (where,) = data.of(caption)
        same = np.flatnonzero((flat == flat[where]).all(1))
        assert same.tolist() == [where]


def test_general_captions_hold_different_images_of_which_they_are_true(data, mnist):
    inside = data.images[:, 2:-2, 2:-2].reshape(len(data.images), -1)
    index = {image.tobytes(): i for i, image in enumerate(mnist.train_images.reshape(600, -1))}
    of = {
        "an even digit": {0, 2, 4, 6, 8},
        "a prime digit": {2, 3, 5, 7},
        "a digit that is not a square": {2, 3, 5, 6, 7, 8},
        "no power of two": {0, 3, 5, 6, 7, 9},
        "less than three or more than seven": {0, 1, 2, 8, 9},
        "spelled without an i": {0, 1, 2, 3, 4, 7},
    }
    seen: list[int] = []
    for caption, text in enumerate(general_captions()):
        found = [index[row.tobytes()] for row in inside[data.of(caption)]]
        digits = set(mnist.train_labels[found].tolist())
        assert digits <= of.get(text, set(range(10)))
        assert len(found) >= 5
        seen += found
    assert len(set(seen)) == len(seen)


def test_no_two_general_captions_say_the_same():
    assert len({frozenset(digits) for digits in _DIGITS.values()}) == len(_DIGITS) == 24
    assert len(set(_HALVES.values())) == len(_HALVES) == 6
    assert min(len(set(digits)) for digits in _DIGITS.values()) >= 4


@pytest.mark.parametrize(("caption", "name", "upper"), [(text, *half) for text, half in _HALVES.items()])
def test_a_half_is_above_or_below_the_median_of_its_digit(data, mnist, caption, name, upper):
    inside = data.images[:, 2:-2, 2:-2].reshape(len(data.images), -1)
    index = {image.tobytes(): i for i, image in enumerate(mnist.train_images.reshape(600, -1))}
    general = np.flatnonzero(data.caption < 30)
    digits = mnist.train_labels[[index[row.tobytes()] for row in inside[general]]]
    values = _measures(data.images[general][:, 2:-2, 2:-2])[name]
    mine = data.caption[general] == general_captions().index(caption)
    assert mine.sum() >= 5
    for digit in range(10):
        median = np.median(values[digits == digit])
        found = values[mine & (digits == digit)]
        assert (found > median if upper else found <= median).all()


def test_the_words_mean_these_halves():
    """Bold has more ink, slanted leans more, wide is wider for its height."""
    assert _HALVES["a bold digit"] == ("ink", True)
    assert _HALVES["a slanted digit"] == ("slant", True)
    assert _HALVES["a wide digit"] == ("width", True)


def test_halves_are_measured_on_strokes_of_known_weight_slant_and_width():
    """Bars drawn here: upright, leaning to the right, bold, lying."""
    bars = np.zeros((4, 28, 28), np.uint8)
    rows = np.arange(4, 24)
    bars[[0, 2], 4:24, 13:15] = 200
    bars[1, rows, 20 - rows // 2] = 200  # one column to the left every two rows down
    bars[2, 4:24, 11:17] = 200
    bars[3, 13:15, 4:24] = 200
    found = _measures(bars)
    assert found["ink"].tolist() == [8000, 4000, 24_000, 8000]
    np.testing.assert_allclose(found["slant"][[0, 2, 3]], 0, atol=1e-12)
    assert 0.48 < found["slant"][1] < 0.52
    assert found["width"][0] < found["width"][2] < 1 < found["width"][3]


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["shifted", "turned", "framed"])
def test_templates_do_not_vary_linearly(data, kind):
    images = data.images[data.of(60 + kind)].reshape(NUM_VARIANTS, -1).astype(float)
    assert len(np.unique(images, axis=0)) > NUM_VARIANTS / 2
    # A picture that only varied in brightness would leave nothing beside its first direction.
    variances = np.linalg.svd(images - images.mean(0), compute_uv=False) ** 2
    assert variances[0] < 0.6 * variances.sum()


def test_the_framed_template_keeps_its_frame(data):
    images = data.images[data.of(62)]
    fixed = (images == images[0]).all(0)
    assert fixed[:, :16].all()
    assert not fixed[12:20, 19:27].any()
    assert images[0, 1, 16] == 160


def test_the_seed_decides(mnist, data):
    again, other = captioned_digits(mnist, seed=3), captioned_digits(mnist, seed=4)
    np.testing.assert_array_equal(again.images, data.images)
    assert (other.images[data.of(30)] != data.images[data.of(30)]).any()
