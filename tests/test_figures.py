import numpy as np
import pytest
from matplotlib.image import imread

from jaxmem.diffusion import NoiseSchedule
from jaxmem.report import mnist
from jaxmem.report.figures import draw
from jaxmem.report.tables import _verdict
from jaxmem.runs.directory import Run


def arrays():
    rng = np.random.default_rng(0)
    timesteps = np.array([0, 1, 20, 100])
    sigma = NoiseSchedule().sigma[timesteps]
    values = -np.sort(rng.uniform(0, 1, (6, 4, 100)))
    values[:3, :, :7] *= -0.05
    samples = rng.uniform(-1, 1, (8, 28, 28))
    return {
        "eigenvalues": values / sigma[None, :, None] ** 2,
        "memorized": np.arange(6) >= 3,
        "label": np.where(np.arange(6) >= 3, 9, 3),
        "timestep": timesteps,
        "sigma": sigma,
        "samples": samples,
        "nearest_image": samples,
        "sample_label": np.where(np.arange(8) < 5, 3, 9),
        "calibrated_l2": np.linspace(1.8, 0.1, 8),
        "threshold": np.asarray(1.4),
        "training_memorized": samples[0],
        "analysed": np.array([0, 1, 2, 5, 6, 7]),
    }


def is_a_picture(path):
    pixels = imread(path)[..., :3]
    assert min(pixels.shape[:2]) >= 400
    return pixels.std() > 0.05


def test_mnist_figures_are_pictures(tmp_path):
    paths = mnist.draw(arrays(), {}, tmp_path)
    assert len(paths) == 4
    assert all(is_a_picture(path) for path in paths)


def test_figures_follow_the_run(tmp_path):
    run = Run.open(tmp_path / "run", {}, experiment="mnist")
    with pytest.raises(ValueError, match="expected a finished run"):
        draw(tmp_path / "run")
    run.finalise({}, arrays())
    assert {path.name for path in draw(tmp_path / "run")} == {
        "figure3_samples.png",
        "figure4_spectra.png",
        "figure5_counts.png",
        "calibrated_l2.png",
    }


def test_unknown_runs_are_named(tmp_path):
    Run.open(tmp_path / "run", {}, experiment="other").finalise({}, {})
    with pytest.raises(
        ValueError,
        match=r"a run of one of \['dimension', 'finetune', 'generate', 'mnist', 'spectrum', .*\], got 'other'",
    ):
        draw(tmp_path / "run")
    with pytest.raises(ValueError, match="expected a run directory"):
        draw(tmp_path)


@pytest.mark.parametrize(
    ("general", "memorized", "auc", "copies", "says"),
    [
        (30.0, 0.0, 1.0, 1.0, "on the one training image the model memorized"),
        (30.0, 0.0, 1.0, 0.2, "nearest training image is mostly not the repeated one"),
        (30.0, 8.0, 1.0, 1.0, "did not memorize it"),
        (0.9, 30.0, 0.0, 1.0, "did not memorize it"),
        (1.0, 0.5, 0.5, 1.0, "says nothing about memorization"),
    ],
)
def test_the_verdict_follows_from_the_numbers(general, memorized, auc, copies, says):
    metrics = {
        "positive_count": {"0": {"general": {"mean": general}, "memorized": {"mean": memorized}}},
        "auc_positive_count": {"0": auc},
        "memorized_are_the_training_image": copies,
    }
    assert says in _verdict(metrics, "0", "digit 9")


def test_a_run_of_another_version_is_named(tmp_path):
    Run.open(tmp_path / "run", {}, experiment="mnist").finalise({}, {"eigenvalues": np.zeros((1, 1, 4))})
    with pytest.raises(ValueError, match=r"expected .* among the results of a mnist run, got none"):
        draw(tmp_path / "run")
