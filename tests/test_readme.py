import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_example_runs_and_says_what_the_comments_say(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    namespace: dict = {}
    exec(compile(block, "README.md", "exec"), namespace)
    exact = np.sort(np.asarray(namespace["amplitudes"], np.float64) ** 2 - 1)[::-1]
    np.testing.assert_allclose(namespace["exact"].eigenvalues, exact, atol=1e-5)  # float32 products of numbers up to 3
    # Residuals are of the operator as computed; float32 rounds the coefficients of the score itself, by about 1e-7.
    assert abs(namespace["few"].eigenvalues[0] - exact[0]) <= namespace["few"].residuals[0] + 1e-6 * exact[0]
    assert "estimate=250.0" in capsys.readouterr().out


def test_the_example_is_about_ten_lines():
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 14


def test_files_named_in_the_readme_exist():
    text = README.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:jaxmem|benchmarks|notebooks)/[\w/.]*)`", text):
        assert (README.parent / path).exists(), path


def test_notebooks_hold_results_without_warnings_and_times():
    for path in sorted((README.parent / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert all("execution" not in cell["metadata"] for cell in cells), path.name  # times of it
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        assert outputs, path.name
        assert all(output.get("name") != "stderr" for output in outputs), path.name  # warnings, with its paths


@pytest.mark.parametrize("name", ["exact_jacobian", "stable_diffusion"])
def test_benchmarks_are_the_committed_measurements(name, monkeypatch):
    root = README.parent
    monkeypatch.syspath_prepend(root / "benchmarks")
    benchmark = importlib.import_module(name)
    result = json.loads((root / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    assert benchmark.readme_section(result) in README.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["counting", "full_spectrum", "rounding"])
def test_the_benchmarks_page_has_the_committed_measurements(name, monkeypatch):
    folder = README.parent / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    result = json.loads((folder / "results" / f"{name}.json").read_text(encoding="utf-8"))
    assert importlib.import_module(name).readme_section(result) in (folder / "README.md").read_text(encoding="utf-8")


def test_what_the_readme_says_of_the_shipped_model_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(README.parent / "scripts")
    metrics = json.loads((README.parent / "benchmarks" / "results" / "verbatim.json").read_text(encoding="utf-8"))
    assert importlib.import_module("ship_verbatim").readme_section(metrics) in README.read_text(encoding="utf-8")


def test_what_the_readme_says_of_counts_was_measured():
    result = json.loads((README.parent / "benchmarks" / "results" / "full_spectrum.json").read_text(encoding="utf-8"))[
        "counts"
    ]
    true, text = result["positive"], " ".join(README.read_text(encoding="utf-8").split())
    rows = {budget: [row for row in result["rows"] if row["budget"] == budget] for budget in (0.12, 0.06, 0.02)}
    errors = {b: np.sqrt(np.mean([(row["estimate"] - true) ** 2 for row in found])) for b, found in rows.items()}
    assert f"A trained U-Net has {true} positive ones" in text
    assert all(round(row["estimate"]) == true for row in rows[0.12])
    assert f"with 12 % of d products ten estimates of ten say {true}, with 6 % they err by {errors[0.06]:.1f}" in text
    assert sum(map(len, rows.values())) == 30
    assert f"and with 2 % by {errors[0.02]:.1f}, where positive Ritz values" in text
    paper = [round(np.median([row["paper"] for row in found])) for found in rows.values()]
    assert "the paper's count, see {}, {} and {} with the same first runs".format(*paper) in text


def test_figures_of_the_benchmarks_page_exist():
    folder = README.parent / "benchmarks"
    for path in re.findall(r"\]\(([\w/.]+)\)", (folder / "README.md").read_text(encoding="utf-8")):
        assert (folder / path).exists(), path
