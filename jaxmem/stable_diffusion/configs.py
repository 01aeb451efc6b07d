"""What a diffusers folder's JSON files say, read strictly: a setting that is not understood is never passed over.

Each ``from_diffusers`` names every field that it cannot honour in one error. A field is either used, or has to be at
the value that changes nothing, or is inert by the rule of `jaxmem.stable_diffusion.settings`.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from jaxmem.diffusion import NoiseSchedule, Prediction, ScheduleKind
from jaxmem.sampling import Spacing
from jaxmem.stable_diffusion.settings import (
    Reading,
    SettingsReader,
    are_sizes,
    either,
    is_flag,
    is_none_or,
    is_number,
    is_size,
    is_whole,
)

# What transformers writes about training, generation and files; none of it reaches the last hidden state. A value of
# another type than transformers writes means something that is not known here.
_NUMBERS = "attention_dropout dropout initializer_factor initializer_range"
_WHOLE_NUMBERS = "bos_token_id eos_token_id pad_token_id projection_dim chunk_size_feed_forward"
_FLAGS = "output_attentions output_hidden_states return_dict is_encoder_decoder torchscript use_bfloat16 use_cache"
_WITHOUT_MEANING = (
    "transformers_version id2label label2id problem_type bad_words_ids diversity_penalty do_sample"
    " early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id"
    " forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams"
    " num_return_sequences prefix remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id"
    " task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k"
    " top_p typical_p begin_suppress_tokens suppress_tokens cross_attention_hidden_size decoder_start_token_id"
    " output_scores"
)


def is_before(version: Any, limit: tuple[int, int]) -> bool:
    """Whether a config says that an older diffusers wrote it; absent versions say nothing."""
    numbers = str(version or "").split(".")[:2]
    return len(numbers) == 2 and all(number.isdigit() for number in numbers) and tuple(map(int, numbers)) < limit


_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D")
_UP = ("UpBlock2D", "CrossAttnUpBlock2D")


@dataclass(frozen=True)
class UNetConfig:
    """The architecture of a UNet; the defaults are Stable Diffusion 1.x."""

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_attention: tuple[bool, ...] = (True, True, True, False)  #: per level, from the finest
    up_attention: tuple[bool, ...] = (True, True, True, False)  #: per level, from the finest
    layers_per_block: int = 2
    transformer_layers_per_block: int = 1
    cross_attention_dim: int = 768
    num_heads: tuple[int, ...] = (8, 8, 8, 8)  #: per level; diffusers calls it attention_head_dim
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float | int = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: float | int = 0
    upcast_attention: bool = False  #: about half precision: nothing here, kept for export

    @property
    def time_features(self) -> int:
        """Features of the timestep's embedding."""
        return 4 * self.block_out_channels[0]

    @classmethod
    def from_diffusers(
        cls, config: Mapping[str, Any], where: str = "unet/config.json", reading: Reading | None = None
    ) -> "UNetConfig":
        """Read ``unet/config.json``; absent fields have diffusers' defaults.

        Raises:
            ValueError: naming every setting that is unknown, impossible or not supported.
        """
        r = SettingsReader(config, where, "UNet2DConditionModel", reading)
        widths = r.sizes("block_out_channels", (320, 640, 1280, 1280))
        levels = len(widths)

        def types(kinds: tuple[str, str]) -> Callable[[Any], bool]:
            return lambda v: isinstance(v, list | tuple) and len(v) == levels and all(kind in kinds for kind in v)

        down = r.take("down_block_types", (_DOWN[1],) * 3 + (_DOWN[0],), types(_DOWN), f"{levels} of {either(_DOWN)}")
        up = r.take("up_block_types", (_UP[0],) + (_UP[1],) * 3, types(_UP), f"{levels} of {either(_UP)}")
        heads = r.take(
            "attention_head_dim",
            8,
            lambda v: is_size(v) or (are_sizes(v) and len(v) == levels),
            f"a whole number of at least 1, or {levels} of them (here they are numbers of heads)",
        )
        values = dict(
            sample_size=r.size("sample_size", None),
            in_channels=r.size("in_channels", 4),
            out_channels=r.size("out_channels", 4),
            block_out_channels=widths,
            down_attention=tuple(kind == _DOWN[1] for kind in down),
            up_attention=tuple(kind == _UP[1] for kind in reversed(up)),
            layers_per_block=r.size("layers_per_block", 2),
            transformer_layers_per_block=r.size("transformer_layers_per_block", 1),
            cross_attention_dim=r.size("cross_attention_dim", 1280),
            num_heads=(heads,) * levels if isinstance(heads, int) else tuple(heads),
            use_linear_projection=r.flag("use_linear_projection", False),
            norm_num_groups=r.size("norm_num_groups", 32),
            norm_eps=r.number("norm_eps", 1e-5, 1e-12, 1e-2),
            flip_sin_to_cos=r.flag("flip_sin_to_cos", True),
            freq_shift=r.number("freq_shift", 0, 0, 1),
            upcast_attention=r.flag("upcast_attention", False),
        )
        r.neutral(
            act_fn=("silu", "swish"),
            mid_block_type="UNetMidBlock2DCrossAttn",
            center_input_sample=False,
            only_cross_attention=False,
            downsample_padding=1,
            mid_block_scale_factor=1,
            num_attention_heads=None,
            dual_cross_attention=False,
            class_embed_type=None,
            num_class_embeds=None,
            addition_embed_type=None,
            encoder_hid_dim=None,
            encoder_hid_dim_type=None,
            reverse_transformer_layers_per_block=None,
            resnet_time_scale_shift="default",
            resnet_skip_time_act=False,
            resnet_out_scale_factor=1.0,
            time_embedding_type="positional",
            time_embedding_dim=None,
            time_embedding_act_fn=None,
            timestep_post_act=None,
            time_cond_proj_dim=None,
            conv_in_kernel=3,
            conv_out_kernel=3,
            attention_type="default",
            class_embeddings_concat=False,
            mid_block_only_cross_attention=(None, False),
            cross_attention_norm=None,
        )
        # Without their type above, they do nothing.
        r.inert("addition_time_embed_dim", "addition_embed_type_num_heads", "projection_class_embeddings_input_dim")
        r.number("dropout", 0.0, 0, 1)
        r.finish()
        if is_before(r.config.get("_diffusers_version"), (0, 9)):  # sizes were often wrong: as diffusers' pipeline does
            values["sample_size"] = max(values["sample_size"], 64)
        made = cls(**values)
        r.require(
            made.in_channels == made.out_channels,
            f"in_channels and out_channels: expected equal numbers (a score has the shape of its input), got"
            f" {made.in_channels} and {made.out_channels}",
        )
        made._check_divisible(r)
        r.finish()
        return made

    def _check_divisible(self, r: SettingsReader) -> None:
        levels = len(self.block_out_channels)
        side = 2 ** (levels - 1)
        r.require(self.sample_size % side == 0, f"sample_size: expected a multiple of {side}, got {self.sample_size}")
        for level, (width, heads) in enumerate(zip(self.block_out_channels, self.num_heads, strict=True)):
            attends = self.down_attention[level] or self.up_attention[level] or level == levels - 1
            r.require(
                not attends or width % heads == 0,
                f"attention_head_dim: expected numbers of heads that divide {self.block_out_channels}, got"
                f" {self.num_heads}",
            )
        below = (*self.block_out_channels[1:], self.block_out_channels[-1])
        above = (self.block_out_channels[0], *self.block_out_channels[:-1])
        for width, under, over in zip(self.block_out_channels, below, above, strict=True):
            r.require(
                all(n % self.norm_num_groups == 0 for n in (width, under + width, width + over)),
                f"norm_num_groups: expected a divisor of {self.block_out_channels}, got {self.norm_num_groups}",
            )

    def to_diffusers(self) -> dict[str, Any]:
        """The ``config.json`` that diffusers reads."""
        return {
            "_class_name": "UNet2DConditionModel",
            "sample_size": self.sample_size,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "block_out_channels": list(self.block_out_channels),
            "down_block_types": [_DOWN[attends] for attends in self.down_attention],
            "up_block_types": [_UP[attends] for attends in reversed(self.up_attention)],
            "layers_per_block": self.layers_per_block,
            "transformer_layers_per_block": self.transformer_layers_per_block,
            "cross_attention_dim": self.cross_attention_dim,
            "attention_head_dim": list(self.num_heads),
            "use_linear_projection": self.use_linear_projection,
            "norm_num_groups": self.norm_num_groups,
            "norm_eps": self.norm_eps,
            "flip_sin_to_cos": self.flip_sin_to_cos,
            "freq_shift": self.freq_shift,
            "upcast_attention": self.upcast_attention,
        }


@dataclass(frozen=True)
class TextEncoderConfig:
    """The architecture of a CLIP text encoder; the defaults are ViT-L/14, Stable Diffusion 1.x's."""

    vocab_size: int = 49_408
    max_position_embeddings: int = 77
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float | int = 1e-5

    @classmethod
    def from_diffusers(
        cls, config: Mapping[str, Any], where: str = "text_encoder/config.json", reading: Reading | None = None
    ) -> "TextEncoderConfig":
        """Read ``text_encoder/config.json``; absent fields have transformers' ``CLIPTextConfig`` defaults.

        Raises:
            ValueError: naming every setting that is unknown, impossible or not supported.
        """
        nested = config.get("text_config")  # of a file of both towers, as transformers reads it
        if config.get("model_type") == "clip" and isinstance(nested, Mapping):
            config = {"model_type": "clip_text_model", **nested}
        r = SettingsReader(config, where, "CLIPTextModel", reading)
        values = dict(
            vocab_size=r.size("vocab_size", 49_408),
            max_position_embeddings=r.size("max_position_embeddings", 77),
            hidden_size=r.size("hidden_size", 512),
            intermediate_size=r.size("intermediate_size", 2048),
            num_hidden_layers=r.size("num_hidden_layers", 12),
            num_attention_heads=r.size("num_attention_heads", 8),
            hidden_act=r.choice("hidden_act", "quick_gelu", ("quick_gelu", "gelu")),
            layer_norm_eps=r.number("layer_norm_eps", 1e-5, 1e-12, 1e-2),
        )
        # Whatever it was saved as, diffusers makes the CLIPTextModel of it that model_index.json names, and the tensors
        # have to fit that: of the two others its last hidden states are a part.
        r.neutral(
            model_type=("clip_text_model", "clip"),
            architectures=(["CLIPTextModel"], None, ["CLIPTextModelWithProjection"], ["CLIPModel"]),
        )
        r.neutral(
            is_decoder=False, add_cross_attention=False, use_attention_mask=(False, None), pruned_heads=({}, None)
        )
        for names, check, expected in (
            (_NUMBERS, is_number, "a number"),
            (_WHOLE_NUMBERS, is_whole, "a whole number"),
            (_FLAGS, is_flag, "true or false"),
        ):
            for name in names.split():
                r.take(name, None, partial(is_none_or, check), f"{expected} or null")
        for name in ("dtype", "torch_dtype"):  # of the file; here everything is float32
            r.choice(name, None, (None, "float32", "float16", "bfloat16", "float64"))
        r.inert(*_WITHOUT_MEANING.split())
        r.finish()
        made = cls(**values)
        r.require(
            made.hidden_size % made.num_attention_heads == 0,
            f"num_attention_heads: expected a divisor of hidden_size {made.hidden_size}, got"
            f" {made.num_attention_heads}",
        )
        r.finish()
        return made

    def to_diffusers(self) -> dict[str, Any]:
        """The ``config.json`` that transformers reads."""
        # CLIP's vocabularies end with the two tokens around a text; the defaults of old transformers are ViT-L's.
        ends = {"bos_token_id": self.vocab_size - 2, "eos_token_id": self.vocab_size - 1}
        return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **asdict(self), **ends}


@dataclass(frozen=True)
class VAEConfig:
    """The architecture of an autoencoder (``AutoencoderKL``); the defaults are Stable Diffusion's."""

    sample_size: int = 512
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float | int = 0.18215  #: diffusion model's latents = scaling_factor × autoencoder's
    force_upcast: bool = True  #: about half precision: nothing here, kept for export

    @classmethod
    def from_diffusers(
        cls, config: Mapping[str, Any], where: str = "vae/config.json", reading: Reading | None = None
    ) -> "VAEConfig":
        """Read ``vae/config.json``; absent fields have diffusers' defaults.

        Raises:
            ValueError: naming every setting that is unknown, impossible or not supported.
        """
        r = SettingsReader(config, where, "AutoencoderKL", reading)
        widths = r.sizes("block_out_channels", (64,))
        values = dict(
            sample_size=r.size("sample_size", 32),
            in_channels=r.size("in_channels", 3),
            out_channels=r.size("out_channels", 3),
            latent_channels=r.size("latent_channels", 4),
            block_out_channels=widths,
            layers_per_block=r.size("layers_per_block", 1),
            norm_num_groups=r.size("norm_num_groups", 32),
            force_upcast=r.flag("force_upcast", True),
            scaling_factor=r.number("scaling_factor", 0.18215, 1e-6, 1e6),
        )
        for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            expected = [kind] * len(widths)
            found = r.take(name, (kind,), lambda v: isinstance(v, list | tuple), "a list")
            r.require(
                list(found) == expected,
                f"{name}: expected {len(widths)} of {kind!r}, one per entry of block_out_channels, got {found!r}",
            )
        r.neutral(
            act_fn=("silu", "swish"),
            shift_factor=None,
            latents_mean=None,
            latents_std=None,
            use_quant_conv=True,
            use_post_quant_conv=True,
            mid_block_add_attention=True,
        )
        r.finish()
        made = cls(**values)
        r.require(
            all(width % made.norm_num_groups == 0 for width in widths),
            f"norm_num_groups: expected a divisor of {widths}, got {made.norm_num_groups}",
        )
        r.finish()
        return made

    @property
    def downscale(self) -> int:
        """Pixels of an image per pixel of its latents, in each direction."""
        return 2 ** (len(self.block_out_channels) - 1)

    def to_diffusers(self) -> dict[str, Any]:
        """The ``config.json`` that diffusers reads."""
        levels = len(self.block_out_channels)
        return {
            "_class_name": "AutoencoderKL",
            **asdict(self),
            "block_out_channels": list(self.block_out_channels),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "act_fn": "silu",
        }


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
        steps = r.take("num_train_timesteps", 1000, lambda v: is_size(v) and v <= 100_000, "1 to 100000")
        betas = r.choice("beta_schedule", own.get("beta_schedule", "linear"), _BETAS)
        start = r.number("beta_start", own.get("beta_start", 1e-4), 1e-9, 0.9)
        end = r.number("beta_end", own.get("beta_end", 0.02), 1e-9, 0.9)
        trained = r.take("trained_betas", None, _is_betas, "a list of numbers between 0 and 1, or null")
        if trained is not None and len(trained) != steps:
            r.require(False, f"trained_betas: expected {steps} numbers (num_train_timesteps), got {len(trained)}")
        prediction = _prediction(r, reading)
        zero_snr = r.flag("rescale_betas_zero_snr", False)
        if zero_snr and prediction == "epsilon":
            # Without signal the noise is the input: an eps-network cannot be trained there, and no step made from it.
            r.refuse(
                "rescale_betas_zero_snr",
                "expected false with prediction_type 'epsilon', got true (zero terminal SNR); where the network"
                " predicts v, load it with `prediction_type='v_prediction'`",
            )
            zero_snr = False
        if zero_snr and steps < 2:
            r.require(False, "num_train_timesteps: expected at least 2 with rescale_betas_zero_snr, got 1")
        spacing = r.choice("timestep_spacing", "leading", ("leading", "trailing", "linspace"))
        final_alpha_one = r.flag("set_alpha_to_one", own.get("set_alpha_to_one", True))
        r.flag("clip_sample", False)
        r.take("steps_offset", 1, is_whole, "a whole number")
        # flow: another forward process; continuous: another input of the network
        r.neutral(thresholding=False, use_flow_sigmas=False, timestep_type="discrete", snr_shift_scale=1.0)
        r.inert(*_SAMPLING.split())
        r.finish()
        if trained is None:
            r.require(start <= end, f"beta_start: expected at most beta_end {end}, got {start}")
        r.finish()
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
        schedule = NoiseSchedule(_BETAS[betas], steps, start, end, tuple(trained or ()), zero_snr)
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
