"""Every scheduler file of diffusers whose forward process is the discrete DDPM one: its table, its network, and DDIM.

The oracle is diffusers: a class's own ``alphas_cumprod``, and ``DDIMScheduler.from_config`` of the file as its Stable
Diffusion pipeline has it.
"""

import importlib
import json
import shutil
import sys
import types
import warnings
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_diffusion as tiny
from conftest import optional_import

from jaxmem.diffusion import NoiseSchedule
from jaxmem.oracles import GaussianMixtureScore, gaussian
from jaxmem.samplers import DDIM
from jaxmem.sampling import sample
from jaxmem.stable_diffusion.configs.scheduler import SCHEDULERS, SchedulerConfig
from jaxmem.stable_diffusion.pipeline import StableDiffusion
from jaxmem.stable_diffusion.settings import Reading

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EPS = {"_class_name": "DDIMScheduler", **SD, "prediction_type": "epsilon"}
NO_PREDICTION = ("RePaintScheduler",)  # whose class has no such argument

# diffusers multiplies 1,000 factors in float32, each off by 6e-8: 2e-5 of a product, and where it is within rounding of
# 0 or of the 2⁻²⁴ of zero terminal SNR, 1e-7 in all.
TABLE = dict(rtol=2e-5, atol=1e-7)


@pytest.fixture(scope="module")
def folder(torch, diffusers, tmp_path_factory):
    transformers = optional_import("transformers")
    return tiny.make_pipeline(torch, diffusers, transformers, tmp_path_factory.mktemp("s"), **tiny.SMALLEST)[1]


def scheduler_class(diffusers, name):
    if name != "DPMSolverSDEScheduler":
        return getattr(diffusers, name)
    # Its noise is drawn by a package of its own; its settings and tables need none.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
        return importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler


def make(diffusers, name, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy, inside diffusers
        return scheduler_class(diffusers, name)(**settings)


def saved(scheduler, path):
    """What diffusers writes, read back as plain JSON."""
    scheduler.save_pretrained(path)
    return json.loads((path / "scheduler_config.json").read_text())


def in_folder(folder, path, config):
    """A copy of a model's folder with another scheduler file."""
    shutil.copytree(folder, path)
    index = json.loads((path / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (path / "model_index.json").write_text(json.dumps(index))
    (path / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    return path


def table(scheduler):
    """alpha² of a scheduler of diffusers."""
    return scheduler.alphas_cumprod.numpy()


@pytest.mark.parametrize("name", SCHEDULERS)
class TestEveryClass:
    def test_defaults_are_its_own(self, name, diffusers, tmp_path):
        """An empty file, and a file of nothing but defaults: the class's own table."""
        theirs = make(diffusers, name)
        for config in ({"_class_name": name, "prediction_type": "epsilon"}, saved(theirs, tmp_path)):
            ours = SchedulerConfig.from_diffusers(config, reading=Reading(prediction_type="epsilon"))
            np.testing.assert_allclose(ours.schedule.alpha**2, table(theirs), **TABLE)

    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
    def test_a_file_of_stable_diffusion(self, name, prediction, diffusers, tmp_path):
        """What `from_config` of Stable Diffusion's PNDM file saves: the same score as the PNDM file."""
        pndm = {"_class_name": "PNDMScheduler", **SD, "prediction_type": prediction, "steps_offset": 1}
        if name == "UnCLIPScheduler":
            pndm["beta_schedule"] = "squaredcos_cap_v2"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = scheduler_class(diffusers, name).from_config(pndm)
        config = saved(theirs, tmp_path)
        assert config["_class_name"] == name
        reading = Reading()
        ours, before = SchedulerConfig.from_diffusers(config, reading=reading), SchedulerConfig.from_diffusers(pndm)
        assert (ours.schedule, ours.prediction) == (before.schedule, before.prediction)
        np.testing.assert_allclose(ours.schedule.alpha**2, table(theirs), **TABLE)
        said = [note for note in reading.notes if "sampling is DDIM, whatever the file says" in note]
        assert len(said) == (name not in ("DDIMScheduler", "DDIMParallelScheduler"))
        assert bool(reading.warnings) == (name in ("LCMScheduler", "TCDScheduler"))

    def test_the_same_score_from_a_folder(self, name, folder, diffusers, tmp_path):
        settings = {} if name == "UnCLIPScheduler" else SD
        pndm = {"_class_name": "PNDMScheduler", **settings, "prediction_type": "epsilon"}
        if not settings:
            pndm["beta_schedule"] = "squaredcos_cap_v2"
        config = saved(make(diffusers, name, **settings), tmp_path / "saved")
        if name in NO_PREDICTION:
            config["prediction_type"] = "epsilon"
        before = StableDiffusion.load(in_folder(folder, tmp_path / "pndm", pndm))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of distilled models
            model = StableDiffusion.load(in_folder(folder, tmp_path / "model", config))
        assert model.score == before.score
        assert model.fingerprint(["unet"]) == before.fingerprint(["unet"])


def test_there_are_the_twelve_and_more():
    assert len(SCHEDULERS) == 23
    named = ("Euler", "EulerA", "DPMSolver", "DEIS", "UniPC", "LMS", "Heun", "KDPM2", "LCM", "TCD", "DDPM", "PNDM")
    assert all(any(known.startswith(name) for known in SCHEDULERS) for name in named)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_timesteps_are_those_of_diffusers_ddim(spacing, name, diffusers, tmp_path):
    config = saved(make(diffusers, name, **SD, prediction_type="epsilon", timestep_spacing=spacing), tmp_path)
    theirs = diffusers.DDIMScheduler.from_config(config | {"steps_offset": 1})
    ours = SchedulerConfig.from_diffusers(config)
    for steps in (1, 2, 3, 7, 10, 50, 64, 200, 999):
        theirs.set_timesteps(steps)
        sampler = DDIM(ours.schedule, steps, ours.steps_offset, spacing=ours.spacing)
        np.testing.assert_array_equal(sampler.timesteps, theirs.timesteps)


def test_a_timestep_that_is_none_is_left_out(diffusers):
    theirs = diffusers.DDIMScheduler(timestep_spacing="trailing")
    theirs.set_timesteps(61)
    assert theirs.timesteps.tolist()[61:] == [-1]  # by rounding; as an index it would be the last of the table
    assert DDIM(NoiseSchedule(), 61, spacing="trailing").timesteps.tolist() == theirs.timesteps.tolist()[:61]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("steps", [7, 50])
def test_samples_are_those_of_diffusers_ddim(spacing, zero_snr, steps, torch, diffusers):
    """A closed-form v-network, sampled by both; with zero terminal SNR diffusers' last alpha is set to ours."""
    settings = dict(**SD, prediction_type="v_prediction", timestep_spacing=spacing, rescale_betas_zero_snr=zero_snr)
    theirs = diffusers.DDIMScheduler(**settings, clip_sample=False, steps_offset=1)
    ours = SchedulerConfig.from_diffusers(dict(theirs.config))
    schedule, target = ours.schedule, gaussian(np.array([0.3, -0.5]), np.array([[0.5, 0.2], [0.2, 0.3]]))
    score, noise = GaussianMixtureScore(schedule), np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    sampler = DDIM(schedule, steps, 1, ours.final_alpha_one, spacing=spacing)
    end, _ = sample(score, target, jax.numpy.asarray(noise), sampler=sampler)

    def their_sample(last):
        if zero_snr and last:
            theirs.alphas_cumprod[-1] = last
        theirs.set_timesteps(steps)
        x = torch.from_numpy(noise)
        for t in theirs.timesteps.tolist():
            alpha, sigma = schedule.alpha[t], schedule.sigma[t]
            value = jax.vmap(lambda x, t=t: score(target, x, t, None))(jax.numpy.asarray(x.numpy()))
            eps = -sigma * np.asarray(value, np.float64)
            v = (eps - sigma * x.numpy()) / alpha
            x = theirs.step(torch.from_numpy(v.astype(np.float32)), t, x).prev_sample
        return x.numpy()

    # At its largest 1/alpha is 4,096 with zero terminal SNR, 15 without: 6e-8 of x becomes 2.5e-4 of the predicted x_0,
    # of which the first step takes over less than a tenth. The exact 0 of diffusers' DDIM moves x by about alpha.
    np.testing.assert_allclose(end, their_sample(2.0**-24), atol=2e-4 if zero_snr else 2e-5)
    if zero_snr:
        theirs = diffusers.DDIMScheduler(**settings, clip_sample=False, steps_offset=1)
        np.testing.assert_allclose(end, their_sample(0), atol=2e-3)


class TestTables:
    def test_zero_terminal_snr(self, diffusers):
        for settings in (SD, {}, {"beta_schedule": "squaredcos_cap_v2"}):
            theirs = make(diffusers, "EulerDiscreteScheduler", **settings, rescale_betas_zero_snr=True)
            config = dict(theirs.config) | {"prediction_type": "v_prediction"}
            schedule = SchedulerConfig.from_diffusers(config).schedule
            np.testing.assert_allclose(schedule.alpha**2, table(theirs), **TABLE)
            assert schedule.alpha[-1] == pytest.approx(2.0**-12, rel=1e-14)
            np.testing.assert_allclose(schedule.alpha**2 + schedule.sigma**2, 1, rtol=1e-14)
            np.testing.assert_allclose(np.cumprod(1 - schedule.betas), schedule.alpha**2, rtol=1e-10)

    def test_trained_betas(self, diffusers):
        betas = np.linspace(0.01, 0.3, 40).tolist()
        theirs = diffusers.DDIMScheduler(num_train_timesteps=40, trained_betas=betas, **SD)
        ours = SchedulerConfig.from_diffusers(json.loads(theirs.to_json_string()))
        np.testing.assert_allclose(ours.schedule.alpha**2, table(theirs), **TABLE)
        np.testing.assert_array_equal(ours.schedule.betas, betas)
        assert SchedulerConfig.from_diffusers(ours.to_diffusers()) == ours
        assert hash(ours.schedule) == hash(replace(ours.schedule))  # a score's, which is a static argument

    @pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
    def test_what_is_written_is_read_again(self, spacing):
        config = {"_class_name": "EulerDiscreteScheduler", **SD, "prediction_type": "v_prediction"}
        ours = SchedulerConfig.from_diffusers(config | {"rescale_betas_zero_snr": True, "timestep_spacing": spacing})
        assert SchedulerConfig.from_diffusers(ours.to_diffusers()) == ours

    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            (dict(num_timesteps=3, trained_betas=(0.1,)), "trained_betas: expected 3 numbers .*, got 1"),
            (dict(num_timesteps=1, trained_betas=(1.0,)), "trained_betas: expected numbers between 0 and 1, got 1.0"),
            (dict(num_timesteps=1, zero_terminal_snr=True), "zero_terminal_snr: expected at least 2 timesteps, got 1"),
        ],
    )
    def test_impossible_tables(self, settings, match):
        with pytest.raises(ValueError, match=match):
            NoiseSchedule(**settings)

    def test_impossible_spacing(self, unchecked):
        with pytest.raises(ValueError, match="spacing: expected one of"):
            DDIM(NoiseSchedule(), 10, spacing="even")


class TestFilesThatUsersHave:
    @pytest.mark.parametrize("kind", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
    def test_keys_of_other_classes(self, kind, diffusers, tmp_path):
        """`from_config` leaves the settings of every class that a file was once of; here of all at once."""
        every = {}
        for name in SCHEDULERS:
            every |= saved(make(diffusers, name), tmp_path / name)
        every |= EPS | {"_class_name": "PNDMScheduler", "timestep_spacing": "leading", "set_alpha_to_one": False}
        config = saved(scheduler_class(diffusers, kind).from_config(every), tmp_path / "last")
        assert config["_class_name"] == kind
        assert {"use_karras_sigmas", "timestep_scaling", "variance_type", "predict_x0", "tau_func"} < config.keys()
        ours = SchedulerConfig.from_diffusers(config)
        assert ours == SchedulerConfig.from_diffusers(EPS | {"set_alpha_to_one": False})
        assert ours.schedule == NoiseSchedule.stable_diffusion()

    @pytest.mark.parametrize(
        "extra",
        [
            {"tensor_format": "pt", "timestep_values": None, "skip_prk_steps": True},  # diffusers 0.2 to 0.4
            {"timestep_values": [1, 2, 3]},
            {"dtype": "float32"},  # Flax
            {"clip_sample": True},
            {"steps_offset": 0},
            {"steps_offset": 7},
            {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "sigma_min": 0.03, "solver_order": 3},
            {"variance_type": "fixed_small"},
            {"predict_epsilon": True},
        ],
        ids=lambda extra: next(iter(extra)),
    )
    def test_what_changes_nothing(self, extra):
        assert SchedulerConfig.from_diffusers(EPS | extra) == SchedulerConfig.from_diffusers(EPS)

    def test_live_schedulers(self, folder, diffusers):
        """Of a live pipeline nothing is taken for the user's word that is a default of the scheduler's class."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
            kept = StableDiffusion.load(pipe)
            for name in ("DDIMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"):
                pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
                assert StableDiffusion.load(pipe).scheduler == kept.scheduler, name
        pipe.scheduler = make(diffusers, "DDIMScheduler", **SD, prediction_type="epsilon")  # clip_sample is true
        assert pipe.scheduler.config.clip_sample
        model = StableDiffusion.load(pipe)
        assert model.score == kept.score
        assert model.sampler(10).timesteps.tolist() == kept.sampler(10).timesteps.tolist()
        pipe.scheduler = make(diffusers, "EulerDiscreteScheduler", **SD)
        with pytest.warns(UserWarning, match="no prediction_type; taken as 'epsilon'"):
            model = StableDiffusion.load(pipe)
        assert model.scheduler.spacing == "leading"


class TestPredictionType:
    def test_missing(self):
        reading = Reading()
        assert SchedulerConfig.from_diffusers({**SD}, reading=reading).prediction == "eps"
        (warning,) = reading.warnings
        assert "no prediction_type; taken as 'epsilon', diffusers' default" in warning
        assert "load it with `prediction_type='v_prediction'`" in warning

    @pytest.mark.parametrize(
        "extra", [{"_diffusers_version": "0.7.0.dev0"}, {"predict_epsilon": True}, {"prediction_type": "epsilon"}]
    )
    def test_said_or_older_than_the_question(self, extra):
        reading = Reading()
        assert SchedulerConfig.from_diffusers(SD | extra, reading=reading).prediction == "eps"
        assert reading.warnings == []

    @pytest.mark.parametrize(("said", "ours"), [("epsilon", "eps"), ("v_prediction", "v"), ("sample", "x0")])
    @pytest.mark.parametrize("config", [{}, {"prediction_type": "flow_prediction"}, {"predict_epsilon": False}])
    def test_the_user_decides(self, said, ours, config):
        reading = Reading(prediction_type=said)
        assert SchedulerConfig.from_diffusers(SD | config, reading=reading).prediction == ours
        assert reading.warnings == []
        assert reading.decisions == {"prediction_type": said}

    @pytest.mark.parametrize("ignored", [(), ("predict_epsilon",)])
    @pytest.mark.parametrize("value", [False, 0, 1, "yes"])
    def test_the_old_word_cannot_be_ignored(self, value, ignored):
        """Without it a network of the image would be read as one of the noise."""
        match = r"predict_epsilon: expected true, got .* load it with `prediction_type='sample'`"
        with pytest.raises(ValueError, match=match) as caught:
            SchedulerConfig.from_diffusers(SD | {"predict_epsilon": value}, reading=Reading(ignored))
        assert "ignore_settings" not in str(caught.value)

    def test_unknown(self):
        with pytest.raises(ValueError, match=r"prediction_type: expected 'epsilon' or .*, got 'v'"):
            SchedulerConfig.from_diffusers(SD, reading=Reading(prediction_type="v"))

    def test_a_folder_warns(self, folder, tmp_path):
        config = {"_class_name": "PNDMScheduler", **SD}
        spoilt = in_folder(folder, tmp_path / "model", config)
        with pytest.warns(UserWarning, match="no prediction_type; taken as 'epsilon'"):
            StableDiffusion.load(spoilt)
        assert StableDiffusion.load(spoilt, prediction_type="v_prediction").scheduler.prediction == "v"
