"""Stable Diffusion in Flax against diffusers and transformers, on tiny random models of both families."""

import copy
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_diffusion as tiny
from conftest import optional_import
from diffusers_parity import call, channels_last, check_autoencoder, compare_blocks
from flax import nnx
from parity import double_module, in_double, widened

from jaxmem import score_jacobian
from jaxmem.jacobian import batch_jacobian
from jaxmem.stable_diffusion.pipeline import StableDiffusion
from jaxmem.stable_diffusion.unet import UNet


@pytest.fixture(scope="module")
def transformers():
    return optional_import("transformers")


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def models(request, torch, diffusers, transformers, tmp_path_factory):
    prediction = "epsilon" if request.param == "sd1" else "v_prediction"
    folder = tmp_path_factory.mktemp(request.param)
    pipeline, saved = tiny.make_pipeline(torch, diffusers, transformers, folder, request.param, prediction)
    return pipeline, StableDiffusion.load(saved)


def network(model, part="unet"):
    return nnx.merge(*model.components[part].load())


@pytest.fixture(scope="module")
def point(torch):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 4, 8, 8), (1, 77, 32))]


@pytest.mark.parametrize("t", [0, 1, 501, 999])
def test_unet_output(models, point, torch, parity, t):
    pipeline, model = models
    x, _, cond = point
    with torch.no_grad():
        peer = pipeline.unet(x, torch.tensor(t), cond).sample[0]
        truth = double_module(torch, pipeline.unet)(x.double(), torch.tensor(t), cond.double()).sample[0]
    arguments = network(model), channels_last(x[0]), t, channels_last(cond[0])
    parity.check("UNet", call(*arguments), channels_last(peer), channels_last(truth), in_double(call, *arguments))


def test_unet_block_by_block(models, point, torch, parity):
    pipeline, model = models
    x, _, cond = point
    assert compare_blocks(torch, parity, pipeline.unet, network(model), x, cond) > 60


def test_jacobian_products_are_torchs(models, point, torch, parity):
    """JVP against `torch.func.jvp`, VJP by the adjoint identity, of the score itself (ε and v)."""
    pipeline, model = models
    alpha, sigma = (float(a[501]) for a in (model.scheduler.schedule.alpha, model.scheduler.schedule.sigma))

    def torchs(unet, x, v, cond):
        def score(x):
            out = unet(x, torch.tensor(501), cond).sample
            return -(out if model.scheduler.prediction == "eps" else alpha * out + sigma * x) / sigma

        with warnings.catch_warnings(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            warnings.simplefilter("ignore")  # torch's own, at its first forward-mode product
            value, product = torch.func.jvp(score, (x,), (v,))
            return [channels_last(part[0]) for part in (value, product, torch.func.vjp(score, x)[1](v)[0])]

    @jax.jit
    def ours(state, x, v, cond):
        operator = score_jacobian(model.score, state, x, 501, cond)
        products = operator.mv(v.reshape(-1)), operator.rmv(v.reshape(-1))
        return operator.value, *(product.reshape(x.shape) for product in products)

    peer = torchs(pipeline.unet, *point)
    truth = torchs(double_module(torch, pipeline.unet), *(part.double() for part in point))
    arguments = model.state, *(channels_last(part[0]) for part in point)
    names = ("score", "Jacobian times vector", "transposed Jacobian times vector")
    for name, *parts in zip(names, ours(*arguments), peer, truth, in_double(ours, *arguments), strict=True):
        parity.check(f"UNet: {name}", *parts)


def test_a_linearisation_holds_no_copy_of_the_weights(models, point):
    _, model = models
    _, _, cond = point
    x = jnp.ones((10, 14, 4))  # 140 tokens: no activation has as many numbers as a weight
    operator = score_jacobian(model.score, model.state, x, 501, channels_last(cond[0]))
    weights = {leaf.size for leaf in jax.tree.leaves(model.state) if leaf.size >= 1024}
    # By size, so that reshaped and transposed copies count too.
    assert not [leaf.shape for leaf in jax.tree.leaves(operator._residuals) if leaf.size in weights]


@pytest.mark.slow  # fast: test_batches_give_what_single_points_give in test_one_prompt.py
@pytest.mark.parametrize("models", ["sd1"], indirect=True)  # sd2 differs in layers that the others compare
def test_points_together_are_points_alone(models, parity, getkey):
    """Several points, and a prompt with and without, in one linearisation."""
    _, model = models
    x = jax.random.normal(getkey(), (3, *model.shape))
    cond = model.embed(["the cat", "", "a dog"])
    t, vectors = jnp.array([981, 981, 21]), jax.random.normal(getkey(), (3, 256))

    @jax.jit
    def together(state, x, cond, vectors):
        operators = batch_jacobian(model.score, state, x, t, cond)
        mv, rmv = (jax.vmap(f, (operators.axes, 0)) for f in (lambda A, v: A.mv(v), lambda A, v: A.rmv(v)))
        return operators.value, mv(operators, vectors), rmv(operators, vectors)

    def alone(state, x, cond, vectors):
        operators = [score_jacobian(model.score, state, x[i], t[i], cond[i]) for i in range(3)]
        values = [(A.value, A.mv(vectors[i]), A.rmv(vectors[i])) for i, A in enumerate(operators)]
        return tuple(jnp.stack(parts) for parts in zip(*values, strict=True))

    parity.functions("UNet: points together", together, alone, model.state, x, cond, vectors)


def test_text_encoder(models, torch, parity):
    pipeline, model = models
    prompts = ["the cat", "", 'Ünïcode, "quotes" and 10% off']
    tokens = pipeline.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    np.testing.assert_array_equal(model.tokenize(prompts), tokens.input_ids)
    with torch.no_grad():
        peer = pipeline.text_encoder(tokens.input_ids).last_hidden_state
        truth = double_module(torch, pipeline.text_encoder)(tokens.input_ids).last_hidden_state
    text = network(model, "text_encoder")
    exact = in_double(jax.vmap(call, (None, 0)), text, jnp.asarray(model.tokenize(prompts)))
    parity.check("text encoder", model.embed(prompts), peer.numpy(), truth.numpy(), exact)
    changed = model.tokenize(["the cat"]).copy()
    changed[0, 40] = 7  # the mask is causal: what comes later changes nothing before
    np.testing.assert_array_equal(
        text(jnp.asarray(changed[0]))[:40], text(jnp.asarray(model.tokenize(["the cat"])[0]))[:40]
    )


def test_autoencoder(models, torch, parity):
    pipeline, model = models
    image = torch.rand((1, 3, 16, 16), generator=torch.Generator().manual_seed(0)) * 2 - 1
    scale = model.vae_config.scaling_factor
    check_autoencoder(torch, parity, "autoencoder", pipeline.vae, network(model, "vae"), scale, image)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    assert model.decode(model.encode(pixels)).shape == pixels.shape


def double_pipeline(torch, pipeline):
    """diffusers' pipeline with its networks in float64, and the schedule's products, which are float32 there."""
    parts = {name: double_module(torch, getattr(pipeline, name)) for name in ("unet", "text_encoder", "vae")}
    scheduler = copy.deepcopy(pipeline.scheduler)
    config = scheduler.config
    roots = torch.linspace(
        config.beta_start**0.5, config.beta_end**0.5, config.num_train_timesteps, dtype=torch.float64
    )
    scheduler.alphas_cumprod = torch.cumprod(1 - roots**2, 0)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        double = type(pipeline)(**pipeline.components | parts | {"scheduler": scheduler}, requires_safety_checker=False)
    double.set_progress_bar_config(disable=True)
    return double


def test_guided_trajectory_is_that_of_diffusers_pipeline(models, torch, parity):
    pipeline, model = models
    noise = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(7))
    prompts = ["the cat", "a dog"]

    def torchs(pipeline, noise):
        """Timesteps, the latents after each of them, and the images."""
        visited = []

        def keep(pipe, step, t, tensors):
            visited.append((int(t), tensors["latents"].numpy().transpose(0, 2, 3, 1)))
            return tensors

        options = dict(num_inference_steps=10, guidance_scale=7.5, output_type="np", callback_on_step_end=keep)
        images = pipeline(prompts, latents=noise, **options).images
        return *zip(*visited, strict=True), images

    timesteps, peer, _ = torchs(pipeline, noise)
    _, truth, images = torchs(double_pipeline(torch, pipeline), noise.double())
    start = noise.numpy().transpose(0, 2, 3, 1)
    before, ours = zip(*model.path(jnp.asarray(start), prompts, num_steps=10), strict=True)
    assert before == (*timesteps, -1)
    with jax.enable_x64(True):
        double = copy.copy(model)
        double._loaded = {part: (graphdef, widened(state)) for part, (graphdef, state) in model._loaded.items()}
        _, exact = zip(*double.path(jnp.asarray(start, jnp.float64), prompts, num_steps=10), strict=True)
    # diffusers' callback comes after each step, our path begins before the first
    parity.check("guided DDIM, ten steps", list(ours[1:]), list(peer), list(truth), list(exact[1:]))
    # Rounded to 255 grey levels; 1e-3, 500 times what latents and decoder are off by, moves some over a half.
    np.testing.assert_allclose(model.decode(ours[-1]) / 255, images, atol=0.5 / 255 + 1e-3)


def test_a_live_pipeline_is_its_folder(models):
    pipeline, model = models
    live = StableDiffusion.load(pipeline)
    assert live.fingerprint() == model.fingerprint()
    assert live.score == model.score
    np.testing.assert_array_equal(live.embed(["the cat"]), model.embed(["the cat"]))


def test_export_is_bit_exact_and_diffusers_draws_the_same(models, diffusers, torch, tmp_path):
    from safetensors.numpy import load_file

    pipeline, model = models
    folder = model.export(tmp_path / "exported")
    assert StableDiffusion.load(folder).fingerprint() == model.fingerprint()
    for part in ("unet", "vae", "text_encoder"):
        (written,) = (folder / part).glob("*.safetensors")
        state = {key.removeprefix("text_model."): array for key, array in load_file(written).items()}
        theirs = {key: tensor.numpy() for key, tensor in getattr(pipeline, part).state_dict().items()}
        assert state.keys() == theirs.keys()
        for key in state:
            np.testing.assert_array_equal(state[key], theirs[key], strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    again.set_progress_bar_config(disable=True)
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(8))
    options = dict(latents=noise, num_inference_steps=4, output_type="latent")
    np.testing.assert_array_equal(again("the cat", **options).images, pipeline("the cat", **options).images)
    with pytest.raises(ValueError, match=r"expected a new or empty folder, got one with files"):
        model.export(folder)


def test_modules_become_a_model(models, tmp_path):
    """What a training has in hand: the networks, a tokenizer, a schedule."""
    _, model = models
    networks = [network(model, part) for part in ("unet", "text_encoder", "vae")]
    made = StableDiffusion.from_modules(*networks, model.tokenizer, model.scheduler)
    assert made.fingerprint() == model.fingerprint()
    assert made.score == model.score
    assert StableDiffusion.load(made.export(tmp_path / "made")).fingerprint() == model.fingerprint()
    other = UNet(replace(model.unet_config, cross_attention_dim=48), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"hidden_size equal to cross_attention_dim, got 32 and 48"):
        StableDiffusion.from_modules(other, *networks[1:], model.tokenizer, model.scheduler)


def test_export_in_half_precision_loads_in_both(models, tmp_path):
    _, model = models
    half = StableDiffusion.load(model.export(tmp_path / "half", np.float16))
    for ours, rounded in zip(jax.tree.leaves(model.state), jax.tree.leaves(half.state), strict=True):
        np.testing.assert_array_equal(np.asarray(ours).astype(np.float16).astype(np.float32), rounded)
    state = jax.tree.map(lambda leaf: leaf, model.state)
    state["conv_in"]["bias"].set_value(jnp.full(32, 1e6))
    kept = model.network("unet")
    model._loaded["unet"] = (kept[0], state)
    try:
        with pytest.raises(ValueError, match=r"conv_in.bias: expected numbers within float16, got larger ones"):
            model.export(tmp_path / "too-large", np.float16)
    finally:
        model._loaded["unet"] = kept


def test_bad_input_is_named(models):
    _, model = models
    cond, x = jnp.zeros((77, 32)), jnp.zeros((8, 8, 4))
    with pytest.raises(ValueError, match=r"x: expected one latent \(rows, columns, 4\), got shape \(4, 8, 8\)"):
        model.score(model.state, x.transpose(2, 0, 1), jnp.int32(1), cond)
    with pytest.raises(ValueError, match=r"cond: expected a prompt's embedding \(tokens, 32\), got None"):
        model.score(model.state, x, jnp.int32(1), None)
    with pytest.raises(ValueError, match=r"cond: expected a prompt's embedding .* got \(77, 16\)"):
        model.score(model.state, x, jnp.int32(1), cond[:, :16])
    with pytest.raises(ValueError, match=r"write \[prompt\]"):
        model.embed("the cat")
    with pytest.raises(ValueError, match=r"images: expected uint8"):
        model.encode(np.zeros((1, 16, 16, 3)))
    with pytest.raises(ValueError, match=r"image: expected \(height, width, 3\) with sides that are multiples of 2"):
        model.encode(np.zeros((1, 15, 16, 3), np.uint8))
    with pytest.raises(ValueError, match=r"latents: expected \(rows, columns, 4\), got shape \(8, 8, 3\)"):
        model.decode(jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"x, t, cond: expected the points as leading axis"):
        batch_jacobian(model.score, model.state, x[None], jnp.array([1, 2]), cond[None])
    with pytest.warns(UserWarning, match=r"1 prompt.* of more than 77 tokens are cut"):
        assert model.tokenize(["a b c " * 60]).shape == (1, 77)
    with pytest.raises(
        ValueError, match=r"expected a folder, a hub id or a diffusers StableDiffusionPipeline, got object"
    ):
        StableDiffusion.load(object())
