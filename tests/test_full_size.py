"""Parity at the full size of Stable Diffusion v1.4, random weights: minutes and up to 18 GB, so marked slow.

The two sides are not in memory together where it matters: torch computes first, is dropped, and its numbers are kept.
"""

import gc
import json
import os
import re
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_diffusion as tiny
from conftest import command_environment, optional_import
from diffusers_parity import call, channels_last, check_autoencoder, compare_blocks
from flax import nnx
from parity import double_module, error, in_double
from test_prompts import REAL

from jaxmem import NoiseSchedule, score_jacobian
from jaxmem.runs.directory import Run
from jaxmem.score import NetworkScore
from jaxmem.stable_diffusion import weights
from jaxmem.stable_diffusion.configs import SchedulerConfig, TextEncoderConfig, UNetConfig, VAEConfig
from jaxmem.stable_diffusion.pipeline import StableDiffusion
from jaxmem.stable_diffusion.tensors import read_tensors
from jaxmem.stable_diffusion.text_encoder import TextEncoder
from jaxmem.stable_diffusion.tokenizer import byte_tokenizer
from jaxmem.stable_diffusion.unet import UNet
from jaxmem.stable_diffusion.vae import VAE

pytestmark = pytest.mark.slow


def load(network, config, folder, layout):
    read = type(config).from_diffusers(json.loads((folder / "config.json").read_text()))
    assert read == config  # the defaults are Stable Diffusion 1.x
    tensors = read_tensors(folder, layout.basename)
    return weights.load_state(lambda: network(config, rngs=nnx.Rngs(0)), tensors, layout, folder.name)


@pytest.fixture(scope="module")
def unet_folder(torch, diffusers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("v1-4")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    tiny.sharpen(unet, torch)
    unet.save_pretrained(folder, max_shard_size="20GB")
    return folder


def test_unet_block_by_block(torch, diffusers, unet_folder, parity):
    theirs = diffusers.UNet2DConditionModel.from_pretrained(unet_folder).eval()
    x, cond = (
        torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((1, 4, 64, 64), (1, 77, 768))
    )
    ours = nnx.merge(*load(UNet, UNetConfig(), unet_folder, weights.UNET))
    assert compare_blocks(torch, parity, theirs, ours, x, cond) > 300
    with torch.no_grad():
        peer = channels_last(theirs(x, torch.tensor(501), cond).sample[0])
        truth = double_module(torch, theirs)(x.double(), torch.tensor(501), cond.double()).sample[0]
    # Without ours in float64, for memory: the blocks are compared there.
    parity.check("full size: UNet", ours(channels_last(x[0]), 501, channels_last(cond[0])), peer, channels_last(truth))


def torch_products(torch, unet, x, v, cond):
    """The output, J v and Jᵀ v; nothing here outlives the call."""

    def f(x):
        return unet(x, torch.tensor(501), cond).sample

    with warnings.catch_warnings(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        warnings.simplefilter("ignore")  # torch's own, at its first forward-mode product
        value, product = torch.func.jvp(f, (x,), (v,))
    at = x.clone().requires_grad_()
    (cotangent,) = torch.autograd.grad(f(at), at, v)
    return value, product, cotangent


def test_unet_jacobian_products(torch, diffusers, unet_folder, parity):
    """The truth is ours in float64: torch's products take twice 17 GB there, and small models' are equal to it."""
    generator = torch.Generator().manual_seed(2)
    x, v, cond = (torch.randn(shape, generator=generator) for shape in ((1, 4, 64, 64), (1, 4, 64, 64), (1, 77, 768)))
    theirs = diffusers.UNet2DConditionModel.from_pretrained(unet_folder).eval().requires_grad_(False)
    peer = [channels_last(part[0]) for part in torch_products(torch, theirs, x, v, cond)]
    del theirs
    gc.collect()

    graphdef, state = load(UNet, UNetConfig(), unet_folder, weights.UNET)
    score = NetworkScore(graphdef, NoiseSchedule.stable_diffusion(), "score")  # the network's output as it is

    def products(state, x, v, cond):
        operator = score_jacobian(score, state, x, 501, cond)
        mv, rmv = jax.jit(lambda A, v: A.mv(v)), jax.jit(lambda A, v: A.rmv(v))
        return operator.value, mv(operator, v).reshape(x.shape), rmv(operator, v).reshape(x.shape)

    arguments = state, channels_last(x[0]), channels_last(v[0]).reshape(-1), channels_last(cond[0])
    ours, truth = products(*arguments), in_double(products, *arguments)
    # The same function as torch's: an epsilon or kernel that is wrong gives 1e-3 to 1.
    assert [error(*parts) < most for *parts, most in zip(peer, truth, (1e-4, 1e-3, 1e-3), strict=True)] == [True] * 3
    for name, *parts in zip(("value", "product", "transposed product"), ours, peer, truth, strict=True):
        parity.check(f"full size: UNet, {name}", *parts)


def test_text_encoder(torch, tmp_path, parity):
    transformers = optional_import("transformers")
    torch.manual_seed(3)
    config = transformers.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768, pad_token_id=1
    )
    encoder = transformers.CLIPTextModel(config).eval()
    tiny.sharpen(encoder, torch)
    encoder.save_pretrained(tmp_path)
    tokens = torch.randint(0, 49_408, (1, 77), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        peer, truth = (module(tokens).last_hidden_state[0] for module in (encoder, double_module(torch, encoder)))
    arguments = (
        nnx.merge(*load(TextEncoder, TextEncoderConfig(), tmp_path, weights.TEXT_ENCODER)),
        jnp.asarray(tokens[0].numpy()),
    )
    parity.check("full size: text encoder", call(*arguments), peer, truth, in_double(call, *arguments))


def test_autoencoder(torch, diffusers, tmp_path, parity):
    torch.manual_seed(5)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    ).eval()
    tiny.sharpen(vae, torch)
    vae.save_pretrained(tmp_path)
    image = torch.rand((1, 3, 512, 512), generator=torch.Generator().manual_seed(6)) * 2 - 1
    ours = nnx.merge(*load(VAE, VAEConfig(), tmp_path, weights.VAE))
    check_autoencoder(torch, parity, "full size: autoencoder", vae, ours, VAEConfig().scaling_factor, image)


def test_an_audit_of_two_prompts_fits(tmp_path):
    """The command on a folder of Stable Diffusion v1.4's sizes: default detectors, one noise, one step, 24 GiB."""
    made = (UNet(UNetConfig(), rngs=nnx.Rngs(0)), TextEncoder(TextEncoderConfig(), rngs=nnx.Rngs(1)))
    scheduler = SchedulerConfig(NoiseSchedule.stable_diffusion(), "eps")
    model = StableDiffusion.from_modules(*made, VAE(VAEConfig(), rngs=nnx.Rngs(2)), byte_tokenizer(), scheduler)
    folder = model.export(tmp_path / "model", np.float16)
    del model, made
    gc.collect()
    (tmp_path / "two.txt").write_text("a lighthouse\na book of maps\n")
    prompts = REAL / "memorized_laion_prompts.csv" if REAL.is_dir() else tmp_path / "two.txt"
    options = ["--limit", "2", "--noises", "1", "--steps-run", "1", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "jaxmem", "audit", str(folder), "--prompts", str(prompts), *options]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, env=command_environment(), stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    said = (tmp_path / "log").read_text()
    assert status == 0, said[-3000:]
    assert usage.ru_maxrss < 24 * 2**20  # KiB
    assert re.search(r"time: about .* per prompt, at [\d.]+ s an evaluation and [\d.]+ s a product", said)
    metrics = Run.read(tmp_path / "run").metrics()
    assert metrics["detectors"] == ["wen-1", "jeon", "anisotropy", "largest-sum@t981", "largest@t981", "smallest@t981"]
    assert metrics["num_products"] == 2 * (2 * 20 + 3 + 2)
    assert all(np.isfinite(list(row["scores"].values())).all() for row in metrics["prompts"])
    print(said, f"{usage.ru_maxrss / 2**20:.1f} GiB, {usage.ru_utime + usage.ru_stime:.0f} s of CPU")
