import json
import re
from pathlib import Path

import numpy as np

README = Path(__file__).parent.parent / "README.md"


def example() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return block


def test_the_example_runs_and_says_what_the_comments_say(capsys):
    namespace: dict = {}
    exec(compile(example(), "README.md", "exec"), namespace)
    exact = np.sort(np.asarray(namespace["amplitudes"], np.float64) ** 2 - 1)[::-1]
    # float32 products of numbers up to 3
    np.testing.assert_allclose(namespace["everything"].eigenvalues, exact, atol=1e-5)
    # Residuals are of the operator as computed; float32 rounds the coefficients of the score itself, by about 1e-7.
    few = namespace["few"]
    assert abs(few.eigenvalues[0] - exact[0]) <= few.residuals[0] + 1e-6 * exact[0]
    assert "estimate=250.0" in capsys.readouterr().out


def test_it_fits_on_a_screen_and_a_half():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120
    assert len([line for line in example().splitlines() if line.strip()]) <= 12


def test_files_named_in_the_readme_exist():
    text = README.read_text(encoding="utf-8")
    paths = re.findall(r"`((?:jaxmem|benchmarks|notebooks|docs|scripts)/[\w/.]*)`", text)
    paths += re.findall(r"\]\(([\w/.-]+)\)", text)
    assert paths
    for path in paths:
        assert (README.parent / path).exists(), path


def test_notebooks_hold_results_without_warnings_and_times():
    for path in sorted((README.parent / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert all("execution" not in cell["metadata"] for cell in cells), path.name  # times of it
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        assert outputs, path.name
        assert all(output.get("name") != "stderr" for output in outputs), path.name  # warnings, with its paths
