"""HiTokSR: x4 super-resolution in a single pass of predicted codebook indices.

Two components, split where the picture is a list of integers: what comes before may be judged by indices, what comes
after by pixels, and each may have a precision of its own.
"""

import json
from collections.abc import Mapping
from typing import Any

from tilewright.export.system import ComponentSpec, Origin, Preset, Settings, System, UserFiles
from tilewright.export.systems.hitoksr.sizes import (
    OPTIONS,
    ORIGIN,
    PRESETS,
    PUBLISHED_VISION,
    TILING,
    of_networks,
    sizes_and_licence,
)
from tilewright.runtime.bundle.program import Call, Grid, Pass, Program, TensorSpec, Tiles

__all__ = ["SYSTEM"]


def settings(preset: Preset, options: Mapping[str, Any], files: UserFiles) -> Settings:
    """The sizes that files say, and the licence of the user's weights where their config.json names one."""
    sizes, licence = sizes_and_licence(preset, options, files)
    return Settings(sizes, {"licence": licence} if licence else {})


def components(settings: Settings) -> dict[str, ComponentSpec]:
    """generate: image to codes and indices. decode: codes to image."""
    sizes = settings.sizes
    groups, patch = sizes["groups"], sizes["patch_px"]
    image = TensorSpec("float32", ("batch", 3, "height", "width"))
    codes = TensorSpec("float32", ("batch", groups * sizes["code_dim"], "rows", "columns"))
    indices = TensorSpec("int32", ("batch", groups, "rows", "columns"))

    px = {"height": 1, "width": 1, "rows": patch, "columns": patch}
    multiples = {"height": patch, "width": patch}
    coded = {"codes": codes, "indices": indices}
    arguments = of_networks(sizes)
    return {
        "generate": ComponentSpec("hitoksr.generate", {"image": image}, coded, px, multiples, arguments),
        "decode": ComponentSpec("hitoksr.decode", {"codes": codes}, {"image": image}, px, {}, arguments),
    }


def program(settings: Settings) -> Program:
    """One pass: a tile in, a tile out. Tiles are as large as the crops of training."""
    calls = (
        Call("generate", {"image": "image"}, {"codes": "codes"}),
        Call("decode", {"codes": "codes"}, {"image": "result"}),
    )
    grids = {"image": Grid(1, 3, "input"), "result": Grid(1, 3)}
    tiles = Tiles(*(settings.sizes[name] for name in TILING))
    return Program(4, settings.sizes["patch_px"], grids, (Pass("restore", tiles, once=calls),))


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


def stand_in() -> dict[str, Any]:
    """Our own file and DINOv3's folder, each with its configuration."""
    from tilewright.export.graph.trace import parameter_specs

    sizes, _ = sizes_and_licence(Preset("full", PRESETS["full"], True), {}, UserFiles({}, {}))
    named = {
        keys(component, name)[-1 if ".vfm." in name else 0]: spec
        for component, network in components(Settings(sizes)).items()
        for name, spec in parameter_specs(network).items()
        if not ignored(ORIGIN, keys(component, name)[0])
    }
    vision = {key for key in named if key.startswith(("layer.", "embeddings.", "norm."))}
    config = {"_class_name": "HiTokSR"} | {name: size for name, size in sizes.items() if name != "vision"}
    return {
        "config.json": json.dumps(config, indent=2),
        "hitoksr.safetensors": {key: spec for key, spec in named.items() if key not in vision},
        "dinov3-vitb16/config.json": json.dumps(PUBLISHED_VISION, indent=2),
        "dinov3-vitb16/model.safetensors": {key: named[key] for key in sorted(vision)},
    }


SYSTEM = System(
    name="hitoksr",
    title="HiTokSR, x4, one pass, 4 groups of 4096 codewords",
    licence="DINOv3 License (vision prior); the system's own weights are the user's",
    base_models=("facebook/dinov3-vitb16-pretrain-lvd1689m",),
    presets=PRESETS,
    options=OPTIONS,
    origins={ORIGIN: Origin("weights", (".",), "HiTokSR's generator, decoder and codebook, and DINOv3-B")},
    settings=settings,
    components=components,
    program=program,
    keys=keys,
    ignored=ignored,
    stand_in=stand_in,
)
