"""The sections of the documentation that the benchmarks write, each between two comments that name it."""

from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
FIGURES = DOCS / "figures"


def update_page(page: str, name: str, section: str) -> None:
    """Replace the section ``name`` of ``docs/<page>.md``."""
    path = DOCS / f"{page}.md"
    before, rest = path.read_text(encoding="utf-8").split(f"<!-- {name} -->", 1)
    _, after = rest.split(f"<!-- /{name} -->", 1)
    path.write_text(f"{before}<!-- {name} -->\n{section}\n<!-- /{name} -->{after}", encoding="utf-8")
