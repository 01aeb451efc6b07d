"""What lies beside or inside a model and changes its function is applied or refused, never ignored."""

import json
import shutil
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_diffusion as tiny
from conftest import command_environment, optional_import
from safetensors.numpy import load_file, save_file

from jaxmem.prompts import read_prompts
from jaxmem.stable_diffusion import adapters, live
from jaxmem.stable_diffusion.configs import SchedulerConfig
from jaxmem.stable_diffusion.pipeline import StableDiffusion

WIDTH = 32  # of the tiny text encoder
TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def peers(torch, diffusers):
    return torch, diffusers, optional_import("transformers")


@pytest.fixture(scope="module")
def original(peers, tmp_path_factory):
    return tiny.make_pipeline(*peers, tmp_path_factory.mktemp("original"), **tiny.SMALLEST)[1]


@pytest.fixture
def folder(original, tmp_path):
    """A copy to put things into."""
    shutil.copytree(original, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def pipe(original, diffusers):
    """A live pipeline to change."""
    return open_with_diffusers(diffusers, original)


def open_with_diffusers(diffusers, folder, cls="StableDiffusionPipeline", **parts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(diffusers, cls).from_pretrained(folder, safety_checker=None, **parts)
    made.set_progress_bar_config(disable=True)
    return made


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def tensors(*names, shape=(4, 4)):
    return {name: np.ones(shape, np.float32) for name in names}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(content, path) if isinstance(content, dict) else path.write_text(content)


WORDS = ("<cat>", "<cat>_1", "<cat>_2", "<dog>", "<dog>_1", "<one>", "Big", "Big_1", "<gap>", "<gap>_2")


@pytest.fixture(scope="module")
def inverted(peers, original, tmp_path_factory):
    """As training scripts save with a full pipeline: the words in the tokenizer, their vectors in the encoder."""
    torch, diffusers, _ = peers
    pipeline = open_with_diffusers(diffusers, original)
    embedded = torch.randn((len(WORDS), WIDTH), generator=torch.Generator().manual_seed(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for word, vector in zip(WORDS, embedded, strict=True):
            pipeline.load_textual_inversion({word: vector}, token=word)
    folder = tmp_path_factory.mktemp("inverted") / "model"
    pipeline.save_pretrained(folder)
    return pipeline, folder


@pytest.fixture(scope="module")
def inverted_models(inverted):
    return [StableDiffusion.load(source) for source in inverted]


class TestTextualInversions:
    """Several vectors per word: the ids that diffusers' pipeline gives to its text encoder."""

    PROMPTS = (
        "a photo of <cat>",
        "<cat>",
        "<cat> and <dog>, <cat> <cat>",
        "a <cat>, a '<dog>'. (<one>)!<cat>?",
        "x<cat>y <cat><dog>",
        "a <CAT>, a <Cat> and <DOG>",
        "<cat>_1 alone, <cat>_2 too",
        "<cat>_1 beside <cat>",
        "<gap> and <one>",
        "Big and big",
        "no word of it",
        "",
        "cat dog < cat >",
        " ".join(["<cat>"] * 40),
        "w " * 74 + "<cat>",
        "w " * 73 + "<dog> tail",
        "w " * 73 + "<cat>",
    )

    def theirs(self, pipeline, prompt):
        """The ids that reach the text encoder inside `encode_prompt`."""
        seen = []
        handle = pipeline.text_encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].numpy()[0]))
        try:
            embedded = pipeline.encode_prompt(prompt, "cpu", 1, False)[0][0].detach().numpy()
        finally:
            handle.remove()
        return seen[0], embedded

    @pytest.mark.filterwarnings("ignore:.*tokens are cut:UserWarning")
    @pytest.mark.parametrize("source", ["live", "folder"])
    def test_prompts_have_diffusers_tokens(self, source, inverted_models, inverted):
        pipeline, model = inverted[0], inverted_models[source == "folder"]
        for prompt in self.PROMPTS:
            np.testing.assert_array_equal(model.tokenize([prompt])[0], self.theirs(pipeline, prompt)[0], prompt)

    def test_a_word_has_all_its_vectors(self, inverted_models):
        ids = inverted_models[0].tokenizer.convert_tokens_to_ids(list(WORDS))
        assert inverted_models[0].whole_tokens(["<cat>", "<dog>", "<one>"]) == [
            [inverted_models[0].tokenizer.bos_token_id, *found, inverted_models[0].tokenizer.eos_token_id]
            for found in (ids[:3], ids[3:5], ids[5:6])
        ]

    def test_embeddings_are_diffusers(self, inverted_models, inverted):
        prompts = ["a photo of <cat>", "<dog>, <cat>", ""]
        for ours, prompt in zip(inverted_models[1].embed(prompts), prompts, strict=True):
            theirs = self.theirs(inverted[0], prompt)[1]
            # Two float32 programs with attention that is sharpened to be unkind: 1e-4; a vector too few gives 0.1.
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3 * np.abs(theirs).max())

    def test_those_at_the_end_are_cut_as_in_diffusers(self, inverted_models):
        fits, cut = "w " * 72 + "<cat>", "w " * 73 + "<cat>"
        assert inverted_models[0].truncated([fits, cut, cut.replace("<cat>", "<one>")]) == [False, True, False]
        with pytest.warns(UserWarning, match=r"1 prompt\(s\) of more than 77 tokens are cut"):
            inverted_models[0].tokenize([fits, cut])

    def test_a_file_of_prompts(self, inverted_models, inverted, tmp_path):
        (tmp_path / "prompts.txt").write_text("a photo of <cat>\n<dog> in snow\n")
        texts = [prompt.text for prompt in read_prompts(tmp_path / "prompts.txt")]
        expected = [self.theirs(inverted[0], text)[0] for text in ("a photo of <cat>", "<dog> in snow")]
        np.testing.assert_array_equal(inverted_models[1].tokenize(texts), expected)

    def test_words_in_each_other(self, pipe):
        pipe.tokenizer.add_tokens(["<a>", "<a>_1", "b<a>", "b<a>_1"])
        model = StableDiffusion.load(pipe)
        assert model.whole_tokens(["<a> c"]) != model.whole_tokens(["c"])
        with pytest.raises(ValueError, match=r"'b<a> <a>': expected textual inversions .* <a> and b<a>; diffusers"):
            model.whole_tokens(["b<a> <a>"])

    @pytest.mark.parametrize("kind", ["safetensors", "bin"])
    def test_their_files_beside_the_model(self, inverted, original, tmp_path, torch, kind):
        """Fine beside a model that has the words, refused beside one that has not."""

        def put(folder, words):
            if kind == "bin":
                torch.save({word: torch.ones(WIDTH) for word in words}, folder / "learned_embeds.bin")
            else:
                write(folder / "learned_embeds-steps-500.safetensors", tensors(*words, shape=(WIDTH,)))

        for source, name in ((inverted[1], "has"), (original, "has-not")):
            shutil.copytree(source, tmp_path / name)
            put(tmp_path / name, ("<cat>",))
        StableDiffusion.load(tmp_path / "has")
        match = rf"learned_embeds.*\.{kind} \(.*, not in the tokenizer\): a textual inversion; .*load adds .*embedding"
        with pytest.raises(ValueError, match=match):
            StableDiffusion.load(tmp_path / "has-not")

    def test_a_word_of_another_program(self, folder):
        write(folder / "style.safetensors", tensors("emb_params", shape=(2, WIDTH)))
        with pytest.raises(ValueError, match=r"style\.safetensors \(style, not in the tokenizer\): a text"):
            StableDiffusion.load(folder)


LORA_NAMES = {
    "diffusers": ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",),
    "diffusers before peft": ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight",),
    "attention processors": ("mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight",),
    "peft": ("base_model.model.mid_block.attentions.0.proj_in.lora_B.weight",),
    "kohya": ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "lora_te_text_model_fc1.alpha"),
    "lyco loha": ("lycoris_mid_block_proj_in.hada_w1_a",),
    "lyco lokr": ("lycoris_mid_block_proj_in.lokr_w1",),
}


class TestBesideAFolder:
    @pytest.mark.parametrize("kind", LORA_NAMES)
    @pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "unet/a.safetensors", "mine/b/c.safetensors"])
    def test_lora(self, folder, kind, name):
        write(folder / name, tensors(*LORA_NAMES[kind]))
        with pytest.raises(ValueError, match=rf"{name}: a LoRA; jaxmem.load fuses it: `lora=\['.*{name}'\]`"):
            StableDiffusion.load(folder)

    @pytest.mark.parametrize("name", ["unet/adapter_config.json", "text_encoder/adapter_config.json"])
    def test_peft(self, folder, name):
        write(folder / name, "{}")
        write((folder / name).with_name("adapter_model.safetensors"), tensors(*LORA_NAMES["peft"]))
        with pytest.raises(
            ValueError,
            match=rf"{name}, .*/adapter_model.safetensors: a LoRA of peft; merge it with peft[\s\S]*merge_and_unload",
        ):
            StableDiffusion.load(folder)

    @pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "text_encoder/my-LoRA.pt", "catlora.safetensors"])
    def test_what_cannot_be_read_by_its_name(self, folder, name):
        write(folder / name, "")
        write(folder / "floral.pt", "")
        with pytest.raises(ValueError, match=rf"\n  {name}: a LoRA; (convert it|jaxmem.load fuses)"):
            StableDiffusion.load(folder)

    def test_pickles_are_looked_through_and_not_run(self, folder, torch):
        class Bomb:
            def __reduce__(self):
                return (exec, ("raise SystemExit('the pickle was run')",))

        torch.save({"unet.proj_in.lora_A.weight": torch.ones(2), "bomb": Bomb()}, folder / "style.pt")
        with pytest.raises(
            ValueError, match=r"style\.pt: a LoRA; convert it where you trust it, .*; jaxmem.load fuses the new file"
        ):
            StableDiffusion.load(folder)
        torch.save({"string_to_param": {"*": torch.ones(2)}, "bomb": Bomb()}, folder / "style.pt")
        with pytest.raises(
            ValueError, match=r"style\.pt \(style, not in the tokenizer\): a textual inversion; convert"
        ):
            StableDiffusion.load(folder)
        torch.save({"state": {}, "bomb": Bomb()}, folder / "style.pt")
        StableDiffusion.load(folder)

    @pytest.mark.parametrize("old", [False, True])
    def test_pickles_of_words(self, folder, torch, old):
        """Under any name, in today's format of PyTorch and that before 1.6."""
        torch.save({"<cat>": torch.ones(WIDTH)}, folder / "mine.bin", _use_new_zipfile_serialization=not old)
        with pytest.raises(
            ValueError, match=r"mine\.bin \(<cat>, not in the tokenizer\): a textual inversion; convert"
        ):
            StableDiffusion.load(folder)
        torch.save({"<|endoftext|>": 1}, folder / "mine.bin", _use_new_zipfile_serialization=not old)
        StableDiffusion.load(folder)

    @pytest.mark.parametrize("old", [False, True])
    def test_a_pickled_ip_adapter(self, folder, torch, old):
        inside = {"image_proj": {"proj.weight": torch.ones(2)}, "ip_adapter": {"1.to_k_ip.weight": torch.ones(2)}}
        torch.save(inside, folder / "ip.bin", _use_new_zipfile_serialization=not old)
        with pytest.raises(
            ValueError, match=r"\n  ip\.bin: an IP-Adapter; jaxmem computes the score of a prompt alone"
        ):
            StableDiffusion.load(folder)

    @pytest.mark.parametrize("suffix", ["bin", "safetensors"])
    def test_custom_diffusion(self, folder, torch, suffix):
        """By its tensors and, where they cannot be read, by its name."""
        match = r"\n  {}: layers of Custom Diffusion; jaxmem does not have .* no call that merges them"
        name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_custom_diffusion.weight"
        path = folder / f"mine.{suffix}"
        save_file(tensors(name), path) if suffix == "safetensors" else torch.save({name: torch.ones(2)}, path)
        with pytest.raises(ValueError, match=match.format(path.name)):
            StableDiffusion.load(folder)
        path.unlink()
        write(folder / f"pytorch_custom_diffusion_weights.{suffix}", "")
        with pytest.raises(ValueError, match=match.format("pytorch_custom_diffusion_weights.*")):
            StableDiffusion.load(folder)

    @pytest.mark.parametrize(
        "name",
        [
            *("LORA.SAFETENSORS", "unet/model.fp16.safetensors", "unet/diffusion_pytorch_model.lora.safetensors"),
            *(
                "unet/adapter_model.safetensors",
                "unet/model.safetensors",
                "vae/diffusion_pytorch_model.fp16.safetensors",
            ),
            *("text_encoder/diffusion_pytorch_model.safetensors", "other/unet/diffusion_pytorch_model.safetensors"),
        ],
    )
    def test_what_only_looks_like_a_file_that_is_read(self, folder, name):
        write(folder / name, tensors(*LORA_NAMES["diffusers"]))
        with pytest.raises(
            ValueError, match=rf"expected a model alone, got files in it[\s\S]*{name}: a LoRA; jaxmem.load fuses"
        ):
            StableDiffusion.load(folder)

    def test_the_files_that_are_read_are_left_to_the_loader(self, folder):
        """One file, that in half precision where there is no other, and all of an index."""
        unet = folder / "unet"
        whole = unet / "diffusion_pytorch_model.safetensors"
        content = load_file(whole) | tensors(f"{TO_Q}.lora_A.weight")
        whole.unlink()
        match = r"unet: expected weights without LoRA layers, got 1 tensors of such layers"
        save_file(content, unet / "diffusion_pytorch_model.fp16.safetensors")
        with pytest.raises(ValueError, match=match):
            StableDiffusion.load(folder)
        (unet / "diffusion_pytorch_model.fp16.safetensors").rename(unet / "any.safetensors")
        index = {"weight_map": dict.fromkeys(content, "any.safetensors")}
        (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=match):
            StableDiffusion.load(folder)

    @pytest.mark.parametrize(
        ("kind", "name"),
        [
            ("a ControlNet", "controlnet_cond_embedding.conv_in.weight"),
            ("an IP-Adapter", "image_proj.proj.weight"),
            ("a T2I-Adapter", "adapter.body.0.resnets.0.block1.weight"),
            ("a motion adapter", "down_blocks.0.motion_modules.0.proj_in.weight"),
        ],
    )
    def test_other_adapters(self, folder, kind, name):
        write(folder / "other/diffusion_pytorch_model.safetensors", tensors(name))
        match = rf"without them, move them elsewhere:\n  other/.*safetensors: {kind}; jaxmem computes the score"
        with pytest.raises(ValueError, match=match):
            StableDiffusion.load(folder)

    def test_all_are_named_at_once(self, folder):
        write(folder / "one.safetensors", tensors(*LORA_NAMES["kohya"]))
        write(folder / "two.safetensors", tensors(*LORA_NAMES["peft"]))
        with pytest.raises(ValueError, match=r"one\.safetensors, two\.safetensors: a LoRA; jaxmem.load fuses"):
            StableDiffusion.load(folder)

    def test_what_changes_nothing_stays(self, folder):
        for name in ("README.md", "samples/0.png", "optimizer.bin", "checkpoint-500/random_states_0.pkl", "v1-5.ckpt"):
            write(folder / name, "lora")
        for name, inside in {
            "checkpoint-500/pytorch_lora_weights.safetensors": "lora_A.weight",
            ".cache/x.safetensors": "lora_A.weight",
            "v1-5-pruned.safetensors": "model.diffusion_model.input_blocks.0.0.weight",
            "unet/diffusion_pytorch_model.non_ema.safetensors": "conv_in.weight",
            "unet/optimizer.safetensors": "step",
        }.items():
            write(folder / name, tensors(inside))
        write(folder / "broken.safetensors", "a pointer of git-lfs")
        shutil.copytree(folder, folder.parent / "copy")
        shutil.copytree(folder.parent / "copy", folder / "other-model")
        write(folder / "other-model/pytorch_lora_weights.safetensors", tensors("a.lora_A.weight"))
        StableDiffusion.load(folder)

    def test_a_folder_of_lora_alone(self, tmp_path):
        write(tmp_path / "pytorch_lora_weights.safetensors", tensors(*LORA_NAMES["diffusers"]))
        with pytest.raises(ValueError, match=r"pytorch_lora_weights\.safetensors: a LoRA; jaxmem.load fuses it"):
            StableDiffusion.load(tmp_path)

    @pytest.mark.parametrize(
        ("names", "match"),
        [
            (
                LORA_NAMES["diffusers"],
                r"got a LoRA; give the model that it was made for as well; jaxmem.load fuses it: `lora=\[",
            ),
            (("<cat>",), r"got a textual inversion; give the model .* as well; jaxmem.load adds it: `embedding=\["),
            (("controlnet_down_blocks.0.weight",), r"got a ControlNet; jaxmem computes"),
            (("model.diffusion_model.out.0.bias",), r"got a whole checkpoint; jaxmem.load opens it"),
        ],
    )
    def test_a_file_as_the_model(self, tmp_path, names, match):
        write(tmp_path / "file.safetensors", tensors(*names))
        with pytest.raises(ValueError, match=rf"expected the folder of a diffusers model, {match}"):
            StableDiffusion.load(tmp_path / "file.safetensors")

    def test_weights_saved_with_their_lora(self, folder):
        """A pipeline that was saved with layers in it: one sentence, not a list of tensors."""
        path = folder / "unet/diffusion_pytorch_model.safetensors"
        content = load_file(path)
        content[f"{TO_Q}.base_layer.weight"] = content.pop(f"{TO_Q}.weight")
        content |= tensors(f"{TO_Q}.lora_A.default.weight", f"{TO_Q}.lora_B.default.weight")
        save_file(content, path, {"format": "pt"})
        with pytest.raises(ValueError, match=r"unet: expected weights without LoRA layers, got 3 tensors .*fuse_lora"):
            StableDiffusion.load(folder)

    def test_the_names_of_a_model_are_no_adapters(self, original):
        names = [name for path in original.glob("*/*.safetensors") for name in load_file(path)]
        assert len(names) > 100
        assert not adapters.is_lora(names)
        assert {adapters.kind_of(path) for path in original.rglob("*") if path.is_file()} == {None}


class TestOfPipelines:
    def test_other_parts(self, folder):
        edit_json(folder / "model_index.json", lambda c: c.update(controlnet=["diffusers", "ControlNetModel"]))
        with pytest.raises(ValueError, match=r"expected the parts of a Stable Diffusion pipeline, got also controlnet"):
            StableDiffusion.load(folder)

    def test_code_in_the_folder(self, folder):
        edit_json(folder / "model_index.json", lambda c: c.update(unet=["my_unet", "UNet2DConditionModel"]))
        with pytest.raises(ValueError, match=r"expected unet of diffusers, got code of its own \('my_unet'\)"):
            StableDiffusion.load(folder)

    @pytest.mark.parametrize("part", ["unet", "text_encoder", "vae", "tokenizer", "scheduler"])
    @pytest.mark.parametrize("name", [["x"], {"x": 1}, None, 3])
    def test_a_class_that_is_no_text(self, folder, part, name):
        edit_json(folder / "model_index.json", lambda c: c.update({part: [c[part][0], name]}))
        with pytest.raises(ValueError, match=rf"model_index\.json: expected {part} of .*, got \['(diff|transf)"):
            StableDiffusion.load(folder)

    @pytest.mark.parametrize("name", ["IPNDMScheduler", "FlowMatchEulerDiscreteScheduler"])
    def test_another_scheduler(self, folder, name):
        edit_json(folder / "model_index.json", lambda c: c.update(scheduler=["diffusers", name]))
        match = (
            rf"expected scheduler of DDIM.*, got \['diffusers', '{name}'\]; use the scheduler of the model that it was"
        )
        with pytest.raises(ValueError, match=match):
            StableDiffusion.load(folder)

    @pytest.mark.parametrize("value", [["x"], {"x": 1}, None, 3])
    def test_a_pipeline_that_is_no_text(self, folder, value):
        edit_json(folder / "model_index.json", lambda c: c.update(_class_name=value))
        with pytest.raises(ValueError, match=r"expected a StableDiffusionPipeline or .*, got "):
            StableDiffusion.load(folder)

    @pytest.mark.parametrize("value", [["x"], {"x": 1}, 3])
    @pytest.mark.parametrize(
        ("file", "name"),
        [
            *(("unet/config.json", "_class_name"), ("unet/config.json", "act_fn"), ("vae/config.json", "act_fn")),
            *(("vae/config.json", "_class_name"), ("text_encoder/config.json", "hidden_act")),
            *(
                ("scheduler/scheduler_config.json", name)
                for name in ("_class_name", "prediction_type", "beta_schedule")
            ),
        ],
    )
    def test_settings_that_are_no_text(self, folder, file, name, value):
        edit_json(folder / file, lambda c: c.update({name: value}))
        with pytest.raises(ValueError, match=r"expected [\s\S]*got "):
            StableDiffusion.load(folder)

    @pytest.mark.parametrize("saved", [False, True])
    def test_controlnet(self, pipe, diffusers, tmp_path, saved):
        """Refused with its name, and what the message names as the remedy works."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            controlled = diffusers.StableDiffusionControlNetPipeline.from_pipe(
                pipe,
                controlnet=diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16,)),
            )
        source = controlled
        if saved:
            controlled.save_pretrained(tmp_path / "controlled")
            # Its folder is refused for the ControlNet's files; the index alone says it too.
            shutil.rmtree(tmp_path / "controlled/controlnet")
            source = tmp_path / "controlled"
        with pytest.raises(ValueError, match=r"got 'StableDiffusionControlNetPipeline'; .* the function that it would"):
            StableDiffusion.load(source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = diffusers.StableDiffusionPipeline.from_pipe(controlled)
        if not saved:
            assert StableDiffusion.load(plain).fingerprint() == StableDiffusion.load(pipe).fingerprint()

    def test_other_pipelines_by_name(self, pipe):
        parts = dict(pipe.components)
        for name in ("StableDiffusionXLPipeline", "StableDiffusionAdapterPipeline", "MyPipeline"):
            other = type(name, (), parts)()
            with pytest.raises(ValueError, match=rf"live pipeline: expected a StableDiffusionPipeline .*got '{name}'"):
                StableDiffusion.load(other)


def with_lora(torch, layer):
    """A layer as peft has it: the layer, and two factors beside it."""

    class Adapted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = layer
            self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(layer.in_features, 2, bias=False)})
            self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(2, layer.out_features, bias=False)})

        def forward(self, x):
            return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))

    return Adapted()


class TestLivePipelines:
    def refused(self, pipe, match):
        with pytest.raises(ValueError, match=match):
            StableDiffusion.load(pipe)

    @pytest.mark.parametrize("part", ["unet", "text_encoder"])
    def test_lora(self, pipe, torch, part):
        module = getattr(pipe, part)
        name = next(n for n, m in module.named_modules() if isinstance(m, torch.nn.Linear) and "attn" in n)
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, with_lora(torch, module.get_submodule(name)))
        self.refused(
            pipe,
            rf"{part}: LoRA layers that are not merged.*load merges the active.*fuse_lora\(\); pipe.unload_lora_w",
        )

    def test_lora_of_peft_itself(self, pipe, torch):
        """diffusers' own way to add it, and the way to merge it that the message names."""
        peft = optional_import("peft")
        config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"], init_lora_weights=False)
        torch.manual_seed(0)
        pipe.unet.add_adapter(config)
        self.refused(pipe, r"unet: LoRA layers that are not merged.*fuse_lora\(\)")
        pipe.unet.disable_adapters()
        self.refused(pipe, r"unet: LoRA layers that are not merged.*fuse_lora\(\)")
        pipe.unet.enable_adapters()
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        StableDiffusion.load(pipe)

    def test_the_mark_of_adapters(self, pipe):
        pipe.text_encoder._hf_peft_config_loaded = True
        self.refused(pipe, r"text_encoder: LoRA layers that are not merged")

    def test_processors(self, pipe, diffusers):
        processor = type("IPAdapterAttnProcessor2_0", (diffusers.models.attention_processor.AttnProcessor,), {})
        pipe.unet.set_attn_processor(processor())
        self.refused(pipe, r"unet: an IP-Adapter, or another input beside the prompt; call pipe.unload_ip_adapter\(\)")
        processor = type("LoRAAttnProcessor", (diffusers.models.attention_processor.AttnProcessor,), {})
        pipe.unet.set_attn_processor(processor())
        self.refused(pipe, r"unet: LoRA layers that are not merged")
        processor = type("Strange", (diffusers.models.attention_processor.AttnProcessor,), {})
        pipe.unet.set_attn_processor(processor())
        self.refused(
            pipe, r"unet: attention processors Strange; call pipe.unet.set_attn_processor\(diff.*AttnProcessor2_0\("
        )
        pipe.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor2_0())
        pipe.enable_attention_slicing(1)  # the same function
        StableDiffusion.load(pipe)

    def test_an_input_beside_the_prompt(self, pipe, torch):
        pipe.unet.encoder_hid_proj = torch.nn.Linear(WIDTH, WIDTH)
        self.refused(pipe, r"unet: an IP-Adapter, or another input")

    def test_a_compiled_network(self, pipe, torch):
        plain = pipe.unet
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own
            pipe.unet = torch.compile(plain)
        self.refused(pipe, r"unet: compiled by torch.compile; give it back with pipe.unet = pipe.unet._orig_mod")
        pipe.unet = pipe.unet._orig_mod
        StableDiffusion.load(pipe)

    @pytest.mark.parametrize("path", ["unet", "text_encoder", "vae", "unet.up_blocks.1.resnets.0"])
    def test_a_replaced_forward(self, pipe, path):
        """Also one that does the same now: a cache begins with its second step."""
        part, _, name = path.partition(".")
        module = getattr(pipe, part).get_submodule(name)
        forward = module.forward
        module.forward = lambda *a, **k: forward(*a, **k)
        self.refused(pipe, rf"{part}: the forward of {name or part} was replaced .*switch that off")

    def test_a_replaced_class(self, pipe):
        """As token merging does it: no name and no setting tells, the function does."""
        block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
        before = type(block)

        class Merged(before):
            def forward(self, hidden_states, *arguments, **options):
                return 1.05 * super().forward(hidden_states, *arguments, **options)

        block.__class__ = Merged
        self.refused(pipe, r"live unet: expected the function .* differs by .*e-0[123][\s\S]*classes of other.*Merged")
        block.__class__ = before
        StableDiffusion.load(pipe)

    def test_a_class_patched_for_all(self, pipe, diffusers, monkeypatch):
        cls = diffusers.models.attention.FeedForward
        forward = cls.forward
        monkeypatch.setattr(cls, "forward", lambda self, x, *a, **k: 0.9 * forward(self, x))
        self.refused(pipe, r"live unet: expected the function of its settings and weights, got one that differs by")

    def test_hooks(self, pipe):
        seen = []
        handle = pipe.unet.mid_block.register_forward_hook(lambda *a: seen.append(1))  # looks, changes nothing
        with pytest.warns(UserWarning, match=r"live unet: compared at two .* look on:\n  hooks on: mid_block"):
            model = StableDiffusion.load(pipe)
        assert len(seen) == 2
        assert len(model.reading.warnings) == 1
        handle.remove()
        handle = pipe.text_encoder.register_forward_hook(lambda m, a, out: (1.01 * out[0], *out[1:]))
        self.refused(pipe, r"live text_encoder: expected the function .* differs by 9.9e-03 [\s\S]*hooks on: CLIPText")
        handle.remove()
        kept = []

        def cache(module, arguments, output):
            kept.append(output)
            return kept[0]

        pipe.unet.mid_block.register_forward_hook(cache)  # the second call shows it
        self.refused(pipe, r"live unet: expected the function .* differs by [\s\S]*hooks on: mid_block")

    def test_a_hook_of_little_noise(self, pipe):
        """The second point is where there is almost none."""

        def late(module, arguments, options, output):
            return (1.05 * output[0],) if int(arguments[1]) < 100 else output

        pipe.unet.register_forward_hook(late, with_kwargs=True)
        self.refused(pipe, r"live unet: expected the function .* differs by 4.8e-02 [\s\S]*hooks on: UNet2D")

    def test_what_the_points_do_not_show_is_warned_of(self, pipe, torch):
        """A hook that acts in guidance's batch only, and a class of another package that does nothing here."""
        conv = pipe.unet.conv_out
        conv.register_forward_hook(lambda m, a, out: 2 * out if len(out) == 2 else out)
        pipe.text_encoder.register_forward_pre_hook(partial(lambda note, m, a: None, "note"))
        conv.__class__ = type("Guided", (type(conv),), {"__module__": "guided.layers"})
        with pytest.warns(UserWarning, match="at two random points") as caught:
            StableDiffusion.load(pipe)
        unet, text_encoder = [str(one.message) for one in caught]
        assert unet.endswith("\n  classes of other packages: guided.layers.Guided\n  hooks on: conv_out")
        assert text_encoder.startswith("live text_encoder: compared at two random points")

    def test_hooks_of_the_libraries_are_not_warned_of(self, pipe):
        """accelerate's, which move tensors, and those of transformers, which collect outputs."""
        for library in ("accelerate", "transformers", "diffusers", "torch"):
            own = type("Hook", (), {"__module__": f"{library}.hooks", "__call__": lambda *arguments: None})
            pipe.unet.mid_block.register_forward_hook(own())
        StableDiffusion.load(pipe)

    @pytest.mark.parametrize("path", ["encode_prompt", "__call__", "prepare_latents", "scheduler.scale_model_input"])
    def test_a_replaced_method(self, pipe, path):
        """No network shows it; the remedy that the message names works."""
        part, _, name = path.rpartition(".")
        target, shown = (pipe.scheduler, "pipe.scheduler") if part else (pipe, "pipe")
        method = getattr(target, name)
        setattr(target, name, lambda *a, **k: method(*a, **k))
        pipe.progress_bar = iter  # shows, changes nothing
        self.refused(pipe, rf"{shown}: {name} replaced, which jaxmem does not run; .*: del {shown}\.{name}$")
        delattr(target, name)
        StableDiffusion.load(pipe)

    def test_a_forward_that_fails(self, pipe):
        def fails(*arguments):
            raise KeyError("batch of two")

        pipe.unet.conv_in.register_forward_pre_hook(fails)
        self.refused(
            pipe, r"live unet: .* got an error from the pipeline's at a random point \(KeyError: 'batch of two'"
        )

    def test_a_schedule_changed_by_hand(self, pipe, torch):
        """No setting tells; the remedy that the message names gives a model of the changed table."""
        betas = 1.5 * pipe.scheduler.betas
        pipe.scheduler.betas, before = betas, pipe.scheduler.alphas_cumprod
        pipe.scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
        self.refused(
            pipe, r"live scheduler: expected the table alphas_cumprod .* up to 1\.5e-01 .*trained_betas=betas.tolist"
        )
        pipe.scheduler.alphas_cumprod = before[:-1]
        self.refused(pipe, r"live scheduler: .* got \(999,\) entries, where its settings make \(1000,\)")
        pipe.scheduler.alphas_cumprod = torch.where(torch.arange(1000) == 7, torch.nan, before)
        self.refused(pipe, r"live scheduler: .* \(at t = 7 first\)")
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, trained_betas=betas.tolist())
        schedule = StableDiffusion.load(pipe).scheduler.schedule
        # 1,000 factors in float32
        np.testing.assert_allclose(schedule.alpha**2, np.cumprod(1 - betas.double().numpy()), rtol=1e-4)

    @pytest.mark.parametrize(
        ("name", "settings"),
        [
            ("DDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
            ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
            ("DDIMScheduler", {"num_train_timesteps": 20_000, "beta_start": 4e-5, "beta_end": 6e-4}),
            ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
        ],
    )
    def test_schedules_of_settings_agree(self, pipe, diffusers, name, settings):
        """Also where the last entry is diffusers' 0, and where twenty thousand factors are rounded."""
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **settings)
        schedule = SchedulerConfig.from_diffusers(dict(pipe.scheduler.config)).schedule
        live.check_schedule(pipe.scheduler, schedule)
        pipe.scheduler.alphas_cumprod[-2] *= 1.01
        pipe.scheduler.alphas_cumprod[3] *= 0.99
        with pytest.raises(ValueError, match=r"live scheduler: .* differ by up to 1\.0e-02 \(at t = 3 first\)"):
            live.check_schedule(pipe.scheduler, schedule)

    def test_the_autoencoder_at_its_first_use(self, pipe):
        said = []
        pipe.vae.decoder.register_forward_hook(lambda m, a, out: out + 0.1)
        with pytest.warns(
            UserWarning, match=r"live vae: compared at two random points at most, [\s\S]*hooks on: decoder"
        ):
            model = StableDiffusion.load(pipe, say=said.append)
        assert [line.split(":")[0] for line in said] == ["unet", "text_encoder"]
        with pytest.raises(ValueError, match=r"live vae: expected the function of its settings .* differs by"):
            model.network("vae")
        pipe.vae.decoder._forward_hooks.clear()
        pipe.vae.encoder.register_forward_hook(lambda m, a, out: 1.1 * out)
        with pytest.raises(ValueError, match=r"live vae: expected the function of its settings .* differs by"):
            model.network("vae")
        pipe.vae.encoder._forward_hooks.clear()
        model.network("vae")

    def test_half_precision_is_compared_in_single_and_all_is_as_before(self, pipe, torch):
        pipe.unet.half().train()
        pipe.unet.mid_block.eval()
        pipe.text_encoder.bfloat16()
        for module in (pipe.unet, pipe.text_encoder):
            before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in module.state_dict().items()}
            modes = [one.training for one in module.modules()]
            torch.manual_seed(5)
            torch.set_float32_matmul_precision("medium")
            try:
                random = torch.get_rng_state()
                model = StableDiffusion.load(pipe)
                assert torch.get_float32_matmul_precision() == "medium"
                assert torch.is_grad_enabled()
                torch.testing.assert_close(torch.get_rng_state(), random, rtol=0, atol=0)
            finally:
                torch.set_float32_matmul_precision("highest")
            assert [one.training for one in module.modules()] == modes
            for name, tensor in module.state_dict().items():
                assert tensor.data_ptr() == before[name][0]
                torch.testing.assert_close(tensor, before[name][1], rtol=0, atol=0)
            assert not any(parameter.grad is not None for parameter in module.parameters())
        assert model.state["conv_in"]["bias"].get_value().dtype == np.float32
        block = pipe.unet.mid_block.attentions[0]
        block.register_forward_hook(lambda m, a, out: (1.02 * out[0],))
        self.refused(pipe, r"live unet: expected the function .* differs by")  # half precision would hide it

    def test_a_model_does_not_change_with_its_pipeline(self, pipe, torch):
        model = StableDiffusion.load(pipe)
        before = model.fingerprint()
        with torch.no_grad():
            for part in (pipe.unet, pipe.text_encoder, pipe.vae):
                for parameter in part.parameters():
                    parameter.add_(1)
        assert model.fingerprint() == before


def test_torch_is_not_needed_for_folders(original):
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from jaxmem.stable_diffusion.pipeline import StableDiffusion\n"
        f"print(StableDiffusion.load({str(original)!r}).shape)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=command_environment())
    assert done.stdout.strip() == "(4, 4, 4)", done.stderr


def test_folders_of_parts_that_are_links(folder, tmp_path):
    """As in the hub's cache, where files are links, and in folders put together from others."""
    shutil.move(folder / "unet", tmp_path / "elsewhere")
    (folder / "unet").symlink_to(tmp_path / "elsewhere")
    StableDiffusion.load(folder)
    write(tmp_path / "elsewhere/mine.safetensors", tensors("a.lora_A.weight"))
    with pytest.raises(ValueError, match=r"unet/mine\.safetensors: a LoRA"):
        StableDiffusion.load(Path(folder))
