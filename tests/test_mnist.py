import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jaxmem import Arnoldi, Dense, Lanczos, cli, read_audit, score_jacobian, spectrum
from jaxmem.config import MnistConfig, TrainingConfig
from jaxmem.data.mnist import load_subset, to_pixels
from jaxmem.experiments.mnist import SCHEDULE, load_model, run_mnist, score_network
from jaxmem.experiments.mnist_analysis import mnist_metrics
from jaxmem.training import train

CONFIG = MnistConfig(
    num_general_images=60,
    num_copies=5,
    features=(8, 16),
    num_blocks=(1, 1),
    embedding=16,
    training=TrainingConfig(
        num_steps=60, batch_size=16, warmup_steps=5, second_order="sliced", second_order_start=0.5, checkpoint_every=20
    ),
    num_ddim_steps=10,
    timesteps=(0, 200),
    num_general_samples=6,
    num_memorized_samples=3,
    sample_batch=4,
    new_threshold=0.0,
    num_analysed=3,
    analysis_batch=2,
    points=2,
    chunk=112,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("mnist") / "run"
    return out, run_mnist(CONFIG, out)


def test_metrics_follow_from_the_arrays_alone(run):
    out, metrics = run
    with np.load(out / "spectra.npz") as file:
        arrays = dict(file)
    again = json.loads(json.dumps(mnist_metrics(arrays)))
    # The seconds are no result: they come from the costs, and are all that the arrays do not hold.
    assert again == {name: value for name, value in metrics.items() if name != "wall_seconds"}
    assert set(metrics) >= {
        "num_samples",
        "positive_count",
        "tangent_count",
        "auc_positive_count",
        "asymmetry",
        "nearest_train_distance",
        "wall_seconds",
        "num_products",
    }
    assert metrics["num_products"] == 6 * 2 * 785
    assert metrics["num_samples"]["analysed"] == {"general": 3, "memorized": 3}
    assert arrays["eigenvalues"].shape == (6, 2, 784)


def test_metrics_by_hand(run):
    out, metrics = run
    with np.load(out / "spectra.npz") as file:
        arrays = dict(file)
    counts = (arrays["eigenvalues"][:, 1] > 1e-15).sum(-1)
    assert metrics["positive_count"]["200"]["general"]["mean"] == pytest.approx(counts[~arrays["memorized"]].mean())
    assert metrics["positive_count"]["200"]["memorized"]["max"] == counts[arrays["memorized"]].max()
    wins = counts[~arrays["memorized"]][:, None] - counts[arrays["memorized"]][None]
    assert metrics["auc_positive_count"]["200"] == pytest.approx((wins > 0).mean() + 0.5 * (wins == 0).mean())
    free = (arrays["eigenvalues"][:, 0] > -0.5 / SCHEDULE.sigma[0] ** 2).sum(-1)
    assert metrics["tangent_count"]["0"]["general"]["min"] == free[~arrays["memorized"]].min()
    _, nine = load_subset()
    np.testing.assert_array_equal(arrays["training_memorized"], to_pixels(nine)[..., 0])
    sample, nearest = arrays["samples"][7], arrays["nearest_image"][7]
    np.testing.assert_allclose(arrays["nearest_distance"][7], np.linalg.norm(sample - nearest), rtol=1e-5)


@pytest.mark.slow  # fast: test_toy2d.py
def test_an_interrupted_run_continues_to_the_same_arrays(run, tmp_path):
    out, _ = run
    for task, at in (("train", 33), ("sample", 4), ("spectra", 6)):

        def interrupt(name, done, total, task=task, at=at):
            if name == task and done >= at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_mnist(CONFIG, tmp_path / "run", interrupt)
    run_mnist(CONFIG, tmp_path / "run")
    assert (tmp_path / "run" / "spectra.npz").read_bytes() == (out / "spectra.npz").read_bytes()
    with pytest.raises(ValueError, match=r"training\.seed"):
        run_mnist(replace(CONFIG, training=replace(CONFIG.training, seed=1)), tmp_path / "run")


def test_too_few_new_samples_is_an_error_that_says_what_to_do(run, tmp_path):
    with pytest.raises(ValueError, match=r"only 0 of 6 samples of digit 3 are clearly new.*train longer, sample more"):
        run_mnist(replace(CONFIG, new_threshold=2.0), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            dict(timesteps=(0, 1)),
            r"timesteps: expected ascending timesteps that 10 DDIM steps visit \(multiples of 100",
        ),
        (dict(timesteps=(200, 0)), "timesteps: expected ascending"),
        (dict(num_ddim_steps=0), "num_ddim_steps: expected 1 to 1000"),
        (dict(num_general_samples=2), "num_general_samples: expected at least 3"),
        (dict(points=0), "points: expected at least 1"),
        (dict(num_general_images=48), "num_general_images: expected at least 49"),
        (dict(features=(12, 16)), "features: expected one or two multiples of 8"),
        (dict(features=(8, 8, 8)), "features: expected one or two multiples of 8"),
        (dict(num_blocks=(1,)), "num_blocks: expected 2 numbers of at least 1"),
        (dict(sampling_seed=-1), "sampling_seed: expected 0 to 4294967295, got -1"),
        (dict(sampling_seed=2**40), "sampling_seed: expected 0 to"),
        (dict(new_threshold=float("nan")), "new_threshold: expected 0 to 2"),
        (dict(clip=0.0), "clip: expected more than 0"),
    ],
)
def test_bad_configurations_are_named(changes, match):
    with pytest.raises(ValueError, match=match):
        replace(CONFIG, **changes)


@pytest.mark.slow  # fast: test_krylov.py, of operators that are not trained
def test_krylov_methods_on_a_trained_model():
    score, state = score_network(CONFIG)
    threes, nine = load_subset()
    images = jnp.asarray(to_pixels(np.concatenate([threes[:60], nine[None]])))
    labels = jnp.asarray([3] * 60 + [9], jnp.int32)
    config = TrainingConfig(num_steps=100, batch_size=16, warmup_steps=5, learning_rate=5e-3, ema_decay=0.9)
    state = train(score, state, (images, labels), SCHEDULE, config).state
    t = 100
    x = SCHEDULE.add_noise(images[0], jax.random.normal(jax.random.key(0), (28, 28, 1)), t)
    operator = score_jacobian(score, state, x, t, labels[0])

    # Arnoldi to the end finds all eigenvalues of J: largest distance under the best one-to-one matching.
    dense = spectrum(operator, Dense(symmetric=False))
    arnoldi = spectrum(operator, Arnoldi(784, tolerance=0.0), key=jax.random.key(1))
    assert len(arnoldi.eigenvalues) == 784
    distance = np.abs(arnoldi.eigenvalues[:, None] - dense.eigenvalues[None])
    matched = distance[scipy.optimize.linear_sum_assignment(distance)]
    assert matched.max() <= 1e-3 * np.linalg.norm(operator.to_dense(), 2)  # the bound; seen: 1e-6

    # After 100 Lanczos steps a pair that says it has converged has an exact eigenvalue within its residual.
    exact = spectrum(operator)
    lanczos = spectrum(operator, Lanczos(100), key=jax.random.key(2))
    converged = lanczos.converged(1e-3)
    assert converged.sum() >= 5
    nearest = np.abs(lanczos.eigenvalues[converged, None] - exact.eigenvalues[None]).min(1)
    assert (nearest <= lanczos.residuals[converged] + exact.noise).all()


class TestAudit:
    """The network that a run trained is a model for an audit."""

    def test_the_model_is_the_trained_network(self, run):
        """Its samples are those that the run kept, which it drew with the trained parameters in memory."""
        model = load_model(run[0])
        with np.load(run[0] / "spectra.npz") as file:
            samples, labels = file["samples"], file["sample_label"]
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(CONFIG.sampling_seed), 0), (4, 28, 28, 1))
        x = [x for _, x in model.path(noise[:3], ["9"] * 3, num_steps=10)][-1]
        # Another batch: float32 rounding over ten steps.
        np.testing.assert_allclose(np.asarray(x)[..., 0], samples[labels == 9], atol=1e-3)

    def test_the_command_line_audits_its_two_digits(self, run, tmp_path, capsys):
        flags = ["--noises", "2", "--ddim-steps", "5", "--timesteps", "200", "--directions", "1"]
        assert cli.main(["audit", str(run[0]), "--out", str(tmp_path / "audit"), *flags]) == 0
        said = capsys.readouterr()
        assert "left out: wen-1" in said.err
        assert "The most memorized" in said.out
        found = read_audit(tmp_path / "audit")
        assert (
            found.prompts == list(load_model(run[0]).prompts()) == [("3", False, "general"), ("9", True, "memorized")]
        )
        assert found.eigenvalues.shape == (2, 2, 1, 784)
        assert found["tangent-count@t200"].evaluation.auc is not None
        model = load_model(run[0])
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), 1), (28, 28, 1))
        x = dict(model.path(noise[None], ["9"], num_steps=5))[200][0]
        exact = spectrum(score_jacobian(model.score, model.state, x, 200, jnp.int32(9)))
        scale = np.abs(exact.eigenvalues).max()  # x_t differs by float32 rounding over the steps before
        np.testing.assert_allclose(found.eigenvalues[1, 1, 0], exact.eigenvalues, atol=1e-4 * scale)
        page = (tmp_path / "audit/report.html").read_text()
        assert "Which of 2 classes has this class-conditional model memorized?" in page
        assert page.count("data:image/png") >= 4
        rows = (tmp_path / "audit/results.csv").read_text().splitlines()
        assert sorted(row.split(",")[:3] for row in rows[1:]) == [
            ['"3"', "0", '"general"'],
            ['"9"', "1", '"memorized"'],
        ]

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            (
                ["audit", "{run}", "--prediction-type", "epsilon"],
                "has no files of diffusers: expected no --prediction-type, got",
            ),
            (["audit", "{run}", "--guidance", "7.5"], "--guidance: expected 1, which is none, for a model"),
            (
                ["audit", "{run}", "--prompts", "{digits}"],
                "--prompts: expected names of the classes of this model ('3",
            ),
            (
                ["audit", "{other}"],
                "expected a run of `jaxmem reproduce mnist`, whose network can be au",
            ),
            (
                ["generate", "{run}", "--prompt", "3"],
                "MODEL: expected a Stable Diffusion 1 or 2 model, got a run of",
            ),
        ],
    )
    def test_errors_are_one_line_before_any_work(self, run, tmp_path, capsys, arguments, match):
        (tmp_path / "digits.txt").write_text("3\n4\n")
        shutil.copytree(run[0], tmp_path / "other")
        path = tmp_path / "other/manifest.json"
        path.write_text(path.read_text().replace('"mnist"', '"toy2d"'))
        names = {"run": run[0], "digits": tmp_path / "digits.txt", "other": tmp_path / "other"}
        arguments = [argument.format(**names) for argument in arguments]
        assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 2
        text = capsys.readouterr().err
        assert match in text
        assert text.count("\n") == 1
        assert not (tmp_path / "out").exists()

    def test_a_run_without_its_network_says_what_to_do(self, run, tmp_path):
        shutil.copytree(run[0], tmp_path / "run")
        path = tmp_path / "run/model.npz"
        whole = path.read_bytes()
        path.write_bytes(whole[:1000])
        with pytest.raises(ValueError, match=r"model\.npz: expected the parameters of a network, got a damaged file"):
            load_model(tmp_path / "run")
        path.unlink()
        with pytest.raises(ValueError, match=r"expected the trained network in model\.npz, got none; let `jaxmem"):
            load_model(tmp_path / "run")
        path.write_bytes(whole)
        manifest = tmp_path / "run/manifest.json"
        manifest.write_text(manifest.read_text().replace('"embedding": 16', '"embedding": 24'))
        with pytest.raises(ValueError, match=r"expected the parameters of the network in the run's manifest, got"):
            load_model(tmp_path / "run")
