"""Pictures inside a page: data URIs of thumbnails and figures, and small lines drawn as SVG."""

import base64
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

SIDE = 112  # pixels of a thumbnail: twice what a table shows, for sharp screens and paper


def data_uri(content: bytes, kind: str) -> str:
    """A file as the text that stands for it in a page."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def thumbnail(image: np.ndarray, side: int = SIDE) -> str:
    """An image (h, w, 3) of uint8 as a data URI, reduced to ``side`` pixels: PNG where it is small, else JPEG."""
    picture = Image.fromarray(image)
    exact = max(picture.size) <= 64
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = BytesIO()
    if exact:
        picture.save(stream, "PNG", optimize=True)
        return data_uri(stream.getvalue(), "png")
    picture.save(stream, "JPEG", quality=85, optimize=True)
    return data_uri(stream.getvalue(), "jpeg")


class Sparkline:
    """Sorted spectra in a box of 100 by 32, all on one scale, so that rows compare."""

    WIDTH, HEIGHT = 100, 32

    def __init__(self, values: np.ndarray) -> None:
        there = values[~np.isnan(values)]
        self.low = min(-1.1, float(np.quantile(there, 0.01))) if there.size else -1.1
        self.high = max(0.2, float(there.max())) if there.size else 0.2

    def height(self, value: Any) -> Any:
        """Where a value is, from the top of the box."""
        share = (np.clip(value, self.low, self.high) - self.low) / (self.high - self.low)
        return np.round(1 + (self.HEIGHT - 2) * (1 - share), 1)

    def points(self, values: np.ndarray, most: int = 40) -> str:
        """A descending spectrum (L,) as the points of a polyline; empty where there is none."""
        values = values[~np.isnan(values)]
        if not values.size:
            return ""
        chosen = np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int))
        x = np.round(1 + (self.WIDTH - 2) * chosen / max(len(values) - 1, 1), 1)
        return " ".join(f"{a:g},{b:g}" for a, b in zip(x, self.height(values[chosen]), strict=True))
