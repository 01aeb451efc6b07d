"""Write jaxmem/data/mnist_3_9.npz from the IDX files of MNIST: python scripts/make_mnist_subset.py DATA_DIR [OUT].

The same IDX files give the same bytes: fixed order of members, fixed dates, LZMA. The last line is the SHA-256 to put
into jaxmem/data/mnist.py.
"""

import hashlib
import io
import sys
import zipfile
from pathlib import Path

import numpy as np

from jaxmem.data import mnist

OUT = Path(__file__).parents[1] / "jaxmem" / "data" / mnist.SUBSET_FILE


def subset_bytes(data_dir: str | Path) -> bytes:
    """The subset as the bytes of an .npz file."""
    full = mnist.load_mnist(data_dir)
    digits = mnist.draw_digits(full.train_images, full.train_labels, num_copies=1)
    arrays = {"threes": digits.images[:-1], "nine": digits.images[-1], "train_index": digits.train_index}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3  # written by default from the operating system
            archive.writestr(info, member.getvalue(), compress_type=zipfile.ZIP_LZMA)
    return out.getvalue()


def main() -> None:
    """Write the file and print its size and sum."""
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    out = Path(sys.argv[2]) if len(sys.argv) == 3 else OUT
    blob = subset_bytes(sys.argv[1])
    out.write_bytes(blob)
    print(f"{out.name}: {len(blob):,} bytes")
    print(hashlib.sha256(blob).hexdigest())


if __name__ == "__main__":
    main()
