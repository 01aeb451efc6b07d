"""What a finished `jaxmem reproduce dimension` has found, as the table and the figure of its page.

jaxmem reproduce dimension --out runs/dimension
python benchmarks/dimension.py runs/dimension
"""

import json
import shutil
import sys
from typing import Any

from counting import RESULTS
from exact_jacobian import environment
from page import FIGURES, update_page

from jaxmem.report.figures import draw
from jaxmem.runs.directory import Run


def main(directory: str) -> None:
    run = Run.read(directory)
    if run.manifest.get("experiment") != "dimension" or not run.finished:
        sys.exit(f"{directory}: expected a finished run of dimension")
    metrics = run.metrics()
    result = {"environment": environment(), "config": run.manifest["config"], "table": metrics["table"]}
    (RESULTS / "dimension.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    update_page("dimension", "dimension", page_section(result))
    for figure in draw(directory):
        shutil.copy(figure, FIGURES / figure.name)


def page_section(result: dict[str, Any]) -> str:
    """The table of the page: mean and spread over the points, where it is not 0.00."""
    table = result["table"]
    names = list(dict.fromkeys(row["estimator"] for row in table))
    rows: dict[str, list[str]] = {}
    for row in table:
        begun = rows.setdefault(row["manifold"], [row["manifold"], str(row["dimension"])])
        spread = f"{row['spread']:.2f}"
        begun.append(f"{row['mean']:.2f}" if float(spread) == 0 else f"{row['mean']:.2f}&nbsp;±&nbsp;{spread}")
    head = ["data", "true", *names]
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in [head, ["---", *["--:"] * (len(head) - 1)], *rows.values()]
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
