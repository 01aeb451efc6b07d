"""Settings of a UNet: ``unet/config.json``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxmem.stable_diffusion.settings import (
    Reading,
    SettingsReader,
    are_sizes,
    either,
    is_before,
    is_size,
)

_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D")
_UP = ("UpBlock2D", "CrossAttnUpBlock2D")
# Settings that `UNet` has no choice of: at another value the network is another one.
_NEUTRAL: dict[str, Any] = dict(
    act_fn=("silu", "swish"),
    mid_block_type="UNetMidBlock2DCrossAttn",
    center_input_sample=False,
    only_cross_attention=False,
    downsample_padding=1,
    mid_block_scale_factor=1,
    num_attention_heads=None,
    dual_cross_attention=False,
    class_embed_type=None,
    num_class_embeds=None,
    addition_embed_type=None,
    encoder_hid_dim=None,
    encoder_hid_dim_type=None,
    reverse_transformer_layers_per_block=None,
    resnet_time_scale_shift="default",
    resnet_skip_time_act=False,
    resnet_out_scale_factor=1.0,
    time_embedding_type="positional",
    time_embedding_dim=None,
    time_embedding_act_fn=None,
    timestep_post_act=None,
    time_cond_proj_dim=None,
    conv_in_kernel=3,
    conv_out_kernel=3,
    attention_type="default",
    class_embeddings_concat=False,
    mid_block_only_cross_attention=(None, False),
    cross_attention_norm=None,
)


@dataclass(frozen=True)
class UNetConfig:
    """The architecture of a UNet; the defaults are Stable Diffusion 1.x."""

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_attention: tuple[bool, ...] = (True, True, True, False)  #: per level, from the finest
    up_attention: tuple[bool, ...] = (True, True, True, False)  #: per level, from the finest
    layers_per_block: int = 2
    transformer_layers_per_block: int = 1
    cross_attention_dim: int = 768
    num_heads: tuple[int, ...] = (8, 8, 8, 8)  #: per level; diffusers calls it attention_head_dim
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float | int = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: float | int = 0
    upcast_attention: bool = False  #: about half precision: nothing here, kept for export

    @property
    def time_features(self) -> int:
        """Features of the timestep's embedding."""
        return 4 * self.block_out_channels[0]

    @classmethod
    def from_diffusers(
        cls, config: Mapping[str, Any], where: str = "unet/config.json", reading: Reading | None = None
    ) -> "UNetConfig":
        """Read ``unet/config.json``; absent fields have diffusers' defaults.

        Raises:
            ValueError: naming every setting that is unknown, impossible or not supported.
        """
        r = SettingsReader(config, where, "UNet2DConditionModel", reading)
        widths = r.sizes("block_out_channels", (320, 640, 1280, 1280))
        levels = len(widths)

        def types(kinds: tuple[str, str]) -> Callable[[Any], bool]:
            return lambda v: isinstance(v, list | tuple) and len(v) == levels and all(kind in kinds for kind in v)

        down = r.take("down_block_types", (_DOWN[1],) * 3 + (_DOWN[0],), types(_DOWN), f"{levels} of {either(_DOWN)}")
        up = r.take("up_block_types", (_UP[0],) + (_UP[1],) * 3, types(_UP), f"{levels} of {either(_UP)}")
        heads = r.take(
            "attention_head_dim",
            8,
            lambda v: is_size(v) or (are_sizes(v) and len(v) == levels),
            f"a whole number of at least 1, or {levels} of them (here they are numbers of heads)",
        )
        values = dict(
            sample_size=r.size("sample_size", None),
            in_channels=r.size("in_channels", 4),
            out_channels=r.size("out_channels", 4),
            block_out_channels=widths,
            down_attention=tuple(kind == _DOWN[1] for kind in down),
            up_attention=tuple(kind == _UP[1] for kind in reversed(up)),
            layers_per_block=r.size("layers_per_block", 2),
            transformer_layers_per_block=r.size("transformer_layers_per_block", 1),
            cross_attention_dim=r.size("cross_attention_dim", 1280),
            num_heads=(heads,) * levels if isinstance(heads, int) else tuple(heads),
            use_linear_projection=r.flag("use_linear_projection", False),
            norm_num_groups=r.size("norm_num_groups", 32),
            norm_eps=r.number("norm_eps", 1e-5, 1e-12, 1e-2),
            flip_sin_to_cos=r.flag("flip_sin_to_cos", True),
            freq_shift=r.number("freq_shift", 0, 0, 1),
            upcast_attention=r.flag("upcast_attention", False),
        )
        r.neutral(**_NEUTRAL)
        # Without their type above, they do nothing.
        r.inert("addition_time_embed_dim", "addition_embed_type_num_heads", "projection_class_embeddings_input_dim")
        r.number("dropout", 0.0, 0, 1)
        r.finish()
        if is_before(r.config.get("_diffusers_version"), (0, 9)):  # sizes were often wrong: as diffusers' pipeline does
            values["sample_size"] = max(values["sample_size"], 64)
        made = cls(**values)
        r.require(
            made.in_channels == made.out_channels,
            f"in_channels and out_channels: expected equal numbers (a score has the shape of its input), got"
            f" {made.in_channels} and {made.out_channels}",
        )
        made._check_divisible(r)
        r.finish()
        return made

    def _check_divisible(self, r: SettingsReader) -> None:
        levels = len(self.block_out_channels)
        for level, (width, heads) in enumerate(zip(self.block_out_channels, self.num_heads, strict=True)):
            attends = self.down_attention[level] or self.up_attention[level] or level == levels - 1
            r.require(
                not attends or width % heads == 0,
                f"attention_head_dim: expected numbers of heads that divide {self.block_out_channels}, got"
                f" {self.num_heads}",
            )
        below = (*self.block_out_channels[1:], self.block_out_channels[-1])
        above = (self.block_out_channels[0], *self.block_out_channels[:-1])
        for width, under, over in zip(self.block_out_channels, below, above, strict=True):
            r.require(
                all(n % self.norm_num_groups == 0 for n in (width, under + width, width + over)),
                f"norm_num_groups: expected a divisor of {self.block_out_channels}, got {self.norm_num_groups}",
            )

    def to_diffusers(self) -> dict[str, Any]:
        """The ``config.json`` that diffusers reads."""
        return {
            "_class_name": "UNet2DConditionModel",
            "sample_size": self.sample_size,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "block_out_channels": list(self.block_out_channels),
            "down_block_types": [_DOWN[attends] for attends in self.down_attention],
            "up_block_types": [_UP[attends] for attends in reversed(self.up_attention)],
            "layers_per_block": self.layers_per_block,
            "transformer_layers_per_block": self.transformer_layers_per_block,
            "cross_attention_dim": self.cross_attention_dim,
            "attention_head_dim": list(self.num_heads),
            "use_linear_projection": self.use_linear_projection,
            "norm_num_groups": self.norm_num_groups,
            "norm_eps": self.norm_eps,
            "flip_sin_to_cos": self.flip_sin_to_cos,
            "freq_shift": self.freq_shift,
            "upcast_attention": self.upcast_attention,
        }
