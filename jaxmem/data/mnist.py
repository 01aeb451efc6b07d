"""MNIST: the shipped subset, the full set from IDX files, and the choice of one general and one memorized digit."""

import gzip
import hashlib
import os
import struct
import zlib
from functools import lru_cache
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from jaxmem.extras import require

# SHA-256 of the decompressed bytes: the .gz of the mirrors differ in their headers, the content does not.
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
ENVIRONMENT = "JAXMEM_DATA"

# The shipped subset is `draw_digits(full MNIST, *these values)`; scripts/make_mnist_subset.py writes it.
SUBSET_FILE = "mnist_3_9.npz"
SUBSET_SHA256 = "aab38b0b1ef973a9466ef7a6ab0259a48ed0725c9263aa201b7cbfdcaa5a3df5"
SUBSET_DIGITS = (3, 9)
SUBSET_NUM_GENERAL = 3000
SUBSET_SEED = 0

# The memorized image is drawn from this many images of its class that lie nearest to the class mean: a typical one.
NUM_TYPICAL = 100


class Mnist(NamedTuple):
    """The 60,000 training and 10,000 test digits, grey values 0 to 255."""

    train_images: UInt8[np.ndarray, "train 28 28"]
    train_labels: UInt8[np.ndarray, " train"]
    test_images: UInt8[np.ndarray, "test 28 28"]
    test_labels: UInt8[np.ndarray, " test"]


class Digits(NamedTuple):
    """A training set with a general class (all images different) and a memorized one (one image, many times).

    The general images come first, then the copies. ``train_index`` is the place of each image among the 60,000 training
    images of MNIST.
    """

    images: UInt8[np.ndarray, "n 28 28"]
    labels: Int[np.ndarray, " n"]
    train_index: Int[np.ndarray, " n"]

    @property
    def memorized(self) -> Bool[np.ndarray, " n"]:
        """Which images are the copies."""
        return self.labels == self.labels[-1]

    @property
    def sha256(self) -> str:
        """The sum of the images and labels, for a run's manifest."""
        return hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()


def to_pixels(images: UInt8[np.ndarray, "*batch 28 28"]) -> Float[np.ndarray, "*batch 28 28 1"]:
    """Grey values as a network sees them: float32 in [-1, 1], ``x = grey / 127.5 - 1``, one channel."""
    return (images.astype(np.float32) / np.float32(127.5) - np.float32(1.0))[..., None]


def load_mnist(data_dir: str | Path | None = None) -> Mnist:
    """Read full MNIST from IDX files, gzipped or not, each checked by the SHA-256 of its decompressed bytes.

    Args:
        data_dir: the folder of the four files. By default the folder named by ``$JAXMEM_DATA``; without that the
            files are downloaded once, to the user's cache folder.

    Raises:
        ValueError: a file is missing, truncated, of another format or of other content, or no mirror answered; the
            message names the file and the remedy.
    """
    folder = data_dir or os.environ.get(ENVIRONMENT)
    blobs = {name: _read(Path(folder), name) if folder else _read_cached(name) for name in SHA256}
    return Mnist(*(parse_idx(blob, name) for name, blob in blobs.items()))


def draw_digits(
    images: UInt8[np.ndarray, "train 28 28"],
    labels: UInt8[np.ndarray, " train"],
    general_digit: int = SUBSET_DIGITS[0],
    memorized_digit: int = SUBSET_DIGITS[1],
    num_general: int = SUBSET_NUM_GENERAL,
    num_copies: int = 30,
    seed: int = SUBSET_SEED,
) -> Digits:
    """Draw ``num_general`` different images of one digit and one typical image of another, ``num_copies`` times.

    The general images are the first ``num_general`` of a random order fixed by the seed, so a smaller set is part of a
    larger one. The memorized image is drawn from the 100 of its class nearest to the class mean. Defaults: the paper,
    section 5.2 (3,000 threes; one nine 30 times).

    Raises:
        ValueError: equal digits, a digit that is not there, or more images asked for than the class has.
    """
    _check_choice(general_digit, memorized_digit, num_general, num_copies, seed)
    of_class = {digit: np.flatnonzero(labels == digit) for digit in (general_digit, memorized_digit)}
    for digit, where in of_class.items():
        if len(where) == 0:
            raise ValueError(f"digit {digit}: expected at least one image of it, got none; choose another digit")
    _, first = np.unique(images[of_class[general_digit]].reshape(-1, 28 * 28), axis=0, return_index=True)
    candidates = of_class[general_digit][np.sort(first)]
    if num_general > len(candidates):
        raise ValueError(
            f"num_general: expected at most {len(candidates):,}, the number of different images of digit "
            f"{general_digit}, got {num_general:,}"
        )
    chosen = np.random.default_rng([seed, general_digit]).permutation(candidates)[:num_general]

    where = of_class[memorized_digit]
    flat = images[where].reshape(len(where), -1).astype(np.float64)
    distance = ((flat - flat.mean(0)) ** 2).sum(1)
    typical = where[np.argsort(distance, kind="stable")[:NUM_TYPICAL]]
    memorized = np.random.default_rng([seed, memorized_digit]).permutation(typical)[0]

    index = np.concatenate([chosen, np.full(num_copies, memorized)])
    return Digits(images[index], labels[index].astype(np.int32), index.astype(np.int32))


def select_digits(
    general_digit: int = SUBSET_DIGITS[0],
    memorized_digit: int = SUBSET_DIGITS[1],
    *,
    num_general: int = SUBSET_NUM_GENERAL,
    num_copies: int = 30,
    seed: int = SUBSET_SEED,
    data_dir: str | Path | None = None,
) -> Digits:
    """``draw_digits`` on the training images, from the shipped subset where it suffices, else from full MNIST.

    Threes against one nine with at most 3,000 threes and seed 0 need no file and no network; the images are the same
    ones that full MNIST gives.
    """
    _check_choice(general_digit, memorized_digit, num_general, num_copies, seed)
    shipped = (general_digit, memorized_digit) == SUBSET_DIGITS and seed == SUBSET_SEED
    if shipped and num_general <= SUBSET_NUM_GENERAL:
        threes, nine, index = _subset()
        return Digits(
            np.concatenate([threes[:num_general], np.repeat(nine[None], num_copies, axis=0)]),
            np.repeat(np.asarray(SUBSET_DIGITS, np.int32), [num_general, num_copies]),
            np.concatenate([index[:num_general], np.repeat(index[-1:], num_copies)]),
        )
    mnist = load_mnist(data_dir)
    return draw_digits(
        mnist.train_images, mnist.train_labels, general_digit, memorized_digit, num_general, num_copies, seed
    )


def load_subset() -> tuple[UInt8[np.ndarray, "3000 28 28"], UInt8[np.ndarray, "28 28"]]:
    """The images that ship with the package: 3,000 threes, all different, and one nine."""
    threes, nine, _ = _subset()
    return threes, nine


@lru_cache(maxsize=1)
def _subset() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    blob = files("jaxmem.data").joinpath(SUBSET_FILE).read_bytes()
    got = hashlib.sha256(blob).hexdigest()
    if got != SUBSET_SHA256:
        raise ValueError(
            f"{SUBSET_FILE}: expected SHA-256 {SUBSET_SHA256}, got {got}; the installed file is damaged, "
            "reinstall jaxmem"
        )
    with np.load(BytesIO(blob)) as arrays:
        out = arrays["threes"], arrays["nine"], arrays["train_index"]
    for array in out:
        array.setflags(write=False)  # cached: everybody shares it
    return out


def parse_idx(blob: bytes, name: str) -> UInt8[np.ndarray, "..."]:
    """Decode an IDX file of unsigned bytes: magic ``00 00 08 ndim``, big-endian uint32 sizes, then the values.

    Raises:
        ValueError: another magic number, or fewer or more bytes than the header announces.
    """
    expected_ndim = 3 if "idx3" in Path(name).name else 1
    expected = struct.pack(">HBB", 0, 8, expected_ndim)
    if blob[:4] != expected:
        raise ValueError(
            f"{name}: expected an IDX file with magic number {expected.hex()}, got {blob[:4].hex() or 'nothing'}; "
            "the file is something else, get MNIST again"
        )
    start = 4 + 4 * expected_ndim
    if len(blob) < start:
        raise ValueError(f"{name}: truncated: expected {start} bytes of header, got {len(blob)}; get the file again")
    shape = struct.unpack(f">{expected_ndim}I", blob[4:start])
    size = int(np.prod(shape, dtype=np.int64))
    if len(blob) - start != size:
        what = "truncated" if len(blob) - start < size else "too long"
        raise ValueError(
            f"{name}: {what}: expected {size:,} bytes for shape {shape}, got {len(blob) - start:,}; get the file again"
        )
    return np.frombuffer(blob, np.uint8, offset=start).reshape(shape)


def _check_choice(general_digit: int, memorized_digit: int, num_general: int, num_copies: int, seed: int) -> None:
    for name, digit in (("general_digit", general_digit), ("memorized_digit", memorized_digit)):
        if not 0 <= digit <= 9:
            raise ValueError(f"{name}: expected 0 to 9, got {digit}")
    if general_digit == memorized_digit:
        raise ValueError(f"general_digit and memorized_digit: expected two different digits, got {general_digit} twice")
    for name, number in (("num_general", num_general), ("num_copies", num_copies)):
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")


def _read(folder: Path, name: str) -> bytes:
    """The checked, decompressed bytes of one file of a folder the user named."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return _checked(_decompress(path), name, path)
    raise ValueError(
        f"MNIST file {name}: expected it, or {name}.gz, in {folder}, got neither; put the four IDX files there, or "
        f"give no data directory and unset ${ENVIRONMENT} to have them downloaded"
    )


def _decompress(path: Path) -> bytes:
    blob = path.read_bytes()
    if path.suffix != ".gz":
        return blob
    try:
        return gzip.decompress(blob)
    except EOFError:
        raise ValueError(
            f"{path}: truncated: expected a whole gzip file, got {len(blob):,} bytes that end too early; "
            "get the file again"
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected a gzip file, got something else ({error}); get the file again") from None


def _checked(blob: bytes, name: str, path: Path) -> bytes:
    parse_idx(blob, str(path))  # a truncated file is called truncated, not of another sum
    got = hashlib.sha256(blob).hexdigest()
    if got != SHA256[name]:
        raise ValueError(
            f"{path}: expected content with SHA-256 {SHA256[name]}, got {got}; this is not MNIST's {name} "
            "(another data set of the same format, or a damaged file), get it again"
        )
    return blob


def _read_cached(name: str) -> bytes:
    """One file from the user's cache folder, downloaded on first use."""
    require("audit", "downloading MNIST")
    import pooch

    failures = []
    for mirror in MIRRORS:
        try:
            path = pooch.retrieve(
                url=f"{mirror}{name}.gz",
                known_hash=f"sha256:{SHA256[name]}",
                fname=name,
                path=pooch.os_cache("jaxmem"),
                downloader=_download_decompressed,
            )
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; pooch reports a wrong sum as ValueError
            failures.append(f"{mirror}: {type(error).__name__}: {error}")
        else:
            return _checked(Path(path).read_bytes(), name, Path(path))
    raise ValueError(
        f"MNIST file {name}: expected to download it, got no usable answer from {len(MIRRORS)} mirrors "
        f"({'; '.join(failures)}); put the four IDX files in a folder and name it by `data_dir` or ${ENVIRONMENT}"
    )


def _download_decompressed(url: str, output_file: str, pooch: object) -> None:
    """A pooch downloader that leaves the decompressed bytes, so that pooch checks and keeps those."""
    from pooch import HTTPDownloader

    compressed = Path(f"{output_file}.gz")
    try:
        HTTPDownloader()(url, str(compressed), pooch)
        Path(output_file).write_bytes(_decompress(compressed))
    finally:
        compressed.unlink(missing_ok=True)
