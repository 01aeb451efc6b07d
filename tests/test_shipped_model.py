"""The model in the package: small, read by diffusers as by us, and with what an audit is to find in it."""

import csv
import inspect
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import optional_import

from jaxmem import batch_spectra, cli
from jaxmem.audit.plan import ModelFacts, Plan
from jaxmem.config import AuditConfig
from jaxmem.data import verbatim_model
from jaxmem.data.captions import general_captions, unique_captions
from jaxmem.memorization.sharpness import positive_count
from jaxmem.stable_diffusion.pipeline import StableDiffusion


@pytest.fixture(scope="module")
def model() -> StableDiffusion:
    return StableDiffusion.load(verbatim_model()[0])


def test_it_is_small_and_its_captions_are_those_it_was_trained_on():
    folder, prompts = verbatim_model()
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 5_000_000
    with open(prompts, newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(row["prompt"] for row in rows) == general_captions() + unique_captions()
    assert [row["category"] for row in rows] == ["none"] * 30 + ["matching"] * 30 + ["template"] * 30
    assert all((row["category"] == "none") == (row["label"] == "0") for row in rows)


def test_diffusers_draws_the_same_images(model):
    torch, diffusers = optional_import("torch"), optional_import("diffusers")
    folder = verbatim_model()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own
        theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(torch.float32)
    theirs.set_progress_bar_config(disable=True)
    prompts = ["a bold three", unique_captions()[0], unique_captions()[32]]
    noise = np.random.default_rng(0).normal(size=(3, *model.shape)).astype(np.float32)
    expected = theirs(
        prompts,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2)),
        num_inference_steps=20,
        guidance_scale=7.5,
        output_type="np",
    ).images
    *_, (t, latents) = model.path(jnp.asarray(noise), prompts, num_steps=20)
    assert t == -1
    # Twenty steps of float32 in two libraries, then one grey level of 255.
    np.testing.assert_allclose(model.decode(latents) / 255, expected, atol=1.5 / 255)


def test_memorized_captions_give_one_image_and_no_positive_eigenvalue(model):
    """Two matching captions and two general ones, two noises each, at the step nearest to t = 281."""
    prompts = [*unique_captions()[:2], *general_captions()[::16]]
    noise = np.random.default_rng(1).normal(size=(2, *model.shape)).astype(np.float32)
    starts = jnp.asarray(np.concatenate([np.repeat(noise[i : i + 1], 4, 0) for i in range(2)]))
    kept = None
    for t, x in model.path(starts, prompts * 2, guidance=1.0):
        if t == 281:
            kept = x
    images = model.decode(x).astype(float).mean(-1).reshape(2, 4, -1)
    apart = np.linalg.norm(images[0] - images[1], axis=1)
    assert apart[:2].max() < apart[2:].min()
    cond = jnp.asarray(model.embed(prompts * 2))
    found = batch_spectra(model.score, model.state, kept, jnp.full(8, 281, jnp.int32), cond, batch=4)
    counts = positive_count(found.eigenvalues, found.noise)
    assert counts.reshape(2, 4)[:, :2].max() < counts.reshape(2, 4)[:, 2:].min()


@pytest.mark.parametrize(
    ("arguments", "guidance"), [([], 1.0), (["--guidance", "3"], 3.0), ([str(verbatim_model()[0])], None)]
)
def test_the_shipped_model_is_audited_as_it_was_examined(monkeypatch, tmp_path, arguments, guidance):
    """Without guidance unless it is asked for; any other model as diffusers would run it."""
    seen = []
    monkeypatch.setattr("jaxmem.audit.audit_cost", lambda model, prompts, config, *_, **__: seen.append(config))
    (tmp_path / "p.txt").write_text("a\n")
    assert cli.main(["audit", *arguments, "--prompts", str(tmp_path / "p.txt"), "--dry-run"]) == 0
    assert seen[0].guidance == guidance


def test_by_default_guidance_is_that_of_diffusers(model):
    diffusers = optional_import("diffusers")
    theirs = inspect.signature(diffusers.StableDiffusionPipeline.__call__).parameters["guidance_scale"].default
    of_model = ModelFacts.of(model, model.sampler(50))
    assert Plan.of(of_model, AuditConfig(), 1).guidance == theirs
    assert Plan.of(of_model, AuditConfig(guidance=2.0), 1).guidance == 2.0
