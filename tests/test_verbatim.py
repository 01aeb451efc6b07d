"""The model that memorizes: shares of a batch, a whole small run that is resumed, and what its figures show."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_diffusion as tiny
from conftest import optional_import

from jaxmem.audit import Audit
from jaxmem.config import AuditConfig, AutoencoderConfig, TrainingConfig, VerbatimConfig
from jaxmem.data.captions import CaptionedImages
from jaxmem.experiments import verbatim
from jaxmem.experiments.verbatim import _probabilities, export_model, labelled_captions, run_verbatim
from jaxmem.experiments.verbatim_analysis import apart, earliest, lowest_over_bound
from jaxmem.report.figures import draw
from jaxmem.runs.directory import Run
from jaxmem.stable_diffusion.pipeline import StableDiffusion
from jaxmem.training import train

SMALL = VerbatimConfig(
    autoencoder=AutoencoderConfig(num_steps=2, batch_size=4),
    training=TrainingConfig(num_steps=2, batch_size=4, warmup_steps=1, checkpoint_every=1, weighting="v"),
    refinement=TrainingConfig(num_steps=2, batch_size=4, warmup_steps=1, checkpoint_every=1, weighting="v", seed=1),
    audit=AuditConfig(noises=2, ddim_steps=3, timesteps=(667, 1), batch=4, directions=1),
    course=AuditConfig(noises=1, ddim_steps=3, timesteps=(667, 334, 1), batch=4, directions=0, seed=1),
)


@pytest.fixture(scope="module")
def data() -> CaptionedImages:
    """Two captions of each category: two with six images, two with one, two with five."""
    caption = np.repeat(np.arange(6), [6, 6, 1, 1, 5, 5])
    images = np.random.default_rng(0).integers(0, 256, (len(caption), 32, 32)).astype(np.uint8)
    categories = ("none", "none", "matching", "matching", "template", "template")
    return CaptionedImages(images, caption, ("a one", "a two", "the fox", "the elk", "the map", "the key"), categories)


def test_categories_have_their_shares_and_captions_of_one_are_equal(data):
    config = VerbatimConfig(matching_share=0.3, template_share=0.2, no_caption_share=0.1)
    with_caption, without = np.split(_probabilities(config, data), 2)
    np.testing.assert_allclose(without.sum(), 0.1, rtol=1e-6)
    np.testing.assert_allclose(with_caption / without, 9, rtol=1e-5)
    per_caption = np.bincount(data.caption, with_caption + without)
    np.testing.assert_allclose(per_caption, [0.25, 0.25, 0.15, 0.15, 0.1, 0.1], rtol=1e-6)


def test_the_first_timestep_from_which_a_statistic_tells():
    course = {"sum": {"matching": [(981, 0.7), (481, 0.96), (81, 0.9)], "template": [(981, 0.5), (81, 0.94)]}}
    assert earliest(course) == {"sum": {"matching": 481, "template": None}}


def audited(**fields):
    found = object.__new__(Audit)  # of the fields that a function looks at
    vars(found).update(fields)
    return found


def test_distances_between_images_of_general_captions():
    # Three pixels of one grey for each caption and noise.
    grey = np.array([[0.2, 1.0], [0.6, 1.0], [0.0, 0.0]])[..., None, None, None]
    images = np.broadcast_to(np.round((grey + 1) * 127.5), (3, 2, 1, 3, 3))
    found = audited(images=np.concatenate([images, np.zeros_like(images[:1])]))  # the empty prompt comes last
    distances = apart(found, ("none", "none", "matching"))
    # Of captions 0 and 1, each pixel: 0.4 and 0 from one noise, 0.8 from two.
    assert distances["one_noise"] == pytest.approx(0.2 * 3**0.5)
    assert distances["two_noises"] == pytest.approx(0.8 * 3**0.5)


def test_the_lowest_eigenvalue_as_a_multiple_of_the_bound():
    values = np.array([[[[3.0, -4.0], [0.0, -20.0]]], [[[1.0, -5.0], [2.0, -1.0]]]])  # (captions, noises, timesteps, d)
    steps = {"timesteps": np.array([9, 5, 1]), "sigma": np.array([0.5, 0.3, 0.2])}
    found = audited(eigenvalues=values, spectral_timesteps=np.array([9, 1]), **steps)
    assert lowest_over_bound(found) == {
        "9": pytest.approx(1.25),
        "1": pytest.approx(0.8),
    }


def test_labels_and_categories_of_the_captions(data):
    assert [(p.text, p.label, p.category) for p in labelled_captions(data)][1:3] == [
        ("a two", False, "none"),
        ("the fox", True, "matching"),
    ]


@pytest.fixture
def patched(monkeypatch, data):
    monkeypatch.setattr(verbatim, "load_mnist", lambda folder: None)
    monkeypatch.setattr(verbatim, "captioned_digits", lambda mnist, seed: data)
    small = replace(verbatim.UNET, block_out_channels=(16, 16), num_heads=(2, 2), norm_num_groups=8)
    monkeypatch.setattr(verbatim, "UNET", small)
    monkeypatch.setattr(verbatim, "TEXT_ENCODER", replace(verbatim.TEXT_ENCODER, num_hidden_layers=1))
    monkeypatch.setattr(verbatim, "AUTOENCODER", replace(verbatim.AUTOENCODER, block_out_channels=(8, 8, 8)))


@pytest.mark.slow  # fast, of its parts: test_audit.py, test_training.py, test_autoencoder.py, the test of exports below
def test_a_run_trains_exports_audits_and_is_drawn(patched, data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    for stage in ("train the diffusion model", "refine its small timesteps"):

        def stop(task: str, done: int, total: int, stage: str = stage) -> None:
            if (task, done) == (stage, 1):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_verbatim(SMALL, out, stop)
    begun, trained = {}, []

    def recording(score, state, *rest, **settings):
        result = train(score, state, *rest, **settings)
        trained.append((state, result.state))
        return result

    monkeypatch.setattr(verbatim, "train", recording)
    metrics = run_verbatim(SMALL, out, lambda task, done, total: begun.setdefault(task, done), say=lambda line: None)
    assert (begun["train the diffusion model"], begun["refine its small timesteps"]) == (2, 1)  # steps already done
    (_, first), (refined_from, refined) = trained
    assert refined_from is first
    model = StableDiffusion.load(out / "model")
    shipped_text = model.network("text_encoder")[1]
    for kept, trained_one in ((model.state, refined["unet"]), (shipped_text, refined["text_encoder"])):
        for shipped, weights in zip(jax.tree.leaves(kept), jax.tree.leaves(trained_one), strict=True):
            np.testing.assert_array_equal(np.asarray(shipped, np.float16), np.asarray(weights, np.float16))
    assert set(metrics["counts"]) == {"667", "1"}
    arrays = Run.read(out).spectra()
    # Returned: no image of another caption is nearer than the caption's own.
    nearest_is_own = np.isclose(arrays["own_distance"], arrays["distance"], rtol=1e-4)[2:4]  # two float32 distances
    assert metrics["matching_returned"] == nearest_is_own.mean()
    assert metrics["captions_returned"] == nearest_is_own.any(1).mean()
    nearest = arrays["distance"][2:4]
    assert metrics["distance"]["matching"] == {"median": np.median(nearest), "largest": nearest.max()}
    # Of a caption with one image the training set's Hessian is -I / sigma².
    sigma = verbatim.SCHEDULER.schedule.sigma[667]
    np.testing.assert_allclose(arrays["oracle"][2:4, :, 0], -1 / sigma**2, rtol=1e-6)
    assert (arrays["own_distance"] >= arrays["distance"] - 1e-4).all()
    assert metrics["num_products"] == sum(
        Run.read(out / name).metrics()["num_products"] for name in ("audit", "course")
    )
    for path in draw(out):
        assert path.stat().st_size > 5000
    assert model.shape == (8, 8, 4)
    assert run_verbatim(SMALL, out) == metrics


def test_an_export_that_was_cut_short_is_made_again(torch, diffusers, tmp_path):
    peers = torch, diffusers, optional_import("transformers")
    model = StableDiffusion.load(tiny.make_pipeline(*peers, tmp_path / "original", **tiny.SMALLEST)[1])
    half = tmp_path / "model.partial"
    half.mkdir()
    (half / "unet").write_text("half")
    export_model(model, tmp_path / "model")
    assert not half.exists()
    loaded = StableDiffusion.load(tmp_path / "model")
    for part in ("unet", "text_encoder", "vae"):
        exact = model.fingerprint((part,))
        assert loaded.fingerprint((part,)) != exact  # half precision is what was asked for
