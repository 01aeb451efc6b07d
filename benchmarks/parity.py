"""Errors against float64 under three instruction sets: of our networks and layers, in float32 and float64, and torch's.

    python benchmarks/parity.py

The comparisons are those of the tests (`tests/parity.py`), run once for each instruction set that XLA may use, with the
flags in XLA_FLAGS. Torch always uses what it finds. A test that fails ends the benchmark.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

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


def main() -> None:
    runs = {name: compare(isa) for name, isa in SETS.items()}
    lines = table(runs)
    result = {
        "what": "relative errors against float64 in the 2-norm, the largest of each kind of comparison",
        "environment": environment() | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")},
        "rows": {name: [row._asdict() for row in rows] for name, rows in runs.items()},
    }
    path = ROOT / "benchmarks" / "results" / "parity.json"
    path.write_text(json.dumps(result) + "\n")
    update_page("parity", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
