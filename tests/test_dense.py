import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import command_environment
from killing import Stopped, signal_when
from operators import Unregistered, nan_score, skewed
from parity import MULTIPLE, rounded

from jaxmem import Dense, score_jacobian, spectrum
from jaxmem.diffusion import NoiseSchedule
from jaxmem.function_operators import MatrixOperator
from jaxmem.operators import Operator
from jaxmem.oracles import EmpiricalScore, GaussianMixtureScore, Separable, SeparableScore, gaussian
from jaxmem.spectra import Status, columns, dense, dense_cost

SCHEDULE = NoiseSchedule()


def separable(d, seed=0):
    rng = np.random.default_rng(seed)
    amplitudes = rng.permutation(np.where(np.arange(d) < d // 5, 2.0, 0.3))
    return Separable(jnp.asarray(amplitudes, jnp.float32), jnp.asarray(rng.choice([-1.0, 1.0], d), jnp.float32))


@pytest.mark.parametrize("t", [30, 300])
@pytest.mark.parametrize("name", ["mixture", "empirical", "separable"])
def test_closed_forms(name, t, tmp_path):
    d = 300
    rng = np.random.default_rng(t)
    x = jnp.asarray(0.7 * rng.normal(size=d), jnp.float32)
    score, state = {
        "mixture": (GaussianMixtureScore(SCHEDULE), gaussian(np.zeros(d), rng.normal(size=(d, 5)), 0.2)),
        "empirical": (EmpiricalScore(SCHEDULE), jnp.asarray(rng.normal(size=(8, d)), jnp.float32)),
        "separable": (SeparableScore(SCHEDULE), separable(d)),
    }[name]
    operator = score_jacobian(score, state, x, t)
    seen = []
    found = spectrum(operator, folder=tmp_path / "a", progress=lambda *step: seen.append(step))
    exact = score.spectrum(state, x, t)
    # As for `spectrum`: rounding of products, 2e-5 of the largest eigenvalue, and what that of x and the state does.
    moved = np.abs(score.spectrum(*rounded((state, x)), t) - exact).max()
    atol = max(2e-5 * np.abs(exact).max(), MULTIPLE * moved)
    np.testing.assert_allclose(found.eigenvalues, exact, rtol=0, atol=atol)
    assert found.num_products == d + 1
    assert found.status == Status.CONVERGED
    assert [step for step in seen if step[1] == step[2]] == [
        ("columns", d, d),
        ("read", d, d),
        ("symmetrise", 1, 1),
        ("solve", 1, 1),
    ]
    known = spectrum(operator)
    np.testing.assert_allclose(found.eigenvalues, known.eigenvalues, atol=2 * float(known.noise + found.noise))
    assert found.asymmetry < 1e-4
    assert (found.dtype, found.method, found.seed, found.vectors) == (known.dtype, Dense(), None, None)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e33])
def test_matrices_are_lapacks(scale, tmp_path, monkeypatch):
    monkeypatch.setattr(dense, "_BLOCK", 64)  # several blocks, the last one smaller
    matrix = skewed(150) * np.float32(scale)
    found = spectrum(MatrixOperator(matrix), folder=tmp_path, chunk=40)
    wide = matrix.astype(np.float64)
    exact = np.linalg.eigvalsh((wide + wide.T) / 2)[::-1]
    # Unit vectors pick columns exactly, and the rest is float64: only LAPACK's rounding.
    np.testing.assert_allclose(found.eigenvalues, exact, atol=1e-12 * np.abs(exact).max())
    np.testing.assert_allclose(found.asymmetry, np.linalg.norm(wide - wide.T) / np.linalg.norm(wide), rtol=1e-12)
    # 1e-5: a product of 150 float32 terms is right to about 1e-6 of the norm, and the bound is sqrt(150) of them.
    assert 0 < found.noise < 1e-5 * np.linalg.norm(wide)
    np.testing.assert_array_equal(found.residuals, found.noise)
    np.testing.assert_array_equal(np.load(tmp_path / "jacobian.npy", mmap_mode="r"), matrix)


def test_noise_covers_an_exact_null_space(tmp_path):
    factor = np.random.default_rng(0).normal(size=(300, 10)).astype(np.float32)
    found = spectrum(MatrixOperator(factor @ factor.T), folder=tmp_path)
    assert np.sum(found.eigenvalues > found.noise) == 10
    assert np.abs(found.eigenvalues[10:]).max() <= found.noise


def test_double_precision_symmetric_parts_and_products_of_less(tmp_path, x64):
    matrix = skewed(60).astype(np.float64)
    exact = np.linalg.eigvalsh((matrix + matrix.T) / 2)[::-1]
    double = MatrixOperator(jnp.asarray(matrix))
    for name, operator, products in (("a", double, 61), ("b", double.symmetric, 122)):
        found = spectrum(operator, folder=tmp_path / name)
        np.testing.assert_allclose(found.eigenvalues, exact, atol=1e-12)
        assert found.num_products == dense_cost(operator).products == products
    assert found.asymmetry == 0
    assert (tmp_path / "a" / "jacobian.npy").stat().st_size == dense_cost(double).disk_bytes
    half = MatrixOperator(jnp.asarray(matrix, jnp.bfloat16))
    rounded = np.asarray(half.matrix, np.float64)
    found = spectrum(half, folder=tmp_path / "c")
    np.testing.assert_allclose(found.eigenvalues, np.linalg.eigvalsh((rounded + rounded.T) / 2)[::-1], atol=1e-12)
    zero = spectrum(MatrixOperator(jnp.zeros((1, 1))), folder=tmp_path / "d")
    assert zero.eigenvalues == zero.asymmetry == 0


@pytest.mark.parametrize(
    "where", ["between chunks", "in a write", "before the record", "in the record", "in the solve"]
)
def test_interrupted_and_resumed_is_bit_identical(where, tmp_path, monkeypatch):
    operator = score_jacobian(SeparableScore(SCHEDULE), separable(200), 0.1 * jnp.ones(200), 200)
    whole = spectrum(operator, folder=tmp_path / "whole", chunk=16)
    folder, resumed_at = tmp_path / "resumed", []
    stop = int(np.random.default_rng(len(where)).integers(1, 12))  # any chunk will do

    def once(module, name, call):
        """Let the ``stop``-th call of a function fail as ``call`` does, or the first of the solve."""
        inner, calls = getattr(module, name), []

        def outer(*args, **options):
            calls.append(None)
            return call(inner, *args, **options) if len(calls) == stop else inner(*args, **options)

        monkeypatch.setattr(module, name, outer)

    def fail(*_, **__):
        raise Stopped

    def half(inner, store, columns):
        with open(store.path, "r+b") as stream:
            stream.seek(0, os.SEEK_END)
            stream.write(columns.tobytes()[: columns.nbytes // 2])
        raise Stopped

    progress = None
    if where == "between chunks":

        def progress(task, done, total):
            if done >= 16 * stop:
                raise Stopped

    elif where == "in a write":
        once(columns.ColumnStore, "append", half)
    elif where == "before the record":
        once(columns, "checksum", fail)
    elif where == "in the record":
        once(columns, "write_atomically", fail)
    else:
        stop = 1
        once(dense.scipy.linalg, "eigh", fail)
    with pytest.raises(Stopped):
        spectrum(operator, folder=folder, chunk=16, **({"progress": progress} if progress else {}))
    monkeypatch.undo()
    found = spectrum(operator, folder=folder, chunk=16, progress=lambda *step: resumed_at.append(step))
    np.testing.assert_array_equal(found.eigenvalues, whole.eigenvalues)
    assert (tmp_path / "whole" / "jacobian.npy").read_bytes() == (folder / "jacobian.npy").read_bytes()
    assert (found.noise, found.asymmetry) == (whole.noise, whole.asymmetry)
    starts = json.loads((folder / "jacobian.json").read_text())["starts"]
    assert found.num_products == 200 + starts
    if where == "between chunks":
        assert resumed_at[0] == ("columns", min(16 * stop, 200), 200)


SCRIPT = """
import sys, time
import jax.numpy as jnp
import numpy as np
from jaxmem import Dense, spectrum
from jaxmem.function_operators import MatrixOperator
from jaxmem.operators import Operator

matrix = np.random.default_rng(0).normal(size=(400, 400)).astype(np.float32)
slowly = lambda *step: time.sleep(float(sys.argv[2]))
found = spectrum(MatrixOperator(matrix), Dense(folder=sys.argv[1]), chunk=8, progress=slowly)
np.save(sys.argv[1] + ".npy", found.eigenvalues)
"""


def test_kill_and_resume_in_another_process(tmp_path):
    def start(name, pause):
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / name), str(pause)], env=command_environment()
        )

    child = start("killed", 0.05)
    record = tmp_path / "killed" / "jacobian.json"
    signal_when(child, lambda: record.exists() and len(json.loads(record.read_text())["sums"]) >= 5)
    assert child.wait() == -signal.SIGKILL
    before = len(json.loads(record.read_text())["sums"])
    assert 5 <= before < 50
    children = [start("killed", 0), start("whole", 0)]
    assert [child.wait() for child in children] == [0, 0]
    assert json.loads(record.read_text())["starts"] == 2
    np.testing.assert_array_equal(np.load(tmp_path / "killed.npy"), np.load(tmp_path / "whole.npy"))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cliff(Operator):
    """Finite but for one column."""

    height: jax.Array
    size = 40
    dtype = jnp.dtype(jnp.float32)

    def mv(self, vector):
        return vector + jnp.where(vector[17] > 0.9, self.height, 0.0)

    rmv = mv


def _free(bytes_):
    return lambda *_: SimpleNamespace(free=bytes_, available=bytes_)


def test_a_column_that_is_not_finite_is_named(tmp_path):
    # The first chunks are whole, and stay; a sound operator is another one then.
    with pytest.raises(ValueError, match="operator: 40 of 40 entries of column 17 are NaN or infinite; check"):
        spectrum(Cliff(jnp.float32(jnp.inf)), folder=tmp_path, chunk=8)
    assert len(json.loads((tmp_path / "jacobian.json").read_text())["sums"]) == 2
    with pytest.raises(ValueError, match="score: 4 of 4 entries are NaN"):
        spectrum(score_jacobian(nan_score, None, jnp.full(4, 6.0)), folder=tmp_path / "b")
    # Nothing of an operator was kept: the folder is free for another.
    matrix = jnp.eye(4)
    with pytest.raises(ValueError, match="of column 0 are NaN or infinite"):
        spectrum(MatrixOperator(matrix.at[2, 3].set(jnp.nan)), folder=tmp_path / "c")
    np.testing.assert_array_equal(spectrum(MatrixOperator(matrix), folder=tmp_path / "c").eigenvalues, 1)
    # Columns that are finite, with sums that are not.
    aligned = 3e38 * jnp.sign(dense._fixed_vector(MatrixOperator(jnp.eye(40))))
    with pytest.raises(ValueError, match="40 of 40 entries of a product with a random unit vector are NaN or infinite"):
        spectrum(MatrixOperator(jnp.tile(aligned, (40, 1))), folder=tmp_path / "d")


@pytest.mark.parametrize(
    ("disturb", "options", "match"),
    [
        (None, {"operator": MatrixOperator(2 * jnp.eye(40))}, "expected columns of this operator, got others.*product"),
        (None, {"operator": MatrixOperator(jnp.eye(41))}, "got others.*size: there 40, now 41.*another folder"),
        (None, {"chunk": 9}, "got others.*chunk: there 8, now 9"),
        (lambda f: (f / "jacobian.npy").unlink(), {}, "expected 40 whole columns, got a damaged file; delete"),
        (lambda f: os.truncate(f / "jacobian.npy", 5000), {}, "expected 40 whole columns, got a damaged file; delete"),
        (lambda f: _flip(f / "jacobian.npy", 20), {}, "expected 40 whole columns, got a damaged file; delete"),
        (lambda f: _flip(f / "jacobian.npy", -1), {}, "columns 32 to 39 are not those that were written; delete"),
        (lambda f: (f / "jacobian.json").write_text("{"), {}, r"jacobian.json: expected JSON.*delete the folder"),
        (lambda f: _edit(f, sums=7), {}, "expected checksums of whole chunks, got a damaged file; delete"),
        (lambda f: _edit(f, sums=["a"] * 6), {}, "expected checksums of whole chunks, got a damaged file; delete"),
        (lambda f: _edit(f, starts=None), {}, "expected checksums of whole chunks, got a damaged file; delete"),
        (lambda f: (f / "jacobian.json").unlink(), {}, r"expected a new or empty folder.*got jacobian.npy; choose"),
        (lambda f: (shutil.rmtree(f), f.write_text("")), {}, "expected a folder for the columns, got a file"),
        (None, {"chunk": 0}, "chunk: expected at least 1, got 0"),
        (None, {"operator": Unregistered()}, "operator: expected a pytree, got Unregistered"),
    ],
)
def test_what_does_not_fit_is_refused_and_left_alone(disturb, options, match, tmp_path):
    operator, folder = MatrixOperator(jnp.eye(40)), tmp_path / "columns"
    spectrum(operator, folder=folder, chunk=8)
    if disturb:
        disturb(folder)
    before = {path.name: path.read_bytes() for path in folder.glob("*")}
    with pytest.raises(ValueError, match=match):
        spectrum(options.get("operator", operator), folder=folder, chunk=options.get("chunk", 8))
    assert before == {path.name: path.read_bytes() for path in folder.glob("*")}


def _flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def _edit(folder, **changes):
    path = folder / "jacobian.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_disk_and_memory_are_looked_for_first(tmp_path, monkeypatch):
    operator = MatrixOperator(jnp.eye(40))
    cost = dense_cost(operator, 8)
    assert cost.products == 41
    assert cost.disk_bytes == 128 + 4 * 40**2  # NumPy's header and the matrix
    assert cost.host_bytes >= 8 * 40**2
    assert cost.device_bytes >= 4 * 8 * 40
    with monkeypatch.context() as patch:
        patch.setattr(dense.shutil, "disk_usage", _free(cost.disk_bytes - 1))
        with pytest.raises(ValueError, match=r"the matrix of d = 40: needs 0.0 MB more in .*free; make room or choose"):
            spectrum(operator, folder=tmp_path / "new" / "folder", chunk=8)
    with monkeypatch.context() as patch:
        patch.setattr(dense.memory.psutil, "virtual_memory", _free(cost.host_bytes - 1))
        with pytest.raises(
            ValueError, match=r"solve of the matrix of d = 40: needs about .* of which this machine has .*free some"
        ):
            spectrum(operator, folder=tmp_path / "new" / "folder", chunk=8)
    with monkeypatch.context() as patch:
        patch.setattr(dense.memory, "available_bytes", lambda: cost.device_bytes - 1)
        with pytest.raises(ValueError, match=r"8 columns of d = 40: needs about .*take a smaller chunk"):
            spectrum(operator, folder=tmp_path / "new" / "folder", chunk=8)
    assert not (tmp_path / "new").exists()
    # What is there already needs no more room.
    spectrum(operator, folder=tmp_path / "a", chunk=8)
    monkeypatch.setattr(dense.shutil, "disk_usage", _free(0))
    spectrum(operator, folder=tmp_path / "a", chunk=8)


def test_a_full_disk_keeps_whole_chunks(tmp_path, monkeypatch):
    operator = MatrixOperator(jnp.asarray(skewed(40)))
    whole = spectrum(operator, folder=tmp_path / "whole", chunk=8)
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) == 9:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(columns.os, "fsync", full)
    with pytest.raises(OSError, match="cannot write: No space left on device; make room"):
        spectrum(operator, folder=tmp_path / "full", chunk=8)
    monkeypatch.undo()
    assert 0 < len(json.loads((tmp_path / "full" / "jacobian.json").read_text())["sums"]) < 5
    found = spectrum(operator, folder=tmp_path / "full", chunk=8)
    np.testing.assert_array_equal(found.eigenvalues, whole.eigenvalues)


def test_the_small_method_points_here():
    with pytest.raises(ValueError, match=r"up to 4096\. Give a `folder`, which keeps its columns in a file"):
        spectrum(score_jacobian(nan_score, None, jnp.zeros(5000)))


@pytest.mark.slow
def test_rehearsal_at_four_thousand(tmp_path):
    d, t = 4096, 300
    score, state, x = SeparableScore(SCHEDULE), separable(d), jnp.zeros(d)
    operator = score_jacobian(score, state, x, t)

    def stop(task, done, total):
        if done >= d // 2:
            raise Stopped

    with pytest.raises(Stopped):
        spectrum(operator, folder=tmp_path, progress=stop)
    found = spectrum(operator, folder=tmp_path)
    exact = score.spectrum(state, x, t)
    # As at d = 300.
    np.testing.assert_allclose(found.eigenvalues, exact, atol=1e-4 * np.abs(exact).max())
    assert np.sum(found.eigenvalues > 0) == np.sum(exact > 0)
    assert found.num_products == d + 2
