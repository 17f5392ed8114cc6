"""HiTokSR: x4 super-resolution in a single pass of predicted codebook indices.

Two components, split where the picture is a list of integers: what comes before may be judged by indices, what comes
after by pixels, and each may have a precision of its own.
"""

from typing import Any

from tilewright.export.systems import Source
from tilewright.runtime.program import Call, Grid, Pass, Program, TensorSpec, Tiles

__all__ = ["LICENCE", "PRESETS", "TITLE", "components", "ignored", "keys", "program"]

TITLE = "HiTokSR, x4, one pass, 4 groups of 4096 codewords"
LICENCE = "DINOv3 License (vision prior); the system's own weights are the user's"
PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
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


def components(preset: str) -> dict[str, Source]:
    """generate: image to codes and indices. decode: codes to image."""
    groups, code_dim = PRESETS[preset].get("groups", 4), PRESETS[preset].get("code_dim", 8)
    image = TensorSpec("float32", ("batch", 3, "height", "width"))
    codes = TensorSpec("float32", ("batch", groups * code_dim, "rows", "columns"))
    indices = TensorSpec("int32", ("batch", groups, "rows", "columns"))

    px = {"height": 1, "width": 1, "rows": 16, "columns": 16}

    def network(name: str) -> object:
        from tilewright.export.networks import hitoksr

        return getattr(hitoksr, name)(hitoksr.HiTokConfig(**PRESETS[preset]))

    return {
        "generate": Source(
            lambda: network("Generate"),
            {"image": image},
            {"codes": codes, "indices": indices},
            "hitoksr",
            px,
            {"height": 16, "width": 16},
        ),
        "decode": Source(lambda: network("Decode"), {"codes": codes}, {"image": image}, "hitoksr", px),
    }


def program(preset: str) -> Program:
    """One pass: a tile in, a tile out. The networks were trained at 512 px, so larger images are tiled."""
    calls = (
        Call("generate", {"image": "image"}, {"codes": "codes"}),
        Call("decode", {"codes": "codes"}, {"image": "result"}),
    )
    grids = {"image": Grid(1, 3, "input"), "result": Grid(1, 3)}
    return Program(4, 16, grids, (Pass("restore", Tiles(512, 64), once=calls),))


def keys(component: str, parameter: str) -> tuple[str, ...]:
    """Our own names, and DINOv3's as published or as transformers 5 spells them."""
    name = parameter.removeprefix("vision.")
    if not name.startswith("vfm."):
        return (name,)
    public = name.replace("vfm.model.layer.", "vfm.layer.")
    return (name, public, name.removeprefix("vfm."), public.removeprefix("vfm."))


def ignored(key: str) -> bool:
    """The tokenizer's encoder and DINOv3's mask token serve training only."""
    return key.startswith("encoder.") or key.endswith("embeddings.mask_token")
