"""A diffusers folder's weights in the layout of the program that Stable Diffusion 1 was trained with: one file.

The inverse of what diffusers' `from_single_file` does, written from the two programs' module trees.
"""

import re
from pathlib import Path

from safetensors.numpy import load_file, save_file

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_key(key: str, layers: int, attends_up: tuple[bool, ...]) -> str:
    """``layers`` of ResNet blocks on each level down; ``attends_up`` of each block on the way up."""
    for ours, theirs in _OUTSIDE.items():
        if key.startswith(ours + "."):
            return key.replace(ours, theirs, 1)
    if found := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(\w+)", key):
        return f"input_blocks.{(layers + 1) * (int(found[1]) + 1)}.0.op.{found[2]}"
    if found := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(\w+)", key):
        level = int(found[1])
        return f"output_blocks.{(layers + 1) * level + layers}.{1 + attends_up[level]}.conv.{found[2]}"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", key):
        place = 1 if found[1] == "attentions" else 2 * int(found[2])
        return f"middle_block.{place}.{_inside(found[1], found[3])}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", key)
    level, block = int(found[2]), int(found[4])
    place = (layers + 1) * level + block + (found[1] == "down")
    side = "input" if found[1] == "down" else "output"
    return f"{side}_blocks.{place}.{int(found[3] == 'attentions')}.{_inside(found[3], found[5])}"


def _inside(kind: str, rest: str) -> str:
    if kind == "attentions":
        return rest
    head, _, last = rest.rpartition(".")
    return f"{_RESNET[head]}.{last}"


def vae_key(key: str, levels: int) -> str:
    key = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(
        r"up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)",
        lambda m: f"up.{levels - 1 - int(m[1])}.{'upsample' if m[2] is None else f'block.{m[2]}'}",
        key,
    )
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = key.replace("mid_block.attentions.0", "mid.attn_1")
    for ours, theirs in (("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"), ("group_norm", "norm")):
        key = key.replace(ours, theirs)
    return re.sub(r"attn_1\.(?:to_(q|k|v)|to_out\.0)\.", lambda m: f"attn_1.{m[1] or 'proj_out'}.", key)


def write_single_file(
    folder: Path, path: Path, *, layers: int, attends_up: tuple[bool, ...], vae_levels: int, more: dict | None = None
) -> Path:
    """Write the networks of a folder as one file; ``more`` has tensors beside them."""
    tensors = {}
    for key, value in load_file(folder / "unet/diffusion_pytorch_model.safetensors").items():
        tensors["model.diffusion_model." + unet_key(key, layers, attends_up)] = value
    for key, value in load_file(folder / "vae/diffusion_pytorch_model.safetensors").items():
        new = vae_key(key, vae_levels)
        pointwise = "mid.attn_1." in new and value.ndim == 2
        tensors["first_stage_model." + new] = value[:, :, None, None] if pointwise else value
    for key, value in load_file(folder / "text_encoder/model.safetensors").items():
        tensors["cond_stage_model.transformer.text_model." + key.removeprefix("text_model.")] = value
    save_file(tensors | (more or {}), path, {"format": "pt"})
    return path
