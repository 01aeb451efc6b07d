"""Copy the figures of the executed notebooks to docs/figures, where docs/gallery.md shows them.

python scripts/gallery.py
"""

import base64
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "figures"


def notebook_figures() -> dict[str, bytes]:
    """The PNG files in the outputs of the notebooks: notebook's name and number of the figure in it."""
    figures = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
        pictures = [data["image/png"] for data in outputs if "image/png" in data]
        for number, picture in enumerate(pictures, 1):
            figures[f"{path.stem}-{number}.png"] = base64.b64decode("".join(picture))
    return figures


if __name__ == "__main__":
    for name, content in notebook_figures().items():
        (FIGURES / name).write_bytes(content)
        print(FIGURES / name)
