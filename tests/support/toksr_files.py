"""The files that a user of TokSR gives, of any size, and CLIP as transformers holds it."""

import zlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from tilewright.export.tokenizers import put, stand_in_clip

__all__ = ["FULL", "OTHER", "TA_TITOK", "TINY", "clip", "shapes_of", "tensors", "untold", "written"]

Sizes = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]
SMALL: Sizes = {"width": 32, "layers": 2, "heads": 2}
TINY: Sizes = {
    "image": 32,
    "patch": 8,
    "latents": 4,
    "token": 4,
    "words": 8,
    "text_width": 16,
    "scale": 0.7525,
    "without": (),
}
TINY |= {"encoder": SMALL | {"text": True}, "decoder": SMALL, "dit": SMALL}
TA_TITOK = TINY | {"encoder": SMALL | {"text": False}, "without": ("encoder.text_guidance",)}
OTHER = TINY | {
    "image": 24,
    "patch": 4,
    "latents": 5,
    "token": 3,
    "scale": 0.5,
    "dit": {"width": 128, "layers": 1, "heads": 2},
}
OTHER |= {"encoder": SMALL | {"layers": 3, "text": False}, "decoder": {"width": 64, "layers": 1, "heads": 1}}
OTHER |= {"without": ("encoder.text_guidance", "attn.out.", "cross.out.")}
FULL = TA_TITOK | {"image": 256, "patch": 16, "latents": 32, "token": 16, "words": 77, "text_width": 768}
FULL |= {"encoder": {"width": 768, "layers": 12}, "decoder": {"width": 1024, "layers": 24}}
FULL |= {"dit": {"width": 768, "layers": 12}}
CLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
CLIP_TEXT: Sizes = {**CLIP, "vocab_size": 64, "max_position_embeddings": 8, "bos_token_id": 62, "eos_token_id": 2}
CLIP_TEXT |= {"hidden_act": "gelu", "layer_norm_eps": 1e-3}
# Name and shape of every tensor of the files; + is a weight and its bias, w a part's width
HALF = "class_embedding 1 w, positional_embedding cells w, latent_token_positional_embedding latents w, ln_pre+ w"
HALF += ", ln_post+ w, text_guidance_proj+ w text_width, text_guidance_positional_embedding words w, "
MLP = "ln_1+ w, ln_2+ w, mlp.c_fc+ 4w w, mlp.c_proj+ w 4w, "
BLOCK = f"{MLP}attn.in_proj_weight 3w w, attn.in_proj_bias 3w, attn.out_proj+ w w"
DIT = "embed+ w token, positions.weight latents w, time.0+ w 256, time.2+ w w, label+ w text_width, condition_norm+ w"
DIT_BLOCK = "ln_3+ w, attn.qkv.weight 3w w, attn.out+ w w, cross.q.weight w w, cross.kv.weight 2w w, cross.out+ w w"
PARTS = {
    "encoder": (f"{HALF}patch_embed+ w 3 patch patch, conv_out+ moments w 1 1", "transformer", BLOCK),
    "decoder": (
        f"{HALF}decoder_embed+ w token, mask_token 1 1 w, ffn.0+ pixels w 1 1, conv_out+ 3 3 3 3",
        "transformer",
        BLOCK,
    ),
    "dit": (f"{DIT}, out+ token w", "blocks", f"{MLP}{DIT_BLOCK}"),
}


def shapes_of(sizes: Sizes, *parts: str) -> Shapes:
    """Every tensor of these parts."""
    shapes = {"latent_tokens": (sizes["latents"], sizes["encoder"]["width"])} if "encoder" in parts else {}
    for part in parts:
        w, (table, name, block) = sizes[part]["width"], PARTS[part]
        known = sizes | {"w": w, "2w": 2 * w, "3w": 3 * w, "4w": 4 * w, "moments": 2 * sizes["token"]}
        known |= {"cells": (sizes["image"] // sizes["patch"]) ** 2 + 1, "pixels": 3 * sizes["patch"] ** 2}
        rows = [f"{name}.{i}.{row}" for i in range(sizes[part]["layers"]) for row in block.split(", ")]
        for tensor, *row in map(str.split, [*table.split(", "), *rows]):
            shape = tuple(known[size] if size in known else int(size) for size in row)
            pair = {f"{tensor[:-1]}.weight": shape, f"{tensor[:-1]}.bias": shape[:1]}
            shapes |= {f"{part}.{n}": s for n, s in (pair if tensor[-1] == "+" else {tensor: shape}).items()}
    return {n: s for n, s in shapes.items() if not any(absent in n for absent in sizes["without"])}


def tensors(shapes: Shapes) -> dict[str, Tensor]:
    """Of order one behind every layer, norms and biases beside what they start as."""
    made = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        made[name] = drawn / (drawn[0].numel() ** 0.5 if len(shape) in (2, 4) else 1)
        made[name] = 0.1 * drawn + (not name.endswith("bias")) if len(shape) == 1 else made[name]
    return made


@cache
def clip() -> CLIPModel:
    """Both towers of a CLIP, as transformers holds them."""
    vision = CLIP | {"image_size": 28, "patch_size": 14}
    made = CLIPModel(CLIPConfig(text_config=CLIP_TEXT, vision_config=vision, projection_dim=16)).eval()
    shapes = {name: tuple(t.shape) for name, t in made.state_dict().items() if t.is_floating_point()}
    made.load_state_dict(tensors(shapes), strict=False)
    return made


def written(folder: Path, sizes: Sizes) -> dict[str, str]:
    """Write the three things a user gives; the options that name them."""
    clip().config.save_pretrained(folder / "clip")
    put(folder / "clip", stand_in_clip(64))
    torch.save(tensors(shapes_of(sizes, "encoder", "decoder")), folder / "tatitok_bl32_vae.bin")
    towers = {name: t.contiguous() for name, t in clip().state_dict().items()}
    assert {"text_model.final_layer_norm.bias", "vision_model.post_layernorm.bias", "logit_scale"} <= towers.keys()
    positions = {"text_model.embeddings.position_ids": torch.arange(8)[None]}
    save_file(towers | positions, folder / "clip" / "model.safetensors")
    save_file(tensors(shapes_of(sizes, "dit")), folder / "dit.safetensors")
    given = {"tokenizer": "tatitok_bl32_vae.bin", "clip": "clip", "dit": "dit.safetensors"}
    return {name: str(folder / file) for name, file in given.items()}


def untold(sizes: Sizes) -> dict[str, float]:
    """The options for what no file tells: heads that are not 64 wide, and another scale."""
    parts = {name: sizes[name] for name in ("encoder", "decoder", "dit")}
    options = {f"{name}_heads": part["heads"] for name, part in parts.items() if part["width"] != 64 * part["heads"]}
    return options | ({} if sizes["scale"] == 0.7525 else {"token_scale": sizes["scale"]})
