"""The sizes of SDXL, DINOv2 and InstantIR's own modules: the published ones, and tiny ones of the same form."""

from dataclasses import dataclass
from typing import Any

__all__ = ["PRESETS", "RANKS", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """The sizes of every network, and the widths between them."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    text_2: dict[str, Any]
    dino: dict[str, Any]
    pixels: dict[str, Any]  # settings of DINOv2's image processor
    schedule: dict[str, Any]  # options of the program's schedule
    resampler: dict[str, int]
    hidden: int  # width of the aggregator's heads
    adaptive: bool  # keys and values of image tokens depend on the time step
    words: int  # ids of a text
    tile_px: int
    overlap_px: int

    @property
    def spatial(self) -> int:
        """Output pixels behind a latent cell, along each axis."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def multiple(self) -> int:
        """Sides of tiles are multiples of so many output pixels: twice what the UNet needs, as in the release."""
        return int(2 * self.spatial * 2 ** (len(self.unet["block_out_channels"]) - 1))

    @property
    def features(self) -> int:
        """The number of features that DINOv2 makes of an image: one of the whole, one a patch."""
        return 1 + (int(self.pixels["side"]) // int(self.dino["patch_size"])) ** 2

    @property
    def pooled(self) -> int:
        """Width of the pooled text: the UNet's added embedding without its six sinusoids."""
        sinusoid = int(self.unet["addition_time_embed_dim"])
        return int(self.unet["projection_class_embeddings_input_dim"]) - 6 * sinusoid

    @property
    def context(self) -> int:
        """Width of the text's hidden states."""
        return int(self.unet["cross_attention_dim"])

    @property
    def keys_and_values(self) -> int:
        """Width of the keys and the values of all cross-attentions, side by side."""
        unet = self.unet
        widths, lengths = unet["block_out_channels"], unet["transformer_layers_per_block"]
        layers, total = unet["layers_per_block"], widths[-1] * lengths[-1]  # the middle has one attention
        kinds = zip(unet["down_block_types"], reversed(unet["up_block_types"]), widths, lengths, strict=True)
        for down, up, width, length in kinds:
            attentions = layers * down.startswith("CrossAttn") + (layers + 1) * up.startswith("CrossAttn")
            total += width * length * attentions
        return int(2 * total)

    @property
    def residuals(self) -> dict[str, tuple[int, int]]:
        """The tensors added to the UNet's skips: name -> channels, and the side of a cell in latent cells."""
        widths, layers = self.unet["block_out_channels"], int(self.unet["layers_per_block"])
        added = [(widths[0], 1)]
        for i, width in enumerate(widths):
            added += layers * [(width, 2**i)]
            added += [(width, 2 ** (i + 1))] if i + 1 < len(widths) else []
        named = {f"r{i}": pair for i, pair in enumerate(added)}
        return named | {"mid": (widths[-1], 2 ** (len(widths) - 1))}


SCHEDULE = {  # SDXL's noise schedule
    "betas": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "spacing_offset": 1,
    "final_alpha": "first",
}
IMAGENET = {"mean": [0.485, 0.456, 0.406], "deviation": [0.229, 0.224, 0.225]}
RANKS = {"full": 64, "tiny": 4}  # preset -> rank of a LoRA with random weights
UNET: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
VAE: dict[str, Any] = {"latent_channels": 4, "scaling_factor": 0.13025}


def _vae(channels: tuple[int, ...], **changes: Any) -> dict[str, Any]:
    """A VAE with one block for each width."""
    down, up = ("DownEncoderBlock2D",) * len(channels), ("UpDecoderBlock2D",) * len(channels)
    return VAE | {"block_out_channels": channels, "down_block_types": down, "up_block_types": up} | changes


PRESETS: dict[str, Sizes] = {
    "full": Sizes(
        unet=UNET
        | {
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "layers_per_block": 2,
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        vae=_vae((128, 256, 512, 512), layers_per_block=2, norm_num_groups=32),
        text={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "hidden_act": "quick_gelu",
        },
        text_2={
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "projection_dim": 1280,
            "hidden_act": "gelu",
        },
        dino={
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 518,
        },
        pixels={"side": 224, "short": 256} | IMAGENET,
        schedule=SCHEDULE,
        resampler={
            "dim": 1280,
            "depth": 4,
            "heads": 20,
            "head_width": 64,
            "queries": 64,
            "width_in": 1024,
            "width_out": 2048,
            "multiple": 4,
        },
        hidden=128,
        adaptive=True,
        words=77,
        tile_px=1024,
        overlap_px=256,
    ),
    "tiny": Sizes(
        unet=UNET
        | {
            "sample_size": 64,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "transformer_layers_per_block": (1, 2),
            "attention_head_dim": (2, 4),
            "cross_attention_dim": 32,
            "norm_num_groups": 8,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64,
        },
        vae=_vae((8, 16), layers_per_block=1, norm_num_groups=4),
        text={
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
            "bos_token_id": 62,
        },
        text_2={
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
            "bos_token_id": 62,
            "projection_dim": 16,
            "hidden_act": "gelu",
        },
        dino={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 14,
            "image_size": 42,
        },
        pixels={"side": 28, "short": 32} | IMAGENET,
        schedule=SCHEDULE,
        resampler={
            "dim": 32,
            "depth": 2,
            "heads": 2,
            "head_width": 16,
            "queries": 4,
            "width_in": 32,
            "width_out": 32,
            "multiple": 4,
        },
        hidden=16,
        adaptive=True,
        words=16,
        tile_px=128,
        overlap_px=32,
    ),
}
