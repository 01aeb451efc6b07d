"""Write the table of detectors of docs/audit.md from their entries.

python scripts/detector_table.py
"""

from pathlib import Path

from jaxmem.detectors import table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "audit.md"
BEGIN, END = "<!-- detectors -->\n", "<!-- /detectors -->"


def page_section() -> str:
    """One row per registered detector, and what is to be said of its released code."""
    rows = table()
    lines = [
        "| detector | formula | memorized is | needs | Jacobian products | source |",
        "|---|---|---|---|---|---|",
        *(
            f"| `{row['name']}` | {row['formula']} | {row['memorized is']} | {row['needs']} | {row['products']}"
            f" | {row['source']} |"
            for row in rows
        ),
        "",
        "Notes on the released code:",
        "",
        *(f"- `{row['name']}`: {row['as released']}." for row in rows if row["as released"]),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}{page_section()}{END}{after}", encoding="utf-8")
