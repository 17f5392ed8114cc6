"""The sizes of FLUX.1-Fill and of the encoders around it: as published, and tiny ones of the same form."""

from dataclasses import dataclass, replace
from typing import Any

__all__ = ["CLIP_VOCABULARY", "PRESETS", "Sizes"]

CLIP_VOCABULARY = 49408
FULL_TRANSFORMER: dict[str, Any] = {
    "patch_size": 1,
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
VAE: dict[str, Any] = {
    "latent_channels": 16,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def _vae(channels: tuple[int, ...], **changes: Any) -> dict[str, Any]:
    """Blocks of one kind, as many as there are widths."""
    down, up = ("DownEncoderBlock2D",) * len(channels), ("UpDecoderBlock2D",) * len(channels)
    blocks = {"block_out_channels": channels, "down_block_types": down, "up_block_types": up}
    return VAE | blocks | changes


@dataclass(frozen=True)
class Sizes:
    """A preset: the networks' configurations, and the lengths between them."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    t5: dict[str, Any]
    clip_text: dict[str, Any]
    siglip: dict[str, Any]
    clip_vision: dict[str, Any]
    bridge: int  # width of VICR's bridge between its ends
    words: int  # T5's ids
    clip_words: int
    tile_px: int
    overlap_px: int
    whole_px: tuple[int, int]
    min_mu: float | None = None  # of the schedule: with a large one, few steps end near the mean of what may be true

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
        """Of the latent."""
        return int(self.vae["latent_channels"])

    @property
    def dim(self) -> int:
        """Of the transformer."""
        return int(self.transformer["attention_head_dim"] * self.transformer["num_attention_heads"])

    @property
    def rows(self) -> int:
        """Vectors that modulate a step."""
        return 12 * int(self.transformer["num_layers"]) + 3 * int(self.transformer["num_single_layers"]) + 2


PRESETS: dict[str, Sizes] = {
    "full": Sizes(
        FULL_TRANSFORMER,
        _vae((128, 256, 512, 512)),
        t5={
            "vocab_size": 32128,
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_layers": 24,
            "num_heads": 64,
            "feed_forward_proj": "gated-gelu",
        },
        clip_text={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        siglip={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        },
        clip_vision={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
            "projection_dim": 768,
        },
        bridge=1024,
        words=512,
        clip_words=77,
        tile_px=1024,
        overlap_px=256,
        whole_px=(2560, 1440),
    ),
    "tiny": Sizes(
        TINY_TRANSFORMER,
        _vae((8, 16), latent_channels=4, layers_per_block=1, norm_num_groups=4),
        t5={
            "vocab_size": 64,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
        },
        clip_text={
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
            "bos_token_id": 62,
        },
        siglip={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        clip_vision={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "projection_dim": 16,
        },
        bridge=24,
        words=64,
        clip_words=16,
        tile_px=128,
        overlap_px=32,
        whole_px=(320, 180),
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
    t5=PRESETS["tiny"].t5 | {"d_model": 64},
    clip_text=PRESETS["tiny"].clip_text | {"hidden_size": 32},
    siglip={
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    },
    clip_vision=PRESETS["tiny"].clip_vision | {"projection_dim": 32},
    bridge=24,
    words=32,
    clip_words=16,
    tile_px=96,
    overlap_px=32,
    whole_px=(96, 96),
    min_mu=5.0,
)
# few blocks at full width: what a machine without a GPU can measure
_FEW = FULL_TRANSFORMER | {"num_layers": 1, "num_single_layers": 2}
PRESETS["mid"] = replace(PRESETS["full"], transformer=_FEW)
