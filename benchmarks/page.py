"""The generated parts of benchmarks/README.md."""

from pathlib import Path

PAGE = Path(__file__).parent / "README.md"


def update_page(name: str, section: str) -> None:
    """Put a benchmark's section between its marks."""
    before, rest = PAGE.read_text(encoding="utf-8").split(f"<!-- {name} -->", 1)
    _, after = rest.split(f"<!-- /{name} -->", 1)
    PAGE.write_text(f"{before}<!-- {name} -->\n{section}\n<!-- /{name} -->{after}", encoding="utf-8")
