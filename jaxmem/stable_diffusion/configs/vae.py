"""Settings of an autoencoder: ``vae/config.json``."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jaxmem.stable_diffusion.settings import (
    Reading,
    SettingsReader,
)


@dataclass(frozen=True)
class VAEConfig:
    """The architecture of an autoencoder (``AutoencoderKL``); the defaults are Stable Diffusion's."""

    sample_size: int = 512
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float | int = 0.18215  #: diffusion model's latents = scaling_factor × autoencoder's
    force_upcast: bool = True  #: about half precision: nothing here, kept for export

    @classmethod
    def from_diffusers(
        cls, config: Mapping[str, Any], where: str = "vae/config.json", reading: Reading | None = None
    ) -> "VAEConfig":
        """Read ``vae/config.json``; absent fields have diffusers' defaults.

        Raises:
            ValueError: naming every setting that is unknown, impossible or not supported.
        """
        r = SettingsReader(config, where, "AutoencoderKL", reading)
        widths = r.sizes("block_out_channels", (64,))
        values = dict(
            sample_size=r.size("sample_size", 32),
            in_channels=r.size("in_channels", 3),
            out_channels=r.size("out_channels", 3),
            latent_channels=r.size("latent_channels", 4),
            block_out_channels=widths,
            layers_per_block=r.size("layers_per_block", 1),
            norm_num_groups=r.size("norm_num_groups", 32),
            force_upcast=r.flag("force_upcast", True),
            scaling_factor=r.number("scaling_factor", 0.18215, 1e-6, 1e6),
        )
        for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            expected = [kind] * len(widths)
            found = r.take(name, (kind,), lambda v: isinstance(v, list | tuple), "a list")
            r.require(
                list(found) == expected,
                f"{name}: expected {len(widths)} of {kind!r}, one per entry of block_out_channels, got {found!r}",
            )
        r.neutral(
            act_fn=("silu", "swish"),
            shift_factor=None,
            latents_mean=None,
            latents_std=None,
            use_quant_conv=True,
            use_post_quant_conv=True,
            mid_block_add_attention=True,
        )
        r.finish()
        made = cls(**values)
        r.require(
            all(width % made.norm_num_groups == 0 for width in widths),
            f"norm_num_groups: expected a divisor of {widths}, got {made.norm_num_groups}",
        )
        r.finish()
        return made

    @property
    def downscale(self) -> int:
        """Pixels of an image per pixel of its latents, in each direction."""
        return 2 ** (len(self.block_out_channels) - 1)

    def to_diffusers(self) -> dict[str, Any]:
        """The ``config.json`` that diffusers reads."""
        levels = len(self.block_out_channels)
        return {
            "_class_name": "AutoencoderKL",
            **asdict(self),
            "block_out_channels": list(self.block_out_channels),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "act_fn": "silu",
        }
