"""Several processes of `jax.distributed` on one run directory: they share the work, and a kill loses nothing."""

import json
import multiprocessing
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import conftest
import first_starts
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shared_run

from jaxmem import Arnoldi, Dense, Lanczos, batch_spectra
from jaxmem.runs.directory import Run
from jaxmem.spectra.shared import record_spectra

SCRIPT = Path(__file__).parent / "shared_run.py"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(out, modes):
    """Start the processes of one run, as many as modes."""
    port = free_port()
    environment = conftest.command_environment() | {"JAX_PLATFORMS": "cpu"}
    commands = [
        [sys.executable, "-W", "ignore", str(SCRIPT), str(out), str(port), str(len(modes)), str(index), mode]
        for index, mode in enumerate(modes)
    ]
    return [subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True) for c in commands]


def end(processes, seconds=600):
    """Wait for them all, and leave none behind."""
    try:
        errors = [process.communicate(timeout=seconds)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [process.returncode for process in processes], errors


def arrays(out):
    return {path.name: path.read_bytes() for path in (out / "arrays").iterdir() if not path.name.startswith(".tmp")}


def keys(out):
    lines = [line for path in sorted(out.glob("results-*.jsonl")) for line in path.read_text().splitlines()]
    return [json.loads(line)["key"] for line in lines]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process, and the spectra of all points at once."""
    out = tmp_path_factory.mktemp("alone") / "run"
    found = shared_run.work(out)
    state, x, t = shared_run.problem()
    at_once = batch_spectra(shared_run.SCORE, state, jnp.asarray(x), t, batch=2)
    # Other groups of points: the last one of a unit is smaller.
    largest = np.abs(at_once.eigenvalues).max()
    np.testing.assert_allclose(found.eigenvalues, at_once.eigenvalues, atol=1e-5 * largest)
    np.testing.assert_allclose(found.noise, at_once.noise, rtol=1e-3)
    np.testing.assert_array_equal(found.num_products, at_once.num_products)
    np.testing.assert_array_equal(found.status, at_once.status)
    assert (found.dtype, found.seed, found.eigenvalues.dtype) == (at_once.dtype, None, at_once.eigenvalues.dtype)
    exact = np.stack([shared_run.SCORE.spectrum(state, x[i], int(t[i])) for i in range(len(x))])
    np.testing.assert_allclose(found.eigenvalues, exact, atol=1e-4 * largest)
    return out


def test_two_processes_share_a_run(alone, tmp_path):
    out = tmp_path / "run"
    codes, errors = end(start(out, ["mesh", "mesh"]))
    assert codes == [0, 0], errors
    assert arrays(out) == arrays(alone)
    assert sorted(keys(out)) == sorted(keys(alone))
    assert [len(lines.read_text().splitlines()) for lines in sorted(out.glob("results-*"))] == [4, 4]
    np.testing.assert_array_equal(Run.read(out).spectra()["eigenvalues"], Run.read(alone).spectra()["eigenvalues"])


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_loses_nothing(alone, tmp_path, victim):
    out = tmp_path / "run"
    modes = ["", ""]
    modes[victim] = "deadly"
    codes, errors = end(start(out, modes))
    assert codes[victim] == -signal.SIGKILL, errors
    assert codes[1 - victim] != 0, "the other one waits for what will never come, until JAX ends it"
    before = keys(out)
    assert 1 <= len(before) < 8
    assert not Run.read(out).finished
    # One victim's run is finished by as many processes as before, the other's by one, as a torn line would be.
    with open(out / f"results-{victim}.jsonl", "a") as stream:
        stream.write('{"key": "spect')
    if victim:
        codes, errors = end(start(out, ["", ""]))
        assert codes == [0, 0], errors
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there was one more device
            shared_run.work(out)
    assert arrays(out) == arrays(alone)
    found = Run.read(out)
    assert sorted(row["key"] for row in found.rows()) == sorted(keys(alone))
    assert set(before) <= {row["key"] for row in found.rows()}
    np.testing.assert_array_equal(found.spectra()["eigenvalues"], Run.read(alone).spectra()["eigenvalues"])


@pytest.mark.parametrize("method", [Lanczos(shared_run.SIZE), Arnoldi(shared_run.SIZE)])
def test_krylov_spectra_do_not_depend_on_units(tmp_path, method):
    state, x, _ = shared_run.problem()
    t = np.arange(400, 400 + len(x))  # distinct eigenvalues: no space closes early
    seen = []
    run = Run.open(tmp_path / "run", {})
    options = dict(method=method, key=jax.random.key(3), batch=4)
    found = record_spectra(
        run, shared_run.SCORE, state, x, t, unit=8, name="krylov", progress=lambda *a: seen.append(a), **options
    )
    at_once = batch_spectra(shared_run.SCORE, state, jnp.asarray(x), t, **options)
    largest = np.abs(at_once.eigenvalues).max()
    np.testing.assert_allclose(found.eigenvalues, at_once.eigenvalues, atol=1e-5 * largest)  # all d have converged
    assert found.eigenvalues.dtype == at_once.eigenvalues.dtype
    np.testing.assert_array_equal(found.num_products, at_once.num_products)
    assert (found.residuals.shape, found.method, found.dtype) == (at_once.residuals.shape, method, jnp.float32)
    assert found.seed.shape == (shared_run.POINTS, 2)
    assert [row["key"] for row in run.rows()] == ["krylov-0000000", "krylov-0000008", "krylov-0000016"]
    assert seen == [("krylov", done, 3) for done in range(4)]


@pytest.mark.parametrize("method", [Dense(), Lanczos(shared_run.SIZE)])
def test_batches_go_on_in_their_folder(tmp_path, method):
    state, x, _ = shared_run.problem()
    x = jnp.asarray(x)
    options = dict(t=500, method=method, key=jax.random.key(3), batch=2)
    whole = batch_spectra(shared_run.SCORE, state, jnp.asarray(x), **options)

    def stop(task, done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        batch_spectra(shared_run.SCORE, state, x, **options, folder=tmp_path / "run", progress=stop)
    seen = []
    found = batch_spectra(
        shared_run.SCORE, state, x, **options, folder=tmp_path / "run", progress=lambda *a: seen.append(a)
    )
    assert seen == [("spectra", done, 11) for done in range(3, 12)]  # 22 points, two of each compiled call
    np.testing.assert_array_equal(found.eigenvalues, whole.eigenvalues)
    np.testing.assert_array_equal(found.noise, whole.noise)
    for changes, match in (
        (dict(t=501), "points: "),
        (dict(method=Lanczos(3)), "method: "),
        (dict(state=state._replace(signs=-state.signs)), "state: "),
        (dict(unit=3), "unit: "),
    ):
        with pytest.raises(ValueError, match=match):
            batch_spectra(shared_run.SCORE, **dict(state=state, x=x) | options | changes, folder=tmp_path / "run")
    with pytest.raises(ValueError, match="unit: expected none without a folder"):
        batch_spectra(shared_run.SCORE, state, x, **options, unit=3)


def _score_of(factor):
    def score(state, x, t, cond):
        return -factor * state * x

    return score


def test_a_folder_knows_scores_of_one_name_apart(tmp_path):
    # Both have the name of the function within; their products differ.
    points = dict(state=jnp.float32(2), x=jnp.ones((3, 4)), t=1.0, folder=tmp_path / "run")
    np.testing.assert_allclose(batch_spectra(_score_of(1.0), **points).eigenvalues, -2, rtol=1e-6)
    np.testing.assert_allclose(batch_spectra(_score_of(1.0), **points).eigenvalues, -2, rtol=1e-6)
    with pytest.raises(ValueError, match="expected"):
        batch_spectra(_score_of(5.0), **points)


def test_what_is_refused_leaves_no_folder(tmp_path):
    points = dict(state=jnp.float32(2), x=jnp.ones((3, 4)), t=1.0, method=Lanczos(2), folder=tmp_path / "run")
    with pytest.raises(ValueError, match="key: Krylov methods need a random key"):
        batch_spectra(_score_of(1.0), **points)
    assert not (tmp_path / "run").exists()
    assert batch_spectra(_score_of(1.0), **points, key=jax.random.key(0)).eigenvalues.shape == (3, 2)


def _nan_slope(state, x, t, cond):
    return jnp.sqrt(x)  # finite at 0, its derivative is not


def test_bad_input_is_refused(tmp_path):
    run = Run.open(tmp_path / "run", {})
    state, x, t = shared_run.problem()
    with pytest.raises(ValueError, match="unit: expected at least 1 point, got 0"):
        record_spectra(run, shared_run.SCORE, state, x, t, unit=0)
    with pytest.raises(ValueError, match="t: expected one timestep or 22 of them"):
        record_spectra(run, shared_run.SCORE, state, x, t[1:], unit=4)
    with pytest.raises(
        ValueError, match=r"points 2 to 3, counted from 0 here: score: the score or its Jacobian at point 1 holds NaN"
    ):
        record_spectra(run, _nan_slope, None, np.float32([[1.0], [1.0], [1.0], [0.0]]), 0, unit=2, name="nan")
    record_spectra(run, shared_run.SCORE, state, x, t, unit=22)
    with pytest.raises(ValueError, match=r"expected the size that the run began with, spectra-0000000 has 22 .*got 11"):
        record_spectra(run, shared_run.SCORE, state, x, t, unit=11)


def test_one_of_many_first_starts_writes_the_manifest(tmp_path):
    directories = [str(tmp_path / f"run-{i}") for i in range(40)]
    # The last two of four starts are of another config in the second half of the directories.
    seeds = [[0] * 20 + [process // 2] * 20 for process in range(4)]
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(4), context.Queue()
    children = [
        context.Process(target=first_starts.open_all, args=(directories, seeds[i], barrier, results, i), daemon=True)
        for i in range(4)
    ]
    for child in children:
        child.start()
    found = [results.get(timeout=120) for _ in range(4)]
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    for i, directory in enumerate(directories):
        written = json.loads((Path(directory) / "manifest.json").read_text())
        outcomes = [outcome[i] for outcome in found]
        opened = [outcome for outcome in outcomes if isinstance(outcome, dict)]
        assert all(manifest == written for manifest in opened)
        assert len(opened) == (4 if i < 20 else 2)
        assert all("expected a run of the same config" in text for text in outcomes if text not in opened)
    assert not list(tmp_path.glob("**/.tmp-*"))


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    run = Run.open(tmp_path / "run", {"seed": 1})
    assert json.loads((tmp_path / "run" / "manifest.json").read_text()) == run.manifest
    assert [path.name for path in sorted((tmp_path / "run").iterdir())] == ["arrays", "manifest.json"]
