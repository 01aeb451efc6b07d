"""The audit of a tiny random pipeline, against recomputation that shares no code with its engine."""

import csv
import errno
import inspect
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import album
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_diffusion as tiny
from conftest import command_environment, optional_import, with_xla_flags
from flax import nnx
from killing import Stopped, recorded_within, signal_when
from rich.console import Console

import jaxmem as jm
from jaxmem import cli, detectors
from jaxmem.audit import audit, audit_cost, engine, read_audit, read_results, store
from jaxmem.audit.cost import count_disk_bytes
from jaxmem.audit.plan import ModelFacts, Plan
from jaxmem.audit.scale import UsualScale
from jaxmem.audit.training.records import WITH, WITHOUT
from jaxmem.config import AuditConfig
from jaxmem.data import verbatim_model
from jaxmem.prompts import Prompt
from jaxmem.report.audit.view import AuditView
from jaxmem.report.tables import print_audit
from jaxmem.runs import durable, memory
from jaxmem.runs.directory import Run
from jaxmem.stable_diffusion.pipeline import StableDiffusion

PROMPTS = [
    Prompt("the cat", True, "VM"),
    Prompt("<script>alert(1)</script>", True, "TM"),
    Prompt("x " * 5000, False),  # 10,000 characters
    Prompt('costs $5, "or" [6]', False),
]
NEUTRAL = [Prompt("a house"), Prompt("a tree")]
CONFIG = AuditConfig(noises=2, ddim_steps=5, batch=5, timesteps=(801, 201), guidance=3.0, seed=7, directions=2)


@pytest.fixture(scope="module")
def folder(torch, diffusers, tmp_path_factory):
    peers = torch, diffusers, optional_import("transformers")
    return tiny.make_pipeline(*peers, tmp_path_factory.mktemp("audit"), **tiny.SMALLEST)[1]


@pytest.fixture(scope="module")
def model(folder):
    return StableDiffusion.load(folder)


@pytest.fixture(scope="module")
def said():
    return []


@pytest.fixture(scope="module")
def out(model, said, tmp_path_factory):
    """A finished run."""
    path = tmp_path_factory.mktemp("finished") / "run"
    audit(model, PROMPTS, CONFIG, folder=path, neutral=NEUTRAL, say=said.append)
    return path


@pytest.fixture(scope="module")
def result(out):
    return read_audit(out)


@pytest.fixture(scope="module")
def recomputed(model):
    """Of each prompt and noise: eps pairs and x_t along guided DDIM, by the plain formulas in NumPy."""
    graphdef, state = model.network("unet")
    apply = jax.jit(lambda state, x, t, cond: nnx.merge(graphdef, state)(x, t, cond))

    derivative = jax.jit(lambda state, x, t, cond: jax.jacfwd(lambda x: nnx.merge(graphdef, state)(x, t, cond))(x))

    def unet(x, t, cond):
        return apply(state, jnp.float32(x), jnp.int32(t), jnp.asarray(cond))

    def jacobian(x, t, cond):
        return derivative(state, jnp.float32(x), jnp.int32(t), jnp.asarray(cond))

    embedded = np.asarray(model.embed([prompt.text for prompt in PROMPTS[:2]] + [""]))
    alpha, sigma = model.scheduler.schedule.alpha, model.scheduler.schedule.sigma
    points = {}
    for i in range(2):
        for j in range(2):
            key = jax.random.fold_in(jax.random.key(CONFIG.seed), j)
            x = np.asarray(jax.random.normal(key, (4, 4, 4)), np.float64)
            path = []
            for t in (801, 601, 401, 201, 1):
                pair = [np.asarray(unet(x, t, embedded[c]), np.float64) for c in (i, 2)]
                path.append((t, x, *pair))
                eps = pair[1] + CONFIG.guidance * (pair[0] - pair[1])
                before = max(t - 200, 0)
                x = alpha[before] * (x - sigma[t] * eps) / alpha[t] + sigma[before] * eps
            points[i, j] = path, x
    return (unet, jacobian), embedded, points


def column(result, name):
    return result.scores[..., [detector.name for detector in result.detectors].index(name)]


def test_shapes_and_names(result):
    names = [detector.name for detector in result.detectors]
    assert result.prompts == PROMPTS
    assert result.reference == NEUTRAL
    assert result.scores.shape == (4, 2, len(names))
    assert result.reference_scores.shape == (2, 2, len(names))
    assert not np.isnan(result.scores).any()
    assert {"wen-1", "wen-5", "jeon", "score-evolution", "anisotropy", "tiled-l2", "positive-count@t201"} < set(names)
    assert result.eigenvalues.shape == (4, 2, 2, 64)
    assert result.images.shape == (4, 2, 8, 8, 3)
    assert result.sampled.all()
    assert result.timesteps.tolist() == [801, 601, 401, 201, 1]
    assert result.spectral_timesteps.tolist() == [801, 201]


def test_scores_are_those_of_the_formulas(model, result, recomputed):
    """Float32 networks alone and in batches: relative 1e-4, more where differences of near equals are squared."""
    sigma = model.scheduler.schedule.sigma
    for (i, j), (path, x0) in recomputed[2].items():
        delta = [eps_c - eps_u for _, _, eps_c, eps_u in path]
        norms = [np.linalg.norm(d) for d in delta]
        np.testing.assert_allclose(result.eps_difference[i, j], norms, rtol=1e-3)
        assert column(result, "wen-5")[i, j] == pytest.approx(np.mean(norms), rel=1e-3)
        steps = [-d / sigma[t] for d, (t, *_) in zip(delta, path, strict=True)]
        evolution = sum(np.sum((steps[k + 1] - steps[k]) ** 2) for k in range(2))
        assert column(result, "score-evolution")[i, j] == pytest.approx(evolution, rel=1e-3)
        image = model.decode(jnp.float32(x0)[None])[0]
        assert np.abs(result.images[i, j].astype(int) - image).max() <= 1


def test_anisotropy_is_off_the_trajectory(result, recomputed):
    (unet, _), embedded, points = recomputed
    for (i, j), (path, _) in points.items():
        _, x, eps_c, eps_u = path[0]
        late = [np.asarray(unet(x, 401, embedded[c]), np.float64) for c in (i, 2)]
        difference = late[0] - late[1]
        norms = np.linalg.norm(late[1], axis=-1) * np.linalg.norm(difference, axis=-1)
        cosine = ((late[1] * difference).sum(-1) / norms).mean()
        expected = np.linalg.norm(eps_c - eps_u) + 2 * cosine
        assert column(result, "anisotropy")[i, j] == pytest.approx(expected, rel=1e-3)
    assert not next(d for d in result.detectors if d.name == "anisotropy").on_trajectory


def dense(recomputed, x, t, cond):
    """The Jacobian of the network's eps, all of it, by forward mode."""
    return np.asarray(recomputed[0][1](x, t, cond), np.float64).reshape(64, 64)


def test_jeon_is_two_derivatives(model, result, recomputed):
    _, embedded, points = recomputed
    sigma = model.scheduler.schedule.sigma[801]
    for (i, j), (path, _) in points.items():
        _, x, eps_c, eps_u = path[0]
        difference = dense(recomputed, x, 801, embedded[i]) - dense(recomputed, x, 801, embedded[2])
        expected = np.linalg.norm(difference @ (eps_c - eps_u).reshape(-1)) / sigma**2
        assert column(result, "jeon")[i, j] == pytest.approx(expected, rel=1e-3)


def symmetric(model, recomputed, x, t, cond):
    matrix = -dense(recomputed, x, t, cond) / model.scheduler.schedule.sigma[t]
    return (matrix + matrix.T) / 2


def test_spectra_and_counts_are_those_of_dense_matrices(model, result, recomputed):
    for i in range(2):
        for k, t in ((0, 801), (1, 201)):
            x = next(x for s, x, *_ in recomputed[2][i, 0][0] if s == t)
            values = np.linalg.eigvalsh(symmetric(model, recomputed, x, t, recomputed[1][i]))[::-1]
            scale = np.abs(values).max()
            # The x_t of the two differ by float32 rounding over the steps before.
            np.testing.assert_allclose(result.eigenvalues[i, 0, k], values, atol=2e-4 * scale)
            assert 0 < result.noise[i, 0, k] < 1e-4 * scale
            if np.abs(values).min() > 4e-4 * scale:
                assert column(result, f"positive-count@t{t}")[i, 0] == (values > 0).sum()
            assert abs(column(result, f"positive-count@t{t}")[i, 0] - (values > 0).sum()) <= 1
            assert column(result, f"largest-sum@t{t}")[i, 0] == pytest.approx(values[:5].sum(), rel=1e-3)
            sizes = np.sort(np.abs(values))[::-1]
            gaps = sizes[:-1] - sizes[1:]
            if np.diff(np.sort(gaps)[-2:]) > 1e-3 * scale:
                assert column(result, f"spectral-gap@t{t}")[i, 0] == 63 - gaps.argmax()


def test_directions_are_decoded_eigenvectors(model, out, result, recomputed):
    found = result.directions
    assert found.timestep == 201
    assert found.amplitude == pytest.approx(4 * model.scheduler.schedule.sigma[201])
    sums = result.eigenvalues[:, :, 1, :5].sum(-1)
    assert [tuple(point) for point in found.point] == [
        np.unravel_index(sums.argmin(), sums.shape), np.unravel_index(sums.argmax(), sums.shape)
    ]  # fmt: skip
    assert found.base.shape == (2, 8, 8, 3)
    assert found.moved.shape == (2, 2, 2, 8, 8, 3)
    for row, (i, j) in enumerate(found.point):
        np.testing.assert_allclose(found.eigenvalues[row], result.eigenvalues[i, j, 1, :2], rtol=1e-3)
    unet = recomputed[0][0]
    i, j = found.point[0]
    point = 2 * i + j
    plan = Plan.of(ModelFacts.of(model, model.sampler(5)), CONFIG, 4, 2)
    x = store.latents(Run.read(out), plan, int(point) // 5, 201)[point % 5].astype(np.float64)
    with pytest.warns(UserWarning, match="are cut"):
        embedded = np.asarray(model.embed([prompt.text for prompt in PROMPTS]))
    matrix = symmetric(model, recomputed, x, 201, embedded[i])
    vector = np.linalg.eigh(matrix)[1][:, -1].reshape(4, 4, 4)
    alpha, sigma = (float(table[201]) for table in (model.scheduler.schedule.alpha, model.scheduler.schedule.sigma))

    def mean(x):
        return (x - sigma * np.asarray(unet(x, 201, embedded[i]), np.float64)) / alpha

    both = [mean(x - found.amplitude * vector), mean(x + found.amplitude * vector)]
    images = model.decode(jnp.float32(np.stack([mean(x), *both])))
    assert np.abs(images[0].astype(int) - found.base[0]).max() <= 1
    either = [np.abs(images[1:][order].astype(int) - found.moved[0, 0]).max() for order in ([0, 1], [1, 0])]
    assert min(either) <= 2  # the sign of an eigenvector is free


def test_metrics_and_table(out, result):
    metrics = result.metrics
    assert [row["prompt"] for row in metrics["prompts"]] == [prompt.text for prompt in PROMPTS]
    assert [row["truncated"] for row in metrics["prompts"]] == [False, False, True, False]
    jeon = column(result, "jeon").mean(1)
    assert [row["rank"]["jeon"] for row in metrics["prompts"]] == (np.argsort(np.argsort(-jeon)) + 1).tolist()
    name = [detector.name for detector in result.detectors].index("jeon")
    listed = result.reference_scores[..., name].mean(1)
    assert [row["percentile"]["jeon"] for row in metrics["prompts"]] == [100 * (listed < s).mean() for s in jeon]
    assert set(metrics["evaluation"]["jeon"]) == {"all", "VM", "TM"}
    assert metrics["evaluation"]["jeon"]["all"]["num_negative"] == 4
    assert metrics["evaluation"]["jeon"]["all"]["tpr_at_1"] is None  # not estimable from four
    with open(out / "results.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    order = [int(row["number"]) - 1 for row in rows]
    assert order == AuditView(result).order.tolist()
    assert [row["place"] for row in rows] == ["1", "2", "3", "4"]
    assert sorted(order) == [0, 1, 2, 3]
    assert [row["prompt"] for row in rows] == [PROMPTS[n].text for n in order]
    assert [float(row["jeon"]) for row in rows] == pytest.approx(jeon[order].tolist(), rel=1e-12)
    assert [row["label"] for row in rows] == [str(int(PROMPTS[n].label)) for n in order]
    assert {float(row["p"]) for row in rows} <= {1 / 3, 2 / 3, 1.0}  # of two reference prompts and itself
    spectra = Run.read(out).spectra()
    assert spectra["eigenvalues"].shape == (8, 2, 64)
    assert spectra["label"].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_pandas_reads_the_table_in_one_call(out, result):
    pandas = optional_import("pandas")
    table = pandas.read_csv(out / "results.csv")
    table = table.sort_values("number")
    assert table["jeon"].tolist() == pytest.approx(column(result, "jeon").mean(1).tolist())
    assert table["prompt"].tolist() == [prompt.text for prompt in PROMPTS]


def test_texts_are_prompts(model, tmp_path):
    prompts = ["the cat", '=HYPERLINK("x")', Prompt("- a dog", True, "@VM")]
    config = AuditConfig(noises=1, ddim_steps=3, steps_run=1, method="none")
    metrics = audit(model, prompts, config, folder=tmp_path / "run", neutral=["a house"]).metrics
    assert [row["prompt"] for row in metrics["prompts"]] == ["the cat", '=HYPERLINK("x")', "- a dog"]
    assert [row["label"] for row in metrics["prompts"]] == [None, None, True]
    optional_import("pandas")
    table = read_results(tmp_path / "run").sort_values("number")
    assert table["prompt"].tolist() == ["the cat", '=HYPERLINK("x")', "- a dog"]
    assert table["category"].tolist()[2] == "@VM"
    assert '\n"\'- a dog",1,"\'@VM",' in (tmp_path / "run/results.csv").read_text()


@pytest.mark.parametrize(
    ("prompts", "options", "match"),
    [
        ("a cat", {}, r"prompts: expected a list of texts or of Prompt objects, got 'a cat'; write \['a cat'\]"),
        (["a cat"], dict(neutral="a dog"), r"neutral: expected a list of texts or of Prompt objects, got 'a dog'"),
        (["a cat", "a cat"], {}, r"prompts: expected each prompt once, got audited prompt 2 equal to audited prompt 1"),
        ([], {}, r"prompts: expected at least one, got none"),
    ],
)
def test_what_is_no_list_of_prompts_is_refused(model, tmp_path, prompts, options, match):
    with pytest.raises(ValueError, match=match):
        audit(model, prompts, CONFIG, folder=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_costs_are_counted_and_said_before(result, said):
    costs = {row["detector"]: row for row in result.costs}
    assert list(costs) == [detector.name for detector in result.detectors]
    # Twelve points, those of the reference included.
    assert costs["wen-1"]["evaluations"] == 12 * 2
    assert costs["jeon"]["products"] == 12 * 2
    assert costs["positive-count@t201"]["evaluations"] == 12 * (2 * 3 + 1)
    assert costs["positive-count@t201"]["products"] == 12 * 65
    assert all(row["seconds"] > 0 and row["bytes"] > 0 for row in result.costs)
    assert result.metrics["num_products"] == 12 * 2 + 12 * 2 * 65 + 2 * 64
    # sampling (one unconditional evaluation per noise at x_T), Jeon, anisotropy, spectra, directions
    assert result.metrics["num_evaluations"] == (12 * 9 + 2) + 24 + (12 + 2) + 24 + 2 * 6
    assert said[0].startswith("1 prompt(s) have more tokens than the text encoder takes and are cut")
    # the warning is true of a network without training: it is no epsilon network (tests/test_first_step.py)
    assert [line.split(":")[0] for line in said[1:]] == ["audit", "work", "time", "memory", "warning"]
    assert f"{result.metrics['num_evaluations']:,} evaluations" in said[2]
    assert f"{result.metrics['num_products']:,} products" in said[2]
    assert "measured, one batch of each" in said[3]


def same(one, two):
    """Two finished runs, but for seconds."""
    assert (one / "spectra.npz").read_bytes() == (two / "spectra.npz").read_bytes()
    for name in ("results.csv", "generations.csv", *(f"images/{path.name}" for path in (one / "images").glob("*"))):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert len(list((one / "images").iterdir())) == len(list((two / "images").iterdir()))
    a, b = Run.read(one), Run.read(two)
    assert {json.dumps(row) for row in a.rows()} == {json.dumps(row) for row in b.rows()}
    assert len(a.rows()) == len(b.rows())
    for name in sorted(path.name for path in (one / "arrays").iterdir()):
        assert (one / "arrays" / name).read_bytes() == (two / "arrays" / name).read_bytes(), name
    metrics = [
        {name: value for name, value in run.metrics().items() if name not in ("wall_seconds", "costs", "finished")}
        for run in (a, b)
    ]
    assert metrics[0] == metrics[1]
    assert not (two / "counting").exists()


@pytest.mark.slow  # fast: the run that is killed, below
def test_an_interrupted_run_can_be_read_and_goes_on(model, out, tmp_path, monkeypatch):
    """Stages fail at their second unit; what is there can be read each time."""
    run_unit = engine.Work.unit
    there = []
    for stage in ("trajectory", "products", "spectra", "directions"):
        seen = []

        def failing(self, key, name, *args, stage=stage, seen=seen, **kwargs):
            if name == stage:
                seen.append(key)
                if len(seen) == 2 or stage == "directions":
                    raise Stopped(key)
            return run_unit(self, key, name, *args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(engine.Work, "unit", failing)
            with pytest.raises(Stopped):
                audit(model, PROMPTS, CONFIG, folder=tmp_path / "run", neutral=NEUTRAL)
        partial = read_audit(tmp_path / "run")
        assert partial.metrics is None
        assert partial.directions is None
        there.append(int((~np.isnan(partial.scores)).sum()))
        if partial.images is not None:
            assert (partial.images[~partial.sampled] == 0).all()
    assert there == sorted(there)
    assert len(set(there)) == 4
    audit(model, PROMPTS, CONFIG, folder=tmp_path / "run", neutral=NEUTRAL)
    same(out, tmp_path / "run")
    again = audit(model, PROMPTS, CONFIG, folder=tmp_path / "run", neutral=NEUTRAL)  # nothing is left to do
    assert again.metrics == Run.read(tmp_path / "run").metrics()


def test_a_full_disk_is_clear_and_the_run_goes_on(model, out, tmp_path, monkeypatch):
    def full(path, *args, **kwargs):
        if "spectrum-00001" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open(path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(durable, "open", full, raising=False)
        with pytest.raises(
            OSError, match=r"spectrum-00001-0801\.npz: cannot write: No space left on device; make room"
        ):
            audit(model, PROMPTS, CONFIG, folder=tmp_path / "run", neutral=NEUTRAL)
    audit(model, PROMPTS, CONFIG, folder=tmp_path / "run", neutral=NEUTRAL)
    same(out, tmp_path / "run")


@pytest.mark.slow  # fast: test_reproduce_sd.py runs such an audit; test_one_prompt.py, test_counting.py
def test_ritz_values_and_budgets(model, out, result, tmp_path):
    """As many Lanczos steps as dimensions give the exact spectra, as many products the exact counts."""
    config = AuditConfig(
        noises=2, ddim_steps=5, batch=5, timesteps=(801,), guidance=3.0, seed=7, method="lanczos", num_steps=64,
        steps_run=2, count_budget=65, directions=1,
    )  # fmt: skip
    audit(model, PROMPTS[:3], config, folder=tmp_path / "run")
    found = read_audit(tmp_path / "run")
    scale = np.abs(result.eigenvalues[:3, :, 0]).max()
    np.testing.assert_allclose(found.eigenvalues[:, :, 0], result.eigenvalues[:3, :, 0], atol=1e-4 * scale)
    assert found.images is None
    assert not found.sampled.any()
    names = [detector.name for detector in found.detectors]
    assert "trace@t801" not in names  # Ritz values do not have it
    for name in ("positive-count@t801", "tangent-count@t801"):
        np.testing.assert_allclose(column(found, name), column(result, name)[:3], atol=1)
    chosen = tuple(found.directions.point.T)
    np.testing.assert_allclose(found.directions.eigenvalues[:, 0], found.eigenvalues[:, :, 0, 0][chosen], rtol=1e-3)
    assert found.metrics["evaluation"]["wen-1"]["all"]["num_negative"] == 2
    assert found.metrics["prompts"][0]["percentile"]["jeon"] is None  # no reference


def test_intervals_are_those_of_the_saved_counts(tmp_path):
    """Two prompts and one of the reference, two noises, two timesteps; one count is not done."""
    steps = dict(ddim_steps=2, guidance=1.0, timesteps=(501, 1), sigma=(0.85, 0.04), spectral_timesteps=(501, 1))
    plan = Plan(
        num_prompts=2, num_reference=1, noises=2, batch=4, **steps, sampler_timesteps=(501, 1), method="none",
        num_steps=20, count_budget=40, directions=0, latent_shape=(8, 8, 4),
    )  # fmt: skip
    prompts = [{"prompt": text, "label": None, "category": None, "truncated": False} for text in "abc"]
    for budget, name in ((40, "estimated"), (257, "exact")):
        run = Run.open(
            tmp_path / name, {"prompts": prompts}, experiment="audit", plan=asdict(replace(plan, count_budget=budget)),
            detectors=["wen-1", "positive-count", "tangent-count"],
        )  # fmt: skip
        for point in range(6):
            for k, t in enumerate(plan.spectral_timesteps):
                if (point, t) != (1, 501):
                    numbers = 100.0 * point + 10 * k + np.arange(9)
                    places = [0, 1, slice(2, 4), 4, 5, 6, slice(7, 9)]
                    arrays = {
                        name: np.asarray(numbers[place]) for name, place in zip(store.COUNTS, places, strict=True)
                    }
                    run.save(store.count(point, t), **arrays)
                    run.append({"key": store.count(point, t)})
    found = read_audit(tmp_path / "estimated")
    assert list(found.intervals) == [detector.name for detector in found.detectors if detector.is_count]
    assert found.intervals["positive-count@t501"].shape == (2, 2, 2)
    np.testing.assert_array_equal(found.intervals["positive-count@t501"][0], [[2, 3], [np.nan, np.nan]])
    np.testing.assert_array_equal(found.intervals["positive-count@t1"][1], [[212, 213], [312, 313]])
    np.testing.assert_array_equal(found.intervals["tangent-count@t1"][0], [[17, 18], [117, 118]])
    assert next(d.title for d in found.detectors if d.is_count) == "Positive eigenvalues (estimate), t = 501"
    exact = read_audit(tmp_path / "exact")
    assert exact.intervals == {}
    assert next(d.title for d in exact.detectors if d.is_count) == "Positive eigenvalues, t = 501"
    np.testing.assert_array_equal(column(exact, "tangent-count@t1"), [[16, 116], [216, 316]])


LOUDNESS = detectors.Detector(
    name="loudness",
    title="Norm of the score with the prompt",
    formula="‖s_c(x₀)‖ + ‖s_c(x₁)‖",
    source="this test",
    memorized_is="high",
    needs=detectors.ScorePairs(2),
    score=lambda pairs: jnp.sqrt(jnp.square(pairs.cond.reshape(2, -1)).sum(1)).sum(),
)
SPREAD = detectors.Detector(
    name="spread",
    title="Spread of pixels between generations",
    formula="mean over pixels of their standard deviation",
    source="this test",
    memorized_is="low",
    needs=detectors.Images(fewest=2),
    score=lambda images: np.full(len(images), images.std(0).mean()),
)


def test_detectors_from_outside_the_package(model, recomputed, result, tmp_path, capsys):
    """Only what the chosen detectors need is collected; their columns are in the table and in the page."""
    config = replace(CONFIG, timesteps=(), directions=None)
    chosen = ["wen-1", LOUDNESS, SPREAD]
    found = jm.audit(model, PROMPTS, config, folder=tmp_path / "run", detectors=chosen)
    assert [detector.name for detector in found.detectors] == ["wen-1", "loudness", "spread"]
    stages = {row["key"].split("-")[0] for row in Run.read(tmp_path / "run").rows()}
    assert stages == {"first", "start", "path", "image"}
    assert found.metrics["num_products"] == 0
    sigma = model.scheduler.schedule.sigma
    for (i, j), (path, _) in recomputed[2].items():
        norms = [np.linalg.norm(eps_c) / sigma[t] for t, _, eps_c, _ in path[:2]]
        assert found["loudness"].scores[i, j] == pytest.approx(sum(norms), rel=1e-3)
    np.testing.assert_array_equal(found["spread"].scores[:, 0], result.images.std(1).mean((1, 2, 3)))
    header = (tmp_path / "run/results.csv").read_text().splitlines()[0].split(",")
    assert {"loudness", "loudness rank", "spread"} < set(header)
    page = found.write_page(tmp_path / "run/report.html").read_text()
    assert LOUDNESS.title in page
    assert LOUDNESS.formula in page
    assert SPREAD.source in page
    # another set is another run, and reading it takes the entries
    with pytest.raises(
        ValueError, match=r"run of the same config, got another one \(detectors: there \[.*\], now \[\"we"
    ):
        audit(model, PROMPTS, config, folder=tmp_path / "run", detectors=["wen-1"])
    with pytest.raises(ValueError, match=r"known here, got loudness, spread in manifest\.json; .*register`, or give"):
        read_audit(tmp_path / "run")
    assert cli.main(["report", str(tmp_path / "run")]) == 2
    assert "in Python, make them known by jaxmem.detectors.register, or give them to read" in capsys.readouterr().err
    again = jm.read_audit(tmp_path / "run", detectors=[LOUDNESS, SPREAD])
    np.testing.assert_array_equal(again.scores, found.scores)
    assert again.metrics == found.metrics


def test_a_detector_that_cannot_run_leaves_nothing(model, tmp_path):
    for name, match in (("trace", "'trace' needs at least spectra"), ("tiled-l2", "'tiled-l2' needs at least images")):
        with pytest.raises(ValueError, match=f"detectors: {match}"):
            audit(
                model, PROMPTS, AuditConfig(noises=2, ddim_steps=5, steps_run=1, method="none"),
                folder=tmp_path / "run", detectors=[name],
            )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_the_result_by_detector(result, out, tmp_path):
    found = result["jeon"]
    np.testing.assert_array_equal(found.scores, column(result, "jeon"))
    assert found.intervals is None
    assert found.evaluation.auc == result.metrics["evaluation"]["jeon"]["all"]["auc"]
    assert found.evaluations["VM"].num_positive == 2
    assert found.reference_scores.shape == (2, 2)
    with pytest.raises(KeyError, match=r"expected one of the detectors that ran \(wen-1, .*\), got 'positive-count'"):
        result["positive-count"]
    assert result.to_csv(tmp_path / "copy.csv").read_bytes() == (out / "results.csv").read_bytes()
    pandas = optional_import("pandas")
    mine, theirs = result.to_dataframe(), read_results(out)
    pandas.testing.assert_frame_equal(mine, theirs, check_dtype=False)


def test_the_package_is_the_function_too():
    assert jm.audit is sys.modules["jaxmem.audit"]
    assert inspect.signature(jm.audit) == inspect.signature(audit)


def test_a_table_needs_pandas(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"Audit.to_dataframe: expected pandas, .*pip install pandas"):
        result.to_dataframe()


def test_the_cost_of_an_audit_is_counted(model, result):
    cost = audit_cost(model, PROMPTS, CONFIG, neutral=NEUTRAL)
    assert (cost.evaluations, cost.products) == tuple(result.metrics[f"num_{n}"] for n in ("evaluations", "products"))
    assert str(cost).splitlines() == list(cost.lines)
    few = audit_cost(model, PROMPTS, replace(CONFIG, timesteps=(), directions=None), detectors=["wen-1"])
    assert (few.evaluations, few.products) == (8 * 9 + 2, 0)
    assert few.memory_bytes > 0
    assert few.disk_bytes == 0


def test_another_config_or_model_is_another_run(model, out):
    for prompts, config, match in (
        (PROMPTS, AuditConfig(**{**CONFIG.__dict__, "guidance": 2.0}), r"config\.guidance: there 3\.0, now 2\.0"),
        (PROMPTS[:3], CONFIG, "plan.num_prompts: there 4, now 3"),
    ):
        with pytest.raises(ValueError, match=match):
            audit(model, prompts, config, folder=out, neutral=NEUTRAL)
    other = Run.read(out)
    other.manifest = other.manifest | {"experiment": "mnist"}
    with pytest.raises(ValueError, match="expected the run of an audit, got 'mnist'"):
        read_audit(other)


def test_the_table_shows_categories_as_they_are(out, tmp_path, capsys):
    shutil.copytree(out, tmp_path / "run")
    path = tmp_path / "run/metrics.json"
    text = path.read_text().replace('"VM"', '"[/red]"')
    path.write_text(re.sub(r'("num_(?:positive|negative)_prompts"): \d', r"\1: 5", text))  # of fewer no area is printed
    print_audit(tmp_path / "run", Console(width=200))
    assert "[/red] " in capsys.readouterr().out


def test_a_run_of_an_older_version_is_named(out, tmp_path):
    shutil.copytree(out, tmp_path / "run")
    path = tmp_path / "run/manifest.json"
    manifest = json.loads(path.read_text())
    for plan in ({name: value for name, value in manifest["plan"].items() if name != "guidance"}, None):
        path.write_text(json.dumps(manifest | {"plan": plan}))
        with pytest.raises(ValueError, match="expected the plan of an audit of this version of jaxmem"):
            read_audit(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(plan=[1]), "expected the plan of an audit"),
        (dict(plan="x"), "expected the plan of an audit"),
        (dict(config={}), r"expected prompts with label and category in the config of manifest\.json, got none"),
        (dict(config={"prompts": ["a"]}), r"expected prompts with label and category"),
        (dict(config={"prompts": []}), r"expected \d+ prompts in manifest\.json, as in its plan, got 0"),
    ],
)
def test_a_damaged_manifest_is_named(out, tmp_path, changes, match):
    shutil.copytree(out, tmp_path / "run")
    path = tmp_path / "run/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=match):
        read_audit(tmp_path / "run")


def test_a_damaged_cost_is_named(out, tmp_path):
    shutil.copytree(out, tmp_path / "run")
    with open(tmp_path / "run/costs-0.jsonl", "a") as stream:
        stream.write('{"key": "jeon-00000", "seconds": 1, "bytes": 1}\n')
    with pytest.raises(ValueError, match=r"a line of 'jeon-00000' without evaluations, stage; delete that line"):
        read_audit(tmp_path / "run")


def test_a_damaged_array_is_made_again_as_its_message_says(out, model, tmp_path):
    shutil.copytree(out, tmp_path / "run")
    path, rows = tmp_path / "run/arrays/products-00000.npz", tmp_path / "run/results-0.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:20])
    with pytest.raises(ValueError, match=r"delete the line of its unit in results-\*\.jsonl, and metrics\.json"):
        read_audit(tmp_path / "run")
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(line for line in lines if json.loads(line)["key"] != "products-00000"))
    (tmp_path / "run/metrics.json").unlink()
    audit(model, PROMPTS, CONFIG, folder=tmp_path / "run", neutral=NEUTRAL)
    assert path.read_bytes() == whole


def test_a_damaged_array_is_named(out, tmp_path):
    shutil.copytree(out, tmp_path / "run")
    path = tmp_path / "run/arrays/products-00000.npz"
    np.savez(path, **{"score:jeon": np.zeros(3)})
    with pytest.raises(
        ValueError, match=r"score:jeon of shape \(5,\) in arrays/products-00000\.npz, got \(3,\); the run is"
    ):
        read_audit(tmp_path / "run")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"products-00000\.npz: expected a whole \.npz file"):
        read_audit(tmp_path / "run")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(timesteps=(800,)), r"the sampling steps visit \(5 from 801 down to 1\), got 800; the nearest is 801"),
        (dict(timesteps=(1,), steps_run=2), r"\(2 from 801 down to 601\), got 1; the nearest is 601"),
        (dict(method="lanczos", num_steps=65), r"num_steps: expected 1 to 64"),
        (dict(method="none", directions=None), "timesteps: expected none with method 'none'"),
        (dict(count_budget=26), "count_budget: expected at least 27 products per point, or 65"),
        (dict(count_budget=40), "count_budget: expected none with method 'eigh', whose counts are exact, got 40"),
        (dict(method="none", timesteps=()), "directions: expected 0 with method 'none', got 2"),
        (dict(steps_run=6), "steps_run: expected 1 to 5, got 6"),
        (dict(noises=0), "noises: expected at least 1, got 0"),
        (dict(noises="2"), "noises: expected a whole number, got '2'"),
        (dict(ddim_steps=2.5), "ddim_steps: expected a whole number, got 2.5"),
        (dict(timesteps=1), "timesteps: expected a list of them, got 1"),
        (dict(guidance="high"), "guidance: expected a number, got 'high'"),
        (dict(batch=0), "batch: expected at least 1, got 0"),
        (dict(directions=17), "directions: expected 0 to 16"),
        (dict(timesteps=(801, 801)), "timesteps: expected each once"),
        (dict(timesteps=(1_000_001,)), "timesteps: expected 0 to 1000000"),
    ],
)
def test_bad_settings_leave_nothing(model, tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        audit(model, PROMPTS, AuditConfig(**{**CONFIG.__dict__, **changes}), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_budgets_are_settled_by_the_plan(model):
    """64 dimensions: 27 products of an estimate up to 64, exact from 65 on; of 16 dimensions 17 are exact already."""
    config = replace(CONFIG, method="lanczos", num_steps=10, batch=None)
    of_model = ModelFacts.of(model, model.sampler(config.ddim_steps))
    plans = {budget: Plan.of(of_model, replace(config, count_budget=budget), 2) for budget in (27, 64, 65, 1000)}
    assert [plan.estimates_counts for plan in plans.values()] == [True, True, False, False]
    small, large = (of_model._replace(shape=shape) for shape in ((2, 2, 4), (64, 64, 4)))
    assert not Plan.of(small, replace(config, count_budget=17), 2).estimates_counts
    with pytest.raises(ValueError, match="count_budget: expected at least 17 for exact counts, got 16"):
        Plan.of(small, replace(config, count_budget=16), 2)
    exact = Plan.of(large, replace(config, count_budget=16_385), 2)
    assert not exact.estimates_counts
    assert exact.columns == 1  # of a latent that large no more products are taken together than in the estimate
    assert count_disk_bytes(exact) == 4 * 16_384**2 + 128
    assert count_disk_bytes(Plan.of(large, replace(config, count_budget=16_384), 2)) == 0


def test_exact_counts_that_do_not_fit_are_refused_before_sampling(model, tmp_path):
    config = replace(CONFIG, method="none", timesteps=(801,), directions=0, count_budget=65)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(
            ValueError, match=r"an exact count: needs 0.0 MB more in .*run, where 0.0 MB are free; make"
        ):
            audit(model, PROMPTS, config, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_directions_need_two_samples(model):
    of_model = ModelFacts.of(model, model.sampler(5))
    with pytest.raises(ValueError, match="directions: expected 0 for one sample of one prompt, got 2"):
        Plan.of(of_model, replace(CONFIG, noises=1), 1)
    assert Plan.of(of_model, replace(CONFIG, noises=1, directions=None), 1).directions == 0
    assert Plan.of(of_model, CONFIG, 1).directions == 2


def test_freedom_is_judged_late_enough():
    usual = UsualScale()
    assert usual.judged([981, 481, 281, 41]) == 281
    assert usual.judged([981, 541, 1]) == 1  # 541 is nearer, but too early
    assert usual.judged([981, 541]) == 541
    half = UsualScale({490: 980.0, 270: 540.0, 140: 280.0, 0: 0.0})
    assert half.judged([490, 270, 140, 0]) == 140
    assert half.judged([490, 270, 0]) == 0


def test_bad_prompts_and_weights_leave_nothing(folder, model, tmp_path, monkeypatch):
    other = CONFIG.__dict__
    bad = AuditConfig()
    object.__setattr__(bad, "method", "dense")  # the tests' type checks would not let it through
    with pytest.raises(ValueError, match="method: expected 'auto', 'eigh', 'lanczos' or 'none', got 'dense'"):
        bad.__post_init__()
    with pytest.raises(ValueError, match="prompts: expected at least one, got none"):
        audit(model, [], CONFIG, folder=tmp_path / "run")
    with pytest.raises(ValueError, match="neutral: expected prompts that are not audited, got 1 that are"):
        audit(model, PROMPTS, CONFIG, folder=tmp_path / "run", neutral=[Prompt(PROMPTS[0].text, True, "VM")])
    with pytest.raises(ValueError, match="prompts: expected another category than 'all'"):
        audit(model, [*PROMPTS, Prompt("b", True, "all")], CONFIG, folder=tmp_path / "run")
    networks = [nnx.merge(*model.components[part].load()) for part in ("unet", "text_encoder", "vae")]
    weight = networks[0].conv_out.weight
    weight.set_value(weight[...].at[0].set(jnp.nan))
    spoilt = StableDiffusion.from_modules(*networks, model.tokenizer, model.scheduler)
    with pytest.raises(ValueError, match=r"finite parameters, got NaN or infinity in unet: conv_out\.weight \(\d"):
        audit(spoilt, PROMPTS, CONFIG, folder=tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(memory, "available_bytes", lambda: 1_000_000)
        with pytest.raises(ValueError, match="the parameters of the model: needs about"):
            audit(StableDiffusion.load(folder), PROMPTS, CONFIG, folder=tmp_path / "run")
        for enough, what in enumerate(("one evaluation of 5 point", "products of 5 point", "the spectra"), 1):
            looks = iter([10**9] * enough)
            patched.setattr(memory, "available_bytes", lambda looks=looks: next(looks, 1000))
            with pytest.raises(ValueError, match=rf"{what}.*: needs about .* smaller `batch`"):
                audit(model, PROMPTS, CONFIG, folder=tmp_path / "run")
    large = {**other, "method": "eigh"}
    monkeypatch.setattr(model, "shape", (64, 64, 4))
    with pytest.raises(ValueError, match="expected 'lanczos' for latents of 16384 dimensions, got 'eigh'"):
        audit(model, PROMPTS, AuditConfig(**large), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_that_overflow_name_the_prompt(model, tmp_path):
    networks = [nnx.merge(*model.components[part].load()) for part in ("unet", "text_encoder", "vae")]
    weight = networks[0].conv_out.weight
    weight.set_value(jnp.full_like(weight[...], 3e38))
    spoilt = StableDiffusion.from_modules(*networks, model.tokenizer, model.scheduler)
    with pytest.raises(ValueError, match=r"NaN or infinity in the score at t = 801 for prompt 'the cat', noise 0"):
        audit(spoilt, PROMPTS, CONFIG, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_empty_prompt_is_named_too(model, tmp_path, monkeypatch):
    conditions = model.conditions

    def spoilt(texts):
        found = conditions(texts)
        found[-1] = np.nan
        return found

    monkeypatch.setattr(model, "conditions", spoilt)
    with pytest.raises(ValueError, match=r"NaN or infinity in the score at t = 801 for prompt '', noise 0"):
        audit(model, PROMPTS, CONFIG, folder=tmp_path / "run")


def test_a_dry_run_says_and_writes_nothing(model, tmp_path, capsys, folder):
    (tmp_path / "p.txt").write_text("a\nb\nc\nd\ne\n")
    arguments = ["audit", str(folder), "--prompts", str(tmp_path / "p.txt"), "--dry-run", "--ddim-steps", "5"]
    assert cli.main([*arguments, "--noises", "1", "--batch", "5", "--out", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert "5 prompts × 1 noise = 5 points, 5 at once" in text
    assert "products with its Jacobian (counted)" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "arguments", "match"),
    [
        (None, [], "p.txt: expected a file of prompts, got no such file"),
        (b"", [], "p.txt: expected at least one prompt"),
        (b"\xff", [], "line 1: expected text in UTF-8"),
        (b"a\na\n", [], "expected each prompt once, got line 2 equal to line 1"),
        (b"a\n", ["--limit", "0"], "limit: expected at least 1"),
        (b"a\n", ["--device", "tpu"], "--device: expected"),
    ],
)
def test_errors_of_the_command_line(folder, tmp_path, capsys, content, arguments, match):
    path = tmp_path / "p.txt"
    if content is not None:
        path.write_bytes(content)
    command = ["audit", str(folder), "--prompts", str(path), "--out", str(tmp_path / "run"), *arguments]
    assert cli.main(command) == 2
    text = capsys.readouterr().err
    assert match in text
    assert text.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_models_that_are_none(folder, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a\n")
    shutil.copytree(folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model/unet")
    common = ["--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "run")]
    assert cli.main(["audit", str(tmp_path / "model"), *common]) == 2
    assert "unet/config.json" in capsys.readouterr().err
    assert cli.main(["audit", str(folder), "--out", str(tmp_path / "run")]) == 2
    assert "--prompts: expected a file of prompts, got none" in capsys.readouterr().err
    assert cli.main(["audit", str(folder), *common[:2]]) == 2
    assert "--out: expected a folder for the run" in capsys.readouterr().err
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained/manifest.json").write_text("{}")
    assert cli.main(["audit", str(tmp_path / "trained"), "--limit", "1", *common[2:]]) == 2
    assert "expected a run of format 2" in capsys.readouterr().err
    with pytest.raises(
        ValueError, match=r"MODEL: expected a folder or a hub id, or the shipped model in .*, got neither"
    ):
        verbatim_model(tmp_path)
    assert not (tmp_path / "run").exists()


def command(folder, prompts, out, *more):
    return [
        *(sys.executable, "-m", "jaxmem", "audit", str(folder), "--memorized", str(prompts), "--out", str(out)),
        *("--noises", "2", "--ddim-steps", "12", "--batch", "2", "--timesteps", "914", "84", "--directions", "1"),
        *more,
    ]


@pytest.fixture(scope="module")
def killing(folder, tmp_path_factory):
    """A command line, its environment, and its run from start to end, which fills the cache of compiled programs."""
    place = tmp_path_factory.mktemp("killing")
    (place / "p.csv").write_text("caption;type\na cat;VM\na dog;TM\na /house;VM\n")
    environment = command_environment()
    done = subprocess.run(
        command(folder, place / "p.csv", place / "whole"), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "The most memorized prompts" in done.stdout
    assert "time: about" in done.stderr
    return place, environment


def kill_when(arguments, environment, out, count, after=0.0):
    """Start, and kill with -9 once so many units are recorded; whether it was in time."""
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    signal_when(process, recorded_within(out, count), after=after)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode == -signal.SIGKILL


def test_a_killed_run_continues_to_the_same_bits(folder, killing, tmp_path):
    place, environment = killing
    out = tmp_path / "run"
    arguments = command(folder, place / "p.csv", out)
    assert kill_when(arguments, environment, out, 4)
    subprocess.run(arguments, env=environment, capture_output=True, check=True)
    same(place / "whole", out)


@pytest.mark.slow
def test_two_devices_find_what_one_finds(folder, killing, tmp_path):
    """Batches of two, a point each; the programs are others, so to float32 rounding over twelve steps."""
    place, environment = killing
    environment = with_xla_flags(environment, "--xla_force_host_platform_device_count=2")
    done = subprocess.run(
        command(folder, place / "p.csv", tmp_path / "run"), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Run.read(tmp_path / "run").manifest["device"]["count"] == 2
    one, two = (read_audit(path) for path in (place / "whole", tmp_path / "run"))
    np.testing.assert_allclose(two.eps_difference, one.eps_difference, rtol=1e-3)
    scale = np.abs(one.eigenvalues).max()
    np.testing.assert_allclose(two.eigenvalues, one.eigenvalues, atol=1e-3 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("of", ["prompts", "training images"])
def test_twenty_kills_at_random_moments(folder, killing, tmp_path, of):
    """Each at a number of further units and a fraction of a second later; started again until twenty have hit."""
    place, environment = killing
    budget = ["--method", "lanczos", "--count-budget", "40"]
    if of == "training images":
        for name, number in (("images", 3), ("held-out", 2)):
            pictures = np.random.default_rng(number).integers(0, 256, (number, 40, 30, 3)).astype(np.uint8)
            album.write_folder(tmp_path / name, pictures, ["a cat", "a dog", "a tree"][:number])
        budget += ["--training-data", str(tmp_path / "images"), "--held-out", str(tmp_path / "held-out")]
        budget += ["--image-timesteps", "914", "--image-noises", "1", "--neutral", "1"]
    whole = tmp_path / "whole"
    subprocess.run(command(folder, place / "p.csv", whole, *budget), env=environment, capture_output=True, check=True)
    seed = random.randrange(2**32)
    print("seed", seed)
    rng, hits, number = random.Random(seed), 0, 0
    while hits < 20:
        number += 1
        out = tmp_path / f"run-{number}"
        arguments = command(folder, place / "p.csv", out, *budget)
        total = sum(len(Run.read(path.parent).rows()) for path in whole.glob("**/manifest.json"))
        done = 0
        while True:
            done += rng.randint(0, total // 3)
            if not kill_when(arguments, environment, out, done, after=rng.random() / 20):
                break
            hits += 1
        same(whole, out)
        if of == "training images":
            assert (whole / "images.csv").read_bytes() == (out / "images.csv").read_bytes()
            for name in (WITH, WITHOUT):
                one, two = (path / "at-images" / name / "arrays" for path in (whole, out))
                assert {path.name: path.read_bytes() for path in one.iterdir()} == {
                    path.name: path.read_bytes() for path in two.iterdir()
                }
