"""Tiny pipelines of diffusers with random weights, one of each family that runs by way of torch."""

import copy
import json
import warnings
from pathlib import Path

from tiny_diffusion import make_text_encoder, make_tokenizer, make_vae, sharpen

ID2LABEL = {"0": "tench", "1": "goldfish, gold"}
FAMILIES = ("sdxl", "sd3", "flux", "pixart", "dit", "ddpm", "ddim-classes")


def make(torch, diffusers, transformers, folder: Path, family: str):
    """A pipeline, and the folder that diffusers saved it in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        pipeline = _MAKERS[family](torch, diffusers, transformers, folder / "tokenizer-files")
        for part in ("unet", "transformer", "text_encoder_2", "text_encoder_3"):
            if getattr(pipeline, part, None) is not None:
                getattr(pipeline, part).eval()
                sharpen(getattr(pipeline, part), torch)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(folder / "model")
    if family == "dit":  # as in published models; diffusers does not save it again
        index = folder / "model" / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": ID2LABEL}))
    return pipeline, folder / "model"


def make_lora(torch, pipeline_class, network, folder: Path, name: str):
    """A LoRA of a network's attention, with random factors, as diffusers' training scripts save it."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(7)
    twin = copy.deepcopy(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin.add_adapter(LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_v"]))
        layers = get_peft_model_state_dict(twin)
        part = "unet" if "UNet" in type(network).__name__ else "transformer"
        pipeline_class.save_lora_weights(folder, **{f"{part}_lora_layers": layers}, weight_name=name)
    return folder / name


def _clip(torch, transformers, folder, **changes):
    tokenizer, size = make_tokenizer(transformers, folder)
    return tokenizer, make_text_encoder(torch, transformers, "sd2", size, **changes), size


def _clip_with_projection(torch, transformers, size, **changes):
    one = make_text_encoder(torch, transformers, "sd2", size, **changes)
    torch.manual_seed(4)
    return transformers.CLIPTextModelWithProjection(one.config).eval()


def _t5(torch, transformers, folder):
    """An encoder of T5 and a tokenizer of single letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    letters += [(chr(code), -3.0) for code in range(33, 127) if chr(code) not in "<>"]
    backend = Tokenizer(models.Unigram(letters, unk_id=2))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.T5TokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", extra_ids=0
    )
    torch.manual_seed(5)
    config = transformers.T5Config(
        vocab_size=len(letters), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return tokenizer, transformers.T5EncoderModel(config).eval()


def _sdxl(torch, diffusers, transformers, folder):
    tokenizer, encoder, size = _clip(torch, transformers, folder)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type="epsilon",
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=make_vae(torch, diffusers),
        text_encoder=encoder,
        text_encoder_2=_clip_with_projection(torch, transformers, size),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )


def _sd3(torch, diffusers, transformers, folder):
    tokenizer, _, size = _clip(torch, transformers, folder)
    encoder_3 = _t5(torch, transformers, folder)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        vae=make_vae(torch, diffusers, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        text_encoder=_clip_with_projection(torch, transformers, size),
        text_encoder_2=_clip_with_projection(torch, transformers, size),
        text_encoder_3=_widened(torch, transformers, encoder_3[1]),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=encoder_3[0],
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _widened(torch, transformers, encoder):
    """The same kind of encoder with the 64 features that Stable Diffusion 3 pads CLIP's to."""
    config = transformers.T5Config(**encoder.config.to_dict() | {"d_model": 64})
    torch.manual_seed(6)
    return transformers.T5EncoderModel(config).eval()


def _flux(torch, diffusers, transformers, folder):
    tokenizer, encoder, _ = _clip(torch, transformers, folder)
    tokenizer_2, encoder_2 = _t5(torch, transformers, folder)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    return diffusers.FluxPipeline(
        vae=make_vae(torch, diffusers, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        text_encoder=encoder,
        text_encoder_2=encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def _pixart(torch, diffusers, transformers, folder):
    tokenizer, encoder = _t5(torch, transformers, folder)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        cross_attention_dim=24,
        in_channels=4,
        out_channels=8,
        norm_type="ada_norm_single",
        num_embeds_ada_norm=1000,
    )
    return diffusers.PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        transformer=transformer,
        vae=make_vae(torch, diffusers),
        scheduler=_ddim(diffusers, clip_sample=False),
    )


def _dit(torch, diffusers, transformers, folder):
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    return diffusers.DiTPipeline(
        transformer=transformer,
        vae=make_vae(torch, diffusers),
        scheduler=_ddim(diffusers, clip_sample=False),
        id2label=ID2LABEL,
    )


def _pixels(diffusers, **changes):
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **changes,
    )


def _ddpm(torch, diffusers, transformers, folder):
    return diffusers.DDPMPipeline(unet=_pixels(diffusers), scheduler=diffusers.DDPMScheduler(prediction_type="epsilon"))


def _ddim_classes(torch, diffusers, transformers, folder):
    return diffusers.DDIMPipeline(unet=_pixels(diffusers, num_class_embeds=4), scheduler=_ddim(diffusers))


def _ddim(diffusers, **changes):
    return diffusers.DDIMScheduler(prediction_type="epsilon", **changes)


_MAKERS = {
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
    "pixart": _pixart,
    "dit": _dit,
    "ddpm": _ddpm,
    "ddim-classes": _ddim_classes,
}
