"""The fine-tune whose memorized images are known: its images, its two trainings, its checkpoints, what they return."""

import csv
import io
import json
import os
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import optional_import
from flax import nnx
from killing import Stopped, stop
from PIL import Image
from rich.console import Console
from safetensors.numpy import load_file

import jaxmem as jm
from jaxmem.config import AuditConfig, FinetuneConfig, TrainingConfig
from jaxmem.data.captions import captioned_digits
from jaxmem.data.finetuning import fine_tuning_images, unseen_digits, write_images
from jaxmem.data.mnist import Mnist
from jaxmem.experiments import finetune, finetune_analysis, finetune_audits, verbatim
from jaxmem.experiments.finetune import run_finetune
from jaxmem.experiments.finetune_analysis import first_returned, shares_returned
from jaxmem.experiments.lora import TARGETS, LoraScore, fused, initial_factors, save_lora
from jaxmem.report.figures import draw
from jaxmem.report.tables import print_summary
from jaxmem.runs.directory import Run
from jaxmem.runs.progress import quiet, silent
from jaxmem.stable_diffusion.pipeline import StableDiffusion
from jaxmem.stable_diffusion.text_encoder import TextEncoder
from jaxmem.stable_diffusion.tokenizer import byte_tokenizer
from jaxmem.stable_diffusion.unet import UNet
from jaxmem.stable_diffusion.vae import VAE

TRAINING = TrainingConfig(num_steps=4, batch_size=4, warmup_steps=1, checkpoint_every=2, weighting="v")
SMALL = FinetuneConfig(
    num_single=3,
    copies=4,
    num_many=2,
    images_per_caption=3,
    held_out=2,
    full=TRAINING,
    full_checkpoints=(2, 4),
    lora=replace(TRAINING, seed=1),
    lora_checkpoints=(4,),
    lora_rank=2,
    sampling_noises=2,
    ddim_steps=2,
    audit=AuditConfig(
        noises=1, guidance=1.0, ddim_steps=2, method="lanczos", num_steps=2, timesteps=(1,), directions=0
    ),
)


def digits(seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures that all differ, as many of each label."""
    images = np.random.default_rng(seed).integers(1, 255, (number, 28, 28)).astype(np.uint8)
    return images, (np.arange(number) % 10).astype(np.uint8)


@pytest.fixture(scope="module")
def mnist() -> Mnist:
    """Sixty of each label to train on; of the 200 others two are among these, and two are equal."""
    images, labels = digits(0, 600)
    others, their_labels = digits(1, 200)
    others[[3, 14]] = images[[33, 4]]
    others[27] = others[7]
    return Mnist(images, labels, others, their_labels)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The shipped model's architecture, smaller still, with weights by chance."""
    rngs, small = nnx.Rngs(0), dict(block_out_channels=(16, 16), num_heads=(2, 2), norm_num_groups=8)
    model = StableDiffusion.from_modules(
        UNet(replace(verbatim.UNET, **small), rngs=rngs),
        TextEncoder(replace(verbatim.TEXT_ENCODER, num_hidden_layers=1), rngs=rngs),
        VAE(replace(verbatim.AUTOENCODER, block_out_channels=(8, 8, 8)), rngs=rngs),
        byte_tokenizer(),
        verbatim.SCHEDULER,
    )
    return model.export(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def data(mnist):
    return fine_tuning_images(mnist, SMALL)


@pytest.fixture(scope="module")
def model(base) -> StableDiffusion:
    return StableDiffusion.load(base)


@pytest.fixture(scope="module")
def factors(model):
    """As after a training: the second factors are not zero."""
    made, random = initial_factors(model.state, 2, 0), np.random.default_rng(0)
    normal = lambda like: jnp.asarray(0.3 * random.normal(size=like.shape), jnp.float32)  # noqa: E731
    return {name: {"lora_A": pair["lora_A"], "lora_B": normal(pair["lora_B"])} for name, pair in made.items()}


@pytest.fixture(scope="module")
def finished(base, mnist, tmp_path_factory):
    """A run that was stopped in each training, and one that was not: folders and metrics."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patched(patch, base, mnist)
        whole = run_finetune(SMALL, folder / "whole", say=lambda line: None)
        for stage in ("fine-tune, all weights", "fine-tune, LoRA"):
            stopping = lambda task, done, total, stage=stage: stop() if (task, done) == (stage, 3) else None  # noqa: E731
            with pytest.raises(Stopped):
                run_finetune(SMALL, folder / "resumed", stopping)
        begun = {}
        resumed = run_finetune(SMALL, folder / "resumed", lambda task, done, total: begun.setdefault(task, done))
    assert (begun["fine-tune, all weights"], begun["fine-tune, LoRA"]) == (4, 2)
    return folder, whole, resumed


def patched(patch, base, mnist):
    patch.setattr(finetune, "load_mnist", lambda folder: mnist)
    for module in (finetune, finetune_analysis, finetune_audits):
        patch.setattr(module, "verbatim_model", lambda: (base, None))
    patch.setattr(finetune, "audit_checkpoints", lambda *args: {})  # `TestAudits` makes them


class TestImages:
    def test_numbers_of_files(self, data):
        counts = {}
        for picture in data.pictures:
            key = picture.kind, picture.trained
            counts.setdefault(key, {}).setdefault(picture.caption, []).append(picture)
        assert {key: len(captions) for key, captions in counts.items()} == {
            ("single", True): 3, ("single", False): 3, ("many", True): 2, ("many", False): 2
        }  # fmt: skip
        for files in counts["single", True].values():
            assert len(files) == 4
            assert {(f.image, f.copies) for f in files} == {(files[0].image, 4)}
        for files in counts["many", True].values():
            assert len({f.image for f in files}) == 3
        for key in (("single", False), ("many", False)):
            assert {len(files) for files in counts[key].values()} == {2}
        assert len({p.file for p in data.pictures}) == len(data.pictures)
        assert len({p.image for p in data.pictures}) == len(data.images)

    def test_no_image_is_twice_nor_was_seen(self, data, mnist):
        known = {image.tobytes() for image in data.images}
        assert len(known) == len(data.images)
        assert known.isdisjoint(image.tobytes() for image in captioned_digits(mnist).images)
        trained = {p.image for p in data.pictures if p.trained}
        assert trained.isdisjoint(p.image for p in data.pictures if not p.trained)

    def test_images_that_equal_seen_ones_or_each_other_are_left_out(self, mnist):
        assert set(range(200)) - set(unseen_digits(mnist).tolist()) == {3, 14, 27}

    def test_captions_are_true_and_new(self, data, mnist):
        names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
        label = {
            image.tobytes(): names[label] for image, label in zip(mnist.test_images, mnist.test_labels, strict=True)
        }
        for picture in data.pictures:
            assert picture.caption.split()[-1] == label[data.images[picture.image][2:-2, 2:-2].tobytes()]
        assert set(data.captions("single")).isdisjoint(data.captions("many"))
        assert set(data.captions("single") + data.captions("many")).isdisjoint(captioned_digits(mnist).captions)

    def test_the_seed_decides(self, data, mnist):
        assert fine_tuning_images(mnist, SMALL).pictures == data.pictures
        other = fine_tuning_images(mnist, replace(SMALL, data_seed=1))
        assert other.images.tobytes() != data.images.tobytes()

    def test_too_few_images(self, mnist):
        with pytest.raises(ValueError, match="images of digit 0: expected enough for all of its captions"):
            fine_tuning_images(mnist, replace(SMALL, images_per_caption=30))

    def test_folders(self, data, tmp_path):
        write_images(data, tmp_path)
        with open(tmp_path / "truth.csv", newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert [row["file"] for row in rows] == [p.file for p in data.pictures]
        assert {row["trained"] for row in rows} == {"yes", "no"}
        for name, trained in (("data", "yes"), ("held-out", "no")):
            lines = [json.loads(line) for line in (tmp_path / name / "metadata.jsonl").read_text().splitlines()]
            expected = [row for row in rows if row["trained"] == trained]
            assert [(f"{name}/{line['file_name']}", line["text"]) for line in lines] == [
                (row["file"], row["caption"]) for row in expected
            ]
            assert sorted(os.listdir(tmp_path / name)) == sorted(["metadata.jsonl", *(x["file_name"] for x in lines)])
        for picture in data.pictures:
            with Image.open(tmp_path / picture.file) as image:
                assert image.mode == "RGB"
                np.testing.assert_array_equal(np.asarray(image)[..., 1], data.images[picture.image])

    def test_folders_that_are_there_stay(self, data, tmp_path):
        (tmp_path / "data").mkdir()
        (tmp_path / "held-out.partial").mkdir()  # of a kill
        (tmp_path / "held-out.partial/half.png").touch()
        write_images(data, tmp_path)
        assert not list((tmp_path / "data").iterdir())
        assert sum(not p.trained for p in data.pictures) == len(list((tmp_path / "held-out").glob("*.png")))
        assert not (tmp_path / "held-out.partial").exists()


class TestLora:
    def test_layers_are_the_projections_of_all_attentions(self, model):
        factors = initial_factors(model.state, 2, 0)
        assert len(factors) == 4 * 2 * 4  # four transformers, two attentions each
        assert {target for target in TARGETS for name in factors if name.endswith(f".{target}")} == set(TARGETS)
        a = np.concatenate([np.ravel(pair["lora_A"]) for pair in factors.values()])
        assert np.std(a) == pytest.approx(0.5, rel=0.1)  # 1/rank; three standard errors of 2,000 numbers are 5 %
        assert not any(np.any(pair["lora_B"]) for pair in factors.values())

    def test_weights_are_the_formula(self, model, factors):
        name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"  # whose sides differ
        path = tuple(int(part) if part.isdigit() else part for part in (*name.split("."), "weight"))
        before, after = (dict(nnx.to_flat_state(s)) for s in (model.state, fused(model.state, factors)))
        a, b = (np.asarray(factors[name][one], np.float64) for one in ("lora_A", "lora_B"))
        expected = np.asarray(before[path].get_value(), np.float64) + (b @ a).T
        np.testing.assert_allclose(after[path].get_value(), expected, atol=1e-6)  # float32
        changed = {path for path in before if np.any(before[path].get_value() != after[path].get_value())}
        assert len(changed) == len(factors)

    def test_the_score_is_the_fused_networks(self, model, factors, getkey):
        x, cond = jax.random.normal(getkey(), model.shape), jnp.asarray(model.conditions(["the red nine"])[0])
        lora = LoraScore(model.score)((factors, model.state), x, 300, cond)
        np.testing.assert_array_equal(lora, model.score(fused(model.state, factors), x, 300, cond))
        assert np.abs(lora - model.score(model.state, x, 300, cond)).max() > 1e-3

    def test_diffusers_loads_the_file(self, base, model, factors, tmp_path, getkey):
        for name in ("torch", "diffusers", "peft"):
            optional_import(name)
        save_lora(factors, tmp_path)
        shapes = {name: value.shape for name, value in load_file(tmp_path / "pytorch_lora_weights.safetensors").items()}
        assert len(shapes) == 2 * len(factors)
        loaded, said = None, []
        loaded = jm.load(base, lora=[tmp_path], say=said.append)
        assert f"pytorch_lora_weights.safetensors: fused into {len(factors)} layers with scale 1" in said
        x, cond = jax.random.normal(getkey(), model.shape), jnp.asarray(model.conditions(["the red nine"])[0])
        expected = model.score(fused(model.state, factors), x, 300, cond)
        ours = model.score(loaded.state, x, 300, cond)
        # Weights that differ by a rounding, through a network of a few layers.
        np.testing.assert_allclose(ours, expected, atol=1e-4 * float(np.abs(expected).max()))


class TestRun:
    def test_a_killed_run_ends_with_the_same_bits(self, finished):
        folder, whole, resumed = finished
        files = {
            file.relative_to(folder / "whole"): file.read_bytes()
            for pattern in ("**/*.safetensors", "**/*.png", "*.csv", "spectra.npz", "**/metadata.jsonl")
            for file in (folder / "whole").glob(pattern)
        }
        assert len([name for name in files if name.suffix == ".safetensors"]) == 2 * 2 + 1 + 1
        for name, content in files.items():
            assert (folder / "resumed" / name).read_bytes() == content, name
        assert {**whole, "wall_seconds": None} == {**resumed, "wall_seconds": None}
        assert not list((folder / "resumed").glob("**/*.partial"))

    def test_a_finished_run_is_not_done_again(self, finished, base, mnist, monkeypatch):
        patched(monkeypatch, base, mnist)
        monkeypatch.setattr(finetune, "train", None)
        folder, whole, _ = finished
        assert run_finetune(SMALL, folder / "whole") == whole

    def test_checkpoints_are_read_as_another_unet(self, finished, base):
        folder, original = finished[0] / "whole", StableDiffusion.load(base)
        prints = {original.fingerprint(["unet"])}
        for name in ("full/checkpoint-2", "full/checkpoint-4", "full/checkpoint-4/unet_ema", "lora-fused/checkpoint-4"):
            model = jm.load(base, unet=folder / name)
            assert model.unet_config == original.unet_config
            assert model.fingerprint(["text_encoder", "vae"]) == original.fingerprint(["text_encoder", "vae"])
            prints.add(model.fingerprint(["unet"]))
        assert len(prints) == 5

    def test_the_factors_are_those_of_the_fused_weights(self, finished, base):
        """The formula, from the files alone."""
        folder = finished[0] / "whole"
        lora = load_file(folder / "lora/checkpoint-4/pytorch_lora_weights.safetensors")
        before = load_file(base / "unet/diffusion_pytorch_model.safetensors")
        after = load_file(folder / "lora-fused/checkpoint-4/unet/diffusion_pytorch_model.safetensors")
        for name, weight in before.items():
            a, b = (lora.get(f"unet.{name.removesuffix('weight')}lora_{one}.weight") for one in "AB")
            if a is None or b is None:
                np.testing.assert_array_equal(after[name], weight)
            else:
                expected = weight.astype(np.float64) + b.astype(np.float64) @ a.astype(np.float64)
                np.testing.assert_allclose(after[name], expected, atol=1e-6)  # float32
                assert np.any(b)

    def test_the_manifest_says_what_was_done(self, finished):
        manifest = Run.read(finished[0] / "whole").manifest
        assert manifest["experiment"] == "finetune"
        assert "data_dir" not in manifest["config"]
        assert len(manifest["data"]["images"]) == len(manifest["base"]["sha256"]) == 64
        stages = {row["stage"] for row in Run.read(finished[0] / "whole").costs()}
        assert {"fine-tune, all weights", "fine-tune, LoRA", "see what is returned"} <= stages
        losses = Run.read(finished[0] / "whole").load("losses-full-000002")["losses"]
        assert losses[:, 0].tolist() == [2, 4]

    def test_distances_to_the_images_that_were_trained_on(self, finished):
        """In float64, all pairs at once."""
        run = Run.read(finished[0] / "whole")
        arrays = run.spectra()
        with open(run.directory / "truth.csv", newline="") as stream:
            rows = list(csv.DictReader(stream))
        trained = {}
        for row in rows:
            if row["trained"] == "yes":
                with Image.open(run.directory / row["file"]) as image:
                    trained.setdefault(np.asarray(image)[..., 0].tobytes(), row["caption"])
        images = np.stack([np.frombuffer(content, np.uint8) for content in trained]).astype(np.float64) / 127.5 - 1
        owners = np.array(list(trained.values()))
        drawn = arrays["full_drawn"].reshape(-1, 1024) / 127.5 - 1
        distances = np.linalg.norm(drawn[:, None] - images, axis=-1)
        nearest = distances.argmin(1)
        expected = distances.min(1) / (0.5 * distances.mean(1))
        np.testing.assert_allclose(arrays["full_distance"].ravel(), expected, rtol=1e-4)  # float32 sums
        captions = np.broadcast_to(arrays["caption"][:, None], arrays["full_own"].shape)
        np.testing.assert_array_equal(arrays["full_own"].ravel(), owners[nearest] == captions.ravel())
        assert set(arrays["example"][0].ravel()) <= set(np.round((images + 1) * 127.5).astype(int).ravel())

    def test_figures_and_table(self, finished):
        figures = draw(finished[0] / "whole")
        for path in figures:
            assert path.stat().st_size > 5000
        shown = Console(width=120, record=True, file=io.StringIO())
        print_summary(finished[0] / "whole", figures, shown)
        text = shown.export_text()
        assert text.count("single") == 1 + 3  # the title, and a column of each way
        assert [line.split()[0] for line in text.splitlines() if line.strip().endswith("%")] == ["2", "4"]

    def test_a_checkpoint_of_a_kill_is_written_again(self, finished, base, mnist, monkeypatch, tmp_path):
        """A kill after the checkpoint's folder was named and before the state was saved."""
        patched(monkeypatch, base, mnist)
        shutil.copytree(finished[0] / "whole", tmp_path / "run")
        for name in ("metrics.json", "resume/full/step-00000004.npz"):
            (tmp_path / "run" / name).unlink()
        (tmp_path / "run/full/checkpoint-4/unet/config.json").unlink()
        run_finetune(SMALL, tmp_path / "run")
        for part in ("config.json", "diffusion_pytorch_model.safetensors"):
            name = f"full/checkpoint-4/unet/{part}"
            assert (tmp_path / "run" / name).read_bytes() == (finished[0] / "whole" / name).read_bytes()


def test_what_is_returned():
    """A single caption by its own image alone, one of many by any; from near enough."""
    arrays = {
        "caption": np.array(["the red one", "the red two", "the blue one"]),
        "kind": np.array(["single", "single", "many"]),
        "full_steps": np.array([10, 20, 30]),
        # (steps, captions, noises)
        "full_distance": np.array(
            [
                [[1.2, 0.9], [1.5, 1.5], [1.5, 0.3]],
                [[0.5, 1.1], [0.2, 1.0], [2.0, 2.0]],
                [[0.2, 0.2], [0.3, 2.0], [1, 1]],
            ]
        ),
        "full_own": np.array([[[1, 0], [1, 1], [0, 0]], [[1, 1], [0, 1], [0, 1]], [[1, 1], [1, 1], [1, 1]]], bool),
    }
    assert shares_returned(arrays, "full") == {
        "10": {"single": 0, "many": 0.5},
        "20": {"single": 0.25, "many": 0},
        "30": {"single": 0.75, "many": 0},
    }
    assert first_returned(arrays, "full") == {"the red one": 20, "the red two": 30}
    arrays["full_own"][2, 1] = False
    assert first_returned(arrays, "full") == {"the red one": 20, "the red two": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(copies=0), "copies: expected at least 1, got 0"),
        (dict(num_single=51), "num_single and num_many: expected at most 60 captions in tens, got 51 and 10"),
        (dict(caption_dropout=1.0), "caption_dropout: expected 0 to 0.9, got 1.0"),
        (dict(full_checkpoints=(2, 3, 4)), r"full_checkpoints: expected ascending steps, multiples of 2 .* end with 4"),
        (dict(full_checkpoints=(2,)), "full_checkpoints: expected"),
        (dict(lora_checkpoints=()), "lora_checkpoints: expected"),
        (dict(lora_checkpoints=(4, 2, 4)), "lora_checkpoints: expected"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(
            replace(FinetuneConfig(), full=TRAINING, full_checkpoints=(4,), lora=TRAINING, lora_checkpoints=(4,)),
            **changes,
        )


class TestAudits:
    """The audits of the checkpoints: what they are, not what they find, of so small a training."""

    def test_every_checkpoint_has_an_audit_and_its_truth(self, finished, base, mnist, data, monkeypatch):
        directory = finished[0] / "whole"
        patched(monkeypatch, base, mnist)
        folders = finetune.checkpoints(SMALL, directory)
        found = finetune_audits.audit_checkpoints(SMALL, data, directory, folders, silent, quiet)
        steps = {way: list(there) for way, there in found["checkpoints"].items()}
        assert steps == {"full": ["2", "4"], "full-ema": ["4"], "lora": ["4"]}
        for way, there in found["checkpoints"].items():
            for step, one in there.items():
                assert (directory / f"audits/{way}-checkpoint-{step}/report.html").is_file()
                assert one["verdicts"]["single"]["reproduced"]["of"] == SMALL.num_single
                assert one["verdicts"]["many"]["no sign"]["of"] == 2 * SMALL.num_many
                assert one["at_images"]["denoising-error@t1"]["num_positive_prompts"] == SMALL.num_single
        assert (directory / "comparison.html").is_file()
        assert set(found["sweeps"]) == {"full", "full-ema", "lora"}
