"""A network's sizes from the shapes in its weight files, under the names of its configuration file.

A missing tensor raises KeyError. Shapes that no configuration describes raise ValueError.
"""

import math
from typing import Any

from tilewright.export.weights.files import Shapes

__all__ = ["clip_text", "dinov2", "unet", "vae"]


def _count(shapes: Shapes, before: str, after: str) -> int:
    """How many keys `before`0`after`, `before`1`after`, ... there are without a gap."""
    count = 0
    while f"{before}{count}{after}" in shapes:
        count += 1
    return count


def _one(what: str, values: list[int]) -> int:
    """The one number that all blocks have."""
    if len(set(values)) != 1:
        raise ValueError(f"its blocks have {values} {what}")
    return values[0]


def unet(shapes: Shapes) -> dict[str, Any]:
    """The sizes of SDXL's UNet."""
    channels_in, channels_out = shapes["conv_in.weight"][1], shapes["conv_out.weight"][0]
    blocks = _count(shapes, "down_blocks.", ".resnets.0.conv1.weight")
    lengths = {
        part: _count(shapes, f"{part}.attentions.0.transformer_blocks.", ".norm1.weight")
        for part in (*(f"{way}_blocks.{i}" for way in ("down", "up") for i in range(blocks)), "mid_block")
    }
    downs = [lengths[f"down_blocks.{i}"] for i in range(blocks)]
    ups = [lengths[f"up_blocks.{i}"] for i in range(blocks)]
    middle = "mid_block.attentions.0"
    transformers = [down or up for down, up in zip(downs, reversed(ups), strict=True)]
    for index, pair in enumerate(zip(downs, reversed(ups), strict=True)):
        # the middle block has as many transformers as the last block
        beside = {*pair, lengths["mid_block"]} if index == blocks - 1 else {*pair}
        if len(beside - {0}) > 1:
            raise ValueError(f"block {index} has {pair[0]} transformers on the way down and {pair[1]} up")
    layers = [_count(shapes, f"down_blocks.{i}.resnets.", ".conv1.weight") for i in range(blocks)]
    return {
        "in_channels": channels_in,
        "out_channels": channels_out,
        "projection_class_embeddings_input_dim": shapes["add_embedding.linear_1.weight"][1],
        "cross_attention_dim": shapes[f"{middle}.transformer_blocks.0.attn2.to_k.weight"][1],
        "use_linear_projection": len(shapes[f"{middle}.proj_in.weight"]) == 2,
        "block_out_channels": [shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(blocks)],
        "layers_per_block": _one("layers", layers),
        "down_block_types": ["CrossAttnDownBlock2D" if length else "DownBlock2D" for length in downs],
        "up_block_types": ["CrossAttnUpBlock2D" if length else "UpBlock2D" for length in ups],
        "transformer_layers_per_block": [count or None for count in transformers[:-1]] + [lengths["mid_block"]],
    }


def vae(shapes: Shapes) -> dict[str, Any]:
    """The sizes of AutoencoderKL."""
    latent = shapes["decoder.conv_in.weight"][1]
    blocks = _count(shapes, "encoder.down_blocks.", ".resnets.0.conv1.weight")
    layers = [_count(shapes, f"encoder.down_blocks.{i}.resnets.", ".conv1.weight") for i in range(blocks)]
    return {
        "latent_channels": latent,
        "block_out_channels": [shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(blocks)],
        "layers_per_block": _one("layers", layers),
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def clip_text(shapes: Shapes) -> dict[str, Any]:
    """The sizes of CLIP's text encoder, under the names of transformers 5 or older ones."""
    inside = "text_model." if any(key.startswith("text_model.") for key in shapes) else ""
    vocabulary, width = shapes[f"{inside}embeddings.token_embedding.weight"]
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": shapes[f"{inside}embeddings.position_embedding.weight"][0],
        "intermediate_size": shapes[f"{inside}encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(shapes, f"{inside}encoder.layers.", ".mlp.fc1.weight"),
    }
    projection = shapes.get("text_projection.weight")
    return sizes | ({"projection_dim": projection[0]} if projection else {})


def dinov2(shapes: Shapes) -> dict[str, Any]:
    """The sizes of DINOv2, under the names of transformers 5 or older ones."""
    width, _, patch, _ = shapes["embeddings.patch_embeddings.projection.weight"]
    cells = math.isqrt(shapes["embeddings.position_embeddings"][1] - 1)
    gated = any(f"encoder.layer.0.mlp.{name}.weight" in shapes for name in ("weights_in", "gate_proj"))
    biases = ("attention.attention.query.bias", "attention.q_proj.bias")
    sizes = {
        "hidden_size": width,
        "patch_size": patch,
        "image_size": cells * patch,
        "num_hidden_layers": _count(shapes, "encoder.layer.", ".norm1.weight"),
        "use_swiglu_ffn": gated,
        "qkv_bias": any(f"encoder.layer.0.{bias}" in shapes for bias in biases),
    }
    if sizes["qkv_bias"] is False and not any(key.startswith("encoder.layer.0.attention.") for key in shapes):
        raise KeyError(f"encoder.layer.0.{biases[0].replace('bias', 'weight')}")
    if not gated:
        sizes["mlp_ratio"] = shapes["encoder.layer.0.mlp.fc1.weight"][0] // width
    return sizes
