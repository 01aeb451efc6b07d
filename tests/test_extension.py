"""Audits that are extended: what they say is that of one audit of everything, and only what is new is computed."""

import json
import shutil
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from album import MANY, SINGLE, Album, single_pictures, varied_pictures, write_folder
from killing import Stopped, at_call, stop
from two_kinds import TwoKinds

import jaxmem as jm
from jaxmem import cli
from jaxmem.audit import stages
from jaxmem.audit.result import read_points
from jaxmem.audit.training.given import TrainingData
from jaxmem.commands import audit as command
from jaxmem.prompts import Prompt
from jaxmem.report.audit.page import write_report
from jaxmem.runs.directory import Run
from jaxmem.runs.origin import Origin
from jaxmem.training_images import Preparation, read_training_images

STEPS, SIZE = 5, 16
CONFIG = jm.AuditConfig(noises=2, ddim_steps=STEPS, timesteps=(200, 600), batch=4, directions=2)
FIRST = [Prompt("copied cat", True), Prompt("varied dog", False)]
ADDED = [Prompt("varied fox", False), Prompt("copied owl", True)]
VARYING = ("wall_seconds", "costs", "finished", "extensions", "num_evaluations", "num_products")


def run(folder, prompts=FIRST, config=CONFIG, **options):
    return jm.audit(TwoKinds(), prompts, config, folder=folder, **options)


def compare(found, whole, same=np.testing.assert_array_equal):
    """All that an audit found, but its costs."""
    for name in ("prompts", "reference"):
        assert getattr(found, name) == getattr(whole, name)
    assert {d.name for d in found.detectors} == {d.name for d in whole.detectors}
    for detector in whole.detectors:
        same(found[detector.name].scores, whole[detector.name].scores)
        same(found[detector.name].reference_scores, whole[detector.name].reference_scores)
    for name in ("eps_difference", "eigenvalues", "images"):
        same(getattr(found, name).astype(float), getattr(whole, name).astype(float))
    for name in ("sampled", "timesteps", "sigma", "spectral_timesteps"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    assert found.manifest["plan"] == whole.manifest["plan"]
    assert found.manifest["config"] == whole.manifest["config"]


def near(found, whole):
    """The same points stand in other batches, at other places of a program that may round otherwise there."""
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-4)


def files(folder):
    paths = [folder / "results.csv", folder / "generations.csv", *(folder / "images").iterdir()]
    return {path.name: path.read_bytes() for path in paths}


def work_of(folder):
    rows = Run.read(folder).rows()
    return tuple(sum(row[name] for row in rows) for name in ("evaluations", "products"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A finished run of two prompts."""
    folder = tmp_path_factory.mktemp("small") / "run"
    run(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One audit of four prompts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return run(folder, [*FIRST, *ADDED]), folder


@pytest.fixture(scope="module")
def extended(small, tmp_path_factory):
    """The run of two prompts, extended by the other two."""
    folder = copied(small, tmp_path_factory.mktemp("extended") / "run")
    run(folder, [*FIRST, *ADDED], origin=Origin(("jaxmem", "audit", "--out", "my run")))
    return folder


@pytest.fixture
def folder(small, tmp_path):
    """A copy of the run of two prompts."""
    return copied(small, tmp_path / "run")


def copied(source, target):
    return shutil.copytree(source, target)


class TestPrompts:
    def test_the_result_is_that_of_one_audit(self, folder, whole):
        """Each prompt has two noises and a batch is four points, so batches are the same, and all bits."""
        lines = []
        # in any order: those that were there come first
        found = run(folder, [*ADDED, *reversed(FIRST)], say=lines.append)
        assert [prompt.text for prompt in found.prompts] == [one.text for one in (*FIRST, *ADDED)]
        assert lines[0] == f"the run in {folder} is extended by 2 prompts; what it has is kept"
        assert lines[1].startswith("audit: 2 prompts × 2 noises = 4 points")
        expected, folder_of_it = whole
        compare(found, expected)
        np.testing.assert_array_equal(found.directions.point, expected.directions.point)
        np.testing.assert_array_equal(found.directions.eigenvalues, expected.directions.eigenvalues)
        np.testing.assert_array_equal(found.directions.moved, expected.directions.moved)
        assert files(folder) == files(folder_of_it)
        assert (folder / "spectra.npz").read_bytes() == (folder_of_it / "spectra.npz").read_bytes()
        metrics, there = json.loads((folder / "metrics.json").read_text()), expected.metrics
        assert {k: v for k, v in metrics.items() if k not in VARYING} == {
            k: v for k, v in there.items() if k not in VARYING
        }
        np.testing.assert_array_equal(read_points(Run.read(folder)), read_points(Run.read(folder_of_it)))
        compare(jm.read_audit(folder), expected)

    def test_only_new_points_are_computed(self, extended, small, whole):
        found = jm.read_audit(extended)
        before, (evaluations, products) = work_of(small), work_of(extended / "extension-1")
        points, noises, spectra, decoded = 4, 2, 2, 2
        sampling = points * (2 * STEPS - 1) + noises  # scores without the prompt at x_T are shared
        off = 2 * points + points + noises  # Jeon's, and the pair at a late timestep
        directions = 2 * (2 + 2 * decoded), 2 * SIZE  # other points are the extreme ones now
        assert not np.array_equal(found.directions.point, jm.read_audit(small).directions.point)
        assert evaluations == sampling + off + points * spectra + directions[0]
        assert products == 2 * points + points * spectra * (SIZE + 1) + directions[1]
        assert work_of(extended) == before
        assert found.metrics["num_evaluations"] == before[0] + evaluations
        assert found.metrics["num_products"] == before[1] + products
        # one audit would have drawn the shared scores and the directions once
        assert found.metrics["num_products"] == whole[0].metrics["num_products"] + directions[1]
        costs = [*Run.read(extended).costs(), *Run.read(extended / "extension-1").costs()]
        assert found.metrics["wall_seconds"]["total"] == pytest.approx(sum(row["seconds"] for row in costs))

    def test_reference_prompts_come_and_become_audited(self, folder):
        run(folder, neutral=["varied sea", "varied sun"])
        run(folder, [*FIRST, "varied sun"], neutral=["varied sea"])
        assert Run.read(folder / "extension-2").rows() == []
        found = run(folder, [*FIRST, "varied sun"], neutral=["varied ice", "varied sea"])
        assert [prompt.text for prompt in found.prompts] == ["copied cat", "varied dog", "varied sun"]
        assert [prompt.text for prompt in found.reference] == ["varied sea", "varied ice"]
        fresh = run(folder.parent / "fresh", [*FIRST, "varied sun"], neutral=["varied sea", "varied ice"])
        compare(found, fresh, near)
        assert not (folder / "images/0004-1.png").exists()

    def test_the_page_says_when_and_how(self, extended):
        page = write_report(extended).read_text()
        for words in ("varied fox", "Extension 1", "UTC, jaxmem audit --out &#39;my run&#39;"):
            assert words in page
        assert write_report(extended).read_text() == page

    def test_another_order_is_the_same_run(self, folder):
        found = run(folder, FIRST[::-1])
        assert found.prompts == FIRST
        assert not (folder / "extension-1").exists()

    def test_one_after_another(self, folder, whole):
        for number in (3, 4):
            found = run(folder, [*FIRST, *ADDED][:number])
        assert found.metrics["extensions"] == 2
        compare(found, whole[0], near)
        # what was asked for earlier is there, too
        lines = []
        for prompts in (FIRST, [*FIRST, ADDED[0]], [*FIRST, *ADDED]):
            again = run(folder, prompts, say=lines.append)
            assert len(again.prompts) == 4
            assert lines.pop() == f"the run in {folder} was extended; its results are those of all that it has"
            assert not lines


class TestNoises:
    def test_the_result_is_that_of_one_audit(self, folder, tmp_path):
        """Prompts and noises in one call: two rectangles."""
        config = replace(CONFIG, noises=3)
        lines = []
        found = run(folder, [*FIRST, *ADDED], config, say=lines.append)
        assert "is extended by 2 prompts and 1 noise;" in lines[0]
        expected = run(tmp_path / "at once", [*FIRST, *ADDED], config)
        compare(found, expected, near)
        assert found.metrics["extensions"] == 2
        assert sorted(path.name for path in (folder / "images").iterdir()) == sorted(
            f"000{n}-{noise}.png" for n in range(1, 5) for noise in range(1, 4)
        )
        near(read_points(Run.read(folder)), read_points(Run.read(tmp_path / "at once")))
        points, spectra = 4, 2
        assert work_of(folder / "extension-2")[1] >= 2 * points + points * spectra * (SIZE + 1)

    def test_krylov_starts_are_those_of_their_noise(self, tmp_path):
        """Three Lanczos steps, where a Hessian has five eigenvalues, depend on the start."""

        class Lines(TwoKinds):
            factors = np.random.default_rng(0).normal(0, 0.3, (2, SIZE, 4)).astype(np.float32)
            state = TwoKinds.state._replace(factors=jnp.asarray(factors), variances=jnp.array([0.05, 0.1]))

        config = replace(CONFIG, method="lanczos", num_steps=3, timesteps=(200,), directions=0)
        jm.audit(Lines(), FIRST, config, folder=tmp_path / "run")
        found = jm.audit(Lines(), FIRST, replace(config, noises=4), folder=tmp_path / "run")
        expected = jm.audit(Lines(), FIRST, replace(config, noises=4), folder=tmp_path / "at once")
        np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, rtol=1e-3)
        assert (np.ptp(found.eigenvalues[..., :2], axis=1) > 1e-2).all()


class TestDetectors:
    KEPT, STAGES = ("wen-all", "trace", "positive-count", "tiled-l2"), ("jeon", "score-evolution", "anisotropy")

    def test_the_result_is_that_of_one_audit(self, tmp_path, small):
        some, names = tmp_path / "run", ["wen-1", "largest"]
        run(some, detectors=names)
        found = run(some, detectors=[*names, *self.KEPT])
        assert {"trace@t200", "tiled-l2"} <= {one.name for one in found.detectors}
        assert Run.read(some / "extension-1").rows() == []  # from what the run had
        found = run(some, detectors=[*names, *self.KEPT, *self.STAGES])
        expected = run(tmp_path / "at once", detectors=[*names, *self.KEPT, *self.STAGES])
        compare(found, expected)  # the batches are the same
        points, noises, steps = 4, 2, 3
        assert work_of(some / "extension-2") == (
            points * (2 * steps - 1) + noises + 2 * points + points + noises,
            2 * points,
        )
        # and then prompts, with all of them
        found = run(some, [*FIRST, *ADDED])
        assert found.metrics["extensions"] == 4  # None: all that are registered
        np.testing.assert_array_equal(found["jeon"].scores[:2], jm.read_audit(small)["jeon"].scores)

    def test_spectra_are_not_taken_afterwards(self, tmp_path):
        config = jm.AuditConfig(noises=1, ddim_steps=3, directions=None)
        jm.audit(TwoKinds(), FIRST, config, folder=tmp_path / "run", detectors=["wen-1"])
        with pytest.raises(ValueError, match=r"detectors: expected to add some that look.* got trace, with"):
            jm.audit(TwoKinds(), FIRST, config, folder=tmp_path / "run", detectors=["wen-1", "trace"])
        assert not (tmp_path / "run/extension-1").exists()


class TestInterruption:
    def test_killed_at_every_unit(self, small, extended, tmp_path, monkeypatch, whole):
        """Until it is done the result is that of the run before; the same call continues to the same bits."""
        there, number = jm.read_audit(small), len(Run.read(extended / "extension-1").rows())
        target = copied(small, tmp_path / "run")
        for at in range(1, number + 1):
            with monkeypatch.context() as patched:
                patched.setattr(Run, "append", at_call(2, Run.append, stop))
                try:
                    run(target, [*FIRST, *ADDED])
                except Stopped:
                    compare(jm.read_audit(target), there)
                    assert at < number
                else:
                    break
        compare(jm.read_audit(target), whole[0])
        assert work_of(target / "extension-1") == work_of(extended / "extension-1")
        assert files(target) == files(extended)

    def test_killed_between_its_end_and_that_of_the_audit(self, folder, monkeypatch, whole):
        with monkeypatch.context() as patched:
            patched.setattr(stages, "write_generations", stop)
            with pytest.raises(Stopped):
                run(folder, [*FIRST, *ADDED])
        assert (folder / "extension-1/metrics.json").exists()
        assert len(jm.read_audit(folder).prompts) == 2
        rows = (folder / "extension-1/results-0.jsonl").read_bytes()
        compare(run(folder, [*FIRST, *ADDED]), whole[0])
        assert (folder / "extension-1/results-0.jsonl").read_bytes() == rows

    def test_an_unfinished_run_is_finished_first(self, tmp_path, monkeypatch, whole):
        with monkeypatch.context() as patched:
            patched.setattr(Run, "append", at_call(3, Run.append, stop))
            with pytest.raises(Stopped):
                run(tmp_path / "run")
        compare(run(tmp_path / "run", [*FIRST, *ADDED]), whole[0])

    def test_another_extension_is_under_way(self, folder, monkeypatch, whole):
        with monkeypatch.context() as patched:
            patched.setattr(Run, "append", at_call(3, Run.append, stop))
            with pytest.raises(Stopped):
                run(folder, [*FIRST, ADDED[0]])
        with pytest.raises(ValueError, match=r"extension-1: expected the call that began this extension.*delete this"):
            run(folder, [*FIRST, ADDED[1]])
        compare(run(folder, [*FIRST, *ADDED]), whole[0], near)  # asks for what was begun, and more
        assert jm.read_audit(folder).metrics["extensions"] == 2


class TestRefusal:
    @pytest.mark.parametrize(
        ("prompts", "changes", "match"),
        [
            ([*FIRST, *ADDED], dict(guidance=3.0), r"another one \(config\.guidance: there 1\.0, now 3\.0;"),
            ([*FIRST, *ADDED], dict(seed=1), r"another one \(config\.seed: there 0, now 1\)"),
            ([*FIRST, *ADDED], dict(steps_run=4), r"another one \(config\.steps_run: there null, now 4; plan\."),
            ([Prompt("copied cat"), *FIRST[1:], *ADDED], {}, r"another one \(config\.prompts.*true.*null"),
            (ADDED, {}, r"another one \(config\.prompts"),
            ([FIRST[0], *ADDED], {}, r"another one \(config\.prompts"),
            ([*FIRST, *ADDED], dict(noises=1), r"another one \(config\.noises: there 2, now 1; "),
        ],
    )  # fmt: skip
    def test_the_differing_fields_are_named(self, folder, prompts, changes, match):
        with pytest.raises(ValueError, match="run of the same config, got " + match):
            run(folder, prompts, replace(CONFIG, **changes))
        assert not (folder / "extension-1").exists()

    def test_a_damaged_manifest(self, folder):
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        del manifest["config"]["prompts"]
        path.write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=r"another one \(config\.prompts: there nothing, now \[\{"):
            run(folder, [*FIRST, *ADDED])

    def test_another_model(self, folder):
        class Others(TwoKinds):
            state = TwoKinds.state._replace(means=TwoKinds.state.means + 0.1)

        with pytest.raises(ValueError, match=r"another one \(model\.sha256: there .*, now .*\)"):
            jm.audit(Others(), [*FIRST, *ADDED], CONFIG, folder=folder)


def test_training_images(tmp_path, monkeypatch):
    """The looks at images stay as they are; new generations have their nearest image."""
    pictures = [*single_pictures(), *varied_pictures(9, 1)]
    images = write_folder(tmp_path / "data", pictures, [*SINGLE, *[MANY] * 9])
    data = read_training_images(images)
    training = TrainingData(data, image_timesteps=(200,), preparation=Preparation(resize="none"), image_noises=1)
    model, config = Album(single_pictures()), jm.AuditConfig(noises=1, ddim_steps=5, timesteps=(200,), directions=0)
    options = dict(config=config, training=training)
    jm.audit(model, [SINGLE[0], MANY], folder=tmp_path / "run", **options)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/at-images").rglob("*.*")}
    with monkeypatch.context() as patched:
        patched.setattr("jaxmem.audit.engine.run_looks", stop)
        found = jm.audit(model, [SINGLE[0], MANY, SINGLE[1], ""], folder=tmp_path / "run", **options)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run/at-images").rglob("*.*")} == before
    expected = jm.audit(model, [SINGLE[0], MANY, SINGLE[1], ""], folder=tmp_path / "at once", **options)
    np.testing.assert_array_equal(found.training.nearest.index, expected.training.nearest.index)
    near(found.training.nearest.distance, expected.training.nearest.distance)
    assert found.training.verdicts == expected.training.verdicts
    assert found.metrics["training"]["verdicts"] == expected.metrics["training"]["verdicts"]
    assert (tmp_path / "run/images.csv").read_bytes() == (tmp_path / "at once/images.csv").read_bytes()


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "open_model", lambda *_: TwoKinds())
    monkeypatch.setattr(cli, "_keep_compiled_programs", lambda: None)
    (tmp_path / "p.txt").write_text("copied cat\nvaried dog\n")
    (tmp_path / "more.txt").write_text("varied fox\ncopied cat\nvaried dog\n")
    common = ["--out", str(tmp_path / "run"), "--ddim-steps", "4", "--timesteps", "250", "--batch", "2"]
    assert cli.main(["audit", "a/b", "--prompts", str(tmp_path / "p.txt"), "--noises", "1", *common]) == 0
    capsys.readouterr()
    again = ["audit", "a/b", "--prompts", str(tmp_path / "more.txt"), "--noises", "2", *common]
    assert cli.main(again) == 0
    said = capsys.readouterr()
    assert f"the run in {tmp_path / 'run'} is extended by 1 prompt and 1 noise; what it has is kept\n" in said.err
    assert "varied fox" in said.out
    assert "varied fox" in (tmp_path / "run/report.html").read_text()
    origin = json.loads((tmp_path / "run/extension-1/manifest.json").read_text())["origin"]
    assert origin["files"][0]["name"] == "more.txt"
    assert cli.main([*again, "--guidance", "2"]) == 2
    assert "config.guidance: there 1.0, now 2.0" in capsys.readouterr().err
