import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxmem.config import Toy2dConfig, TrainingConfig
from jaxmem.experiments.toy2d import SCHEDULE, population, run_toy2d, toy2d_metrics, training_points
from jaxmem.oracles import GaussianMixtureScore

QUICK = TrainingConfig(
    num_steps=150, batch_size=64, warmup_steps=10, ema_decay=0.9, second_order="exact", learning_rate=5e-3
)
CONFIG = Toy2dConfig(
    num_samples=200,
    width=16,
    depth=1,
    landing_radius=2.5,
    training=QUICK,
    first_order_training=replace(QUICK, second_order="none"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy2d") / "run"
    seen = []
    metrics = run_toy2d(CONFIG, out, lambda task, done, total: seen.append((task, done, total)))
    return out, metrics, seen


def test_population_and_training_points_agree():
    config = Toy2dConfig()
    points = training_points(config)
    assert points.shape == (3100, 2)
    assert (points == np.array(config.point, np.float32)).all(1).sum() == 100
    draws = points[:3000].astype(np.float64)
    # 3,000 draws: four standard errors of a mean, 4/√3000, and of a covariance entry, 4 √2/√3000.
    np.testing.assert_allclose(draws.mean(0), config.mean, atol=0.08)
    np.testing.assert_allclose(np.cov(draws.T), config.covariance, atol=0.11)
    np.testing.assert_allclose(np.exp(population(config).log_weights), [30 / 31, 1 / 31], rtol=1e-6)
    assert np.linalg.norm(draws - config.point, axis=1).min() > config.landing_radius


def test_metrics_follow_from_the_arrays_alone(run):
    out, metrics, _ = run
    with np.load(out / "spectra.npz") as file:
        arrays = dict(file)
    again = json.loads(json.dumps(toy2d_metrics(arrays)))
    # The seconds are no result: they come from the costs, and are all that the arrays do not hold.
    assert again == {name: value for name, value in metrics.items() if name != "wall_seconds"}
    assert metrics["wall_seconds"]["total"] > 0
    assert set(metrics) >= {
        "memorized_fraction",
        "hessian_rel_error",
        "hessian_abs_error",
        "hessian_rel_error_median",
        "first_order",
        "empirical",
        "num_products",
    }
    assert len(metrics["hessian_rel_error"]) == 1000
    assert set(metrics["hessian_rel_error"]["20"]) == {"memorized", "general"}
    assert metrics["num_products"] == 2 * 2 * 1000 * 2


def test_closed_form_and_errors_by_hand(run):
    out, metrics, _ = run
    with np.load(out / "spectra.npz") as arrays:
        path, learned = arrays["second_order_paths"][0], arrays["second_order_hessians"][0]
        eigenvalues = arrays["eigenvalues"][0]
        memorized = arrays["second_order_memorized_sample"]
    t = 300
    exact = GaussianMixtureScore(SCHEDULE).hessian(population(CONFIG), path[t], t)
    gap = np.linalg.norm(learned[t] - exact)
    assert metrics["hessian_rel_error"][str(t)]["memorized"] == pytest.approx(gap / np.linalg.norm(exact), rel=1e-6)
    assert metrics["hessian_abs_error"][str(t)]["memorized"] == pytest.approx(gap * SCHEDULE.sigma[t] ** 2, rel=1e-6)
    symmetric = (learned[t].astype(np.float64) + learned[t].T) / 2
    np.testing.assert_allclose(eigenvalues[t], np.linalg.eigvalsh(symmetric)[::-1], rtol=1e-6)
    assert metrics["memorized_fraction"] == memorized.mean()


def test_progress_is_shown_and_a_finished_run_returns_at_once(run, monkeypatch):
    out, metrics, seen = run
    assert {task for task, *_ in seen} >= {"train second-order", "train first-order", "sample second-order"}
    for task in {task for task, *_ in seen}:
        assert [done == total for name, done, total in seen if name == task][-1]
    monkeypatch.setattr("jaxmem.experiments.toy2d.train", None)
    assert run_toy2d(CONFIG, out) == metrics
    with pytest.raises(ValueError, match="landing_radius"):
        run_toy2d(replace(CONFIG, landing_radius=1.0), out)


def test_an_interrupted_run_continues_to_the_same_arrays(run, tmp_path):
    out, _, _ = run

    def interrupt(task, done, total):
        if task == "sample first-order":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_toy2d(CONFIG, tmp_path / "run", interrupt)
    run_toy2d(CONFIG, tmp_path / "run")
    assert (tmp_path / "run" / "spectra.npz").read_bytes() == (out / "spectra.npz").read_bytes()


def test_no_memorized_sample_is_an_error_that_says_what_to_do(tmp_path):
    config = replace(CONFIG, landing_radius=1e-9, training=replace(QUICK, num_steps=20))
    with pytest.raises(ValueError, match=r"0 of 200 samples landed on the duplicated point.*train longer"):
        run_toy2d(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(covariance=((1.0, 2.0), (2.0, 1.0))), "covariance: expected a symmetric positive definite"),
        (dict(num_samples=0), "num_samples: expected at least 2"),
        (dict(field_timestep=1000), "field_timestep: expected 0 to 999"),
        (dict(point=(float("inf"), 0.0)), "point: expected -1000000 to 1000000, got inf"),
        (dict(data_seed=2**32), "data_seed: expected 0 to 4294967295"),
        (dict(landing_radius=-0.1), "landing_radius: expected more than 0 and at most 1,000,000, got -0.1"),
    ],
)
def test_bad_configurations_are_named(changes, match):
    with pytest.raises(ValueError, match=match):
        Toy2dConfig(**changes)


def test_the_learned_jacobian_is_jacfwds(run):
    from flax import nnx

    from jaxmem.experiments.toy2d import path_hessians
    from jaxmem.networks.mlp import MLP
    from jaxmem.score import bind

    score, state = bind(MLP(2, width=8, depth=1, rngs=nnx.Rngs(0)), SCHEDULE, "eps")
    paths = jax.random.normal(jax.random.key(0), (2, 5, 2))
    found = path_hessians(score, state, paths)
    exact = jax.jacfwd(lambda x: score(state, x, jax.numpy.int32(3), None))(paths[1, 3])
    np.testing.assert_allclose(found[1, 3], exact, rtol=1e-4, atol=1e-4 * np.abs(exact).max())


def test_figures_of_the_run_are_drawn(run):
    from jaxmem.report.figures import draw

    out, _, _ = run
    paths = draw(out)
    assert [path.name for path in paths] == [
        "figure1_landscapes.png",
        "figure2a_scores.png",
        "figure2b_eigenvalues.png",
        "hessian_errors.png",
    ]
    assert all(path.stat().st_size > 20_000 for path in paths)
