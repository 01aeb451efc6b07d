"""One door for every source: what diffusers makes of the same files and choices is what jaxmem.load gives."""

import json
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import loaded
import numpy as np
import pytest
from conftest import command_environment
from flax import nnx
from loaded import PROMPT, close, our_unet, same_as, their_embedding, their_unet
from safetensors.numpy import load_file, save_file
from single_file import write_single_file

import jaxmem as jm
from jaxmem.commands.output import open_stable_diffusion
from jaxmem.config import FilesConfig, PartsConfig
from jaxmem.data import verbatim_model
from jaxmem.stable_diffusion.configs import UNetConfig
from jaxmem.stable_diffusion.unet import UNet

peers, original, base, pipe = loaded.peers, loaded.original, loaded.base, loaded.pipe


class TestSources:
    def test_a_folder_is_the_ports_model(self, original, base):
        assert base.fingerprint() == jm.StableDiffusion.load(original).fingerprint()
        assert base.reading.decisions == {}

    def test_a_live_pipeline(self, pipe, base):
        assert jm.load(pipe).fingerprint() == base.fingerprint()

    def test_parameters_in_bfloat16_are_refused(self, original):
        for options, problem in (
            (dict(parameters="bfloat16"), r"parameters: expected float32 for Stable Diffusion 1 and 2, .* got 'bfl"),
            (dict(parameters="float16"), r"parameters: expected 'float32' or 'bfloat16', got 'float16'"),
        ):
            with pytest.raises(ValueError, match=problem):
                jm.load(original, **options)

    def test_what_is_told(self, original):
        said = []
        model = jm.load(original, ignore_settings=["new"], prediction_type="v_prediction", say=said.append)
        assert said == ["ignore_settings: nothing was refused for new, nothing is ignored"]
        assert model.reading.decisions == {"prediction_type": "v_prediction"}

    def test_a_source_that_is_none(self):
        with pytest.raises(ValueError, match=r"model: expected a folder, a hub id or a diffusers StableDiffusionPipe"):
            jm.load(3)
        with pytest.raises(ValueError, match=r"expected the folder of a diffusers model or a hub id"):
            jm.load("./nowhere")

    @pytest.mark.parametrize("name", ["StableDiffusionControlNetPipeline", "MyPipeline"])
    def test_another_class_is_refused_by_its_name(self, original, tmp_path, name):
        shutil.copytree(original, tmp_path / "model")
        index = tmp_path / "model/model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": name}))
        with pytest.raises(ValueError, match=rf"expected a .*StableDiffusionPipeline.*got '{name}'"):
            jm.load(tmp_path / "model")
        with pytest.raises(ValueError, match=rf"live pipeline: expected a .*got '{name}'"):
            jm.load(type(name, (), {"components": {}})())

    def test_a_run_has_no_files_of_diffusers(self, tmp_path):
        (tmp_path / "manifest.json").write_text("{}")
        for options in (dict(unet="x"), dict(clip_skip=1), dict(height=8), dict(ignore_settings=["x"])):
            (name,) = options
            with pytest.raises(
                ValueError, match=rf"a run of jaxmem .* has no files of diffusers: expected no `{name}`, got one"
            ):
                jm.load(tmp_path, **options)
        with pytest.raises(ValueError, match=r"MODEL: expected a Stable Diffusion 1 or 2 model, got a run of jaxmem"):
            open_stable_diffusion(str(tmp_path), FilesConfig(), PartsConfig())

    def test_lists_are_lists(self, original):
        for name in ("lora", "embedding", "ignore_settings"):
            with pytest.raises(ValueError, match=rf"{name}: expected a list, got one text; write \['x'\]"):
                jm.load(original, **{name: "x"})

    def test_torch_is_not_needed_for_folders(self, original):
        script = (
            "import sys; sys.modules.update(torch=None, diffusers=None)\nimport jaxmem as jm\n"
            f"m = jm.load({str(original)!r}, unet={str(original / 'unet')!r}, clip_skip=1, width=24)\nprint(m.shape)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=command_environment())
        assert done.stdout.strip() == "(4, 12, 4)", done.stderr

    def test_what_needs_diffusers_says_so(self, original, tmp_path, monkeypatch):
        words = tmp_path / "word.safetensors"
        save_file({"<cat>": np.ones(32, np.float32)}, words)
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(ImportError, match=r"without peft; install them: pip install 'jaxmem\[diffusers\]'"):
            jm.load(original, embedding=[words])


class TestChoicesWithoutTorch:
    @pytest.mark.parametrize("skip", [0, 1, 2])
    def test_clip_skip_is_diffusers(self, skip, original, pipe):
        if not hasattr(pipe.text_encoder, "text_model"):  # of transformers before 5.6, as diffusers' clip_skip wants it
            vars(pipe.text_encoder)["text_model"] = pipe.text_encoder
        model = jm.load(original, clip_skip=skip)
        close(model.embed([PROMPT])[0], their_embedding(pipe, clip_skip=skip))
        assert model.reading.decisions == ({"clip_skip": skip} if skip else {})

    def test_without_it_is_the_last_layer(self, base, pipe):
        close(base.embed([PROMPT])[0], their_embedding(pipe))

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize("skip", [-1, 3, True, 1.0])
    def test_layers_that_are_not_there(self, skip, original):
        with pytest.raises(ValueError, match=r"clip_skip: expected a whole number from 0 to 2, .* got"):
            jm.load(original, clip_skip=skip)

    @pytest.mark.parametrize(
        ("height", "width", "shape"), [(24, 16, (12, 8)), (8, 40, (4, 20)), (16, None, (8, 4)), (None, 8, (4, 4))]
    )
    def test_pictures_of_another_size(self, height, width, shape, original, pipe, torch):
        model = jm.load(original, height=height, width=width)
        assert model.shape == (*shape, 4)
        same_as(torch, model, pipe)
        x = np.random.default_rng(1).standard_normal(model.shape).astype(np.float32)
        with torch.no_grad():
            theirs = pipe.vae.decode(torch.tensor(x.transpose(2, 0, 1)[None]) / pipe.vae.config.scaling_factor).sample
        pixels = np.round(255 * np.clip(theirs[0].numpy().transpose(1, 2, 0) / 2 + 0.5, 0, 1)).astype(int)
        assert np.abs(model.decode(jnp.asarray(x)[None])[0].astype(int) - pixels).max() <= 1
        assert model.reading.decisions == ({} if shape == (4, 4) else {"latent_shape": [*shape, 4]})

    @pytest.mark.parametrize("shape", [(5, 7), (6, 9), (4, 3)])
    def test_sides_that_do_not_fold(self, shape, base, pipe, torch):
        """Where a level has an odd side, the way up goes to the size of the way down."""
        x = np.random.default_rng(2).standard_normal((*shape, 4)).astype(np.float32)
        cond = their_embedding(pipe)
        close(our_unet(base, x, cond), their_unet(torch, pipe.unet, x, cond))

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize("pixels", [12, 0, -8, 16.0, True])
    def test_sizes_that_diffusers_refuses(self, pixels, original):
        with pytest.raises(ValueError, match=r"height: expected a multiple of 8 pixels, as in diffusers, got"):
            jm.load(original, height=pixels)

    def test_they_are_in_the_identity(self, original, base):
        chosen = [{}, dict(clip_skip=1), dict(clip_skip=2), dict(height=16), dict(width=16)]
        identities = [json.dumps(jm.load(original, **one).identity([PROMPT])) for one in chosen]
        assert len(set(identities)) == len(chosen)
        assert json.loads(identities[0]) == json.loads(json.dumps(base.identity([PROMPT])))


@pytest.fixture(scope="module")
def trained(original, tmp_path_factory):
    """Checkpoints as diffusers' training scripts leave them: the UNet, and the average of its weights."""
    folder = tmp_path_factory.mktemp("trained") / "checkpoint-500"
    for name, factor in (("unet", 1.5), ("unet_ema", 1.25)):
        shutil.copytree(original / "unet", folder / name)
        path = folder / name / "diffusion_pytorch_model.safetensors"
        weights = load_file(path)
        save_file(weights | {"conv_out.weight": factor * weights["conv_out.weight"]}, path, {"format": "pt"})
    config = folder / "unet_ema/config.json"
    averaged = dict(decay=0.9999, inv_gamma=1.0, min_decay=0.0, optimization_step=500, power=2 / 3)
    averaged |= dict(update_after_step=0, use_ema_warmup=False)
    config.write_text(json.dumps(json.loads(config.read_text()) | averaged))
    (folder / "optimizer.bin").write_text("a pickle that is not looked at")
    return folder


class TestAnotherUNet:
    def test_a_checkpoint_is_its_unet(self, original, trained, base):
        said = []
        plain, averaged, whole = (
            jm.load(original, unet=path, say=said.append)
            for path in (trained / "unet", str(trained / "unet_ema"), trained)
        )
        assert said == [f"{trained}: unet is read; for the average of weights give {trained / 'unet_ema'}"]
        names = [model.reading.decisions["unet_weights"] for model in (plain, averaged, whole)]
        assert names == ["checkpoint-500/unet", "checkpoint-500/unet_ema", "checkpoint-500/unet"]
        assert plain.identity([PROMPT]) == whole.identity([PROMPT])
        identities = {json.dumps(model.identity([PROMPT])) for model in (base, plain, averaged)}
        assert len(identities) == 3
        ratio = [
            np.asarray(m.state["conv_out"]["weight"].get_value() / base.state["conv_out"]["weight"].get_value())
            for m in (plain, averaged)
        ]
        np.testing.assert_allclose(ratio[0], 1.5, rtol=1e-6)  # float32
        np.testing.assert_allclose(ratio[1], 1.25, rtol=1e-6)

    def test_the_models_own_is_not_needed(self, original, trained, tmp_path):
        shutil.copytree(original, tmp_path / "model", ignore=shutil.ignore_patterns("unet"))
        model = jm.load(tmp_path / "model", unet=trained)
        assert model.fingerprint() == jm.load(original, unet=trained).fingerprint()
        with pytest.raises(ValueError, match=r"got no unet/config\.json"):
            jm.load(tmp_path / "model")

    def test_of_a_live_pipeline(self, pipe, original, trained):
        before = pipe.unet
        model = jm.load(pipe, unet=trained)
        assert pipe.unet is before
        assert model.fingerprint() == jm.load(original, unet=trained).fingerprint()

    def test_what_is_no_unet(self, original, trained, tmp_path):
        with pytest.raises(ValueError, match=r"another `unet`: expected a folder .*got .*nowhere, which is no folder$"):
            jm.load(original, unet=tmp_path / "nowhere")
        with pytest.raises(ValueError, match=r"which has neither$"):
            jm.load(original, unet=tmp_path)
        shutil.copytree(trained / "unet_ema", tmp_path / "some/unet_ema")
        with pytest.raises(ValueError, match=r"which has neither; give .*some/unet_ema$"):
            jm.load(original, unet=tmp_path / "some")
        save_file(
            {"unet.conv_in.lora_A.weight": np.ones((2, 2), np.float32)}, tmp_path / "pytorch_lora_weights.safetensors"
        )
        match = r"another `unet`: expected a folder, got .* with a LoRA, .*safetensors; jaxmem.load fuses it: `lora=\["
        with pytest.raises(ValueError, match=match):
            jm.load(original, unet=tmp_path)
        with pytest.raises(ValueError, match=r"_class_name: expected UNet2DConditionModel, got 'AutoencoderKL'"):
            jm.load(original, unet=original / "vae")

    def test_only_pickles(self, original, trained, tmp_path):
        shutil.copytree(trained / "unet", tmp_path / "unet")
        path = tmp_path / "unet/diffusion_pytorch_model.safetensors"
        path.rename(path.with_suffix(".bin"))
        with pytest.raises(ValueError, match=r"expected diffusion_pytorch_model\.safetensors, got only pickles"):
            jm.load(original, unet=tmp_path)


LAYOUT = dict(layers=1, attends_up=(False, True), vae_levels=2)  # of the tiny model


class TestSingleFiles:
    @pytest.fixture
    def single(self, original, tmp_path):
        """A checkpoint, and beside it the settings of its model, without weights."""
        shutil.copytree(original, tmp_path / "tiny", ignore=shutil.ignore_patterns("*.safetensors"))
        averages = {"model_ema.decay": np.ones(1, np.float32), "betas": np.ones(2, np.float32)}
        return write_single_file(original, tmp_path / "tiny.safetensors", **LAYOUT, more=averages)

    def test_it_is_the_folder_it_was_made_from(self, single, base):
        said = []
        model = jm.load(single, say=said.append)
        assert model.fingerprint() == base.fingerprint()
        assert model.identity([PROMPT]) == base.identity([PROMPT])
        assert "tiny.safetensors: the weights are read, not their averages (model_ema.*)" in said
        assert model.warnings == []

    def test_the_file_in_a_models_folder(self, original, base, tmp_path):
        shutil.copytree(original, tmp_path / "model")
        file = write_single_file(original, tmp_path / "model/v1.safetensors", **LAYOUT)
        assert jm.load(str(file)).fingerprint() == base.fingerprint()

    def test_in_half_precision(self, single, original):
        half = {key: value.astype(np.float16) for key, value in load_file(single).items()}
        save_file(half, single)
        model = jm.load(single)
        assert model.state["conv_in"]["bias"].get_value().dtype == np.float32
        assert model.state["conv_in"]["bias"].get_value()[0] == np.float32(
            half["model.diffusion_model.input_blocks.0.0.bias"][0]
        )

    def test_with_another_unet(self, single, trained, original):
        assert jm.load(single, unet=trained).fingerprint() == jm.load(original, unet=trained).fingerprint()

    def test_without_settings_and_without_the_hub(self, single, monkeypatch):
        shutil.rmtree(single.with_suffix(""))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        match = (
            r"expected the settings and the tokenizer of its model, .* neither a diffusers folder beside it \(.*tiny\)"
        )
        with pytest.raises(OSError, match=match):
            jm.load(single)

    def test_what_would_be_left_out(self, single):
        content = load_file(single)
        extra = {"model.diffusion_model.input_blocks.9.0.in_layers.0.bias": np.ones(3, np.float32)}
        save_file(content | extra, single)
        with pytest.raises(ValueError, match=r"tiny\.safetensors: expected "):
            jm.load(single)
        save_file(content | {"other.thing": np.ones(3, np.float32)}, single)
        with pytest.warns(UserWarning, match=r"1 tensors that no part of a Stable Diffusion has are not read \(other"):
            jm.load(single)
        save_file({key: value for key, value in content.items() if "cond_stage" not in key}, single)
        with pytest.raises(ValueError, match=r"expected a whole Stable Diffusion, got a file without text_encoder"):
            jm.load(single)

    def test_other_models_and_pickles(self, single):
        name = "conditioner.embedders.0.transformer.x"
        save_file(load_file(single) | {name: np.ones(3, np.float32)}, single)
        with pytest.raises(ValueError, match=r"single file of Stable Diffusion 1 or 2, got one of Stable Diffusion XL"):
            jm.load(single)
        for suffix in (".ckpt", ".pt", ".bin"):
            path = single.with_suffix(suffix)
            path.write_text("anything")
            with pytest.raises(ValueError, match=r"pickles that you trust, are converted with diffusers"):
                jm.load(path)


def test_the_port_takes_odd_sides_under_vmap_and_jit(getkey):
    """The shapes alone: numbers are compared above."""
    config = UNetConfig(
        block_out_channels=(8, 8, 8), down_attention=(False,) * 3, up_attention=(False,) * 3, num_heads=(1,) * 3,
        norm_num_groups=4, cross_attention_dim=4, layers_per_block=1,
    )  # fmt: skip
    unet = nnx.eval_shape(lambda: UNet(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(unet)
    out = jax.eval_shape(
        lambda s, x, c: nnx.merge(graphdef, s)(x, 3, c), state, jnp.zeros((9, 13, 4)), jnp.zeros((2, 4))
    )
    assert out.shape == (9, 13, 4)


def test_the_shipped_model_in_another_size():
    model = jm.load(verbatim_model()[0], height=16, width=48)
    assert model.decode(jnp.zeros((1, *model.shape))).shape == (1, 16, 48, 3)


class TestOtherClasses:
    """What is done with a class that Stable Diffusion's port does not read, before it is given away."""

    @pytest.fixture
    def ddpm(self, peers, tmp_path):
        torch, diffusers, _ = peers
        torch.manual_seed(0)
        unet = diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
            pipeline.save_pretrained(tmp_path / "ddpm")
        return pipeline, tmp_path / "ddpm"

    def test_choices_that_they_do_not_have(self, ddpm):
        with pytest.raises(ValueError, match="clip_skip: expected 0 for a DDPMPipeline, got 1"):
            jm.load(ddpm[1], clip_skip=1)

    def test_classes_that_nobody_knows(self, ddpm):
        index = ddpm[1] / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "NewPipeline"}))
        match = r"expected a pipeline of StableDiffusionPipeline, .*DDPMPipeline, .*got 'NewPipeline', whose network"
        with pytest.raises(ValueError, match=match):
            jm.load(ddpm[1])
        with pytest.raises(ValueError, match=match):
            jm.load(type("NewPipeline", (), {"components": {}})())


def test_an_audit_of_pictures_that_are_not_square(original, tmp_path):
    """Through all of it: the samples, their spectra, the pictures on the page."""
    model = jm.load(original, height=8, width=24)
    config = jm.AuditConfig(noises=1, ddim_steps=2, method="lanczos", num_steps=2, directions=1)
    found = jm.audit(model, ["a cat", "a dog"], config, folder=tmp_path / "run")
    assert found.images.shape == (2, 1, 8, 24, 3)
    found.write_page(tmp_path / "page.html")
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert '"latent_shape": [4, 12, 4]' in json.dumps(manifest)
    with pytest.raises(ValueError, match="another"):
        jm.audit(jm.load(original), ["a cat", "a dog"], config, folder=tmp_path / "run")


def test_the_flags_are_the_arguments(original, trained):
    parts = PartsConfig(unet=trained, clip_skip=1, height=8, width=24)
    model = open_stable_diffusion(str(original), FilesConfig(prediction_type="sample"), parts)
    assert model.shape == (4, 12, 4)
    assert model.scheduler.prediction == "x0"
    expected = jm.load(original, unet=trained, clip_skip=1, height=8, width=24, prediction_type="sample")
    assert model.identity([PROMPT]) == expected.identity([PROMPT])
