"""LoRA and textual inversions through jaxmem.load: equal to diffusers' own pipeline with them."""

import json
import warnings

import loaded
import numpy as np
import pytest
from conftest import optional_import
from loaded import PROMPT, close, open_with_diffusers, same_as, their_embedding
from safetensors.numpy import load_file, save_file

import jaxmem as jm

SCALE, RANK, ALPHA = 0.7, 2, 6.0
WIDTH = 32  # of the tiny text encoder
UNET_LAYERS = ["to_q", "to_v", "to_out.0", "ff.net.2", "conv1", "proj_in"]
TEXT_LAYERS = ["q_proj", "out_proj", "fc1"]
peers, original, base, pipe = loaded.peers, loaded.original, loaded.base, loaded.pipe


@pytest.fixture(scope="module")
def adapted(peers, original):
    """A pipeline with LoRA layers in UNet and text encoder, not fused, and the layers' tensors by their module."""
    torch, diffusers, _ = peers
    peft = optional_import("peft")
    pipe = open_with_diffusers(diffusers, original)
    torch.manual_seed(4)
    for part, layers in (("unet", UNET_LAYERS), ("text_encoder", TEXT_LAYERS)):
        if part == "unet" or reason_without_text_encoder() is None:
            config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers, init_lora_weights=False)
            getattr(pipe, part).add_adapter(config, adapter_name="trained")
    return pipe


def reason_without_text_encoder():
    """transformers asks for a recent PEFT, which diffusers' layers of the UNet do not need."""
    from transformers.integrations.peft import MIN_PEFT_VERSION
    from transformers.utils.peft_utils import check_peft_version

    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as error:
        return f"LoRA of text encoders: {error}"
    return None


def adapted_parts(pipe):
    return [part for part in ("unet", "text_encoder") if factors(getattr(pipe, part))]


def factors(module):
    """By module path, the two factors of each layer."""
    return {
        name: [one["trained"].weight.detach().numpy().copy() for one in (layer.lora_A, layer.lora_B)]
        for name, layer in module.named_modules()
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer")
    }


@pytest.fixture(scope="module")
def files(adapted, peers, tmp_path_factory):
    """The same LoRA as diffusers saves it, and as kohya's scripts do."""
    from peft.utils import get_peft_model_state_dict

    _, diffusers, _ = peers
    folder = tmp_path_factory.mktemp("lora")
    layers = {
        f"{part}_lora_layers": get_peft_model_state_dict(getattr(adapted, part), adapter_name="trained")
        for part in adapted_parts(adapted)
    }
    config = {
        f"{part}_lora_adapter_metadata": getattr(adapted, part).peft_config["trained"].to_dict()
        for part in adapted_parts(adapted)
    }
    diffusers.StableDiffusionPipeline.save_lora_weights(folder, **layers, **config)
    kohya = {}
    for part, prefix in (("unet", "lora_unet_"), ("text_encoder", "lora_te_text_model_")):
        for name, (down, up) in factors(getattr(adapted, part)).items():
            key = prefix + name.removeprefix("text_model.").replace(".", "_")
            kohya |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            kohya[f"{key}.alpha"] = np.asarray(ALPHA, np.float32)
    save_file(kohya, folder / "kohya.safetensors")
    return {"diffusers": folder / "pytorch_lora_weights.safetensors", "kohya": folder / "kohya.safetensors"}


@pytest.fixture
def scaled(adapted):
    """The pipeline with its LoRA at the scale, and back."""
    for part in (adapted.unet, adapted.text_encoder):
        for layer in part.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("trained", SCALE)
    yield adapted
    for part in (adapted.unet, adapted.text_encoder):
        for layer in part.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("trained", 1.0)


class TestLora:
    @pytest.mark.parametrize("layout", ["diffusers", "kohya"])
    def test_it_is_diffusers_pipeline_with_it(self, layout, files, original, scaled, base, torch):
        said = []
        model = jm.load(original, lora=[f"{files[layout]}:{SCALE}"], say=said.append)
        same_as(torch, model, scaled)
        layers = len(factors(scaled.unet)) + len(factors(scaled.text_encoder))
        assert f"{files[layout].name}: fused into {layers} layers with scale 0.7" in said
        assert model.fingerprint(["unet"]) != base.fingerprint(["unet"])

    def test_it_is_in_the_text_encoder(self, files, original, base):
        if reason := reason_without_text_encoder():
            pytest.skip(reason)
        models = [jm.load(original, lora=[f"{files[layout]}:{SCALE}"]) for layout in files]
        for model in models:
            difference = np.abs(np.asarray(model.embed([PROMPT])) - np.asarray(base.embed([PROMPT]))).max()
            assert difference > 1e-2

    @pytest.mark.parametrize("layout", ["diffusers", "kohya"])
    def test_it_is_diffusers_fused_pipeline(self, layout, files, original, pipe, torch):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe.load_lora_weights(str(files[layout].parent), weight_name=files[layout].name)
            pipe.fuse_lora(lora_scale=SCALE)
            pipe.unload_lora_weights()
        same_as(torch, jm.load(original, lora=(f"{files[layout]}:{SCALE}",)), pipe)

    def test_the_weights_are_the_formula(self, files, original, base, adapted):
        """W + scale (alpha / rank) B A, in float64."""
        model = jm.load(original, lora=[f"{files['kohya']}:{SCALE}"])
        name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
        down, up = factors(adapted.unet)[name]
        before, after = (np.asarray(load(m.state, name)["weight"].get_value(), np.float64).T for m in (base, model))
        expected = before + SCALE * ALPHA / RANK * up.astype(float) @ down.astype(float)
        np.testing.assert_allclose(after, expected, rtol=0, atol=1e-6)  # float32

    def test_two_of_them_and_their_order(self, files, original, base):
        """Additions to weights: the order changes rounding alone, and 0.7 twice is 1.4."""
        both = jm.load(original, lora=[f"{files['kohya']}:0.7", f"{files['diffusers']}:0.7"])
        once = jm.load(original, lora=[f"{files['kohya']}:1.4"])
        name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
        one, other = (np.asarray(load(m.state, name)["weight"].get_value()) for m in (both, once))
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
        assert [entry["scale"] for entry in both.reading.decisions["lora"]] == [0.7, 0.7]

    def test_the_identity_names_file_and_scale(self, files, original, base):
        texts = [str(files["kohya"]), f"{files['kohya']}:{SCALE}", f"{files['kohya']}:-1", f"{files['diffusers']}:0.7"]
        models = [jm.load(original, lora=[text]) for text in texts]
        assert len({json.dumps(model.identity([PROMPT])) for model in (base, *models)}) == 5
        (entry,) = models[1].identity([PROMPT])["lora"]
        assert entry["file"] == "kohya.safetensors"
        assert entry["scale"] == SCALE
        assert len(entry["sha256"]) == 64

    def test_paths_with_colons_and_folders(self, files, original, tmp_path):
        folder = tmp_path / "a:b"
        folder.mkdir()
        content = load_file(files["kohya"])
        for name in ("c:0.5.safetensors", "pytorch_lora_weights.safetensors", "it.safetensors:2"):
            save_file(content, folder / name)
        scales = {
            f"{folder}/c:0.5.safetensors": 1.0,
            f"{folder}/c:0.5.safetensors:0.5": 0.5,
            f"{folder}:0.25": 0.25,
            f"{folder}": 1.0,
        }
        for text, scale in scales.items():
            assert jm.load(original, lora=[text]).reading.decisions["lora"][0]["scale"] == scale, text

    def test_beside_the_model_it_may_lie_where_it_is_given(self, files, original, tmp_path):
        import shutil

        shutil.copytree(original, tmp_path / "model")
        inside = tmp_path / "model/pytorch_lora_weights.safetensors"
        shutil.copy(files["diffusers"], inside)
        with pytest.raises(ValueError, match=r"a LoRA; jaxmem.load fuses it: `lora=\['.*pytorch_lora_weights.saf"):
            jm.load(tmp_path / "model")
        expected = jm.load(original, lora=[files["diffusers"]]).fingerprint()
        assert jm.load(tmp_path / "model", lora=[inside]).fingerprint() == expected

    def test_of_a_live_pipeline(self, files, original, pipe):
        before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
        model = jm.load(pipe, lora=[f"{files['kohya']}:{SCALE}"])
        assert model.fingerprint() == jm.load(original, lora=[f"{files['kohya']}:{SCALE}"]).fingerprint()
        assert all((before[name] == value).all() for name, value in pipe.unet.state_dict().items())
        assert not hasattr(pipe.unet, "peft_config")

    @pytest.mark.parametrize("part", ["unet", "text_encoder"])
    def test_layers_that_the_model_does_not_have(self, part, original, tmp_path):
        """diffusers says a word in its log and goes on without them."""
        prefix = {"unet": "unet.down_blocks.9.attentions.0.proj_in", "text_encoder": "text_encoder_2.layers.0.fc1"}
        pair = {f"{prefix[part]}.lora_{one}.weight": np.ones((2, 2), np.float32) for one in "AB"}
        save_file(pair, tmp_path / "other.safetensors")
        with pytest.raises(
            ValueError,
            match=r"lora: expected one (whose layers the model has|that diffusers loads into the model), got",
        ):
            jm.load(original, lora=[tmp_path / "other.safetensors"])

    def test_some_of_its_layers(self, files, original, tmp_path):
        content = load_file(files["kohya"])
        content["lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = np.ones((2, WIDTH), np.float32)
        content["lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = np.ones((64, 2), np.float32)
        content["lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha"] = np.asarray(1.0, np.float32)
        save_file(content, tmp_path / "xl.safetensors")
        with pytest.raises(ValueError, match=r"lora: expected one .*got .*xl\.safetensors"):
            jm.load(original, lora=[tmp_path / "xl.safetensors"])

    def test_of_another_size(self, files, original, tmp_path):
        content = {
            key: np.repeat(value, 2, -1) if "down" in key else value for key, value in load_file(files["kohya"]).items()
        }
        save_file(content, tmp_path / "wide.safetensors")
        with pytest.raises(
            ValueError, match=r"lora: expected one that diffusers loads into the model, got .*wide\.safetensors"
        ):
            jm.load(original, lora=[tmp_path / "wide.safetensors"])

    @pytest.mark.parametrize("name", ["dora_scale", "hada_w1_a", "lokr_w1", "lora_mid.weight"])
    def test_other_forms_of_additions(self, name, files, original, tmp_path):
        key = "lora_unet_mid_block_attentions_0_proj_in"
        save_file(
            load_file(files["kohya"]) | {f"{key}.{name}": np.ones((2, 2), np.float32)}, tmp_path / "a.safetensors"
        )
        with pytest.raises(ValueError, match=r"lora: expected pairs of low-rank factors, got .* 1 tensors of another"):
            jm.load(original, lora=[tmp_path / "a.safetensors"])

    @pytest.mark.parametrize("scale", ["0", "inf", "nan", "-inf"])
    def test_scales_that_are_none(self, scale, files, original):
        with pytest.raises(ValueError, match=r"lora: expected a finite scale other than 0 after the colon, got"):
            jm.load(original, lora=[f"{files['kohya']}:{scale}"])

    def test_files_that_are_none(self, original, tmp_path, torch):
        with pytest.raises(
            ValueError, match=r"lora: expected a \.safetensors file of a LoRA, got .*x, which is no file"
        ):
            jm.load(original, lora=[tmp_path / "x"])
        torch.save({"a.lora_A.weight": torch.ones(2)}, tmp_path / "x.bin")
        with pytest.raises(
            ValueError, match=r"lora: expected a \.safetensors file, got .*x\.bin; convert it where you tr"
        ):
            jm.load(original, lora=[tmp_path / "x.bin"])
        save_file({"<cat>": np.ones(WIDTH, np.float32)}, tmp_path / "word.safetensors")
        with pytest.raises(ValueError, match=r"lora: expected a file of a LoRA, got .*, which is a textual inversion"):
            jm.load(original, lora=[tmp_path / "word.safetensors"])


def load(state, path):
    for part in path.split("."):
        state = state[int(part)] if part.isdigit() else state[part]
    return state


class TestLoraInLivePipelines:
    """LoRA that is active in a user's pipeline is fused in a copy; the result is compared with the pipeline itself."""

    def test_active_ones_are_fused_in_a_copy(self, scaled, torch):
        before = {name: value.clone() for name, value in scaled.unet.state_dict().items()}
        said = []
        model = jm.load(scaled, say=said.append)
        same_as(torch, model, scaled)
        after = scaled.unet.state_dict()
        assert after.keys() == before.keys()
        assert all((before[name] == value).all() for name, value in after.items())
        assert "unet: compared with the live pipeline's, whose LoRA is not fused" in said

    def test_disabled_ones_are_left_out(self, adapted, base, torch):
        parts = [getattr(adapted, part) for part in adapted_parts(adapted)]
        for part in parts:
            part.disable_adapters()
        try:
            assert jm.load(adapted).fingerprint() == base.fingerprint()
            layer = next(layer for layer in adapted.unet.modules() if hasattr(layer, "lora_A"))
            layer.enable_adapters(True)
            with pytest.raises(ValueError, match=r"expected LoRA that is enabled or disabled everywhere, got both"):
                jm.load(adapted)
        finally:
            for part in parts:
                part.enable_adapters()

    def test_with_another_unet(self, adapted, original):
        with pytest.raises(ValueError, match=r"another `unet`: expected none for a pipeline with LoRA in it"):
            jm.load(adapted, unet=original / "unet")

    @pytest.mark.usefixtures("float16")
    def test_half_precision(self, original, diffusers, torch, base):
        half = open_with_diffusers(diffusers, original, torch_dtype=torch.float16)
        model = jm.load(half)
        weight = model.state["conv_in"]["weight"].get_value()
        assert weight.dtype == np.float32
        np.testing.assert_array_equal(weight, base.state["conv_in"]["weight"].get_value().astype(np.float16))

    def test_attention_slicing(self, pipe, base):
        pipe.enable_attention_slicing(1)
        assert jm.load(pipe).fingerprint() == base.fingerprint()

    def test_a_compiled_unet(self, pipe, torch):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe.unet = torch.compile(pipe.unet)
        with pytest.raises(
            ValueError, match=r"compiled by torch.compile; give it back with pipe.unet = pipe.unet._orig_"
        ):
            jm.load(pipe)


class TestEmbeddings:
    VECTORS = np.random.default_rng(5).standard_normal((3, WIDTH)).astype(np.float32)
    PROMPTS = ("a photo of {}", "{}", "no word", "{} and {}, the {}")

    def their_tokens(self, pipe, prompt):
        seen = []
        handle = pipe.text_encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].numpy()[0]))
        try:
            their_embedding(pipe, prompt)
        finally:
            handle.remove()
        return seen[0]

    @pytest.mark.parametrize(
        ("content", "word"),
        [
            ({"<cat>": VECTORS}, "<cat>"),
            ({"<cat>": VECTORS[0]}, "<cat>"),
            ({"<cat>": VECTORS[:1].astype(np.float16)}, "<cat>"),
            ({"emb_params": VECTORS}, "style"),
        ],
        ids=["three", "one", "half", "emb_params"],
    )
    def test_tokens_and_embeddings_are_diffusers(self, content, word, original, pipe, tmp_path):
        path = tmp_path / "style.safetensors"
        save_file(content, path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe.load_textual_inversion(str(tmp_path), weight_name=path.name, token=word)
        said = []
        model = jm.load(original, embedding=[path], say=said.append)
        count = len(np.atleast_2d(next(iter(content.values()))))
        assert f"style.safetensors: the word {word} has {count} vector{'s' if count > 1 else ''}" in said
        for text in self.PROMPTS:
            prompt = text.format(word, word, word)
            np.testing.assert_array_equal(model.tokenize([prompt])[0], self.their_tokens(pipe, prompt))
            close(model.embed([prompt])[0], their_embedding(pipe, prompt))

    def test_several_words_in_a_file_and_files(self, original, tmp_path):
        save_file({"<a>": self.VECTORS, "<b>": self.VECTORS[0]}, tmp_path / "two.safetensors")
        save_file({"<c>": self.VECTORS[1]}, tmp_path / "one.safetensors")
        model = jm.load(original, embedding=[tmp_path / "two.safetensors", tmp_path / "one.safetensors"])
        assert [entry["words"] for entry in model.reading.decisions["embedding"]] == [["<a>", "<b>"], ["<c>"]]
        (ids,) = model.whole_tokens(["<a> <b> <c>"])
        assert len(ids) == 2 + 3 + 1 + 1

    def test_two_are_two_identities(self, original, tmp_path):
        found = set()
        for factor in (1, 2):
            save_file({"<cat>": factor * self.VECTORS}, tmp_path / "cat.safetensors")
            found.add(json.dumps(jm.load(original, embedding=[tmp_path / "cat.safetensors"]).identity(["<cat>"])))
        assert len(found) == 2

    def test_the_users_pipeline_stays(self, pipe, tmp_path):
        save_file({"<cat>": self.VECTORS}, tmp_path / "cat.safetensors")
        model = jm.load(pipe, embedding=[tmp_path / "cat.safetensors"])
        assert "<cat>" in model.tokenizer.added_tokens_encoder
        assert "<cat>" not in pipe.tokenizer.added_tokens_encoder
        assert len(pipe.text_encoder.get_input_embeddings().weight) == model.text_encoder_config.vocab_size - 3

    def test_words_and_lora_together(self, original, tmp_path, files):
        save_file({"<cat>": self.VECTORS}, tmp_path / "cat.safetensors")
        model = jm.load(original, lora=[files["kohya"]], embedding=[tmp_path / "cat.safetensors"], clip_skip=1)
        assert set(model.reading.decisions) == {"lora", "embedding", "clip_skip"}

    def test_what_does_not_fit(self, original, tmp_path, torch):
        path = tmp_path / "cat.safetensors"
        save_file({"<cat>": np.ones((2, 16), np.float32)}, path)
        with pytest.raises(
            ValueError, match=r"embedding: expected vectors of 32 numbers, .* got '<cat>' of shape \(2, 16"
        ):
            jm.load(original, embedding=[path])
        save_file({"clip_l": np.ones((2, 32), np.float32), "clip_g": np.ones((2, 64), np.float32)}, path)
        with pytest.raises(ValueError, match=r"embedding: expected vectors of 32 numbers, .* made for another model"):
            jm.load(original, embedding=[path])
        save_file({"<cat>": self.VECTORS}, path)
        with pytest.raises(ValueError, match=r"embedding: expected words that are new to the tokenizer, got .*already"):
            jm.load(original, embedding=[path, path])
        torch.save({"<cat>": torch.ones(32)}, tmp_path / "cat.pt")
        with pytest.raises(
            ValueError, match=r"embedding: expected a \.safetensors file, got .*cat\.pt; convert it where"
        ):
            jm.load(original, embedding=[tmp_path / "cat.pt"])


def test_fp16_files_are_fused_in_single_precision(peers, original, files, tmp_path):
    _, diffusers, _ = peers
    pipe = open_with_diffusers(diffusers, original).to(peers[0].float16)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    model = jm.load(tmp_path / "half", lora=[f"{files['kohya']}:{SCALE}"])
    weight = np.asarray(
        load(model.state, "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")["weight"].get_value()
    )
    assert (weight != weight.astype(np.float16)).any()
