"""Duplicates, nearest training images and descriptors, against float64 NumPy, scikit-learn and sums by hand."""

import io
import re
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import optional_import
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from jaxmem.memorization.distances import calibrated_l2
from jaxmem.training_images import duplicates, load_descriptor, nearest
from jaxmem.training_images.area import reduced
from jaxmem.training_images.descriptor import MEAN, STD, preprocess
from jaxmem.training_images.duplicates import groups
from jaxmem.training_images.nearest import nearest_images


def drawn(n: int, side: int, seed: int) -> np.ndarray:
    """Smooth colour fields with edges, unlike one another, of contrasts as photographs have them."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, 6, 6, 3), np.uint8)
    fine = [Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC) for image in coarse]
    images = np.stack([np.asarray(image) for image in fine]).astype(int)
    images[:, side // 4 : side // 2, side // 3 : side // 2] = rng.integers(0, 256, (n, 1, 1, 3))
    return np.clip(images + rng.normal(0, 3, images.shape), 0, 255).astype(np.uint8)


def again(image: np.ndarray, how: str) -> np.ndarray:
    """The image after it was saved as JPEG, or made smaller and large again."""
    picture, stream = Image.fromarray(image), io.BytesIO()
    if how == "jpeg":
        picture.save(stream, "JPEG", quality=50)
        return np.asarray(Image.open(stream))
    half = (picture.width // 2, picture.height // 2)
    return np.asarray(picture.resize(half).resize(picture.size))


def rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean(((a.astype(float) - b.astype(float)) / 255) ** 2)))


def test_reduction_is_the_exact_average_of_areas():
    image = np.random.default_rng(0).integers(0, 256, (3, 96, 130, 3), np.uint8)
    # 96 → 64: each pixel twice, then three at once; 130 → 64: 32 times and 65 at once
    wide = image.astype(float).repeat(2, axis=1).repeat(32, axis=2)
    exact = wide.reshape(3, 64, 3, 64, 65, 3).mean((2, 4)) / 255
    np.testing.assert_allclose(
        reduced(image, block=2).values, exact.reshape(3, -1), atol=1e-6
    )  # float32 sums of 195 parts
    small = image[:, :64, :20]
    np.testing.assert_allclose(reduced(small).values, small.reshape(3, -1) / 255, atol=1e-7)


def test_encoding_again_and_resizing_stay_below_the_threshold_and_other_images_do_not():
    images = drawn(20, 64, 0)
    for how in ("jpeg", "half"):
        assert max(rms(image, again(image, how)) for image in images) < 0.8 * duplicates.PIXEL_THRESHOLD
    apart = [rms(a, b) for number, a in enumerate(images) for b in images[:number]]
    assert min(apart) > 2 * duplicates.PIXEL_THRESHOLD


@pytest.mark.parametrize("block", [7, 1024])
def test_groups_of_copies_near_copies_and_chains(monkeypatch, block):
    monkeypatch.setattr(duplicates, "_BLOCK", block)
    images = drawn(12, 64, 1)
    pixels = np.concatenate([images, images[[3]], [again(images[5], "jpeg")], [again(images[5], "half")], images[[3]]])
    expected = [*range(12), 3, 5, 5, 3]
    assert groups(reduced(pixels)).tolist() == expected
    order = np.random.default_rng(2).permutation(len(pixels))
    _, first, inverse = np.unique(np.array(expected)[order], return_index=True, return_inverse=True)
    assert groups(reduced(pixels[order])).tolist() == np.argsort(np.argsort(first))[inverse].tolist()
    assert groups(reduced(pixels), threshold=0.0).tolist() == [*range(12), 3, 12, 13, 3]  # equal ones only


def test_groups_against_a_search_by_hand():
    rng = np.random.default_rng(3)
    base = rng.integers(60, 200, (9, 8, 8, 3)).astype(float)
    # steps of all sizes about the threshold, none of them within float32 of it
    pixels = np.clip(np.concatenate([base + rng.normal(0, s, base.shape) for s in (0, 6, 9, 12, 15)]), 0, 255)
    pixels = pixels.astype(np.uint8)
    n = len(pixels)
    distance = np.array([[rms(a, b) for b in pixels] for a in pixels])
    assert np.abs(distance - duplicates.PIXEL_THRESHOLD).min() > 1e-5
    linked = distance <= duplicates.PIXEL_THRESHOLD
    label = list(range(n))
    for _ in range(n):
        label = [min(label[b] for b in range(n) if linked[a, b]) for a in range(n)]
    names = {value: number for number, value in enumerate(dict.fromkeys(label))}
    expected = [names[value] for value in label]
    assert 9 < len(names) < n  # some are linked, some are not
    assert groups(reduced(pixels)).tolist() == expected


def test_squares_are_as_exact_as_said():
    pixels = drawn(64, 64, 4)
    values = reduced(pixels).values - np.float32(0.5)
    squares = (values * values).sum(1)[:, None] + (values * values).sum(1)[None] - 2 * values @ values.T
    exact = np.array([[rms(a, b) ** 2 for b in pixels] for a in pixels])
    assert np.abs(squares / values.shape[1] - exact).max() < 1e-6


def test_dark_images_of_little_contrast_are_not_one_picture():
    rng = np.random.default_rng(5)
    dark = rng.integers(0, 21, (6, 32, 32, 3), np.uint8)  # noise of grey levels 0 to 20
    assert max(rms(a, b) for a in dark for b in dark) < duplicates.PIXEL_THRESHOLD
    assert groups(reduced(dark)).tolist() == list(range(6))
    flat = np.zeros((3, 8, 8, 3), np.uint8)
    flat[1] = 1  # one grey level more: other pixels, and no contrast to tell by
    assert groups(reduced(flat)).tolist() == [0, 1, 0]


def test_descriptors_link_what_pixels_do_not():
    pixels = drawn(5, 32, 6)
    angles = np.radians([0, 40, 80, 170, 200])  # cos 40° = 0.77, cos 30° = 0.87
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    assert groups(reduced(pixels), descriptors=vectors).tolist() == [0, 0, 0, 1, 1]
    assert groups(reduced(pixels), descriptors=vectors, similarity=0.8).tolist() == [0, 1, 2, 3, 3]


@pytest.mark.usefixtures("unchecked")
def test_what_groups_refuse():
    pixels = drawn(3, 8, 0)
    with pytest.raises(ValueError, match="descriptors: expected one for each of 3 images, got 2"):
        groups(reduced(pixels), descriptors=np.ones((2, 4), np.float32))
    with pytest.raises(ValueError, match=r"threshold: expected a number of at least 0, got -1\.0"):
        groups(reduced(pixels), threshold=-1.0)
    assert groups(reduced(pixels[:0])).tolist() == []


def test_nearest_images_against_scikit_learn_and_the_published_formula():
    training, new = drawn(70, 32, 7), drawn(5, 32, 8)
    generated = np.concatenate([new, training[[11]], np.clip(training[[20]].astype(int) + 2, 0, 255).astype(np.uint8)])
    found = nearest_images(reduced(generated), reduced(training), np.arange(70))
    x, y = generated.reshape(7, -1) / 255, training.reshape(70, -1) / 255
    away, index = NearestNeighbors(n_neighbors=50, algorithm="brute").fit(y).kneighbors(x)
    away /= np.sqrt(y.shape[1])
    away[5, 0] = 0  # scikit-learn expands the square
    np.testing.assert_array_equal(found.index, index[:, 0])
    np.testing.assert_allclose(found.distance, away[:, 0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.calibrated, away[:, 0] / (0.5 * away.mean(1)), rtol=1e-5, atol=1e-6)
    assert found.index[5:].tolist() == [11, 20]
    assert found.distance[5] == 0
    assert found.calibrated[5] == 0
    np.testing.assert_allclose(found.distance[6], rms(generated[6], training[20]), rtol=1e-5)


def test_copies_in_the_training_set_change_nothing():
    training, generated = drawn(60, 16, 9), drawn(4, 16, 10)
    near = nearest_images(reduced(generated), reduced(training), np.arange(60))
    copies = np.concatenate([training, np.repeat(training[near.index], 60, axis=0)])
    labels = np.concatenate([np.arange(60), np.repeat(near.index, 60)]).astype(int)
    again = nearest_images(reduced(generated), reduced(copies), labels)
    np.testing.assert_array_equal(again.index, near.index)
    np.testing.assert_allclose(again.calibrated, near.calibrated, rtol=1e-6)
    alone = nearest_images(reduced(generated), reduced(copies), np.arange(300))
    assert (alone.calibrated > 1.9).all()  # what the groups are for


def test_a_group_counts_by_its_nearest_member():
    training, generated = drawn(30, 16, 11), drawn(1, 16, 12)
    closer = (0.2 * training[[4]] + 0.8 * generated).astype(np.uint8)
    everything = np.concatenate([training, closer])
    found = nearest_images(reduced(generated), reduced(everything), np.array([*range(30), 4]))
    replaced = training.copy()
    replaced[4] = closer[0]
    x, y = (jnp.asarray(images.reshape(len(images), -1) / 255, jnp.float32) for images in (generated, replaced))
    assert found.index.tolist() == [30]
    np.testing.assert_allclose(found.calibrated, calibrated_l2(x, y, num_neighbours=30), rtol=1e-5)


def test_other_images_are_neighbours_and_never_the_nearest():
    training, others, generated = drawn(4, 16, 15), drawn(20, 16, 16), drawn(3, 16, 17)
    found = nearest_images(reduced(generated), reduced(training), np.array([0, 1, 2, 2]), reduced(others).values)
    away = np.array([[rms(a, b) for b in training] for a in generated])
    beyond = np.array([[rms(a, b) for b in others] for a in generated])
    np.testing.assert_array_equal(found.index, away.argmin(1))
    for i in range(3):  # of the group of two the nearest one counts, or else its first
        kept = away[i, [0, 1, 3 if away[i].argmin() == 3 else 2]]
        expected = away[i].min() / (0.5 * np.concatenate([kept, beyond[i]]).mean())
        np.testing.assert_allclose(found.calibrated[i], expected, rtol=1e-5)
    assert np.isnan(nearest_images(reduced(generated), reduced(training), np.array([0, 1, 2, 2])).calibrated).all()


def test_few_groups_have_no_calibrated_distance_and_fewer_than_fifty_take_all():
    training, generated = drawn(10, 16, 13), drawn(3, 16, 14)
    found = nearest_images(reduced(generated), reduced(training), np.arange(10))
    away = np.array([[rms(a, b) for b in training] for a in generated])
    np.testing.assert_allclose(found.calibrated, away.min(1) / (0.5 * away.mean(1)), rtol=1e-5)
    few = nearest_images(reduced(generated), reduced(training), np.array([*range(9), 8]))
    assert np.isnan(few.calibrated).all()
    np.testing.assert_allclose(few.distance, away.min(1), rtol=1e-5)
    assert nearest_images(reduced(generated[:0]), reduced(training), np.arange(10)).index.shape == (0,)
    equal = nearest_images(
        reduced(np.repeat(training[:1], 2, 0)), reduced(np.repeat(training[:1], 12, 0)), np.arange(12)
    )
    assert equal.calibrated.tolist() == [0.0, 0.0]


@pytest.mark.usefixtures("unchecked")
def test_what_nearest_images_refuse():
    training = drawn(3, 16, 0)
    with pytest.raises(ValueError, match=r"images of one size, got \(8, 8\) and \(16, 16\); prepare the training"):
        nearest_images(reduced(drawn(2, 8, 0)), reduced(training), np.arange(3))
    with pytest.raises(ValueError, match="at least 1 image and a group for each, got 0 images and 0 groups"):
        nearest_images(reduced(training), reduced(training[:0]), np.arange(0))
    assert nearest.NEIGHBOURS == 50


def test_preprocessing_is_that_of_sscds_readme():
    image = drawn(1, 72, 15)[0, :36]  # 72 wide and 36 high
    found = preprocess(image)
    assert found.shape == (1, 3, 288, 576)
    resized = np.asarray(Image.fromarray(image).resize((576, 288), Image.Resampling.BILINEAR), float) / 255
    for channel in range(3):
        expected = (resized[..., channel] - MEAN[channel]) / STD[channel]
        np.testing.assert_allclose(found[0, channel], expected, atol=1e-5)
    assert preprocess(image.transpose(1, 0, 2), None).shape == (1, 3, 576, 288)
    assert preprocess(image, (20, 30)).shape == (1, 3, 20, 30)


WEIGHTS = np.random.default_rng(16).normal(size=(4, 3)).astype(np.float32)


def expected_vectors(pixels: np.ndarray, size=None) -> np.ndarray:
    """The mean of each channel, through a matrix, by hand."""
    means = np.stack([preprocess(image, size)[0].astype(float).mean((1, 2)) for image in pixels])
    vectors = means @ WEIGHTS.T.astype(float)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def onnx_file(path, shape, *, kind="vector", inputs=1):
    """A mean over pixels and a product with WEIGHTS, as an ONNX file."""
    optional_import("onnxruntime")
    onnx = optional_import("onnx")
    helper, numbers = onnx.helper, onnx.TensorProto
    nodes = [helper.make_node("GlobalAveragePool", ["x"], ["pooled"])]
    if kind == "vector":
        nodes.append(helper.make_node("Flatten", ["pooled"], ["means"]))
        nodes.append(helper.make_node("MatMul", ["means", "w"], ["y"]))
    else:
        nodes.append(helper.make_node("Identity", ["pooled"], ["y"]))
    values = [helper.make_tensor_value_info(name, numbers.FLOAT, shape) for name in ("x", "unused")[:inputs]]
    graph = helper.make_graph(
        nodes,
        "descriptor",
        values,
        [helper.make_tensor_value_info("y", numbers.FLOAT, None)],
        [helper.make_tensor("w", numbers.FLOAT, (3, 4), np.ascontiguousarray(WEIGHTS.T).ravel())],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("shape", "size"),
    [(("n", 3, "h", "w"), None), ((1, 3, None, None), None), ((1, 3, 32, 40), (32, 40)), ((None, 3, 32, 32), (32, 32))],
)
def test_onnx_descriptors_against_numpy(tmp_path, shape, size):
    descriptor = load_descriptor(onnx_file(tmp_path / "mean.onnx", shape))
    assert descriptor.size == size
    pixels = drawn(3, 24, 17)[:, :20]
    found = descriptor(pixels)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected_vectors(pixels, size), atol=2e-5)  # float32 means of 288 × 345 values
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "options", "match"),
    [
        (
            (8, 3, 32, 32),
            {},
            r"expected one input of float32 images \(1 or any number, 3, .*, got x of tensor\(float\)",
        ),
        ((1, 1, 32, 32), {"kind": "map"}, "expected one input of float32 images"),
        ((1, 3, 32, 32), {"inputs": 2}, "expected one input .* unused of"),
    ],
)
def test_onnx_files_that_take_no_single_image(tmp_path, shape, options, match):
    with pytest.raises(ValueError, match=match):
        load_descriptor(onnx_file(tmp_path / "a.onnx", shape, **options))


def test_an_output_that_is_no_vector_is_refused(tmp_path):
    descriptor = load_descriptor(onnx_file(tmp_path / "a.onnx", (1, 3, 8, 8), kind="map"))
    with pytest.raises(ValueError, match=r"a vector for each image, an output of shape \(1, k\), got \(1, 3, 1, 1\)"):
        descriptor(drawn(1, 8, 0))
    with pytest.raises(ValueError, match="expected at least one image, got none"):
        descriptor(drawn(1, 8, 0)[:0])


def test_a_file_that_is_no_onnx(tmp_path):
    optional_import("onnxruntime")
    (tmp_path / "a.onnx").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"a\.onnx: expected an ONNX model, got a file that onnxruntime cannot open"):
        load_descriptor(tmp_path / "a.onnx")


def scripted(torch, path, scale: float = 1.0):
    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(scale * torch.from_numpy(WEIGHTS.copy()))

        def forward(self, x):
            return x.mean((2, 3)) @ self.w.T

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.trace(Mean().eval(), torch.zeros(1, 3, 8, 8)).save(str(path))
    return path


def test_torchscript_descriptors_against_numpy(tmp_path, torch):
    path = scripted(torch, tmp_path / "sscd.torchscript.pt")
    descriptor = load_descriptor(str(path))
    pixels = drawn(3, 24, 17)[:, :20]
    np.testing.assert_allclose(descriptor(pixels), expected_vectors(pixels), atol=2e-5)
    assert len(descriptor.sha256) == 64
    assert descriptor.path == path


def test_zeros_and_weights_alone_are_refused(tmp_path, torch):
    zeros = load_descriptor(scripted(torch, tmp_path / "zeros.pt", scale=0.0))
    with pytest.raises(ValueError, match=r"a finite vector other than zero, got one of norm 0\.0"):
        zeros(drawn(1, 8, 0))
    torch.save({"w": torch.zeros(3)}, tmp_path / "sscd.classy.pt")
    with pytest.raises(ValueError, match=r"expected TorchScript, .*files of weights alone, such as \.classy\.pt"):
        load_descriptor(tmp_path / "sscd.classy.pt")


def test_files_that_are_no_descriptor(tmp_path):
    with pytest.raises(
        ValueError, match=re.escape("expected a descriptor named .onnx, .pt, .pth, .torchscript, got '.h5'")
    ):
        load_descriptor(tmp_path / "a.h5")
    with pytest.raises(ValueError, match="expected a descriptor, got no such file"):
        load_descriptor(tmp_path / "a.onnx")
