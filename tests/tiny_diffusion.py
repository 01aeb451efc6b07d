"""Tiny Stable Diffusion pipelines with random weights, built by diffusers: the parity oracle of the port."""

import json
import warnings
from pathlib import Path

FAMILIES = ("sd1", "sd2")
# Every kind of block once and latents of 4 × 4 × 4, which compile in half of the time: for tests that depend neither on
# the network's depth nor on its size.
SMALLEST = dict(layers_per_block=1, block_out_channels=(16, 32), sample_size=4)


def unet_config(family: str) -> dict:
    shared = dict(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=2,
        norm_num_groups=8,
        cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    if family == "sd1":
        return shared | dict(attention_head_dim=4)
    return shared | dict(attention_head_dim=[2, 4], use_linear_projection=True)


def sharpen(module, torch, factor: float = 4.0) -> None:
    """Scale queries and keys, and move norms off 1 and biases off 0: the default initialisation hides faults there."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if any(part in name for part in ("to_q.weight", "to_k.weight", "q_proj.weight", "k_proj.weight")):
                parameter.mul_(factor)
            elif name.endswith("bias") or "norm" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def make_unet(torch, diffusers, family: str, **changes):
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**unet_config(family) | changes).eval()
    sharpen(unet, torch)
    return unet


def make_vae(torch, diffusers, **changes):
    torch.manual_seed(2)
    config = dict(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=16,
    )
    vae = diffusers.AutoencoderKL(**config | changes).eval()
    sharpen(vae, torch)
    return vae


def make_text_encoder(torch, transformers, family: str, vocab_size: int, **changes):
    torch.manual_seed(3)
    config = transformers.CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        hidden_act="quick_gelu" if family == "sd1" else "gelu",
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=1,
        **changes,
    )
    encoder = transformers.CLIPTextModel(config).eval()
    sharpen(encoder, torch, 12.0)
    return encoder


def make_tokenizer(transformers, folder: Path):
    """A byte-level CLIP tokenizer without merges but one, which knows every string."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in printable] + [
        chr(256 + i) for i in range(256 - len(printable))
    ]  # byte-level BPE's
    words = [*symbols, *(s + "</w>" for s in symbols), "th", "the</w>", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"})
    )
    return transformers.CLIPTokenizer.from_pretrained(folder), len(words)


def make_scheduler(diffusers, prediction: str = "epsilon"):
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )


def make_pipeline(
    torch, diffusers, transformers, folder: Path, family: str = "sd1", prediction: str = "epsilon", **unet
):
    """A pipeline, and its folder in today's layout; ``unet`` has changes of the UNet's configuration."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer, vocab_size = make_tokenizer(transformers, folder / "tokenizer-files")
        pipeline = diffusers.StableDiffusionPipeline(
            vae=make_vae(torch, diffusers),
            text_encoder=make_text_encoder(torch, transformers, family, vocab_size),
            tokenizer=tokenizer,
            unet=make_unet(torch, diffusers, family, **unet),
            scheduler=make_scheduler(diffusers, prediction),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(folder / "model")
    return pipeline, folder / "model"
