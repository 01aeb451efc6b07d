"""Settings of a scheduler, ``scheduler/scheduler_config.json``: noise schedule, prediction type, DDIM's timesteps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxmem.diffusion import NoiseSchedule, Prediction, ScheduleKind
from jaxmem.samplers import Spacing
from jaxmem.stable_diffusion.settings import (
    Reading,
    SettingsReader,
    either,
    is_before,
    is_number,
    is_size,
    is_whole,
)

_BETAS: dict[str, ScheduleKind] = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
PREDICTION_TYPES: dict[str, str] = {ours: theirs for theirs, ours in _PREDICTIONS.items()}  #: diffusers' by ours
# Classes of diffusers 0.42 whose forward process is x_t = alpha_t x_0 + sigma_t eps on a table of betas, with the
# defaults that they have of their own; the others' are DDIM's. What they differ in is how they sample.
_KARRAS = {"beta_start": 0.00085, "beta_end": 0.012}  # "sensible defaults", with linear betas
_CONSISTENCY = {**_KARRAS, "beta_schedule": "scaled_linear"}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {},
    "DDIMInverseScheduler": {},
    "DDIMParallelScheduler": {},
    "DDPMScheduler": {},
    "DDPMParallelScheduler": {},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverMultistepInverseScheduler": {},
    "DPMSolverSDEScheduler": _KARRAS,
    "DPMSolverSinglestepScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": _KARRAS,
    "KDPM2AncestralDiscreteScheduler": _KARRAS,
    "KDPM2DiscreteScheduler": _KARRAS,
    "LCMScheduler": _CONSISTENCY,
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {"set_alpha_to_one": False},
    "RePaintScheduler": {},
    "SASolverScheduler": {},
    "TCDScheduler": _CONSISTENCY,
    "UnCLIPScheduler": {"beta_schedule": "squaredcos_cap_v2"},
    "UniPCMultistepScheduler": {},
}
#: What to do about a scheduler of another class.
OTHER_SCHEDULER = (
    "use the scheduler of the model that it was trained from (its folder scheduler/ and its entry in model_index.json,"
    " or pipe.scheduler), unless it was trained on another forward process, such as flow matching, which jaxmem does"
    " not have"
)
# How a scheduler steps, in any class of any version since diffusers 0.2: files carry settings of classes that they were
# once of. None reaches the table of betas or what the network predicts.
_SAMPLING = (
    "algorithm_type clip_sample_range corrector_order disable_corrector dynamic_thresholding_ratio euler_at_final"
    " final_sigmas_type flow_shift interpolation_type lambda_min_clipped lower_order_final noise_sampler_seed"
    " original_inference_steps predict_x0 predictor_order sample_max_value sigma_max sigma_min skip_prk_steps"
    " solver_order solver_p solver_type time_shift_type timestep_scaling use_beta_sigmas use_dynamic_shifting"
    " use_exponential_sigmas use_karras_sigmas use_lu_lambdas eta tau_func"
    # of an output with a learned variance, which has twice the channels: the UNet's numbers of channels are compared
    " variance_type"
    # arrays and their library, of diffusers 0.2 to 0.4 and of its Flax classes
    " tensor_format timestep_values dtype"
)


def _is_betas(value: Any) -> bool:
    numbers = isinstance(value, list | tuple) and len(value) > 0 and all(map(is_number, value))
    return value is None or (numbers and all(0 < beta < 1 for beta in value))


@dataclass(frozen=True)
class SchedulerConfig:
    """The noise schedule of a folder, what its network predicts, and where DDIM steps."""

    schedule: NoiseSchedule
    prediction: Prediction = "eps"
    steps_offset: int = 1
    final_alpha_one: bool = False
    spacing: Spacing = "leading"

    @classmethod
    def from_diffusers(
        cls,
        config: Mapping[str, Any],
        where: str = "scheduler/scheduler_config.json",
        reading: Reading | None = None,
    ) -> "SchedulerConfig":
        """Read ``scheduler/scheduler_config.json`` of any of `SCHEDULERS`, for sampling with DDIM.

        A score needs the table of betas and what the network predicts; both are as the file's own class has them.
        Sampling is what diffusers' ``DDIMScheduler.from_config`` of the file does in its Stable Diffusion pipeline:

        - ``timestep_spacing`` where the file names one, else "leading", whatever the default of its class;
        - ``steps_offset`` 1 and ``clip_sample`` false whatever the file says: the pipeline sets both;
        - ``set_alpha_to_one`` by default true, but false of a PNDM file, which is how Stable Diffusion was published;
        - ``thresholding`` is of pixels and has to be false.

        With zero terminal SNR and "trailing" or "linspace" timesteps the first step is where alpha is 2⁻¹²: there the
        score is almost -x, and what prompts change in it is of the size of alpha, with rounding of some 1e-3 of that.

        Raises:
            ValueError: naming every setting that is unknown, impossible or not supported.
        """
        reading = Reading() if reading is None else reading
        r = SettingsReader(config, where, tuple(SCHEDULERS), reading, f"; {OTHER_SCHEDULER}")
        kind = str(r.config.get("_class_name", "DDIMScheduler"))
        own = SCHEDULERS.get(kind, {})
        kind_of_betas, steps, start, end, trained = _betas(r, own)
        prediction = _prediction(r, reading)
        zero_snr = _zero_terminal_snr(r, prediction, steps)
        spacing = r.choice("timestep_spacing", "leading", ("leading", "trailing", "linspace"))
        final_alpha_one = r.flag("set_alpha_to_one", own.get("set_alpha_to_one", True))
        r.flag("clip_sample", False)
        r.take("steps_offset", 1, is_whole, "a whole number")
        # flow: another forward process; continuous: another input of the network
        r.neutral(thresholding=False, use_flow_sigmas=False, timestep_type="discrete", snr_shift_scale=1.0)
        r.inert(*_SAMPLING.split())
        r.finish()
        if not trained:
            r.require(start <= end, f"beta_start: expected at most beta_end {end}, got {start}")
        r.finish()
        _tell_what_is_not_read(kind, reading)
        schedule = NoiseSchedule(kind_of_betas, steps, start, end, trained, zero_snr)
        return cls(schedule, _PREDICTIONS[prediction], 1, final_alpha_one, spacing)

    def to_diffusers(self) -> dict[str, Any]:
        """The ``scheduler_config.json`` of the DDIM scheduler that samples as jaxmem does.

        Raises:
            ValueError: diffusers' DDIM has no such prediction.
        """
        schedule = self.schedule
        if self.prediction not in _PREDICTIONS.values():
            raise ValueError(f"prediction: expected one of {tuple(_PREDICTIONS.values())}, got {self.prediction!r}")
        return {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": schedule.num_timesteps,
            "beta_start": schedule.beta_start,
            "beta_end": schedule.beta_end,
            "beta_schedule": {ours: theirs for theirs, ours in _BETAS.items()}[schedule.kind],
            "trained_betas": list(schedule.trained_betas) or None,
            "rescale_betas_zero_snr": schedule.zero_terminal_snr,
            "prediction_type": in_diffusers_words(self.prediction),
            "steps_offset": self.steps_offset,
            "set_alpha_to_one": self.final_alpha_one,
            "clip_sample": False,
            "timestep_spacing": self.spacing,
        }


def in_diffusers_words(prediction: str) -> str:
    """``prediction_type`` of a `jaxmem.diffusion.Prediction`; those that diffusers does not have keep their name."""
    return PREDICTION_TYPES.get(prediction, prediction)


def _prediction(r: SettingsReader, reading: Reading) -> str:
    """What the network predicts: as the user says, as the file says, or as every model did when the file was written.

    ``prediction_type`` came with diffusers 0.9, and v-prediction with it; files of before mean epsilon, unless they say
    ``predict_epsilon: false``.
    """
    if reading.prediction_type is not None:
        if reading.prediction_type not in _PREDICTIONS:
            allowed = either(tuple(_PREDICTIONS))
            raise ValueError(f"prediction_type: expected {allowed}, got {reading.prediction_type!r}")
        r.inert("prediction_type", "predict_epsilon")
        return reading.prediction_type
    old = r.config.get("predict_epsilon")
    if "prediction_type" in r.config:
        r.inert("predict_epsilon")  # of which the newer one is there
    else:
        r.inert("predict_epsilon")
        # Not one that can be ignored: without it the network would be read as another.
        r.require(
            old is None or old is True,
            f"predict_epsilon: expected true, got {old!r}; of false, diffusers' word of before prediction_type, load it"
            f" with `prediction_type='sample'`: the network predicts the image without noise",
        )
        if old is None and not is_before(r.config.get("_diffusers_version"), (0, 9)):
            reading.warnings.append(
                f"{r.where}: no prediction_type; taken as 'epsilon', diffusers' default. If the model was trained to"
                f" predict v, all numbers are wrong: load it with `prediction_type='v_prediction'`"
            )
    r.inert("prediction_type")  # looked at here: without it there is nothing to go on with
    found = r.config.get("prediction_type", "epsilon")
    known = isinstance(found, str) and found in _PREDICTIONS
    r.require(
        known,
        f"prediction_type: expected {either(tuple(_PREDICTIONS))}, got {found!r}; if the file is wrong, load it with"
        f" `prediction_type='epsilon'` or 'v_prediction'",
    )
    return found if known else "epsilon"


def _betas(
    r: SettingsReader, own: Mapping[str, Any]
) -> tuple[ScheduleKind, int, float | int, float | int, tuple[float | int, ...]]:
    """What the table of betas is made of: kind, number, first, last, or the table itself where the file has it."""
    steps = r.take("num_train_timesteps", 1000, lambda v: is_size(v) and v <= 100_000, "1 to 100000")
    kind = r.choice("beta_schedule", own.get("beta_schedule", "linear"), _BETAS)
    start = r.number("beta_start", own.get("beta_start", 1e-4), 1e-9, 0.9)
    end = r.number("beta_end", own.get("beta_end", 0.02), 1e-9, 0.9)
    trained = r.take("trained_betas", None, _is_betas, "a list of numbers between 0 and 1, or null")
    if trained is not None and len(trained) != steps:
        r.require(False, f"trained_betas: expected {steps} numbers (num_train_timesteps), got {len(trained)}")
    return _BETAS[kind], steps, start, end, tuple(trained or ())


def _zero_terminal_snr(r: SettingsReader, prediction: str, steps: int) -> bool:
    """Whether the last timestep has no signal."""
    zero_snr = r.flag("rescale_betas_zero_snr", False)
    if zero_snr and prediction == "epsilon":
        # Without signal the noise is the input: an eps-network cannot be trained there, and no step made from it.
        r.refuse(
            "rescale_betas_zero_snr",
            "expected false with prediction_type 'epsilon', got true (zero terminal SNR); where the network"
            " predicts v, load it with `prediction_type='v_prediction'`",
        )
        return False
    if zero_snr and steps < 2:
        r.require(False, "num_train_timesteps: expected at least 2 with rescale_betas_zero_snr, got 1")
    return zero_snr


def _tell_what_is_not_read(kind: str, reading: Reading) -> None:
    """Of a class other than DDIM's its way of sampling is not read; of a distilled model's, the model is in doubt."""
    if kind not in ("DDIMScheduler", "DDIMParallelScheduler"):
        reading.notes.append(
            f"scheduler: of {kind} the noise schedule, the prediction type and the spacing of timesteps are used;"
            f" sampling is DDIM, whatever the file says"
        )
    if kind in ("LCMScheduler", "TCDScheduler"):
        reading.warnings.append(
            f"scheduler: {kind} usually goes with a distilled model, whose output is no score of the data; if this"
            f" is one, take the model that it was distilled from"
        )
