"""The sizes of FLUX.1-Fill and of the encoders around it: the published ones, and smaller ones of the same form."""

from dataclasses import dataclass, field, replace
from typing import Any

from tilewright.export.networks import configs

__all__ = [
    "CLIP_TEXT",
    "CLIP_VOCABULARY",
    "PRESETS",
    "SCHEDULE",
    "Sizes",
]


UNREAD = ("projection_dim", "bos_token_id")  # keys that CLIP's text encoder without a projection does not read
CLIP_TEXT = replace(
    configs.CLIP_TEXT,
    defaults={key: value for key, value in configs.CLIP_TEXT.defaults.items() if key not in UNREAD},
    moot=(*configs.CLIP_TEXT.moot, *UNREAD),
)

CLIP_VOCABULARY = 49408
FULL_TRANSFORMER: dict[str, Any] = {
    "in_channels": 384,
    "out_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
TINY_TRANSFORMER = FULL_TRANSFORMER | {
    "in_channels": 48,
    "out_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}
FULL_VAE: dict[str, Any] = {
    "act_fn": "silu",
    "latent_channels": 16,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SCHEDULE: dict[str, Any] = dict(configs.FLOW.defaults)


def _vae(channels: tuple[int, ...], **changes: Any) -> dict[str, Any]:
    """A VAE with one block for each width."""
    down, up = ("DownEncoderBlock2D",) * len(channels), ("UpDecoderBlock2D",) * len(channels)
    blocks = {"block_out_channels": channels, "down_block_types": down, "up_block_types": up}
    return FULL_VAE | blocks | changes


def _t5(**sizes: Any) -> dict[str, Any]:
    return {**configs.T5.defaults, "feed_forward_proj": "gated-gelu", **sizes}


def _clip_text(**sizes: Any) -> dict[str, Any]:
    return {**CLIP_TEXT.defaults, **sizes}


def _siglip(**sizes: Any) -> dict[str, Any]:
    return {**configs.SIGLIP.defaults, "patch_size": 14, **sizes}


def _clip_vision(**sizes: Any) -> dict[str, Any]:
    return {**configs.CLIP_VISION.defaults, "patch_size": 14, **sizes}


def _siglip_processor(side: int) -> dict[str, Any]:
    return {**configs.SIGLIP_PROCESSOR.defaults, "size": {"height": side, "width": side}}


def _clip_processor(side: int) -> dict[str, Any]:
    cut = {"height": side, "width": side}
    return {**configs.CLIP_PROCESSOR.defaults, "size": {"shortest_edge": side}, "crop_size": cut}


@dataclass(frozen=True)
class Sizes:
    """The sizes of every network, and the widths between them. A network that a build lacks has an empty dict."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    words: int  # ids that T5 reads
    tile_px: int
    overlap_px: int
    whole_px: tuple[int, int]
    schedule: dict[str, Any] = field(default_factory=lambda: dict(SCHEDULE))
    t5: dict[str, Any] = field(default_factory=dict)
    clip_text: dict[str, Any] = field(default_factory=dict)
    clip_words: int = 77
    siglip: dict[str, Any] = field(default_factory=dict)
    siglip_processor: dict[str, Any] = field(default_factory=dict)
    clip_vision: dict[str, Any] = field(default_factory=dict)
    clip_processor: dict[str, Any] = field(default_factory=dict)
    bridge: int = 0  # inner width of VICR's bridge

    @property
    def spatial(self) -> int:
        """Output pixels behind a latent cell, along each axis."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def multiple(self) -> int:
        """Output pixels behind a token, along each axis."""
        return 2 * self.spatial

    @property
    def channels(self) -> int:
        """Channels of the latent."""
        return int(self.vae["latent_channels"])

    @property
    def dim(self) -> int:
        """Width of the transformer."""
        return int(self.transformer["attention_head_dim"] * self.transformer["num_attention_heads"])

    @property
    def rows(self) -> int:
        """Modulation vectors of a step."""
        return 12 * int(self.transformer["num_layers"]) + 3 * int(self.transformer["num_single_layers"]) + 2

    @property
    def context(self) -> int:
        """Width of the vector that the transformer reads for each word."""
        return int(self.transformer["joint_attention_dim"])

    @property
    def pooled(self) -> int:
        """Width of the pooled text, the vector that the transformer reads for the whole text."""
        return int(self.transformer["pooled_projection_dim"])


PRESETS: dict[str, Sizes] = {
    "full": Sizes(
        FULL_TRANSFORMER,
        _vae((128, 256, 512, 512)),
        words=512,
        tile_px=1024,
        overlap_px=256,
        whole_px=(2560, 1440),
        t5=_t5(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64),
        clip_text=_clip_text(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
        siglip=_siglip(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=27,
            num_attention_heads=16,
            image_size=384,
        ),
        siglip_processor=_siglip_processor(384),
        clip_vision=_clip_vision(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            projection_dim=768,
        ),
        clip_processor=_clip_processor(224),
        bridge=1024,
    ),
    "tiny": Sizes(
        TINY_TRANSFORMER,
        _vae((8, 16), latent_channels=4, layers_per_block=1, norm_num_groups=4),
        words=64,
        tile_px=128,
        overlap_px=32,
        whole_px=(320, 180),
        t5=_t5(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
        clip_text=_clip_text(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
        ),
        clip_words=16,
        siglip=_siglip(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
        ),
        siglip_processor=_siglip_processor(28),
        clip_vision=_clip_vision(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            projection_dim=16,
        ),
        clip_processor=_clip_processor(28),
        bridge=24,
    ),
}
# trained by tools/train, and shipped
PRESETS["demo"] = Sizes(
    FULL_TRANSFORMER
    | {
        "in_channels": 192,
        "out_channels": 64,
        "num_layers": 1,
        "num_single_layers": 3,
        "attention_head_dim": 64,
        "num_attention_heads": 4,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (16, 24, 24),
    },
    _vae(
        (16, 48, 96),
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=1,
        scaling_factor=1.0,
        shift_factor=0.0,
    ),
    words=32,
    tile_px=96,
    overlap_px=32,
    whole_px=(96, 96),
    # a large one at every size: few steps end near the mean of what may be true
    schedule=SCHEDULE | {"base_shift": 5.0, "max_shift": 5.0},
    t5=PRESETS["tiny"].t5 | {"d_model": 64},
    clip_text=PRESETS["tiny"].clip_text | {"hidden_size": 32},
    clip_words=16,
    siglip=_siglip(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
    ),
    siglip_processor=_siglip_processor(56),
)
# few blocks at full width: what a machine without a GPU can measure
_FEW = FULL_TRANSFORMER | {"num_layers": 1, "num_single_layers": 2}
PRESETS["mid"] = replace(PRESETS["full"], transformer=_FEW)
