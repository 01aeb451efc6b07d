"""The U-Net of `jaxmem.networks.unet` as a torch user would write it: NCHW, conv2d, group_norm, one example at a time.

It exists for the parity test and the Jacobian benchmark. `from_state` copies the weights of a Flax one into it.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn

from jaxmem.networks.unet import UNet


class TorchResBlock(nn.Module):
    def __init__(self, inner: int, outer: int, embedding: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inner, eps=1e-5)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * outer)
        self.norm2 = nn.GroupNorm(groups, outer, eps=1e-5, affine=False)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.skip = None if inner == outer else nn.Conv2d(inner, outer, 1, bias=False)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden) * (1 + scale) + shift))
        return hidden + (x if self.skip is None else self.skip(x))


class TorchUNet(nn.Module):
    """``forward(x, t, cond)`` with x (batch, channels, height, width), t and cond int64 of shape (batch,)."""

    def __init__(self, twin: UNet, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        height, width, channels = twin.shape
        patch, features, num_blocks = twin.patch, twin.features, twin.num_blocks
        embedding, groups = twin.time1.out_features, twin.norm.num_groups
        self.patch = patch
        self.register_buffer("alphas", torch.tensor(twin.schedule.alpha, dtype=dtype))
        self.register_buffer("sigmas", torch.tensor(twin.schedule.sigma, dtype=dtype))
        self.register_buffer("frequencies", torch.tensor(np.geomspace(0.25, 8.0, 16), dtype=dtype))
        self.time1, self.time2 = nn.Linear(32, embedding), nn.Linear(embedding, embedding)
        self.classes = nn.Embedding(twin.num_classes, embedding) if twin.num_classes else None
        self.stem = nn.Conv2d(channels, features[0], patch, stride=patch)
        maps = max(twin.num_classes, 1)
        self.position = nn.Parameter(torch.zeros(maps, features[0], height // patch, width // patch))
        self.prior = nn.Parameter(torch.zeros(maps, 3 * channels, height, width))
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for level, outer in enumerate(features):
            if level:
                self.shrink.append(nn.Conv2d(features[level - 1], outer, 2, stride=2))
            self.down.append(
                nn.ModuleList([TorchResBlock(outer, outer, embedding, groups) for _ in range(num_blocks[level])])
            )
        for level in reversed(range(len(features) - 1)):
            outer = features[level]
            self.grow.append(nn.ConvTranspose2d(features[level + 1], outer, 2, stride=2, bias=False))
            self.up.append(
                nn.ModuleList(
                    [
                        TorchResBlock(outer if i else 2 * outer, outer, embedding, groups)
                        for i in range(num_blocks[level])
                    ]
                )
            )
        self.norm = nn.GroupNorm(groups, features[0], eps=1e-5)
        self.modulation = nn.Linear(embedding, 2 * features[0])
        self.out = nn.Conv2d(features[0], 3 * patch * patch * channels, 3, padding=1)
        self.to(dtype)

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        alpha, sigma = (table[t][:, None, None, None] for table in (self.alphas, self.sigmas))
        log_snr = torch.log(alpha / sigma)
        angles = log_snr[:, :, 0, 0] * self.frequencies
        embedding = self.time2(F.silu(self.time1(torch.cat([angles.sin(), angles.cos()], dim=1))))
        if self.classes is not None:
            embedding = embedding + self.classes(cond)
        embedding = F.silu(embedding)
        row = torch.zeros_like(t) if cond is None else cond
        hidden = self.stem(x) + self.position[row]
        skips = []
        for level, blocks in enumerate(self.down):
            if level:
                skips.append(hidden)
                hidden = self.shrink[level - 1](hidden)
            for block in blocks:
                hidden = block(hidden, embedding)
        for grow, blocks in zip(self.grow, self.up, strict=True):
            hidden = torch.cat([grow(hidden), skips.pop()], dim=1)
            for block in blocks:
                hidden = block(hidden, embedding)
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        hidden = self.norm(hidden) * (1 + scale) + shift
        maps = F.pixel_shuffle(self.out(F.silu(hidden)), self.patch) + 4 * self.prior[row]
        logit, image, residual = maps.chunk(3, dim=1)
        gate = torch.sigmoid(4 * (1 + torch.nn.functional.softplus(log_snr)) * logit - 2 * log_snr)
        return gate * (x - alpha * image) / sigma + residual


def torch_score(model: TorchUNet, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
    """``s = -eps / sigma`` for one example x of shape (channels, height, width)."""
    return -model(x[None], t[None], None if cond is None else cond[None])[0] / model.sigmas[t]


def from_state(twin: UNet, state: nnx.State, dtype: torch.dtype = torch.float32) -> TorchUNet:
    """A torch model with the weights of ``state`` (as `jaxmem.bind` split it from ``twin``).

    Kernels here are (row, column, in, out), or (row · column · in, out) where a fold comes before; those of torch are
    (out, in, row, column).
    """
    model, values = TorchUNet(twin, dtype), nnx.to_pure_dict(state)

    def put(target: torch.Tensor, value: Any) -> None:
        value = torch.tensor(np.array(value))
        if target.shape != value.shape:
            raise ValueError(f"expected {tuple(target.shape)}, got {tuple(value.shape)}")
        with torch.no_grad():
            target.copy_(value)

    def linear(target: nn.Linear, source: dict) -> None:
        put(target.weight, source["kernel"].T)
        if target.bias is not None:
            put(target.bias, source["bias"])

    def window(target: nn.Conv2d, source: dict) -> None:
        outer, inner, rows, columns = target.weight.shape
        put(target.weight, np.array(source["kernel"]).reshape(rows, columns, inner, outer).transpose(3, 2, 0, 1))
        if target.bias is not None:
            put(target.bias, source["bias"])

    def norm(target: nn.GroupNorm, source: dict) -> None:
        put(target.weight, source["scale"])
        put(target.bias, source["shift"])

    def block(target: TorchResBlock, source: dict) -> None:
        norm(target.norm1, source["norm1"])
        window(target.conv1, source["conv1"])
        linear(target.modulation, source["modulation"])
        window(target.conv2, source["conv2"])
        if target.skip is not None:
            window(target.skip, source["skip"])

    for name in ("time1", "time2", "modulation"):
        linear(getattr(model, name), values[name])
    if model.classes is not None:
        put(model.classes.weight, values["classes"]["embedding"])
    window(model.stem, values["stem"])
    for name in ("position", "prior"):
        put(getattr(model, name), np.array(values[name]).transpose(0, 3, 1, 2))
    for i, target in enumerate(model.shrink):
        window(target, values["shrink"][i])
    for i, target in enumerate(model.grow):
        kernel = np.array(values["grow"][i]["kernel"])
        inner, outer = kernel.shape[0], kernel.shape[1] // 4
        put(target.weight, kernel.reshape(inner, 2, 2, outer).transpose(0, 3, 1, 2))
    for side in ("down", "up"):
        for i, blocks in enumerate(getattr(model, side)):
            for j, target in enumerate(blocks):
                block(target, values[side][i][j])
    norm(model.norm, values["norm"])
    # The outputs are unfolded next: `unfold` reads (row, column, feature), pixel_shuffle (feature, row, column).
    patch, maps = model.patch, model.out.out_channels // model.patch**2
    kernel, bias = (np.array(values["out"][k]) for k in ("kernel", "bias"))
    kernel = kernel.reshape(-1, patch, patch, maps).transpose(0, 3, 1, 2).reshape(kernel.shape)
    bias = bias.reshape(patch, patch, maps).transpose(2, 0, 1).reshape(-1)
    window(model.out, {"kernel": kernel, "bias": bias})
    return model.eval()
