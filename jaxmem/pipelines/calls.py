"""How each network is called: ``call(module, x, t, cond)`` on torch tensors with a batch of one."""

from typing import Any


def unet_of_pixels(module: Any, x: Any, t: Any, cond: Any) -> Any:
    """`UNet2DModel`, with class labels or nothing; a learned variance is left out."""
    return module(x, t, class_labels=cond).sample[:, : x.shape[1]]


def unet_xl(module: Any, x: Any, t: Any, cond: Any) -> Any:
    """The `UNet2DConditionModel` of Stable Diffusion XL."""
    added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
    return module(x, t, cond["tokens"], added_cond_kwargs=added).sample


def dit(module: Any, x: Any, t: Any, cond: Any) -> Any:
    """`DiTTransformer2DModel`; a learned variance, the second half of its channels, is left out."""
    return module(x, timestep=t, class_labels=cond).sample[:, : x.shape[1]]


def pixart(module: Any, x: Any, t: Any, cond: Any) -> Any:
    """`PixArtTransformer2DModel`; a learned variance is left out."""
    added = {"resolution": cond.get("resolution"), "aspect_ratio": cond.get("aspect_ratio")}
    output = module(
        x,
        encoder_hidden_states=cond["tokens"],
        encoder_attention_mask=cond["mask"],
        timestep=t,
        added_cond_kwargs=added,
    )
    return output.sample[:, : x.shape[1]]


def transformer_3(module: Any, x: Any, t: Any, cond: Any) -> Any:
    """The `SD3Transformer2DModel`, whose timestep is 1,000 sigma; t counts millionths."""
    output = module(
        hidden_states=x,
        timestep=t.to(x.dtype) / 1_000,
        encoder_hidden_states=cond["tokens"],
        pooled_projections=cond["pooled"],
    )
    return output.sample


def flux(module: Any, x: Any, t: Any, cond: Any) -> Any:
    """The `FluxTransformer2DModel`, whose timestep is sigma, and whose x are rows of patches of two by two pixels."""
    import torch

    batch, channels, rows, columns = x.shape
    patches = x.reshape(batch, channels, rows // 2, 2, columns // 2, 2).permute(0, 2, 4, 1, 3, 5)
    row = torch.arange(rows // 2, device=x.device, dtype=x.dtype)[:, None].expand(rows // 2, columns // 2)
    column = torch.arange(columns // 2, device=x.device, dtype=x.dtype)[None].expand(rows // 2, columns // 2)
    places = torch.stack([torch.zeros_like(row), row, column], -1).reshape(-1, 3)
    output = module(
        hidden_states=patches.reshape(batch, -1, channels * 4),
        timestep=t.to(x.dtype) / 1_000_000,
        guidance=cond.get("guidance"),
        pooled_projections=cond["pooled"],
        encoder_hidden_states=cond["tokens"],
        txt_ids=torch.zeros((cond["tokens"].shape[1], 3), device=x.device, dtype=x.dtype),
        img_ids=places,
    ).sample
    grid = output.reshape(batch, rows // 2, columns // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(batch, channels, rows, columns)
