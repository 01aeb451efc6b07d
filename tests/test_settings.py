"""The rule for inert settings, both sides: what cannot change the function loads, what can is refused by name."""

import json
import shutil
import warnings

import numpy as np
import pytest
import tiny_diffusion as tiny
from conftest import optional_import
from safetensors.numpy import load_file, save_file

from jaxmem.stable_diffusion.configs import SchedulerConfig, TextEncoderConfig, UNetConfig, VAEConfig
from jaxmem.stable_diffusion.pipeline import StableDiffusion
from jaxmem.stable_diffusion.settings import TRAINING, Reading

PARTS = {"unet": UNetConfig, "text_encoder": TextEncoderConfig, "vae": VAEConfig, "scheduler": SchedulerConfig}
PLAIN = {
    "unet": {"sample_size": 64, "cross_attention_dim": 768},
    "text_encoder": {},
    "vae": {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]},
    "scheduler": {"prediction_type": "epsilon"},
}
EMA = ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")


@pytest.fixture(scope="module")
def original(torch, diffusers, tmp_path_factory):
    transformers = optional_import("transformers")
    return tiny.make_pipeline(torch, diffusers, transformers, tmp_path_factory.mktemp("s"), **tiny.SMALLEST)[1]


@pytest.fixture
def folder(original, tmp_path):
    """A copy to spoil."""
    shutil.copytree(original, tmp_path / "model")
    return tmp_path / "model"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def file_of(folder, part):
    return folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "extra",
    [
        {"_attn_implementation_autoset": True},
        {"_anything": [1, 2]},
        {"something_new": None},
        {"gradient_checkpointing": True},
        {"attention_probs_dropout_prob": 0.1},
        {"caption_dropout": 1},
        *({key: value} for key, value in zip(EMA, (0.9999, 0.0, 12_000, 0, False, 1.0, 2 / 3), strict=True)),
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_inert(part, extra):
    read = PARTS[part].from_diffusers
    assert read(PLAIN[part] | extra) == read(PLAIN[part])


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "extra",
    [
        {"something_new": 3},
        {"something_new": False},  # which may not be what it is without
        {"something_new": 0},
        {"something_new": ""},
        {"attention_probs_dropout_prob": 2},
        {"dropout_kind": "attention"},
    ],
    ids=str,
)
def test_what_may_change_the_function(part, extra):
    ((name, value),) = extra.items()
    with pytest.raises(
        ValueError, match=f"1 setting that jaxmem does not support:\n  {name}: not known, got {value!r}"
    ):
        PARTS[part].from_diffusers(PLAIN[part] | extra)


@pytest.mark.parametrize(
    "extra",
    [
        {"initializer_factor": 1},
        {"initializer_range": 1},
        {"layer_norm_eps": 1e-5, "hidden_size": 512, "attention_dropout": 0.5},
        {"dropout": 0, "torch_dtype": "float16"},
        {"architectures": ["CLIPTextModelWithProjection"]},
        {"model_type": "clip"},
        {"model_type": "clip", "architectures": ["CLIPModel"]},
    ],
    ids=str,
)
def test_of_text_encoders(extra):
    assert TextEncoderConfig.from_diffusers(extra) == TextEncoderConfig.from_diffusers({})


@pytest.mark.parametrize("extra", [{"resnet_out_scale_factor": 1}, {"mid_block_scale_factor": 1.0}, {"dropout": 0.5}])
def test_of_unets(extra):
    assert UNetConfig.from_diffusers(PLAIN["unet"] | extra) == UNetConfig.from_diffusers(PLAIN["unet"])


@pytest.mark.parametrize("extra", [{"resnet_out_scale_factor": 1.5}, {"mid_block_scale_factor": True}])
def test_numbers_are_equal_and_flags_are_none(extra):
    with pytest.raises(ValueError, match=f"{next(iter(extra))}: expected 1"):
        UNetConfig.from_diffusers(PLAIN["unet"] | extra)


def test_a_text_config_inside_another():
    inner = {"hidden_size": 64, "num_attention_heads": 4, "model_type": "clip_text_model"}
    found = TextEncoderConfig.from_diffusers({"model_type": "clip", "text_config": inner, "projection_dim": 512})
    assert (found.hidden_size, found.num_attention_heads) == (64, 4)
    with pytest.raises(ValueError, match="new: not known, got 1"):
        TextEncoderConfig.from_diffusers({"model_type": "clip", "text_config": inner | {"new": 1}})


def test_refusals_do_not_speak_of_another_architecture():
    with pytest.raises(ValueError, match="new: not known") as caught:
        UNetConfig.from_diffusers(PLAIN["unet"] | {"new": 1, "act_fn": "gelu"})
    text = str(caught.value)
    assert text == (
        "unet/config.json: 2 settings that jaxmem does not support:\n  act_fn: expected 'silu' or 'swish', got 'gelu'\n"
        "  new: not known, got 1\nCorrect the file. Where a setting cannot change what the model computes, load without"
        " it: `ignore_settings=['act_fn', 'new']`"
    )


class TestIgnoredSettings:
    def test_are_read_as_if_they_were_not_there(self):
        config = PLAIN["unet"] | {"new": [1], "act_fn": "gelu", "layers_per_block": 3}
        reading = Reading(ignore_settings=("new", "act_fn", "layers_per_block"))
        found = UNetConfig.from_diffusers(config, reading=reading)
        assert found == UNetConfig.from_diffusers(PLAIN["unet"] | {"layers_per_block": 3})  # which was not refused
        assert reading.ignored == {"unet/config.json: act_fn": "'gelu'", "unet/config.json: new": "[1]"}
        assert reading.decisions == {"ignored_settings": reading.ignored}
        assert [warning.split(" = ")[0] for warning in reading.finish()] == list(reading.ignored)
        assert reading.notes == ["ignore_settings: nothing was refused for layers_per_block, nothing is ignored"]

    def test_only_where_there_is_something_to_go_on_with(self):
        with pytest.raises(ValueError, match="sample_size: expected a whole number"):
            UNetConfig.from_diffusers({"sample_size": None}, reading=Reading(ignore_settings=("sample_size",)))
        with pytest.raises(ValueError, match="_class_name: expected UNet2DConditionModel") as caught:
            UNetConfig.from_diffusers(
                PLAIN["unet"] | {"_class_name": "UNet2DModel"}, reading=Reading(ignore_settings=("_class_name",))
            )
        assert "ignore_settings" not in str(caught.value)

    def test_of_a_folder(self, folder, original):
        edit(file_of(folder, "unet"), my_setting="x")
        edit(file_of(folder, "text_encoder"), other=1)
        with pytest.raises(ValueError, match=r"my_setting: not known, got 'x'[\s\S]*ignore_settings=\['my_setting'\]"):
            StableDiffusion.load(folder)
        with pytest.warns(UserWarning, match=r"config.json: (my_setting|other) = .* is ignored, as asked"):
            model = StableDiffusion.load(folder, ignore_settings=["my_setting", "other"])
        assert model.score == StableDiffusion.load(original).score
        assert model.reading.decisions == {
            "ignored_settings": {"unet/config.json: my_setting": "'x'", "text_encoder/config.json: other": "1"}
        }
        with pytest.raises(ValueError, match=r"ignore_settings: expected a list, got one text; write \['my"):
            StableDiffusion.load(folder, ignore_settings="my_setting")


def test_training_keys_have_reasons():
    assert set(EMA) < set(TRAINING)
    assert all(len(reason) > 10 for reason in TRAINING.values())


def test_an_averaged_unet_of_diffusers(folder, original, diffusers, torch):
    """`EMAModel.save_pretrained` writes its own state into the UNet's settings."""
    from diffusers.training_utils import EMAModel

    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    ema = EMAModel(unet.parameters(), model_cls=diffusers.UNet2DConditionModel, model_config=unet.config)
    ema.save_pretrained(folder / "unet")
    assert set(EMA) < set(json.loads(file_of(folder, "unet").read_text()))
    assert StableDiffusion.load(folder).score == StableDiffusion.load(original).score


class TestTextProjection:
    """`CLIPTextModelWithProjection` has one matrix more, behind the hidden states that condition the UNet."""

    def test_its_folder_loads_as_the_text_model(self, folder, original, torch):
        transformers = optional_import("transformers")
        encoder = transformers.CLIPTextModel.from_pretrained(original / "text_encoder")
        larger = transformers.CLIPTextModelWithProjection(encoder.config).eval()
        theirs = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
        state = {f"text_model.{key}": value for key, value in theirs.items()}
        larger.load_state_dict(state | {"text_projection.weight": larger.text_projection.weight})
        shutil.rmtree(folder / "text_encoder")
        larger.save_pretrained(folder / "text_encoder")
        assert "text_projection.weight" in load_file(folder / "text_encoder/model.safetensors")
        assert json.loads(file_of(folder, "text_encoder").read_text())["architectures"] == [
            "CLIPTextModelWithProjection"
        ]
        model, before = StableDiffusion.load(folder), StableDiffusion.load(original)
        np.testing.assert_array_equal(model.embed(["the cat"]), before.embed(["the cat"]))
        tokens = torch.from_numpy(model.tokenize(["the cat"]).astype(np.int64))
        with torch.no_grad():
            expected = larger(tokens).last_hidden_state.numpy()
        # two float32 programs of two layers; diffusers_parity's tolerance
        np.testing.assert_allclose(model.embed(["the cat"]), expected, atol=2e-5 * np.abs(expected).max())

    @pytest.mark.parametrize("name", ["visual_projection.weight", "vision_model.post_layernorm.weight"])
    def test_other_tensors_do_not(self, folder, name):
        path = folder / "text_encoder/model.safetensors"
        save_file(load_file(path) | {name: np.ones((4, 4), np.float32)}, path, {"format": "pt"})
        with pytest.raises(ValueError, match=f"{name} .*: unknown, the configuration has no such parameter"):
            StableDiffusion.load(folder)


class TestPartsThatAreMissing:
    @pytest.mark.parametrize("part", ["unet", "text_encoder", "vae", "tokenizer", "scheduler"])
    @pytest.mark.parametrize("value", [[None, None], None])
    def test_in_the_index(self, folder, part, value):
        edit(folder / "model_index.json", **{part: value})
        match = rf"model_index.json: expected {part} of .*; add the {part} of the model that it was made from"
        with pytest.raises(ValueError, match=match):
            StableDiffusion.load(folder)

    @pytest.mark.parametrize("part", ["unet", "text_encoder", "vae", "tokenizer", "scheduler"])
    def test_in_the_folder(self, folder, part):
        shutil.rmtree(folder / part)
        with pytest.raises(ValueError, match=rf"expected a diffusers model \(model_index.json, .* got no {part}/"):
            StableDiffusion.load(folder)

    @pytest.mark.parametrize("part", ["safety_checker", "feature_extractor", "image_encoder", "watermarker"])
    @pytest.mark.parametrize("value", [[None, None], None])
    def test_what_is_not_needed(self, folder, part, value):
        edit(folder / "model_index.json", **{part: value})
        StableDiffusion.load(folder)

    @pytest.mark.parametrize("part", ["unet", "text_encoder", "vae", "tokenizer", "scheduler"])
    def test_of_a_live_pipeline(self, original, diffusers, part):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline = diffusers.StableDiffusionPipeline.from_pretrained(original, safety_checker=None)
        setattr(pipeline, part, None)
        with pytest.raises(ValueError, match=f"got StableDiffusionPipeline without {part}; of a pipeline with parts"):
            StableDiffusion.load(pipeline)
