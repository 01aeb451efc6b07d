"""Families of diffusers pipelines against diffusers itself: network, Jacobian, spectrum, sampling, audit."""

import copy
import warnings
from importlib.util import find_spec

import album
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pipelines

torch = pytest.importorskip("torch", reason="torch is not installed")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
if find_spec("torchax") is None:  # the package imports it, after what that needs
    pytest.skip("torchax is not installed", allow_module_level=True)
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import jaxmem as jm  # noqa: E402
from jaxmem.pipelines import from_pipeline  # noqa: E402

FAMILIES = tiny_pipelines.FAMILIES
PROMPT = {"dit": "gold", "ddpm": "", "ddim-classes": "3"}
T = {"sd3": 501_000, "flux": 501_000}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of diffusers


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
    """Family, pipeline, folder and model."""
    family = request.param
    pipeline, folder = tiny_pipelines.make(torch, diffusers, transformers, tmp_path_factory.mktemp(family), family)
    return family, pipeline, folder, _model(pipeline, family)


def _model(pipeline, family):
    from jaxmem.stable_diffusion.settings import Reading

    sides = dict(height=16, width=16) if family == "flux" else {}  # its default is a size of its own
    return from_pipeline(pipeline, Reading(**sides))


def _network(pipeline):
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def _condition(model, family):
    found = model.conditions([PROMPT.get(family, "a red car")])
    return None if found is None else jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), found)


def _point(model):
    return np.asarray(jax.random.normal(jax.random.key(1), model.shape))


def _in_torch(pipeline, model, family, x, dtype, t=None):
    """The network's output as a function of one x, called as diffusers' pipeline calls it, written out again here."""
    network = copy.deepcopy(_network(pipeline)).to(dtype)
    cond, t = _condition(model, family), T.get(family, 501) if t is None else t
    tensor = lambda leaf: torch.tensor(np.asarray(leaf)).to(dtype)[None]  # noqa: E731
    if family in ("dit", "ddim-classes"):
        label = torch.tensor([int(cond)])
        return lambda x: network(x[None], torch.tensor([t]), class_labels=label).sample[0, : x.shape[0]]
    if family == "ddpm":
        return lambda x: network(x[None], torch.tensor([t])).sample[0]
    tokens = tensor(cond["tokens"])
    if family == "sdxl":
        added = {"text_embeds": tensor(cond["pooled"]), "time_ids": tensor(cond["time_ids"])}
        return lambda x: network(x[None], torch.tensor([t]), tokens, added_cond_kwargs=added).sample[0]
    if family == "pixart":
        mask, nothing = tensor(cond["mask"]), {"resolution": None, "aspect_ratio": None}
        return lambda x: network(
            x[None], tokens, torch.tensor([t]), encoder_attention_mask=mask, added_cond_kwargs=nothing
        ).sample[0, : x.shape[0]]
    time = torch.tensor([t / 1e3 if family == "sd3" else t / 1e6], dtype=dtype)
    pooled = tensor(cond["pooled"])
    if family == "sd3":
        return lambda x: network(x[None], tokens, pooled, time).sample[0]
    pack, unpack = diffusers.FluxPipeline._pack_latents, diffusers.FluxPipeline._unpack_latents
    c, h, w = model.shape
    places = diffusers.FluxPipeline._prepare_latent_image_ids(1, h // 2, w // 2, "cpu", dtype)

    def flux(x):
        output = network(
            hidden_states=pack(x[None], 1, c, h, w),
            timestep=time,
            guidance=torch.tensor([3.5], dtype=dtype),
            pooled_projections=pooled,
            encoder_hidden_states=tokens,
            txt_ids=torch.zeros(tokens.shape[1], 3, dtype=dtype),
            img_ids=places,
        ).sample
        return unpack(output, 2 * h, 2 * w, 2)[0]

    return flux


def test_network_jacobian_and_spectrum(made, parity):
    """The oracle is torch in float64: its output, and its Jacobian in reverse mode, of which the rest follows."""
    family, pipeline, _, model = made
    x, cond, t = _point(model), _condition(model, family), T.get(family, 501)
    exact = _in_torch(pipeline, model, family, x, torch.float64)
    single = _in_torch(pipeline, model, family, x, torch.float32)
    # The features of the timestep are float32 in the network itself, and no average over an array hides their rounding.
    beside = _in_torch(pipeline, model, family, x, torch.float64, float(np.nextafter(np.float32(t), np.float32(1e9))))
    with torch.no_grad():
        truth, peer = exact(torch.tensor(x).double()).numpy(), single(torch.tensor(x)).numpy()
        inputs = beside(torch.tensor(x).double()).numpy()
    ours = np.asarray(jax.jit(model.score.network)(model.state, x, t, cond))
    parity.check(f"{family}: network", ours, peer, truth, inputs=inputs)
    assert np.abs(ours - truth).max() <= 1e-5 * np.abs(truth).max()

    jacobian = torch.autograd.functional.jacobian(exact, torch.tensor(x).double()).reshape(x.size, x.size).numpy()
    alpha, sigma = (float(np.asarray(table)) for table in model.schedule.at(t, jnp.float32))
    hessian = {
        "eps": -jacobian / sigma,
        "flow": -(np.eye(x.size) + alpha * jacobian) / (alpha + sigma) / sigma,
    }[model.prediction]
    operator = jm.score_jacobian(model.score, model.state, x, t, cond)
    v = np.random.default_rng(0).standard_normal(x.size)
    for product, expected in ((operator @ v, hessian @ v), (operator.T @ v, hessian.T @ v)):
        assert np.linalg.norm(product - expected) <= 1e-4 * np.linalg.norm(expected)
    found = jm.spectrum(operator).eigenvalues
    expected = np.linalg.eigvalsh((hessian + hessian.T) / 2)
    assert np.abs(np.sort(found) - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_parameters_in_bfloat16(family, tmp_path):
    """A model of its own: the oracle is the rounded network in float64, and nothing is computed in bfloat16."""
    from jaxmem.stable_diffusion.settings import Reading

    pipeline, _ = tiny_pipelines.make(torch, diffusers, transformers, tmp_path, family)
    sides = dict(height=16, width=16) if family == "flux" else {}
    model = from_pipeline(pipeline, Reading(parameters="bfloat16", **sides))
    assert {str(model.state[name].dtype) for name, _ in _network(pipeline).named_parameters()} == {"bfloat16"}
    ordinary, rounded = from_pipeline(pipeline, Reading(**sides)).identity([""]), model.identity([""])
    assert ordinary["sha256"] != rounded["sha256"]
    assert "parameters" not in ordinary
    assert rounded["parameters"] == "bfloat16"

    x, cond, t = _point(model), _condition(model, family), T.get(family, 501)
    apart = _in_torch(pipeline, model, family, x, torch.float64)
    with torch.no_grad():
        for parameter in _network(pipeline).parameters():
            parameter.copy_(parameter.to(torch.bfloat16).float())
        exact = _in_torch(pipeline, model, family, x, torch.float64)
        truth, unrounded = (call(torch.tensor(x).double()).numpy() for call in (exact, apart))
    found = np.asarray(jax.jit(model.score.network)(model.state, x, t, cond))
    size = np.abs(truth).max()
    assert np.abs(found - truth).max() <= 1e-5 * size < 1e-4 * size < np.abs(truth - unrounded).max()

    ours = from_pipeline(pipeline, Reading(parameters="bfloat16", **sides), ours=True)
    assert _network(ours.pipeline) is None
    assert jm.model.fingerprint(ours.state) == rounded["sha256"]


def test_ten_steps_of_sampling(made):
    """Against diffusers' own pipeline, from the same noise, with its default scale of guidance."""
    family, pipeline, _, model = made
    if family in ("sdxl", "ddpm"):  # models of tables of betas are sampled by DDIM, whatever their scheduler
        pipeline = copy.copy(pipeline)
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
        if family == "sdxl":
            pipeline.scheduler.register_to_config(clip_sample=False)
    noise = np.asarray(jax.random.normal(jax.random.key(2), (1, *model.shape)))
    ours = [x for _, x in model.path(jnp.asarray(noise), [PROMPT.get(family, "a red car")], num_steps=10)][-1]
    theirs = _sampled_by_diffusers(pipeline, model, family, torch.tensor(noise))
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-3 * np.abs(theirs).max()


def _sampled_by_diffusers(pipeline, model, family, noise):
    prompt, height, width = PROMPT.get(family, "a red car"), *model.picture_size
    if family == "ddim-classes":  # diffusers' pipeline has no labels, so its loop is here
        return _loop(pipeline, noise, lambda x, t: pipeline.unet(x, t, class_labels=torch.tensor([3])).sample)
    if family == "ddpm":
        return _loop(pipeline, noise, lambda x, t: pipeline.unet(x, t).sample)
    if family == "dit":
        return _dit_latents(pipeline, noise, 1)
    if family == "flux":
        c, h, w = model.shape
        packed = pipeline._pack_latents(noise, 1, c, h, w)
        found = pipeline(
            prompt, height=height, width=width, latents=packed, num_inference_steps=10, output_type="latent"
        ).images
        return pipeline._unpack_latents(found, height, width, pipeline.vae_scale_factor).numpy()
    more = {"use_resolution_binning": False} if family == "pixart" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipeline(
            prompt,
            height=height,
            width=width,
            latents=noise,
            num_inference_steps=10,
            output_type="latent",
            **more,
        ).images.numpy()


def _loop(pipeline, x, network):
    pipeline.scheduler.set_timesteps(10)
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            x = pipeline.scheduler.step(network(x, t), t, x).prev_sample
    return x.numpy()


def _dit_latents(pipeline, noise, label):
    """What DiTPipeline hands to its autoencoder, which is replaced to catch it."""

    class Caught(Exception):
        pass

    def decode(latents):
        raise Caught(latents)

    from diffusers.pipelines.dit import pipeline_dit

    draw, own = pipeline_dit.randn_tensor, pipeline.vae.decode
    pipeline_dit.randn_tensor, pipeline.vae.decode = (lambda **_: noise), decode
    try:
        pipeline([label], num_inference_steps=10)
    except Caught as caught:
        return (caught.args[0] * pipeline.vae.config.scaling_factor).numpy()
    finally:
        pipeline_dit.randn_tensor, pipeline.vae.decode = draw, own
    raise AssertionError("the autoencoder was not called")


def test_audit_from_nothing_to_its_page(made, tmp_path, capsys):
    """`jaxmem audit` of the folder, as a user types it; what a family cannot have is absent, with the reason."""
    from jaxmem.cli import main

    family, _, folder, model = made
    arguments = ["audit", str(folder), "--out", str(tmp_path / "run"), "--noises", "2", "--ddim-steps", "3"]
    arguments += ["--method", "lanczos", "--num-steps", "4"]
    if family == "flux":
        arguments += ["--height", "16", "--width", "16"]
    if family == "ddim-classes":
        arguments += ["--limit", "3"]  # of its own classes
    elif family != "ddpm":  # it has no prompts
        prompts = ["gold", "tench", "7"] if family == "dit" else ["a red car", "a cat"]
        (tmp_path / "prompts.csv").write_text("prompt\n" + "\n".join(prompts) + "\n")
        arguments += ["--prompts", str(tmp_path / "prompts.csv")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(arguments) == 0
    said = capsys.readouterr().err
    found = jm.read_audit(tmp_path / "run")
    assert ("left out: " in said) == (not model.has_pairs)
    assert ("wen-1" in [detector.name for detector in found.detectors]) == model.has_pairs
    page = (tmp_path / "run" / "report.html").read_text()
    assert family not in T or "DDIM" not in page
    assert np.isfinite(found.scores).all()
    if family == "ddim-classes":
        assert [prompt.text for prompt in found.prompts] == ["0", "1", "2"]
    assert (tmp_path / "run" / "results.csv").is_file()


def _xl(tmp_path):
    return tiny_pipelines.make(torch, diffusers, transformers, tmp_path, "sdxl")


def test_lora_of_xl_from_its_folder(tmp_path):
    """`jaxmem.load` of a folder with a LoRA against the pipeline that diffusers fused."""
    pipeline, folder = _xl(tmp_path)
    lora = tiny_pipelines.make_lora(torch, type(pipeline), pipeline.unet, tmp_path, "style.safetensors")
    plain, model = jm.load(folder), jm.load(folder, lora=[f"{lora}:0.7"])
    pipeline.load_lora_weights(str(tmp_path), weight_name="style.safetensors", adapter_name="style")
    pipeline.fuse_lora(lora_scale=0.7)
    x, cond = _point(model), _condition(model, "sdxl")
    with torch.no_grad():
        expected = _in_torch(pipeline, model, "sdxl", x, torch.float64)(torch.tensor(x).double()).numpy()
    found = np.asarray(model.score.network(model.state, jnp.asarray(x), 501, cond))
    without = np.asarray(plain.score.network(plain.state, jnp.asarray(x), 501, cond))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.abs(without - expected).max() > 1e-2 * np.abs(expected).max()
    assert model.identity([])["lora"][0]["scale"] == 0.7
    assert model.identity([])["sha256"] != plain.identity([])["sha256"]


def test_another_unet_of_xl(tmp_path):
    """What a training saved takes the place of the folder's own network; one of another class is refused."""
    pipeline, folder = _xl(tmp_path / "xl")
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(2)
    pipeline.unet.save_pretrained(tmp_path / "checkpoint-5" / "unet")
    model = jm.load(folder, unet=tmp_path / "checkpoint-5")
    assert np.array_equal(model.state["conv_out.weight"], pipeline.unet.conv_out.weight.detach().numpy())
    assert model.identity([])["unet_weights"] == "checkpoint-5/unet"
    dit, _ = tiny_pipelines.make(torch, diffusers, transformers, tmp_path / "dit", "dit")
    dit.transformer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="expected a folder of a UNet2DConditionModel"):
        jm.load(folder, unet=tmp_path / "other")


def test_half_precision_and_slicing_of_a_live_pipeline(tmp_path):
    """Loaded, and computed in float32; the pipeline stays as it is."""
    pipeline, _ = _xl(tmp_path)
    pipeline.to(torch.bfloat16)
    pipeline.enable_attention_slicing()
    model = jm.load(pipeline)
    assert pipeline.unet.dtype == torch.bfloat16
    x, cond = _point(model), _condition(model, "sdxl")
    with torch.no_grad():
        expected = _in_torch(pipeline, model, "sdxl", x, torch.float64)(torch.tensor(x).double()).numpy()
    found = np.asarray(model.score.network(model.state, jnp.asarray(x), 501, cond))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_mutations_are_noticed(tmp_path):
    """What the comparisons above would say to encoders in the wrong order and to a wrong prediction type."""
    pipeline, _ = _xl(tmp_path)
    model = _model(pipeline, "sdxl")
    x, cond = jnp.asarray(_point(model)), _condition(model, "sdxl")
    right = np.asarray(model.score(model.state, x, 501, cond))
    swapped = cond | {"tokens": jnp.roll(cond["tokens"], 32, axis=1)}
    assert np.abs(np.asarray(model.score(model.state, x, 501, swapped)) - right).max() > 1e-3 * np.abs(right).max()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = jm.load(pipeline, prediction_type="v_prediction")
    assert other.score != model.score
    assert np.abs(np.asarray(other.score(other.state, x, 501, cond)) - right).max() > 1e-3 * np.abs(right).max()


def test_what_does_not_load_says_so(tmp_path):
    pipeline, folder = _xl(tmp_path)
    with pytest.raises(ValueError, match="height: expected a multiple of 2 pixels, got 15"):
        jm.load(folder, height=15)
    pipeline.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(ValueError, match="scheduler"):
        jm.load(pipeline)
    other = diffusers.StableDiffusionXLImg2ImgPipeline(**pipeline.components)
    with pytest.raises(ValueError, match="StableDiffusionXLImg2ImgPipeline"):
        jm.load(other)


def test_schedulers_of_another_kind_are_refused(tmp_path):
    """A network of flow matching gets other timesteps than one of a table of betas."""
    pipeline, _ = _xl(tmp_path / "xl")
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="expected one of a table of betas, for a StableDiffusionXLPipeline"):
        jm.load(pipeline)
    flux, _ = tiny_pipelines.make(torch, diffusers, transformers, tmp_path / "flux", "flux")
    flux.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(ValueError, match="expected FlowMatchEulerDiscreteScheduler"):
        jm.load(flux, height=16, width=16)


def test_what_changes_the_numbers_changes_the_identity(tmp_path):
    pipeline, _ = _xl(tmp_path)
    before = jm.load(pipeline).identity([])
    assert jm.load(pipeline).identity([]) == before
    pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert jm.load(pipeline).identity([]) != before
    pipeline.disable_freeu()
    pipeline.vae.register_to_config(scaling_factor=0.5)
    assert jm.load(pipeline).identity([]) != before


def test_pictures_are_encoded_as_diffusers_encodes_them(made):
    """Against the encoder in float64, with diffusers' own scaling of latents written out; pixels go there and back."""
    _, pipeline, _, model = made
    pictures = np.random.default_rng(0).integers(0, 256, (2, *model.picture_size, 3)).astype(np.uint8)
    found = np.asarray(model.encode(pictures))
    assert found.shape == (2, *model.shape)
    values = torch.tensor(pictures).double().permute(0, 3, 1, 2) / 127.5 - 1
    if model.in_pixels:
        np.testing.assert_allclose(found, values.numpy(), atol=1e-6)
        np.testing.assert_array_equal(model.decode(jnp.asarray(found)), pictures)
        return
    vae = copy.deepcopy(pipeline.vae).double()
    with torch.no_grad():
        mode = vae.encode(values).latent_dist.mode()
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    expected = ((mode - shift) * vae.config.scaling_factor).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_an_audit_of_training_images(made, tmp_path):
    """From a folder of images to verdicts, of every family."""
    family, _, _, model = made
    caption = PROMPT.get(family, "a red car")
    pictures = np.random.default_rng(1).integers(0, 256, (2, *model.picture_size, 3)).astype(np.uint8)
    data = jm.read_training_images(album.write_folder(tmp_path / "data", pictures, [caption] * 2))
    config = jm.AuditConfig(noises=1, ddim_steps=4, method="lanczos", num_steps=3, batch=2)
    last = tuple(model.sampler(4).timesteps.tolist())[-2]
    training = jm.TrainingData(data, image_timesteps=(last,), image_noises=1)
    found = jm.audit(model, config=config, folder=tmp_path / "run", training=training, neutral=_neutral(model))
    assert len(found.training.verdicts) == 2
    assert {verdict.word for verdict in found.training.verdicts} <= {"no sign", "not decided"}
    for look in found.training.looks.values():
        assert np.isfinite(look.column(f"denoising-error@t{last}")).all()
    assert found.write_page(tmp_path / "page.html").stat().st_size > 10_000


def _neutral(model):
    return ["a blue boat"] if model.condition == "prompt" else []
