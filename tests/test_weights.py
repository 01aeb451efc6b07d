"""The strict loader: one test per guard, the hub's older layout, half precision, shards, bounded memory."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_diffusion as tiny
from conftest import optional_import
from safetensors.numpy import load_file, save_file

from jaxmem.stable_diffusion import weights
from jaxmem.stable_diffusion.configs import SchedulerConfig, TextEncoderConfig, UNetConfig, VAEConfig
from jaxmem.stable_diffusion.pipeline import StableDiffusion

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(torch, diffusers, tmp_path_factory):
    transformers = optional_import("transformers")
    return tiny.make_pipeline(torch, diffusers, transformers, tmp_path_factory.mktemp("original"))[1]


@pytest.fixture
def folder(original, tmp_path):
    """A copy to spoil."""
    shutil.copytree(original, tmp_path / "model")
    return tmp_path / "model"


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


KEY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"


def test_one_error_names_everything(folder):
    def change(tensors):
        tensors["extra.weight"] = np.ones(3, np.float32)
        tensors["conv_in.weight"] = tensors["conv_in.weight"].reshape(32, 36)
        tensors["conv_out.bias"] = np.ones(4, np.int32)
        del tensors[KEY]

    edit_tensors(folder / UNET, change)
    with pytest.raises(ValueError, match=r"unet: 4 problems with the weights; nothing was loaded") as caught:
        StableDiffusion.load(folder)
    text = str(caught.value)
    assert "extra.weight (diffusion_pytorch_model.safetensors): unknown" in text
    assert "conv_in.weight (diffusion_pytorch_model.safetensors): expected shape (32, 4, 3, 3), got (32, 36)" in text
    assert "conv_out.bias (diffusion_pytorch_model.safetensors): expected one of F64, F32, F16, BF16, got I32" in text
    assert f"{KEY}: missing, expected shape (64, 64)" in text


def test_a_long_list_of_problems_is_cut(folder):
    edit_tensors(folder / UNET, lambda tensors: [tensors.pop(key) for key in list(tensors)[:40]])
    with pytest.raises(ValueError, match=r"40 problems[\s\S]*\.\.\. and 28 more$"):
        StableDiffusion.load(folder)


def test_two_spellings_of_one_tensor(folder):
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    name = "encoder.mid_block.attentions.0.{}.weight"
    edit_tensors(path, lambda t: t.update({name.format("query"): t[name.format("to_q")].copy()}))
    with pytest.raises(
        ValueError, match=r"attentions\.0\.(query|to_q)\.weight .*: given twice, also as .*(query|to_q)"
    ):
        StableDiffusion.load(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(folder, value):
    edit_tensors(folder / UNET, lambda tensors: tensors[KEY].__setitem__((3, 4), value))
    model = StableDiffusion.load(folder)  # headers are fine; the numbers are read at first use
    with pytest.raises(ValueError, match=f"{KEY} .*: holds NaN, infinity"):
        _ = model.state


def test_pickles_are_refused(folder):
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"got only pickles \(diffusion_pytorch_model.bin\).*save_pretrained"):
        StableDiffusion.load(folder)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (UNET, "unet: expected diffusion_pytorch_model.safetensors, got no such file"),
        ("unet/config.json", "got no unet/config.json"),
        ("model_index.json", "got no model_index.json"),
        ("scheduler/scheduler_config.json", "got no scheduler/scheduler_config.json"),
        ("tokenizer/tokenizer.json", "got no tokenizer/vocab.json"),
    ],
)
def test_files_that_are_not_there(folder, name, match):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=match):
        StableDiffusion.load(folder)


@pytest.mark.parametrize("name", [UNET, "vae/config.json", "model_index.json"])
@pytest.mark.parametrize("damage", ["cut", "text"])
def test_damaged_files_are_named(folder, name, damage):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2] if damage == "cut" else b"<html>not found</html>")
    with pytest.raises(ValueError, match=f"{name.split('/')[-1]}: expected"):
        StableDiffusion.load(folder)


def test_damaged_tokenizer(folder):
    (folder / "tokenizer/tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer: expected a CLIP tokenizer, got damaged files"):
        StableDiffusion.load(folder).embed(["a"])


def test_another_pipeline(folder):
    edit_json(folder / "model_index.json", lambda index: index.update(_class_name="StableDiffusionXLPipeline"))
    with pytest.raises(ValueError, match=r"model: expected a StableDiffusionPipeline or .*'StableDiffusionXLPipeline'"):
        StableDiffusion.load(folder)


def test_a_file_or_nothing_instead_of_a_folder(folder):
    with pytest.raises(ValueError, match=f"got a file; it belongs to the model in {folder}; give that folder"):
        StableDiffusion.load(folder / UNET)
    (folder.parent / "v1-5.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected the folder of a diffusers model, got a file.*from_single_file"):
        StableDiffusion.load(folder.parent / "v1-5.ckpt")


def test_components_of_different_models(folder, torch, diffusers):
    tiny.make_vae(torch, diffusers, latent_channels=8).save_pretrained(folder / "vae")
    with pytest.raises(ValueError, match=r"vae and unet: expected latent_channels equal to in_channels, got 8 and 4"):
        StableDiffusion.load(folder)


def test_tokens_beyond_the_vocabulary(original):
    model = StableDiffusion.load(original)
    model.text_encoder_config = model.text_encoder_config.__class__(
        **vars(model.text_encoder_config) | {"vocab_size": 500}
    )
    with pytest.raises(ValueError, match=r"tokenizer: expected tokens below 500 .*, got 515"):
        model.tokenize(["a"])


class TestShards:
    def shard(self, folder, **changes):
        """The UNet in two files and an index, as diffusers writes large models."""
        tensors = load_file(folder / UNET)
        (folder / UNET).unlink()
        names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        parts = [{k: v for i, (k, v) in enumerate(tensors.items()) if i % 2 == part} for part in (0, 1)]
        for name, part in zip(names, parts, strict=True):
            save_file(part, folder / "unet" / name, {"format": "pt"})
        index = {key: name for name, part in zip(names, parts, strict=True) for key in part} | changes
        path = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
        path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
        return path, names

    def test_load_as_one(self, folder, original):
        self.shard(folder)
        assert StableDiffusion.load(folder).fingerprint() == StableDiffusion.load(original).fingerprint()

    def test_beside_a_whole_file(self, folder, original):
        self.shard(folder)
        shutil.copy(original / UNET, folder / UNET)
        with pytest.raises(ValueError, match=r"got both; remove the one that is old"):
            StableDiffusion.load(folder)

    @pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "a\\b.safetensors", "weights.bin", ""])
    def test_outside_the_folder(self, folder, name):
        self.shard(folder, **{KEY: name})
        with pytest.raises(ValueError, match=r"expected names of .safetensors files in its own folder, got"):
            StableDiffusion.load(folder)

    def test_missing_shard(self, folder):
        _, names = self.shard(folder)
        (folder / "unet" / names[1]).unlink()
        with pytest.raises(ValueError, match=f"expected the file {names[1]} beside it, got no such file"):
            StableDiffusion.load(folder)

    def test_index_that_disagrees(self, folder):
        path, names = self.shard(folder)
        edit_json(
            path, lambda index: index["weight_map"].update({"conv_in.bias": names[1], "conv_in.weight": names[0]})
        )
        with pytest.raises(ValueError, match=r"conv_in.(bias|weight): listed in .*, not there"):
            StableDiffusion.load(folder)

    def test_the_same_tensor_in_two_shards(self, folder):
        _, names = self.shard(folder)
        both = [folder / "unet" / name for name in names]
        twice = next(iter(load_file(both[0])))
        edit_tensors(both[1], lambda tensors: tensors.update({twice: np.zeros(3, np.float32)}))
        with pytest.raises(ValueError, match=f"{twice}: in .*, not listed for it"):
            StableDiffusion.load(folder)

    @pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "{"])
    def test_an_index_of_another_kind(self, folder, content):
        path, _ = self.shard(folder)
        path.write_text(content)
        with pytest.raises(ValueError, match=r"index.json: expected"):
            StableDiffusion.load(folder)


def test_half_precision_variants(folder, original, torch):
    """fp16 files are taken where there are no others, bfloat16 tensors are read; both are float32 afterwards."""
    path = folder / UNET
    edit_tensors(path, lambda t: t.update({k: v.astype(np.float16) for k, v in t.items()}))
    path.rename(folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    exact, half = StableDiffusion.load(original), StableDiffusion.load(folder)
    for ours, rounded in zip(jax.tree.leaves(exact.state), jax.tree.leaves(half.state), strict=True):
        assert rounded.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(ours).astype(np.float16).astype(np.float32), rounded)

    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    save_torch({k: v.bfloat16() for k, v in load_torch(original / UNET).items()}, path, {"format": "pt"})
    brain = StableDiffusion.load(folder)  # the whole file comes first
    for ours, rounded in zip(jax.tree.leaves(exact.state), jax.tree.leaves(brain.state), strict=True):
        np.testing.assert_array_equal(ours.astype(jnp.bfloat16).astype(jnp.float32), rounded)


def make_old(folder):
    """The layout of the hub's first Stable Diffusion folders."""

    def text(tensors):
        for key in list(tensors):
            tensors[f"text_model.{key.removeprefix('text_model.')}"] = tensors.pop(key)
        tensors["text_model.embeddings.position_ids"] = np.arange(77, dtype=np.int64)[None]

    def vae(tensors):
        for key in list(tensors):
            for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                if f".{new}." in key:
                    array = tensors.pop(key)
                    if key.startswith("decoder") and array.ndim == 2:  # both are found: linear, and as 1×1 convolutions
                        array = array[:, :, None, None]
                    tensors[key.replace(f".{new}.", f".{old}.")] = np.ascontiguousarray(array)

    edit_tensors(folder / "text_encoder/model.safetensors", text)
    edit_tensors(folder / "vae/diffusion_pytorch_model.safetensors", vae)
    for part in ("unet", "vae"):
        edit_json(folder / part / "config.json", lambda c: c.update(_diffusers_version="0.2.2"))
    edit_json(
        folder / "vae/config.json",
        lambda c: [
            c.pop(k)
            for k in list(c)
            if k
            in (
                "scaling_factor",
                "shift_factor",
                "latents_mean",
                "latents_std",
                "force_upcast",
                "use_quant_conv",
                "use_post_quant_conv",
                "mid_block_add_attention",
            )
        ],
    )
    kept = (
        "_class_name",
        "act_fn",
        "attention_head_dim",
        "block_out_channels",
        "center_input_sample",
        "cross_attention_dim",
        "down_block_types",
        "downsample_padding",
        "flip_sin_to_cos",
        "freq_shift",
        "in_channels",
        "layers_per_block",
        "mid_block_scale_factor",
        "norm_eps",
        "norm_num_groups",
        "out_channels",
        "sample_size",
        "up_block_types",
        "_diffusers_version",
    )
    edit_json(folder / "unet/config.json", lambda c: [c.pop(k) for k in list(c) if k not in kept])
    edit_json(folder / "model_index.json", lambda c: c.update(scheduler=["diffusers", "PNDMScheduler"]))
    (folder / "scheduler/scheduler_config.json").write_text(
        json.dumps(
            {
                "_class_name": "PNDMScheduler",
                "_diffusers_version": "0.2.2",
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "beta_start": 0.00085,
                "num_train_timesteps": 1000,
                "skip_prk_steps": True,
            }
        )
    )
    edit_json(
        folder / "text_encoder/config.json",
        lambda c: c.update(
            _name_or_path="openai/clip-vit-large-patch14",
            dropout=0.0,
            torch_dtype="float32",
            transformers_version="4.21.0.dev0",
        ),
    )
    for extra in ("safety_checker", "feature_extractor"):
        (folder / extra).mkdir()
        (folder / extra / "config.json").write_text("{}")
    (folder / "safety_checker/pytorch_model.bin").write_bytes(b"not read")


def test_the_hubs_older_layout_is_the_same_model(folder, original):
    make_old(folder)
    today, old = StableDiffusion.load(original), StableDiffusion.load(folder)
    assert old.fingerprint() == today.fingerprint()  # UNet and text encoder, bit for bit
    for a, b in zip(jax.tree.leaves(today.network("vae")[1]), jax.tree.leaves(old.network("vae")[1]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert old.scheduler == today.scheduler
    assert old.unet_config.sample_size == 64  # what diffusers makes of sizes below it in files of that time
    assert (replace(old.unet_config, sample_size=8), old.vae_config, old.text_encoder_config) == (
        today.unet_config,
        today.vae_config,
        today.text_encoder_config,
    )
    noise = jax.random.normal(jax.random.key(0), (1, *today.shape))
    ends = [list(model.path(noise, ["the cat"], num_steps=4))[-1][1] for model in (today, old)]
    np.testing.assert_array_equal(*ends)
    np.testing.assert_array_equal(today.decode(ends[0]), old.decode(ends[1]))


class TestConfigs:
    def test_everything_wrong_is_named_at_once(self, original):
        config = json.loads((original / "unet/config.json").read_text())
        config |= {"class_embed_type": "timestep", "sample_size": None, "new_field": 3, "in_channels": True}
        with pytest.raises(ValueError, match=r"unet/config.json: 4 settings that jaxmem does not support") as caught:
            UNetConfig.from_diffusers(config)
        for part in (
            "class_embed_type: expected None, got 'timestep'",
            "sample_size: expected a whole number of at least 1, got None",
            "new_field: not known, got 3",
            "in_channels: expected a whole number of at least 1, got True",
        ):
            assert part in str(caught.value)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"_class_name": "UNet2DModel"}, "_class_name: expected UNet2DConditionModel, got 'UNet2DModel'"),
            ({"in_channels": 9}, "in_channels and out_channels: expected equal numbers"),
            ({"attention_head_dim": [4]}, "attention_head_dim: expected a whole number of at least 1, or 2 of them"),
            ({"attention_head_dim": 5}, "attention_head_dim: expected numbers of heads that divide"),
            ({"norm_num_groups": 7}, "norm_num_groups: expected a divisor of"),
            ({"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "down_block_types: expected 2 of"),
            ({"block_out_channels": 32}, "block_out_channels: expected a list of whole numbers"),
            ({"act_fn": "gelu"}, "act_fn: expected 'silu' or 'swish', got 'gelu'"),
            ({"only_cross_attention": True}, "only_cross_attention: expected False, got True"),
            ({"addition_embed_type": "text_time"}, "addition_embed_type: expected None"),
        ],
    )
    def test_unet(self, original, change, match):
        config = json.loads((original / "unet/config.json").read_text())
        with pytest.raises(ValueError, match=match):
            UNetConfig.from_diffusers(config | change)

    @pytest.mark.parametrize(
        ("cls", "config", "match"),
        [
            (TextEncoderConfig, {"hidden_act": "relu"}, "hidden_act: expected 'quick_gelu' or 'gelu', got 'relu'"),
            (TextEncoderConfig, {"use_attention_mask": True}, "use_attention_mask: expected False or None"),
            (
                TextEncoderConfig,
                {"num_attention_heads": 7},
                "num_attention_heads: expected a divisor of hidden_size 512",
            ),
            (TextEncoderConfig, {"model_type": "bert"}, "model_type: expected 'clip_text_model' or 'clip', got 'bert'"),
            (VAEConfig, {"shift_factor": 0.1}, "shift_factor: expected None, got 0.1"),
            (
                VAEConfig,
                {"up_block_types": ["UpDecoderBlock2D"] * 2},
                "up_block_types: expected 1 of 'UpDecoderBlock2D'",
            ),
            (VAEConfig, {"norm_num_groups": 24}, r"norm_num_groups: expected a divisor of \(64,\), got 24"),
            (VAEConfig, {"scaling_factor": 0}, "scaling_factor: expected a number from 1e-06"),
            (
                SchedulerConfig,
                {"timestep_spacing": "even"},
                "timestep_spacing: expected 'leading' or 'trailing' or 'li",
            ),
            (SchedulerConfig, {"prediction_type": "flow"}, "prediction_type: expected 'epsilon' or 'v_prediction'"),
            (
                SchedulerConfig,
                {"prediction_type": ["epsilon"]},
                "prediction_type: expected 'epsilon' or 'v_prediction'",
            ),
            (
                SchedulerConfig,
                {"prediction_type": "flow_prediction"},
                "or 'sample', got 'flow_prediction'; if the file is wrong, load it with `prediction_type=",
            ),
            (
                SchedulerConfig,
                {"rescale_betas_zero_snr": True, "prediction_type": "epsilon"},
                "rescale_betas_zero_snr: expected false with .* 'epsilon', got true .*`prediction_type='v_prediction'`",
            ),
            (SchedulerConfig, {"trained_betas": [0.1]}, r"trained_betas: expected 1000 numbers .*, got 1"),
            (
                SchedulerConfig,
                {"trained_betas": [0.1, 1.0]},
                r"trained_betas: expected a list of numbers between 0 and",
            ),
            (SchedulerConfig, {"beta_schedule": "laplace"}, "beta_schedule: expected 'linear' or 'scaled_linear' or"),
            (SchedulerConfig, {"thresholding": True}, "thresholding: expected False, got True"),
            (SchedulerConfig, {"use_flow_sigmas": True}, "use_flow_sigmas: expected False, got True"),
            (SchedulerConfig, {"timestep_type": "continuous"}, "timestep_type: expected 'discrete', got 'continuous'"),
            (SchedulerConfig, {"snr_shift_scale": 3.0}, "snr_shift_scale: expected 1.0, got 3.0"),
            (SchedulerConfig, {"predict_epsilon": False}, "predict_epsilon: expected true, got False"),
            (SchedulerConfig, {"beta_start": 0.1}, "beta_start: expected at most beta_end 0.02, got 0.1"),
            (SchedulerConfig, {"steps_offset": "1"}, "steps_offset: expected a whole number, got '1'"),
            *(
                (
                    SchedulerConfig,
                    {"_class_name": name},
                    f"_class_name: expected DDIMScheduler or .*, got '{name}'; use the scheduler of the",
                )
                for name in ("IPNDMScheduler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler")
            ),
        ],
    )
    def test_others(self, cls, config, match):
        with pytest.raises(ValueError, match=match):
            cls.from_diffusers(config)

    def test_what_is_written_is_read_again(self):
        for config in (UNetConfig(), VAEConfig(), TextEncoderConfig()):
            assert type(config).from_diffusers(config.to_diffusers()) == config

    @pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
    def test_schedules_are_diffusers(self, kind, diffusers):
        theirs = diffusers.DDIMScheduler(beta_schedule=kind, steps_offset=1, set_alpha_to_one=False, clip_sample=False)
        ours = SchedulerConfig.from_diffusers(dict(theirs.config))
        # diffusers multiplies 1,000 factors in float32
        np.testing.assert_allclose(ours.schedule.alpha**2, theirs.alphas_cumprod, rtol=2e-5, atol=1e-9)
        assert SchedulerConfig.from_diffusers(ours.to_diffusers()) == ours


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux's /proc")
def test_loading_holds_the_weights_once(tmp_path, torch, diffusers):
    """Peak memory of a process that loads 0.4 GB of weights, beyond what it has before, is at most 1.3 times them."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        **tiny.unet_config("sd1") | dict(block_out_channels=(320, 640), norm_num_groups=32, layers_per_block=3)
    )
    unet.save_pretrained(tmp_path)
    script = r"""
import json, re, sys
from pathlib import Path
from flax import nnx
from jaxmem.stable_diffusion import weights
from jaxmem.stable_diffusion.configs import UNetConfig
from jaxmem.stable_diffusion.tensors import read_tensors
from jaxmem.stable_diffusion.unet import UNet
folder = Path(sys.argv[1])
config = UNetConfig.from_diffusers(json.loads((folder / "config.json").read_text()))
make = lambda: UNet(config, rngs=nnx.Rngs(0))
# Not getrusage: its peak survives exec, and is that of the process that started this one.
peak = lambda: 1024 * int(re.search("VmHWM:[^0-9]*([0-9]+)", Path("/proc/self/status").read_text())[1])
weights.check(make, read_tensors(folder, weights.UNET.basename), weights.UNET, "unet")
import jax
jax.numpy.ones(1000).block_until_ready()  # what JAX itself takes when it starts
before = peak()
_, state = weights.load_state(make, read_tensors(folder, weights.UNET.basename), weights.UNET, "unet")
print((peak() - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout.split()[-1]) <= 1.3


def test_shapes_are_traced_once_and_are_not_the_weights(folder):
    one, two = StableDiffusion.load(folder), StableDiffusion.load(folder)
    before = weights.shapes(one.components["unet"].make)
    assert weights.shapes(two.components["unet"].make) is before
    missing = one.bytes_to_read
    assert missing == sum(component.float32_bytes for component in one.components.values())
    loaded = one.network("unet")[1]
    assert one.bytes_to_read == missing - one.components["unet"].float32_bytes
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(before[1]))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))


def test_classes_of_the_parts(folder):
    edit_json(
        folder / "model_index.json", lambda c: c.update(text_encoder=["transformers", "CLIPTextModelWithProjection"])
    )
    with pytest.raises(ValueError, match=r"expected text_encoder of CLIPTextModel, got .*WithProjection"):
        StableDiffusion.load(folder)


def test_two_schedulers(folder):
    edit_json(folder / "scheduler/scheduler_config.json", lambda c: c.update(_class_name="PNDMScheduler"))
    with pytest.raises(ValueError, match=r"expected one scheduler, got DDIMScheduler in model_index.json and 'PNDM"):
        StableDiffusion.load(folder)


def test_a_tokenizer_of_another_length(folder):
    edit_json(folder / "tokenizer/tokenizer_config.json", lambda c: c.update(model_max_length=16))
    with pytest.raises(ValueError, match=r"tokenizer: expected model_max_length 77 .*, got 16"):
        StableDiffusion.load(folder).embed(["a"])


def test_double_precision_beyond_single(folder):
    edit_tensors(folder / UNET, lambda t: t.update({KEY: np.full((64, 64), 1e300)}))
    with pytest.raises(ValueError, match=r"numbers beyond float32"):
        _ = StableDiffusion.load(folder).state


def test_brackets_without_end(folder):
    (folder / "unet/config.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"config.json: expected JSON, got a damaged file"):
        StableDiffusion.load(folder)


def test_live_pipelines_that_were_changed(folder, torch, diffusers):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    StableDiffusion.load(pipe)
    pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    with pytest.raises(ValueError, match=r"FreeU is on; call disable_freeu"):
        StableDiffusion.load(pipe)
    pipe.disable_freeu()
    pipe.unet.to("meta")
    with pytest.raises(ValueError, match=r"live unet: .* is offloaded"):
        StableDiffusion.load(pipe)
