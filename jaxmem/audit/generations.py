"""What a finished audit drew, as files for people: a PNG per prompt and noise, and a table that says which is which."""

import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from jaxmem.prompts.cells import quoted_cell
from jaxmem.runs.durable import write_atomically

if TYPE_CHECKING:
    from jaxmem.audit.result import Audit

FOLDER, TABLE = "images", "generations.csv"
_DIGITS = 4  # of a prompt's number, so that names sort as numbers


def write_generations(result: "Audit", directory: Path, process: int = 0) -> None:
    """Write ``images/<number>-<noise>.png`` and ``generations.csv``, which has a row for each in the page's order.

    The number is that of the prompt in its list and the noise that of the starting point, both from 1, as in
    ``results.csv`` and on the page. An image that is there is whole and is left as it is; equal images are equal bytes.

    Args:
        result: of the audit; nothing is written where it has no images.
        directory: of the run.
        process: index of this process among those that share the run.

    Raises:
        OSError: a file cannot be written; each is there whole or not at all.
    """
    if result.images is None:
        return
    (directory / FOLDER).mkdir(exist_ok=True)
    lines = ["place,number,noise,prompt,file\n"]
    order, places = result.ranking.order.tolist(), result.ranking.places
    for place, n in enumerate(order, 1):
        for noise in np.flatnonzero(result.sampled[n]).tolist():
            name = f"{FOLDER}/{n + 1:0{_DIGITS}d}-{noise + 1}.png"
            shown = "" if np.isnan(places[n]) else place
            lines.append(f"{shown},{n + 1},{noise + 1},{quoted_cell(result.prompts[n].text)},{name}\n")
            if not (directory / name).exists():
                _write(directory / name, as_png(result.images[n, noise]), process)
    _write(directory / TABLE, "".join(lines).encode(), process)


def _write(path: Path, content: bytes, process: int) -> None:
    write_atomically(path, lambda stream: stream.write(content), process)


def as_png(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    r"""An image as a PNG file; an audit needs no imaging library for this.

    >>> as_png(np.zeros((2, 3, 3), np.uint8))[:4]
    b'\x89PNG'
    """
    height, width, _ = image.shape
    left = np.pad(image[:, :-1], ((0, 0), (1, 0), (0, 0)))
    rows = np.pad((image - left).reshape(height, -1), ((0, 0), (1, 0)), constant_values=1)  # filter 1: of the left

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # eight bits of red, green and blue
    pixels = zlib.compress(rows.tobytes(), 6)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
