"""The paper's figures of any Stable Diffusion model, from the command line: a tiny random pipeline, both presets."""

import re

import pytest
import tiny_diffusion as tiny
from conftest import optional_import

from jaxmem import cli
from jaxmem.runs.directory import Run

LINES = ["caption;category", "the cat;matching", "the dog;template", "a house;none", "the owl;matching"]
CATEGORIES = ["matching", "template", "none", "no prompt"]


@pytest.fixture(scope="module")
def command(torch, diffusers, tmp_path_factory):
    """One prompt of each category, six sampling steps."""
    folder = tmp_path_factory.mktemp("sd")
    _, path = tiny.make_pipeline(torch, diffusers, optional_import("transformers"), folder, **tiny.SMALLEST)
    (folder / "prompts.csv").write_text("\n".join(LINES))
    prompts = ["--prompts", str(folder / "prompts.csv"), "--per-category", "1"]
    return ["reproduce", "sd", str(path), *prompts, "--ddim-steps", "6"]


@pytest.mark.slow  # fast: the same estimate in test_a_dry_run_says_and_writes_nothing of test_audit.py
@pytest.mark.parametrize("preset", ["small", "paper"])
def test_a_dry_run_prints_products_hours_and_gigabytes(command, preset, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = [*command, "--preset", preset, "--timesteps", "831", "--num-steps", "8", "--dry-run", "--out", str(out)]
    if preset == "paper":
        arguments += ["--count-budget", "40"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "products with its Jacobian (counted)" in text
    assert re.search(r"time: about [\d.]+ (s|min|h) \(", text)  # hours from 100 minutes on
    assert re.search(r"\d [MG]B of parameters", text)
    assert not out.exists()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--method", "eigh"], marks=pytest.mark.slow, id="exact"),
        pytest.param(["--num-steps", "8"], id="ritz"),
    ],
)
def test_the_figures_are_drawn_and_the_page_is_written(command, options, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main([*command, *options, "--timesteps", "831", "333", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    run = Run.read(out)
    assert run.finished
    kinds = [prompt["category"] for prompt in run.manifest["config"]["prompts"]]
    assert kinds == CATEGORIES
    assert [prompt["prompt"] for prompt in run.manifest["config"]["prompts"]][-1] == ""
    for name in ("figure6", "figure7", "figure8", "figure9", "figure10"):
        path = out / "figures" / f"{name}.png"
        assert path.stat().st_size > 5000
        assert str(path) in printed
    assert (out / "report.html").stat().st_size > 10_000
