"""The run contract: resume, refusals, kills in the middle of writing, full and read-only disks."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxmem.diffusion import NoiseSchedule
from jaxmem.runs import directory as runs
from jaxmem.runs import durable, manifest
from jaxmem.runs.directory import Run
from jaxmem.runs.identity import fingerprint

CONFIG = {"seed": 1, "sizes": (2, 3), "training": {"num_steps": 10, "second_order": "none"}}
HERE = {"versions": {"jaxmem": "1"}, "device": {"kind": "cpu", "count": 1}}


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(manifest, "environment", lambda: dict(HERE))
    monkeypatch.setattr(runs, "_process_index", lambda: 0)
    return tmp_path / "run"


def finish(run: Run) -> None:
    for i in range(3):
        key = f"unit-{i}"
        if not run.done(key):
            run.save(key, values=np.full((2, 2), i, np.float32))
            run.append({"key": key, "value": i / 3})
    eigenvalues = np.stack([run.load(f"unit-{i}")["values"] for i in range(3)])
    run.finalise(
        {"mean": eigenvalues.mean(), "nan": np.nan}, {"eigenvalues": eigenvalues, "method": np.asarray("eigh")}
    )


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_run_from_beginning_to_end(out: Path):
    run = Run.open(out, CONFIG, dtype="float32", data=fingerprint(np.zeros(3)))
    written = json.loads((out / "manifest.json").read_text())
    assert written == {
        "format": 2,
        "config": {"seed": 1, "sizes": [2, 3], "training": {"num_steps": 10, "second_order": "none"}},
        "dtype": "float32",
        "data": fingerprint(np.zeros(3)),
        **HERE,
    }
    assert not run.finished
    finish(run)
    run.cost({"stage": "spectra", "seconds": 1.5})
    assert run.finished
    assert sorted(tree(out)) == [
        "arrays/unit-0.npz",
        "arrays/unit-1.npz",
        "arrays/unit-2.npz",
        "costs-0.jsonl",
        "manifest.json",
        "metrics.json",
        "results-0.jsonl",
        "spectra.npz",
    ]
    seen = Run.read(out)
    assert seen.manifest == written
    assert seen.metrics() == {"mean": 1.0, "nan": None}
    assert seen.rows() == [{"key": f"unit-{i}", "value": i / 3} for i in range(3)]
    assert seen.costs() == [{"stage": "spectra", "seconds": 1.5}]
    spectra = seen.spectra()
    assert spectra["eigenvalues"].shape == (3, 2, 2)
    assert str(spectra["method"]) == "eigh"


def test_the_environment_is_recorded(tmp_path: Path):
    Run.open(tmp_path / "run", {})
    written = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert set(written["versions"]) == {"jaxmem", "jax", "jaxlib", "flax", "optax", "numpy", "python"}
    assert written["device"]["count"] >= 1
    text = (tmp_path / "run" / "manifest.json").read_text()
    assert str(tmp_path) not in text
    assert os.uname().nodename not in text.split('"')


def test_a_second_start_continues(out: Path):
    whole, parts = out / "whole", out / "parts"
    finish(Run.open(whole, CONFIG))
    first = Run.open(parts, CONFIG)
    first.save("unit-0", values=np.zeros((2, 2), np.float32))
    first.append({"key": "unit-0", "value": 0.0})
    first.save("unit-1", values=np.zeros((2, 2), np.float32))  # its row never came: the unit is done again
    again = Run.open(parts, CONFIG)
    assert again.done("unit-0")
    assert not again.done("unit-1")
    finish(again)
    assert tree(parts) == tree(whole)
    finish(Run.open(parts, CONFIG))
    assert tree(parts) == tree(whole)


def test_another_config_is_refused_field_by_field(out: Path):
    Run.open(out, CONFIG, dtype="float32")
    other = {"seed": 2, "sizes": (2, 3), "training": {"num_steps": 10, "second_order": "exact"}, "extra": None}
    with pytest.raises(ValueError, match="expected a run of the same config") as error:
        Run.open(out, other, dtype="float32")
    message = str(error.value)
    assert "config.seed: there 1, now 2" in message
    assert 'config.training.second_order: there "none", now "exact"' in message
    assert "config.extra: there nothing, now null" in message
    assert "sizes" not in message
    assert "choose another folder" in message
    with pytest.raises(ValueError, match='dtype: there "float32", now "float64"'):
        Run.open(out, CONFIG, dtype="float64")
    with pytest.raises(ValueError, match="data: there nothing, now"):
        Run.open(out, CONFIG, dtype="float32", data="0")


def test_a_section_of_another_version_is_one_difference(out: Path):
    Run.open(out, CONFIG)
    newer = CONFIG | {"refinement": {"num_steps": 10, "weighting": "v"}}
    with pytest.raises(ValueError, match="with the version of jaxmem that made it") as error:
        Run.open(out, newer)
    assert '(config.refinement: there nothing, now {"num_steps": 10, "weighting": "v"})' in str(error.value)
    with pytest.raises(ValueError, match=r"config.training: there \{.*\}, now nothing\)"):
        Run.open(out, {key: value for key, value in CONFIG.items() if key != "training"})


def test_of_long_lists_the_first_difference_is_shown(out: Path):
    prompts = [{"prompt": f"a picture of the number {i}"} for i in range(40)]
    Run.open(out, {"prompts": prompts})
    for other, shown in (
        ([*prompts[:21], {"prompt": "x"}, *prompts[22:]], r'prompts\[21\]: there .*number 21"}, now {"prompt": "x"}\)'),
        (prompts[:30], r'prompts\[30\]: there {"prompt": "a picture of the number 30"}, now nothing\)'),
        ([*prompts, None], r"prompts\[40\]: there nothing, now null\)"),
    ):
        with pytest.raises(ValueError, match=shown):
            Run.open(out, {"prompts": other})


def test_another_environment_is_told_and_recorded(out: Path, monkeypatch: pytest.MonkeyPatch):
    Run.open(out, CONFIG)
    monkeypatch.setattr(manifest, "environment", lambda: HERE | {"versions": {"jaxmem": "2"}})
    with pytest.warns(UserWarning, match=r'versions\.jaxmem: there "1", now "2"'):
        Run.open(out, CONFIG)
    assert json.loads((out / "environments-0.jsonl").read_text()) == {"versions": {"jaxmem": "2"}}


def test_a_foreign_folder_is_refused(out: Path):
    out.mkdir()
    for name in "abcd":
        (out / name).touch()
    with pytest.raises(ValueError, match=r"expected a new or empty directory or a run, got 4 .*\(a, b, c, …\)"):
        Run.open(out, CONFIG)
    with pytest.raises(ValueError, match="expected a directory for the run, got a file"):
        Run.open(out / "a", CONFIG)
    assert sorted(path.name for path in out.iterdir()) == list("abcd")


@pytest.mark.parametrize("content", [b"", b'{"format": 1, "con', b"[1]", b"\xff\xfe"])
def test_a_damaged_manifest_is_named(out: Path, content: bytes):
    Run.open(out, CONFIG)
    (out / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json: expected JSON.*got .*choose another folder"):
        Run.open(out, CONFIG)
    with pytest.raises(ValueError, match=r"manifest\.json: expected JSON"):
        Run.read(out)


def test_what_does_not_belong_into_a_manifest(out: Path):
    with pytest.raises(ValueError, match=r"config\.data_dir: expected no absolute path"):
        Run.open(out, {"data_dir": str(out.absolute())})
    with pytest.raises(ValueError, match=r"config\.x: expected numbers.*got set"):
        Run.open(out, {"x": {1}})
    with pytest.raises(ValueError, match=r"config\.x\[0\]: expected numbers.*got NoiseSchedule"):
        Run.open(out, {"x": [NoiseSchedule()]})
    assert not out.exists()


def test_a_torn_last_line_is_cut(out: Path):
    run = Run.open(out, CONFIG)
    run.append({"key": "a", "value": 1})
    whole = (out / "results-0.jsonl").read_bytes()
    for torn in (b'{"key": "b", "val', b"\x00\x00", b'{"key": "b"}'):
        (out / "results-0.jsonl").write_bytes(whole + torn)
        assert [row["key"] for row in Run.read(out).rows()] == ["a"]
        again = Run.open(out, CONFIG)
        assert (out / "results-0.jsonl").read_bytes() == whole
        assert not again.done("b")


def test_a_damaged_line_in_the_middle_is_named(out: Path):
    run = Run.open(out, CONFIG)
    run.append({"key": "a"})
    (out / "results-0.jsonl").write_bytes(b'{"key"\n{"key": "b"}\n')
    with pytest.raises(ValueError, match=r"results-0\.jsonl, line 1: expected a JSON object, got"):
        Run.open(out, CONFIG)
    (out / "results-0.jsonl").write_bytes(b'{"value": 1}\n')
    with pytest.raises(ValueError, match=r'results-0\.jsonl: expected a "key" in each line'):
        Run.open(out, CONFIG)


def test_keys_are_new_and_are_file_names(out: Path):
    run = Run.open(out, CONFIG)
    run.append({"key": "a"})
    with pytest.raises(ValueError, match="expected a new key, got 'a' a second time"):
        run.append({"key": "a"})
    with pytest.raises(ValueError, match="expected a new key, got 'a' a second time"):
        Run.open(out, CONFIG).append({"key": "a"})
    with pytest.raises(ValueError, match='expected a text under "key", got None'):
        run.append({"value": 1})
    for key in ("", "../a", "a/b", ".tmp-0-a", "a b", "x" * 151):
        with pytest.raises(ValueError, match="key: expected letters, digits"):
            run.save(key, x=np.zeros(1))
        with pytest.raises(ValueError, match="key: expected letters, digits"):
            run.append({"key": key})


def test_processes_share_a_run(out: Path):
    one, two = Run.open(out, CONFIG, process=0), Run.open(out, CONFIG, process=10)
    two.append({"key": "b"})
    one.append({"key": "a"})
    assert [row["key"] for row in Run.read(out).rows()] == ["a", "b"]
    assert Run.open(out, CONFIG, process=0).done("b")
    one.append({"key": "b", "value": 1})
    with pytest.raises(ValueError, match=r"results-10\.jsonl: expected one row per key, got two different ones of 'b'"):
        Run.read(out)


def test_arrays_that_are_missing_damaged_or_objects(out: Path):
    run = Run.open(out, CONFIG)
    with pytest.raises(ValueError, match=r"a\.npz: expected saved arrays, got no such file"):
        run.load("a")
    run.save("a", x=np.arange(100.0), y=np.ones(2))
    path = out / "arrays" / "a.npz"
    for keep in (0, 5, 300):
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(
            ValueError, match=r"a\.npz: expected a whole \.npz file.*delete the line of its unit in results"
        ):
            run.load("a")
        run.save("a", x=np.arange(100.0), y=np.ones(2))
    assert list(run.load("a")) == ["x", "y"]
    np.testing.assert_array_equal(run.load("a")["x"], np.arange(100.0))
    path.write_bytes(path.read_bytes().replace(np.float64(99).tobytes(), np.float64(98).tobytes()))
    with pytest.raises(ValueError, match=r"a\.npz: expected a whole \.npz file, got a damaged file"):
        run.load("a")
    with pytest.raises(ValueError, match="arrays: expected at least one for 'a', got none"):
        run.save("a")
    with pytest.raises(ValueError, match="c: expected an array of numbers or texts, got dtype object"):
        run.save("b", c=np.asarray([None]))
    with pytest.raises(ValueError, match="c: expected an array of numbers or texts, got dtype object"):
        run.finalise({}, {"c": np.asarray([None])})


def test_reading_what_is_no_finished_run(out: Path):
    with pytest.raises(ValueError, match=r"expected a run directory, got no manifest\.json"):
        Run.read(out)
    run = Run.open(out, CONFIG)
    for look in (run.metrics, run.spectra):
        with pytest.raises(ValueError, match=r"expected a finished run, got one without metrics\.json"):
            look()
    finish(run)
    whole = (out / "spectra.npz").read_bytes()
    (out / "spectra.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"spectra\.npz: expected a whole \.npz file, got .*delete metrics\.json"):
        run.spectra()
    (out / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"metrics\.json: expected JSON, got a damaged file.*delete it"):
        run.metrics()


# The child does the work of `finish`, and kills itself at the n-th call of one of the functions that write.
CHILD = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
import test_runs as t
from killing import at_call, die
t.manifest.environment = lambda: dict(t.HERE)
t.runs._process_index = lambda: 0
name, number = sys.argv[2], int(sys.argv[3])
setattr(os, name, at_call(number, getattr(os, name), die))
run = t.Run.open(Path(sys.argv[1]), t.CONFIG)
t.finish(run)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
@pytest.mark.parametrize(
    ("function", "calls"),
    # os.link: manifest. os.replace: three arrays, spectra, metrics. os.fsync: twice for each of these, and for rows.
    [("link", 1), ("unlink", 1)]
    + [("replace", n) for n in (1, 3, 4, 5)]
    + [("fsync", n) for n in (1, 2, 3, 5, 6, 8, 12, 14)],
)
def test_a_killed_run_continues_to_the_same_bytes(out: Path, function: str, calls: int):
    whole, killed = out / "whole", out / "killed"
    finish(Run.open(whole, CONFIG))
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(killed), function, str(calls), str(Path(__file__).parent)],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert tree(killed) != tree(whole)
    finish(Run.open(killed, CONFIG))
    assert tree(killed) == tree(whole)


def test_a_full_disk_is_clear_and_loses_nothing(out: Path):
    resource = pytest.importorskip("resource", reason="needs POSIX limits")
    run = Run.open(out, CONFIG)
    run.save("a", x=np.zeros(10))
    run.append({"key": "a"})
    before = tree(out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))  # files of at most 200 bytes
    try:
        for write in (
            lambda: run.save("a", x=np.zeros(1000)),
            lambda: run.append({"key": "b", "text": "x" * 300}),
            lambda: run.finalise({"text": "x" * 300}, {"eigenvalues": np.zeros(1000)}),
        ):
            with pytest.raises(OSError, match=r"cannot write: .*make room .*what is finished is kept"):
                write()
            assert tree(out) == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not run.done("b")
    run.append({"key": "b"})
    assert [row["key"] for row in Run.read(out).rows()] == ["a", "b"]


def test_a_read_only_place_is_clear(out: Path, monkeypatch: pytest.MonkeyPatch):
    def read_only(*_args, **_kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", read_only)
        with pytest.raises(OSError, match="run: cannot write: Read-only file system; make room or make it writable"):
            Run.open(out, CONFIG)
    run = Run.open(out, CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "open", read_only, raising=False)
        with pytest.raises(OSError, match=r"a\.npz: cannot write: Read-only file system"):
            run.save("a", x=np.zeros(1))
        with pytest.raises(OSError, match=r"results-0\.jsonl: cannot write: Read-only file system"):
            run.append({"key": "a"})
    assert not run.done("a")


@pytest.mark.parametrize("made", [1, None, 3])
def test_a_folder_of_another_format_is_refused(out: Path, made: int | None):
    Run.open(out, CONFIG)
    path = out / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": made}))
    before = tree(out)
    sentence = rf"run: expected a run of format 2, got format {made} of jaxmem .*; read it with that version, or run"
    with pytest.raises(ValueError, match=sentence):
        Run.read(out)
    with pytest.raises(ValueError, match=sentence):
        Run.open(out, CONFIG)
    assert tree(out) == before


def test_fingerprints_tell_arrays_apart():
    a = np.arange(6, dtype=np.int32)
    assert fingerprint(a) == fingerprint(a.copy())
    different = [a, a.astype(np.float32), a.reshape(2, 3), a[::-1]]
    assert len({fingerprint(array) for array in different}) == 4
