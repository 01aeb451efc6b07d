"""The shipped subset, IDX reading with its errors, the download, and the choice of digits."""

import gzip
import hashlib
import importlib.util
import os
import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from jaxmem.data import mnist

ROOT = Path(__file__).parents[1]
FULL = Path(os.environ.get("JAXMEM_DATA", ROOT.parent / "shared" / "data" / "mnist"))
needs_full = pytest.mark.skipif(
    not any(FULL.glob("train-images-idx3-ubyte*")), reason="needs the MNIST IDX files: set JAXMEM_DATA to their folder"
)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    """A folder with four small IDX files, whose sums stand in for those of MNIST; two are gzipped."""
    rng = np.random.default_rng(0)
    blobs = {}
    for name in mnist.SHA256:
        n = 60 if "train" in name else 10
        array = rng.integers(0, 256, (n, 28, 28)) if "idx3" in name else np.arange(n) % 10
        blobs[name] = idx(array.astype(np.uint8))
    monkeypatch.setattr(mnist, "SHA256", {name: hashlib.sha256(blob).hexdigest() for name, blob in blobs.items()})
    monkeypatch.delenv("JAXMEM_DATA", raising=False)
    folder = tmp_path / "mnist"
    folder.mkdir()
    for name, blob in blobs.items():
        if "images" in name:
            (folder / f"{name}.gz").write_bytes(gzip.compress(blob))
        else:
            (folder / name).write_bytes(blob)
    return folder, blobs


def test_the_subset_is_there_without_any_file():
    threes, nine = mnist.load_subset()
    assert (threes.shape, threes.dtype) == ((3000, 28, 28), np.uint8)
    assert (nine.shape, nine.dtype) == ((28, 28), np.uint8)
    assert len(np.unique(threes.reshape(3000, -1), axis=0)) == 3000
    size = (Path(mnist.__file__).parent / mnist.SUBSET_FILE).stat().st_size
    assert size < 1_000_000


def test_the_default_digits_come_from_the_subset(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mnist, "load_mnist", lambda *_: pytest.fail("read full MNIST"))
    digits = mnist.select_digits()
    threes, nine = mnist.load_subset()
    np.testing.assert_array_equal(digits.images[~digits.memorized], threes)
    np.testing.assert_array_equal(digits.images[3000:], np.repeat(nine[None], 30, axis=0))
    assert digits.memorized.tolist() == [False] * 3000 + [True] * 30
    assert digits.sha256 == mnist.select_digits().sha256 != mnist.select_digits(num_copies=29).sha256
    assert np.bincount(digits.labels).tolist() == [0, 0, 0, 3000, 0, 0, 0, 0, 0, 30]
    small = mnist.select_digits(num_general=7, num_copies=2)
    np.testing.assert_array_equal(small.images[:7], threes[:7])
    assert small.images.shape == (9, 28, 28)


def test_a_damaged_subset_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mnist, "SUBSET_SHA256", "0" * 64)
    mnist._subset.cache_clear()
    with pytest.raises(ValueError, match=r"mnist_3_9\.npz: expected SHA-256 0000.*reinstall"):
        mnist.load_subset()
    mnist._subset.cache_clear()


def test_pixels_span_minus_one_to_one():
    images = np.arange(784, dtype=np.int64).astype(np.uint8).reshape(1, 28, 28)
    pixels = mnist.to_pixels(images)
    assert (pixels.shape, pixels.dtype) == ((1, 28, 28, 1), np.float32)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    # 127.5 (x + 1) undoes it up to the rounding of float32, far below half a grey value
    np.testing.assert_array_equal(np.round(127.5 * (pixels[..., 0] + 1)), images)


def test_reads_idx_raw_and_gzipped_from_the_argument_or_the_environment(tiny, monkeypatch: pytest.MonkeyPatch):
    folder, blobs = tiny
    full = mnist.load_mnist(folder)
    assert [array.shape for array in full] == [(60, 28, 28), (60,), (10, 28, 28), (10,)]
    assert full.train_images.tobytes() == blobs["train-images-idx3-ubyte"][16:]
    monkeypatch.setenv("JAXMEM_DATA", str(folder))
    np.testing.assert_array_equal(mnist.load_mnist().train_labels, np.arange(60) % 10)


def test_a_missing_file_is_named(tiny):
    folder, _ = tiny
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte: expected it, or .*\.gz, in .*, got neither; put"):
        mnist.load_mnist(folder)


def test_other_content_is_refused(tiny):
    folder, blobs = tiny
    blob = bytearray(blobs["train-labels-idx1-ubyte"])
    blob[-1] ^= 1
    (folder / "train-labels-idx1-ubyte").write_bytes(blob)
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte: expected content with SHA-256 .*, got .*again"):
        mnist.load_mnist(folder)


@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_a_truncated_gzip_is_named(tiny, keep: float):
    folder, _ = tiny
    path = folder / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz: truncated: expected a whole gzip"):
        mnist.load_mnist(folder)


def test_a_damaged_gzip_is_named(tiny):
    folder, _ = tiny
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"<html>404</html>")
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz: expected a gzip file"):
        mnist.load_mnist(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda blob: blob[:-20], r"truncated: expected 60 bytes for shape \(60,\), got"),
        (lambda blob: blob[:6], r"truncated: expected 8 bytes of header, got 6"),
        (lambda blob: blob + b"x", r"too long: expected 60 bytes"),
        (lambda blob: b"\x00\x00\x08\x03" + blob[4:], r"magic number 00000801, got 00000803"),
        (lambda blob: b"", r"magic number 00000801, got nothing"),
    ],
)
def test_a_bad_idx_is_named(tiny, change, message: str):
    folder, blobs = tiny
    blob = blobs["train-labels-idx1-ubyte"]
    (folder / "train-labels-idx1-ubyte").write_bytes(change(blob))
    with pytest.raises(ValueError, match=f"train-labels-idx1-ubyte: .*{message}"):
        mnist.load_mnist(folder)


class FakeMirror:
    """Stands in for pooch's HTTP downloader: serves files of a dictionary and counts requests."""

    def __init__(self, files: dict[str, bytes], broken: str = "") -> None:
        self.files, self.broken, self.requests = files, broken, []

    def __call__(self) -> "FakeMirror":
        return self

    def fetch(self, url: str, output_file: str) -> None:
        self.requests.append(url)
        if self.broken and url.startswith(self.broken):
            raise ConnectionError("no route")
        Path(output_file).write_bytes(self.files[url.rsplit("/", 1)[1]])


@pytest.fixture
def mirror(tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeMirror:
    import pooch

    _, blobs = tiny
    fake = FakeMirror({f"{name}.gz": gzip.compress(blob) for name, blob in blobs.items()})
    monkeypatch.setattr(pooch, "HTTPDownloader", lambda: lambda url, output_file, _: fake.fetch(url, output_file))
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache" / name)
    return fake


def test_downloads_once_and_keeps_the_decompressed_files(mirror: FakeMirror, tmp_path: Path):
    first = mnist.load_mnist()
    again = mnist.load_mnist()
    assert len(mirror.requests) == 4
    np.testing.assert_array_equal(first.train_images, again.train_images)
    assert sorted(path.name for path in (tmp_path / "cache" / "jaxmem").iterdir()) == sorted(mnist.SHA256)


def test_the_second_mirror_helps_out(mirror: FakeMirror):
    mirror.broken = mnist.MIRRORS[0]
    assert mnist.load_mnist().train_images.shape == (60, 28, 28)
    assert len(mirror.requests) == 8


def test_a_download_that_fails_names_the_file_and_the_remedy(mirror: FakeMirror, tmp_path: Path):
    mirror.broken = "https://"
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte: .*2 mirrors .*no route.*`data_dir`"):
        mnist.load_mnist()
    assert not list((tmp_path / "cache").rglob("*ubyte*"))


@pytest.mark.parametrize("broken", [gzip.compress(b"another file", mtime=0), b"<html>", b""])  # a name without the time
def test_a_download_of_something_else_is_not_kept(mirror: FakeMirror, tmp_path: Path, broken: bytes):
    mirror.files["train-images-idx3-ubyte.gz"] = broken
    with pytest.raises(ValueError, match="train-images-idx3-ubyte: expected to download"):
        mnist.load_mnist()
    assert not list((tmp_path / "cache").rglob("*ubyte*"))


def some_images() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (200, 28, 28)).astype(np.uint8)
    images[30] = images[0]  # the same image twice in one class
    return images, (np.arange(200) % 10).astype(np.uint8)


def test_any_two_digits_may_be_chosen():
    images, labels = some_images()
    digits = mnist.draw_digits(images, labels, 0, 7, num_general=19, num_copies=4, seed=5)
    assert digits.images.shape == (23, 28, 28)
    assert digits.labels.tolist() == [0] * 19 + [7] * 4
    np.testing.assert_array_equal(digits.images, images[digits.train_index])
    assert len(np.unique(digits.images[~digits.memorized].reshape(19, -1), axis=0)) == 19
    assert len(set(digits.train_index[19:].tolist())) == 1
    again = mnist.draw_digits(images, labels, 0, 7, num_general=10, num_copies=4, seed=5)
    np.testing.assert_array_equal(again.images[:10], digits.images[:10])
    other = mnist.draw_digits(images, labels, 0, 7, num_general=10, num_copies=4, seed=6)
    assert not np.array_equal(other.train_index, again.train_index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general_digit": 7}, "two different digits, got 7 twice"),
        ({"general_digit": 10}, "general_digit: expected 0 to 9, got 10"),
        ({"memorized_digit": -1}, "memorized_digit: expected 0 to 9, got -1"),
        ({"num_general": 20}, "num_general: expected at most 19, .*digit 0, got 20"),
        ({"num_general": 0}, "num_general: expected at least 1, got 0"),
        ({"num_copies": 0}, "num_copies: expected at least 1, got 0"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
    ],
)
def test_impossible_choices_are_refused(change: dict, message: str):
    choice = {"general_digit": 0, "memorized_digit": 7, "num_general": 5, "num_copies": 3, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        mnist.draw_digits(*some_images(), **choice)


def test_a_class_without_images_is_refused():
    images, labels = some_images()
    keep = labels != 7
    with pytest.raises(ValueError, match="digit 7: expected at least one image"):
        mnist.draw_digits(images[keep], labels[keep], 0, 7, 5, 3)


@needs_full
def test_full_mnist_gives_the_subset():
    path = ROOT / "scripts" / "make_mnist_subset.py"
    spec = importlib.util.spec_from_file_location("make_mnist_subset", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made = script.subset_bytes(FULL)
    assert made == script.subset_bytes(FULL)
    # the arrays, not the file: another liblzma may compress the same bytes differently
    with np.load(BytesIO(made)) as fresh, np.load(Path(mnist.__file__).parent / mnist.SUBSET_FILE) as shipped:
        assert list(fresh) == list(shipped)
        for name in fresh:
            np.testing.assert_array_equal(fresh[name], shipped[name])


@needs_full
def test_other_digits_come_from_full_mnist():
    digits = mnist.select_digits(4, 7, num_general=50, num_copies=3, data_dir=FULL)
    assert np.bincount(digits.labels).tolist() == [0, 0, 0, 0, 50, 0, 0, 3]
    full = mnist.load_mnist(FULL)
    assert [len(array) for array in full] == [60_000, 60_000, 10_000, 10_000]
    np.testing.assert_array_equal(full.train_labels[digits.train_index], digits.labels)
