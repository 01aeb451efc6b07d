"""The sections of the documentation that the benchmarks write, each between two comments that name it.

python benchmarks/page.py

writes all of them again from the committed results, without measuring.
"""

import importlib
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FIGURES = DOCS / "figures"
#: Of each benchmark that has a section: the page and the comment.
SECTIONS = {
    "exact_jacobian": ("performance", "benchmark"),
    "stable_diffusion": ("performance", "stable diffusion benchmark"),
    "torch_networks": ("performance", "torch networks"),
    "counting": ("benchmarks", "counting"),
    "count_coverage": ("benchmarks", "count coverage"),
    "false_listings": ("benchmarks", "false listings"),
    "full_spectrum": ("benchmarks", "full spectrum"),
    "rounding": ("benchmarks", "rounding"),
    "large_models": ("large-models", "large models"),
    "finetune": ("fine-tune", "fine-tune"),
    "dimension": ("dimension", "dimension"),
}


def update_page(page: str, name: str, section: str) -> None:
    """Replace the section ``name`` of ``docs/<page>.md``."""
    path = DOCS / f"{page}.md"
    before, rest = path.read_text(encoding="utf-8").split(f"<!-- {name} -->", 1)
    _, after = rest.split(f"<!-- /{name} -->", 1)
    path.write_text(f"{before}<!-- {name} -->\n{section}\n<!-- /{name} -->{after}", encoding="utf-8")


def committed_section(benchmark: str) -> str:
    """The section of a benchmark as its committed result gives it."""
    result = json.loads((ROOT / "benchmarks" / "results" / f"{benchmark}.json").read_text(encoding="utf-8"))
    return importlib.import_module(benchmark).page_section(result)


if __name__ == "__main__":
    for benchmark, (page, name) in SECTIONS.items():
        update_page(page, name, committed_section(benchmark))
