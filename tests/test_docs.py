"""The documentation: every code block runs, every command line parses, every public name has an entry."""

import importlib
import json
import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path

import album
import numpy as np
import pytest
import tiny_pipelines

import jaxmem
from jaxmem import cli
from jaxmem.data import verbatim_model

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("**/*.md"))]
HUB = "CompVis/stable-diffusion-v1-4"  # 3.4 GB; the model that ships takes its place
# Of the page about models of other classes; tiny ones with random weights take their place.
PIPELINES = {"stabilityai/stable-diffusion-xl-base-1.0": "sdxl", "google/ddpm-cifar10-32": "ddpm"}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def with_blocks(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder with the prompts that the pages speak of, for what the blocks write; figures without a screen."""
    lines = verbatim_model()[1].read_text(encoding="utf-8").splitlines()
    chosen = [lines[0], *lines[1:3], *lines[31:33]]
    shutil.copytree(verbatim_model()[0] / "unet", tmp_path / "checkpoint-500/unet")
    (tmp_path / "prompts.csv").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    for folder, number in (("images", 3), ("other-images", 2)):
        pictures = np.random.default_rng(number).integers(0, 255, (number, 32, 32)).astype(np.uint8)
        album.write_folder(tmp_path / folder, pictures, ["a handwritten digit"] * number)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    yield tmp_path
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


@pytest.mark.parametrize("page", with_blocks("python"), ids=name_of)
def test_the_code_of_a_page_runs(page, workplace):
    """In order, in one namespace. In place of the hub's model stands the one that ships, without its network."""
    namespace: dict = {"__name__": "page"}
    text = page.read_text(encoding="utf-8")
    standing_in = _tiny_pipelines(workplace) if any(name in text for name in PIPELINES) else {}
    for block in blocks(page, "python"):
        line = text[: text.index(block)].count("\n")
        code = block.replace(HUB, str(verbatim_model()[0]))
        for name, folder in standing_in.items():
            code = code.replace(name, str(folder))
        exec(compile("\n" * line + code, str(page), "exec"), namespace)  # errors name the line of the page


def _tiny_pipelines(folder: Path) -> dict[str, Path]:
    """Pipelines that stand in for those of the hub, and the LoRA that the page speaks of."""
    torch, diffusers, transformers = map(pytest.importorskip, ("torch", "diffusers", "transformers"))
    pytest.importorskip("peft")
    made = {
        name: tiny_pipelines.make(torch, diffusers, transformers, folder / family, family)
        for name, family in PIPELINES.items()
    }
    xl, _ = made["stabilityai/stable-diffusion-xl-base-1.0"]
    tiny_pipelines.make_lora(torch, type(xl), xl.unet, folder, "style.safetensors")
    return {name: saved for name, (_, saved) in made.items()}


@pytest.mark.parametrize("page", with_blocks("sh"), ids=name_of)
def test_the_command_lines_of_a_page_parse(page):
    """Those of `jaxmem`; of `make` the target is there, of Python and shell scripts the file."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            program = words[0].rpartition("/")[2] if words else ""
            if program == "jaxmem":
                assert cli._parse(words[1:]) is not None
            elif program == "make":
                assert words[1] in targets, line
            elif program.startswith("python") and words[1].endswith(".py"):
                assert (ROOT / words[1]).exists(), line
            else:
                assert program in ("pip", "", "python") or (ROOT / words[0]).exists(), line


@pytest.mark.parametrize("number", range(1, 6))
def test_each_of_the_five_jobs_is_short_and_imports_from_jaxmem_alone(number):
    _, _, job = (DOCS / "five-jobs.md").read_text(encoding="utf-8").partition(f"\n## {number}. ")
    code = re.findall(r"```python\n(.*?)```", job.partition("\n## ")[0], re.DOTALL)
    assert "jaxmem." not in re.sub(r"jaxmem as jm", "", "".join(code))
    for block in code:
        assert len([line for line in block.splitlines() if line.strip()]) <= 12


def test_public_names_are_documented(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    documented = importlib.import_module("documented")
    assert documented.faults(jaxmem.__all__, documented.entries()) == []


def test_undocumented_names_are_found(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    documented = importlib.import_module("documented")
    (tmp_path / "a.md").write_text(
        "::: jaxmem\n    options:\n      members: [spectrum, bind]\n\n::: jaxmem.bind\n\n::: jaxmem.old\n"
    )
    monkeypatch.setattr(jaxmem.spectrum, "__doc__", None)
    monkeypatch.setattr(jaxmem.Count, "__doc__", "Count(lower, estimate)")  # Python's own
    assert documented.faults(["spectrum", "bind", "Count", "__version__"], documented.entries(tmp_path)) == [
        "Count: public, but in no page of docs/api",
        "old: in docs/api, but not public",
        "bind: in docs/api 2 times",
        "Count: no docstring",
        "spectrum: no docstring",
    ]


def test_the_table_of_detectors_is_made_from_their_entries(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = importlib.import_module("detector_table")
    rows = [line for line in script.page_section().splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {7}  # a bar in a formula would end its cell
    section = f"{script.BEGIN}{script.page_section()}{script.END}"
    assert section in (DOCS / "audit.md").read_text(encoding="utf-8"), "run scripts/detector_table.py"


def test_pictures_of_the_pages_exist_and_are_used():
    shown = set()
    for page in PAGES:
        for path in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / path).exists(), f"{name_of(page)}: {path}"
            shown.add((page.parent / path).resolve())
    assert shown == {path.resolve() for path in DOCS.glob("**/*.png")}


def test_the_gallery_has_the_figures_of_the_notebooks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    gallery = importlib.import_module("gallery")
    figures = gallery.notebook_figures()
    page = (DOCS / "gallery.md").read_text(encoding="utf-8")
    assert figures
    for name, content in figures.items():
        assert (gallery.FIGURES / name).read_bytes() == content, f"{name}: run scripts/gallery.py"
        assert f"figures/{name}" in page, name
    assert {path.name for path in gallery.FIGURES.glob("0*.png")} == set(figures)


def test_pages_are_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2].partition("\n\n")[0]
    pages = {str(page.relative_to(DOCS)) for page in DOCS.glob("**/*.md")}
    assert set(re.findall(r": ([\w/-]+\.md)$", navigation, re.MULTILINE)) == pages


def test_one_version_everywhere_and_the_changelog_has_its_date():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    (date,) = re.findall(r"^date-released: (\d{4}-\d\d-\d\d)$", citation, re.MULTILINE)
    assert f"\nversion: {version}\n" in citation
    assert f"\n## [{version}] - {date}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_benchmarks_are_the_committed_measurements(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmarks = importlib.import_module("page")
    for name, (page, mark) in benchmarks.SECTIONS.items():
        section = f"<!-- {mark} -->\n{benchmarks.committed_section(name)}\n<!-- /{mark} -->"
        assert section in (DOCS / f"{page}.md").read_text(encoding="utf-8"), f"{name}: run benchmarks/page.py"


def test_what_is_said_of_the_shipped_model_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    metrics = json.loads((ROOT / "benchmarks" / "results" / "verbatim.json").read_text(encoding="utf-8"))
    section = importlib.import_module("ship_verbatim").page_section(metrics)
    assert section in (DOCS / "shipped-model.md").read_text(encoding="utf-8")


def test_what_is_said_of_counts_was_measured():
    """The errors of counts of a spectrum that is known, from the rows of the benchmark."""
    import numpy as np

    path = ROOT / "benchmarks" / "results" / "full_spectrum.json"
    counts = json.loads(path.read_text(encoding="utf-8"))["counts"]
    true, text = counts["positive"], " ".join((DOCS / "choosing-a-method.md").read_text(encoding="utf-8").split())
    rows = {share: [row for row in counts["rows"] if row["budget"] == share] for share in (0.12, 0.06, 0.02)}
    errors = {b: np.sqrt(np.mean([(row["estimate"] - true) ** 2 for row in found])) for b, found in rows.items()}
    assert f"A trained U-Net has {true} positive ones" in text
    assert all(round(row["estimate"]) == true for row in rows[0.12])
    assert f"with 12 % of d products ten estimates of ten say {true}, with 6 % they err by {errors[0.06]:.1f}" in text
    assert sum(map(len, rows.values())) == 30
    assert f"and with 2 % by {errors[0.02]:.1f}, where positive Ritz values" in text
    paper = [round(np.median([row["paper"] for row in found])) for found in rows.values()]
    assert "the paper's count, see {}, {} and {} with the same first runs".format(*paper) in text
