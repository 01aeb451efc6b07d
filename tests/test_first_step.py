"""A prediction type that cannot be right is noticed at the first step: closed forms, the shipped model, commands."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem import cli
from jaxmem.audit import audit, audit_cost, read_audit
from jaxmem.audit.generate import run_generate
from jaxmem.audit.spectrum import run_spectrum
from jaxmem.config import AuditConfig, GenerateConfig, SpectrumConfig
from jaxmem.data import verbatim_model
from jaxmem.diffusion import FlowSchedule, NoiseSchedule, to_score
from jaxmem.first_step import EPSILON, OTHER, contradiction, noise_share
from jaxmem.prompts import Prompt
from jaxmem.report.audit.page import write_report
from jaxmem.report.tables import print_audit
from jaxmem.runs.directory import Run
from jaxmem.stable_diffusion.configs.scheduler import PREDICTION_TYPES
from jaxmem.stable_diffusion.pipeline import StableDiffusion

SCHEDULE = NoiseSchedule.stable_diffusion()
FLOW = FlowSchedule()
PREDICTIONS = ("eps", "v", "x0")


def outputs(score, x, alpha, sigma):
    """What three networks that know this score give: of the noise, of v and of the clean image."""
    eps = -sigma * score
    clean = (x - sigma * eps) / alpha
    return {"eps": eps, "v": alpha * eps - sigma * clean, "x0": clean}


def expected(true, said):
    """What a warning names, or None."""
    if true == "eps":
        return None if said == "eps" else "It looks like 'epsilon'"
    return "It looks like 'v_prediction' (or 'sample'), or not trained" if said == "eps" else None


def check(score, x, t, schedule=SCHEDULE):
    """Every network under every label: its scores are then what the label makes of its output."""
    alpha, sigma = schedule.alpha[t], schedule.sigma[t]
    found = {}
    for true, output in outputs(score, x, alpha, sigma).items():
        for said in PREDICTIONS:
            share = noise_share(said, to_score(said, output, x, alpha, sigma), x, alpha, sigma)
            text = contradiction(said, share, "prediction_type", PREDICTION_TYPES)
            wanted = expected(true, said)
            assert (text is None) == (wanted is None), (true, said, share)
            assert text is None or wanted in text
        found[true] = share
    return found


class TestClosedForms:
    @pytest.mark.parametrize("t", [1_000_000, 999_000, 960_000])
    @pytest.mark.parametrize("deviation", [0.0, 1.0, 1.5])
    def test_flow(self, t, deviation):
        """Of rectified flow, in float32 as scores are: what a network of each kind gives back, under each label."""
        alpha, sigma = FLOW.alpha[t], FLOW.sigma[t]
        rng = np.random.default_rng(3)
        x, centre = rng.normal(size=(4, 256)), np.sign(rng.normal(size=256))
        clean = centre + alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2) * (x - alpha * centre)
        eps = (x - alpha * clean) / sigma
        networks = {
            "flow": eps - clean,
            "eps": eps,
            "v": alpha * eps - sigma * clean,
            "x0": clean,
            "-flow": clean - eps,
        }
        for true, output in networks.items():
            for said in ("flow", *PREDICTIONS):
                score = np.float32(to_score(said, output, x, alpha, sigma))
                share = noise_share(said, score, x, alpha, sigma)
                text = contradiction(said, share)
                # float32 scores hold the output to 1e-7 / alpha
                assert share == pytest.approx({"flow": 1, "eps": 1, "-flow": -1}.get(true, 0), abs=0.2)
                if said in ("flow", "eps") and true in ("v", "x0"):
                    assert "It looks like 'v' (or 'x0'), or not trained. " in text
                    assert text.endswith("load it with `prediction='v'`")
                elif said in ("flow", "eps") and true == "-flow":
                    assert f"It looks like {said!r} with the other sign. " in text
                    assert text.endswith("give the model the negative of its output")
                elif said in ("v", "x0") and true in ("flow", "eps"):
                    assert "It looks like 'eps' (or 'flow'). " in text
                    assert text.endswith("load it with `prediction='eps'` or `prediction='flow'`")
                else:
                    assert text is None

    @pytest.mark.parametrize("t", [981, 999])
    @pytest.mark.parametrize("deviation", [0.0, 0.2, 1.0, 1.5])
    @pytest.mark.parametrize("mean", [0.0, 1.0])
    def test_gaussians(self, t, deviation, mean):
        """s = -(x - alpha mean) / (alpha² deviation² + sigma²); latents of Stable Diffusion have deviations near 1."""
        alpha, sigma = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
        rng = np.random.default_rng(0)
        x, centre = rng.normal(size=(4, 256)), mean * np.sign(rng.normal(size=256))
        score = -(x - alpha * centre) / (alpha**2 * deviation**2 + sigma**2)
        shares = check(score, x, t)
        # 4 × 256 numbers: the part of the output that is not of this noise adds 1/32 of its size, at most 1
        assert shares["eps"] == pytest.approx(1, abs=0.02)
        assert shares["v"] == pytest.approx(alpha * (1 - deviation**2), abs=0.05 + 3 / 32 * mean)
        assert shares["x0"] == pytest.approx(alpha * deviation**2, abs=0.05 + 3 / 32 * mean)

    def test_two_points(self):
        """A memorized model: the posterior mean jumps between images, and hardly knows the noise."""
        t, rng = 981, np.random.default_rng(1)
        alpha, sigma = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
        x, points = rng.normal(size=(3, 256)), rng.normal(size=(2, 256))
        distance = ((x[:, None] - alpha * points) ** 2).sum(-1) / (2 * sigma**2)
        weights = np.exp(distance.min(1, keepdims=True) - distance)
        clean = weights / weights.sum(1, keepdims=True) @ points
        check(-(x - alpha * clean) / sigma**2, x, t)

    def test_zero_terminal_snr(self):
        schedule = NoiseSchedule("scaled_linear", 1000, 0.00085, 0.012, zero_terminal_snr=True)
        x = np.random.default_rng(2).normal(size=(4, 256))
        check(-x / (0.25 * schedule.alpha[999] ** 2 + schedule.sigma[999] ** 2), x, 999, schedule)

    def test_the_words_of_the_argument(self):
        text = contradiction("eps", 0.01)
        assert text.startswith("prediction: the model says 'eps', but")
        assert text.endswith("load it with `prediction='v'`")

    def test_what_cannot_be_known(self):
        x = np.ones((1, 8))
        assert noise_share("eps", -x, x, SCHEDULE.alpha[501], SCHEDULE.sigma[501]) is None  # x is half an image
        assert noise_share("score", -x, x, SCHEDULE.alpha[981], SCHEDULE.sigma[981]) is None
        assert contradiction("eps", None) is None
        for said in PREDICTIONS:
            assert contradiction(said, (EPSILON + OTHER) / 2) is None  # neither one nor the other


@pytest.fixture(scope="module")
def shipped():
    return StableDiffusion.load(verbatim_model()[0])


@pytest.fixture(scope="module")
def mislabelled(tmp_path_factory):
    """The shipped model, which predicts v, with a file that says epsilon."""
    folder = tmp_path_factory.mktemp("wrong") / "model"
    shutil.copytree(verbatim_model()[0], folder)
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "epsilon"}))
    return folder


def test_the_shipped_model(shipped):
    """Single noises, with and without a prompt that it memorized: the numbers of `first_step`'s thresholds."""
    t = int(shipped.sampler(50).timesteps[0])
    x = np.random.default_rng(0).normal(size=(4, *shipped.shape)).astype(np.float32)
    embedded = shipped.embed(["the azure orchard", "a handwritten digit", ""])
    evaluate = jax.jit(lambda state, x, cond: jax.vmap(lambda x: shipped.score(state, x, jnp.int32(t), cond))(x))
    for cond in embedded:
        score = np.asarray(evaluate(shipped.state, x, cond), np.float64)
        for i in range(len(x)):
            shares = check(score[i], x[i].astype(np.float64), t)
            assert shares["eps"] == pytest.approx(1, abs=0.02)
            assert abs(shares["v"]) < 0.2
            assert abs(shares["x0"]) < 0.2


WRONG = "prediction_type: the model says 'epsilon', but at the first step its output holds 0.0"
CONFIG = AuditConfig(noises=2, ddim_steps=10, steps_run=1, method="none", guidance=1.0)


def test_an_audit_warns_at_once_in_its_table_and_in_its_page(mislabelled, tmp_path, capsys):
    model, said = StableDiffusion.load(mislabelled), []
    metrics = audit(model, [Prompt("the azure orchard")], CONFIG, folder=tmp_path / "run", say=said.append).metrics
    assert [line.startswith(f"warning: {WRONG}") for line in said[-1:]] == [True]
    (warning,) = metrics["warnings"]
    assert warning.startswith(WRONG)
    assert "It looks like 'v_prediction' (or 'sample'), or not trained" in warning
    assert warning.endswith("load it with `prediction_type='v_prediction'`")
    assert read_audit(tmp_path / "run").warnings == (warning,)
    from html import unescape

    from rich.console import Console

    print_audit(tmp_path / "run", Console(width=2000))
    assert f"warning: {warning}" in capsys.readouterr().out
    page = unescape(write_report(tmp_path / "run", None).read_text())
    assert f"<strong>Is the model what it was read as?</strong> {warning}" in page
    # before it is finished, too
    (tmp_path / "run/metrics.json").unlink()
    assert warning in unescape(write_report(tmp_path / "run", None).read_text())
    said = []
    cost = audit_cost(model, [Prompt("the azure orchard")], CONFIG, say=said.append)
    assert cost.lines == tuple(said)
    assert said[-1].startswith(f"warning: {WRONG}")


def test_the_remedy_is_a_flag_and_is_recorded(mislabelled, shipped, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("the azure orchard\n")
    flags = ["--noises", "2", "--ddim-steps", "10", "--steps-run", "1", "--method", "none", "--guidance", "1"]
    arguments = ["audit", str(mislabelled), "--prompts", str(tmp_path / "prompts.txt"), *flags, "--out"]
    assert cli.main([*arguments, str(tmp_path / "wrong")]) == 0
    assert f"warning: {WRONG}" in capsys.readouterr().err
    assert cli.main([*arguments, str(tmp_path / "right"), "--prediction-type", "v_prediction"]) == 0
    assert "warning" not in capsys.readouterr().err
    right, wrong = (Run.read(tmp_path / name) for name in ("right", "wrong"))
    assert right.manifest["model"]["prediction_type"] == "v_prediction"
    assert "prediction_type" not in wrong.manifest["model"]
    metrics = audit(shipped, [Prompt("the azure orchard")], CONFIG, folder=tmp_path / "shipped").metrics
    assert right.metrics()["warnings"] == metrics["warnings"] == []
    assert right.metrics()["prompts"][0]["scores"] == metrics["prompts"][0]["scores"]
    assert wrong.metrics()["prompts"][0]["scores"] != metrics["prompts"][0]["scores"]


def test_files_without_a_type_are_named_in_the_page(mislabelled, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(mislabelled, folder)
    path = folder / "scheduler/scheduler_config.json"
    config = json.loads(path.read_text()) | {"_class_name": "PNDMScheduler"}
    del config["prediction_type"]
    path.write_text(json.dumps(config | {"my_setting": 3}))
    index = json.loads((folder / "model_index.json").read_text()) | {"scheduler": ["diffusers", "PNDMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "prompts.txt").write_text("the azure orchard\n")
    flags = ["--noises", "2", "--ddim-steps", "10", "--steps-run", "1", "--method", "none"]
    arguments = ["audit", str(folder), "--prompts", str(tmp_path / "prompts.txt"), *flags, "--out", str(tmp_path / "r")]
    assert cli.main(arguments) == 2
    assert "my_setting: not known, got 3" in capsys.readouterr().err
    assert cli.main([*arguments, "--ignore-setting", "my_setting"]) == 0
    errors = capsys.readouterr().err
    assert errors.count("sampling is DDIM, whatever the file says") == 1
    assert errors.count("no prediction_type; taken as 'epsilon'") == 1
    assert errors.count("my_setting = 3 is ignored, as asked") == 1
    assert errors.count(WRONG) == 1
    run = Run.read(tmp_path / "r")
    assert run.manifest["model"]["ignored_settings"] == {"scheduler/scheduler_config.json: my_setting": "3"}
    kinds = [warning.split(" ")[1] for warning in run.metrics()["warnings"]]
    assert len(kinds) == 3
    page = (tmp_path / "r/report.html").read_text()
    assert page.count("Is the model what it was read as?") == 3
    assert "UserWarning" not in errors


@pytest.mark.parametrize("timestep", [None, 601])
def test_spectra_and_images(mislabelled, shipped, tmp_path, timestep):
    options = dict(prompt=("the azure orchard", "a digit"), ddim_steps=5, guidance=3.0)
    for model, warned in ((StableDiffusion.load(mislabelled), True), (shipped, False)):
        said = []
        config = SpectrumConfig(**options, timestep=timestep, num_steps=2)
        metrics = run_spectrum(model, config, tmp_path / f"spectrum-{warned}", say=said.append)
        assert [text.startswith(WRONG[:60]) for text in metrics["warnings"]] == [True] * warned
        assert sum("warning: prediction_type" in line for line in said) == warned
        if timestep is None:
            continue
        said = []
        metrics = run_generate(model, GenerateConfig(**options), tmp_path / f"images-{warned}", say=said.append)
        assert [text.startswith(WRONG[:60]) for text in metrics["warnings"]] == [True] * warned
        assert sum("warning: prediction_type" in line for line in said) == warned
