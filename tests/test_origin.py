"""Where a run came from: its date, command line and files, which decide nothing."""

import hashlib
import json
import re
import shutil
import subprocess

import pytest
from two_kinds import TwoKinds

from jaxmem import cli
from jaxmem.audit import audit
from jaxmem.commands import audit as command
from jaxmem.config import AuditConfig
from jaxmem.report.audit.page import write_report
from jaxmem.runs.directory import Run
from jaxmem.runs.origin import Origin, SourceFile, source_files, without_folders

CONFIG = AuditConfig(noises=1, ddim_steps=4, timesteps=(250,), batch=4)
PROMPTS = ["copied cat", "varied dog"]


@pytest.mark.parametrize(
    ("words", "whole", "shown"),
    [
        (["--prompts", "/home/me/p.csv", "q.csv"], "", ["--prompts", "p.csv", "q.csv"]),
        (["--prompts=/home/me/p.csv"], "", ["--prompts=p.csv"]),
        (["--lora", "../files/a.safetensors:0.8"], "", ["--lora", "a.safetensors:0.8"]),
        (["--out", "/data/a=b/c"], "", ["--out", "a=c"]),
        (["--out", r"C:\data\runs"], "", ["--out", "runs"]),
        (["CompVis/stable-diffusion-v1-4", "--out", "x/y"], "CompVis/stable-diffusion-v1-4", None),
        (["--timesteps", "981", "-"], "", ["--timesteps", "981", "-"]),
        (["/"], "", ["."]),
    ],
)
def test_folders_are_left_out_of_a_command_line(words, whole, shown):
    found = list(without_folders(words, whole))
    assert found == (shown or [whole, "--out", "y"])


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_hashes_are_those_of_sha256sum(tmp_path):
    (tmp_path / "captions").mkdir()
    for name in ("b.txt", "a.TXT", "c.png"):
        (tmp_path / "captions" / name).write_text(name)
    (tmp_path / "p.csv").write_bytes(b"prompt\na cat\n")

    def sums(folder, *names):
        return subprocess.run(["sha256sum", *names], cwd=folder, capture_output=True, check=True).stdout

    listing = hashlib.sha256(sums(tmp_path / "captions", "a.TXT", "b.txt")).hexdigest()
    found = source_files({"prompts": (tmp_path / "p.csv", "-"), "reference": (tmp_path / "captions",)}.items())
    assert found == (
        SourceFile("prompts", "p.csv", sums(tmp_path, "p.csv").decode().split()[0]),
        SourceFile("prompts", "standard input", None),
        SourceFile("reference", "captions", listing),
    )


def test_a_run_continues_on_another_day_by_another_command(tmp_path, monkeypatch):
    """The manifest keeps what it said first; the page has the run's dates, and its bytes do not change."""
    monkeypatch.setattr("jaxmem.runs.origin.now", lambda: "2026-01-02T03:04:05Z")
    monkeypatch.setattr("jaxmem.audit.stages.now", lambda: "2026-02-03T04:05:06Z")
    first = Origin(("jaxmem", "audit", "--out", "my run"), (SourceFile("memorized", "p.csv", "5f" * 32),))
    audit(TwoKinds(), PROMPTS, CONFIG, folder=tmp_path / "run", origin=first)
    manifest = Run.read(tmp_path / "run").manifest
    assert manifest["origin"] == {
        "begun": "2026-01-02T03:04:05Z",
        "command": ["jaxmem", "audit", "--out", "my run"],
        "files": [{"role": "memorized", "name": "p.csv", "sha256": "5f" * 32}],
    }
    page = write_report(tmp_path / "run").read_bytes()
    monkeypatch.setattr("jaxmem.runs.origin.now", lambda: "2027-01-01T00:00:00Z")
    again = audit(TwoKinds(), PROMPTS, CONFIG, folder=tmp_path / "run", origin=Origin(("jaxmem", "other")))
    assert again.manifest == manifest
    assert write_report(tmp_path / "run").read_bytes() == page
    for words in (b"2026-01-02 03:04:05 UTC", b"2026-02-03 04:05:06 UTC", b"&#39;my run&#39;", b"p.csv, SHA-256 5f5f"):
        assert words in page
    (tmp_path / "run/metrics.json").unlink()
    assert audit(TwoKinds(), PROMPTS, CONFIG, folder=tmp_path / "run").manifest == manifest


def test_python_begins_runs_without_a_command(tmp_path):
    found = audit(TwoKinds(), PROMPTS, CONFIG, folder=tmp_path / "run").manifest["origin"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", found.pop("begun"))
    assert found == {"command": None, "files": []}


def test_the_command_says_what_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "open_model", lambda *_: TwoKinds())
    monkeypatch.setattr(cli, "_keep_compiled_programs", lambda: None)
    (tmp_path / "p.txt").write_text("copied cat\nvaried dog\n")
    (tmp_path / "n.txt").write_text("varied house\n")
    arguments = ["audit", "someone/model", "--memorized", str(tmp_path / "p.txt"), f"--reference={tmp_path / 'n.txt'}"]
    arguments += ["--out", str(tmp_path / "run"), "--noises", "1", "--ddim-steps", "4", "--timesteps", "250"]
    assert cli.main(arguments) == 0, capsys.readouterr().err
    text = (tmp_path / "run/manifest.json").read_text()
    assert str(tmp_path) not in text
    found = json.loads(text)["origin"]
    assert found["command"] == [
        *("jaxmem", "audit", "someone/model", "--memorized", "p.txt", "--reference=n.txt", "--out", "run"),
        *("--noises", "1", "--ddim-steps", "4", "--timesteps", "250"),
    ]
    assert found["files"] == [
        {"role": role, "name": name, "sha256": hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}
        for role, name in (("memorized", "p.txt"), ("reference", "n.txt"))
    ]
