"""Errors against float64 under three instruction sets: of our networks and layers, in float32 and float64, and torch's.

    python benchmarks/rounding.py

The comparisons are those of the tests (`tests/parity.py`), run once for each instruction set that XLA may use, with the
flags in XLA_FLAGS. Torch always uses what it finds. A test that fails ends the benchmark.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from exact_jacobian import environment
from page import update_page

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from parity import Row, table  # noqa: E402

SETS = {"SSE4.2": "SSE4_2", "AVX2": "AVX2", "all of this CPU": None}


def compare(isa: str | None) -> list[Row]:
    limit = "" if isa is None else f" --xla_cpu_max_isa={isa}"
    flags = os.environ | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + limit}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "pytest", "-q", "tests", "--parity", str(rows)]
        subprocess.run(command, cwd=ROOT, env=flags, check=True)
        return [Row(*row) for row in json.loads(rows.read_text())]


def page_section(result: dict[str, Any]) -> str:
    """The benchmark as the page of benchmarks shows it."""
    facts = result["environment"]
    return "\n".join(
        [
            *table({name: [Row(*row) for row in rows] for name, rows in result["rows"].items()}),
            "",
            f"{facts['cpu']}, jax {facts['jax']}, torch {facts['torch']}, XLA_FLAGS={facts['XLA_FLAGS']}",
        ]
    )


def save(runs: dict[str, list[Row]]) -> None:
    result = {
        "what": "relative errors against float64 in the 2-norm: name, ours, the peer's, ours in float64, of inputs",
        "environment": environment() | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")},
        "rows": {name: [[v if isinstance(v, str | None) else float(f"{v:.3g}") for v in row] for row in rows]
                 for name, rows in runs.items()},
    }  # fmt: skip
    path = ROOT / "benchmarks" / "results" / "rounding.json"
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    update_page("benchmarks", "rounding", page_section(result))
    print(page_section(result))


if __name__ == "__main__":
    save({name: compare(isa) for name, isa in SETS.items()})
