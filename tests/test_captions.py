"""The captioned digits: what each caption was given, and that templates vary as said."""

import numpy as np
import pytest

from jaxmem.data.captions import CATEGORIES, NUM_VARIANTS, captioned_digits, general_captions, unique_captions
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
    seen: list[int] = []
    for caption, text in enumerate(general_captions()):
        found = [index[row.tobytes()] for row in inside[data.of(caption)]]
        digits = mnist.train_labels[found]
        allowed = {"even": {0, 2, 4, 6, 8}, "odd": {1, 3, 5, 7, 9}, "small": {0, 1, 2, 3, 4}, "large": {5, 6, 7, 8, 9}}
        assert set(digits.tolist()) <= allowed.get(text.split()[1], set(range(10)))
        assert len(found) >= 5
        seen += found
    assert len(set(seen)) == len(seen)


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
