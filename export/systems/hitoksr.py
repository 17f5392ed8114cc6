"""HiTokSR: x4 super-resolution in a single pass of predicted codebook indices.

Two components, split where the picture is a list of integers: what comes before may be judged by indices, what comes
after by pixels, and each may have a precision of its own.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tilewright.export.system import ComponentSpec, Option, Origin
from tilewright.runtime.program import Call, Grid, Pass, Program, TensorSpec, Tiles

__all__ = [
    "LICENCE",
    "OPTIONS",
    "ORIGINS",
    "PRESETS",
    "TITLE",
    "build_time",
    "components",
    "constants",
    "ignored",
    "keys",
    "origin",
    "program",
    "settings",
    "stand_in",
    "tokenizers",
]

TITLE = "HiTokSR, x4, one pass, 4 groups of 4096 codewords"
LICENCE = "DINOv3 License (vision prior); the system's own weights are the user's"
OPTIONS: dict[str, Option] = {}
ORIGINS = {"hitoksr": Origin("weights", (".",), "HiTokSR's generator, decoder and codebook, and DINOv3-B")}
PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "demo": {
        "dim": 256,
        "heads": 4,
        "depth": 3,
        "mlp_dim": 512,
        "patch_px": 4,
        "codes": 256,
        "code_dim": 4,
        "stem": (16, 48, 128),
        "stem_blocks": 2,
        "stem_norm_groups": 8,
        "class_layers": (1, 2, 3, 4),
        "vision": {
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "patch_size": 4,
            "num_register_tokens": 4,
        },
    },
    "tiny": {
        "dim": 32,
        "heads": 2,
        "depth": 2,
        "mlp_dim": 64,
        "codes": 16,
        "code_dim": 2,
        "stem": (8, 8, 16, 16, 32),
        "stem_blocks": 1,
        "stem_norm_groups": 4,
        "class_layers": (1, 2, 3, 4),
        "vision": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "patch_size": 16,
            "num_register_tokens": 4,
        },
    },
}


def components(preset: str) -> dict[str, ComponentSpec]:
    """generate: image to codes and indices. decode: codes to image."""
    groups, code_dim = PRESETS[preset].get("groups", 4), PRESETS[preset].get("code_dim", 8)
    image = TensorSpec("float32", ("batch", 3, "height", "width"))
    codes = TensorSpec("float32", ("batch", groups * code_dim, "rows", "columns"))
    indices = TensorSpec("int32", ("batch", groups, "rows", "columns"))

    patch = _patch_px(preset)
    px = {"height": 1, "width": 1, "rows": patch, "columns": patch}
    multiples = {"height": patch, "width": patch}
    coded, sizes = {"codes": codes, "indices": indices}, PRESETS[preset]
    return {
        "generate": ComponentSpec("hitoksr.generate", {"image": image}, coded, px, multiples, sizes),
        "decode": ComponentSpec("hitoksr.decode", {"codes": codes}, {"image": image}, px, {}, sizes),
    }


def program(preset: str) -> Program:
    """One pass: a tile in, a tile out. Tiles are as large as the crops of training."""
    calls = (
        Call("generate", {"image": "image"}, {"codes": "codes"}),
        Call("decode", {"codes": "codes"}, {"image": "result"}),
    )
    grids = {"image": Grid(1, 3, "input"), "result": Grid(1, 3)}
    tiles = Tiles(96, 32) if preset == "demo" else Tiles(512, 64)
    return Program(4, _patch_px(preset), grids, (Pass("restore", tiles, once=calls),))


def _patch_px(preset: str) -> int:
    return int(PRESETS[preset].get("patch_px", 16))


def settings(preset: str, given: Mapping[str, Any], origins: Mapping[str, Any]) -> dict[str, Any]:
    """There is nothing to choose."""
    return {}


def build_time(preset: str) -> dict[str, ComponentSpec]:
    """Nothing runs at build."""
    return {}


def constants(preset: str, run: Callable[..., Any], given: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """The program reads none."""
    return {}


def tokenizers(preset: str, given: Mapping[str, Any], folder: Path | None) -> dict[str, str]:
    """It takes no words."""
    return {}


def origins(component: str) -> set[str]:
    """One folder holds them all."""
    return {"hitoksr"}


def origin(component: str, parameter: str) -> str:
    """One folder holds them all."""
    return "hitoksr"


def keys(component: str, parameter: str) -> tuple[str, ...]:
    """Our own names, and DINOv3's as published or as transformers 5 spells them."""
    name = parameter.removeprefix("vision.")
    if not name.startswith("vfm."):
        return (name,)
    public = name.replace("vfm.model.layer.", "vfm.layer.")
    return (name, public, name.removeprefix("vfm."), public.removeprefix("vfm."))


def ignored(origin: str, key: str) -> bool:
    """The tokenizer's encoder and DINOv3's mask token serve training only."""
    return key.startswith("encoder.") or key.endswith("embeddings.mask_token")


def stand_in(preset: str) -> dict[str, Any]:
    """Our own names beside DINOv3's file."""
    from tilewright.export.graph.trace import parameter_specs

    named = {
        keys(component, name)[-1 if ".vfm." in name else 0]: spec
        for component, source in components(preset).items()
        for name, spec in parameter_specs(source).items()
        if not ignored("hitoksr", keys(component, name)[0])
    }
    vision = {key for key in named if key.startswith(("layer.", "embeddings.", "norm."))}
    return {
        "hitoksr.safetensors": {key: spec for key, spec in named.items() if key not in vision},
        "dinov3-vitb16/model.safetensors": {key: named[key] for key in sorted(vision)},
    }
