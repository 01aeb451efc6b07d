import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jaxmem import Arnoldi, Dense, Lanczos, score_jacobian, spectrum
from jaxmem.config import MnistConfig, TrainingConfig
from jaxmem.data.mnist import load_subset, to_pixels
from jaxmem.experiments.mnist import SCHEDULE, mnist_metrics, run_mnist, score_network
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
