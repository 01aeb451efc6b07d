"""Put the model and the captions of a finished `jaxmem reproduce verbatim` where the package ships them.

python scripts/ship_verbatim.py runs/verbatim
"""

import csv
import shutil
import sys
from pathlib import Path

from jaxmem.config import VerbatimConfig
from jaxmem.data.captions import CATEGORIES, NUM_UNIQUE, general_captions, unique_captions
from jaxmem.runs import Run
from jaxmem.stable_diffusion.pipeline import StableDiffusion

TARGET = Path(__file__).parent.parent / "jaxmem" / "data" / "verbatim"
LIMIT = 5_000_000  # bytes


def main(directory: str) -> None:
    run = Run.read(directory)
    if run.manifest.get("experiment") != "verbatim" or not run.finished:
        sys.exit(f"{directory}: expected a finished run of verbatim")
    expected = VerbatimConfig().training.num_steps
    if run.manifest["config"]["training"]["num_steps"] != expected:
        sys.exit(f"{directory}: expected the {expected} training steps of the default, got another number")
    source = run.directory / "model"
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    if size > LIMIT:
        sys.exit(f"{source}: expected at most {LIMIT:,} bytes, got {size:,}")
    StableDiffusion.load(source)
    shutil.rmtree(TARGET, ignore_errors=True)
    shutil.copytree(source, TARGET / "model")
    kinds = [name for name in CATEGORIES for _ in range(NUM_UNIQUE)]
    with open(TARGET / "prompts.csv", "w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["prompt", "label", "category"])
        for text, kind in zip(general_captions() + unique_captions(), kinds, strict=True):
            writer.writerow([text, int(kind != "none"), kind])
    print(f"{TARGET}: {size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
