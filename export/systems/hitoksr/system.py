"""HiTokSR: x4 super-resolution in a single pass of predicted codebook indices.

Two components meet where the picture is a list of integers. The first is judged by its indices, the second by its
pixels, and each may have its own precision.
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
    sizes_and_licence,
    sizes_of_networks,
)
from tilewright.runtime.bundle.program import Call, Grid, Pass, Program, TensorSpec, Tiles

__all__ = ["SYSTEM"]


def settings(preset: Preset, options: Mapping[str, Any], files: UserFiles) -> Settings:
    """The sizes in the user's files, and the licence of the weights if their config.json names one."""
    sizes, licence = sizes_and_licence(preset, options, files)
    return Settings(sizes, {"licence": licence} if licence else {})


def components(settings: Settings) -> dict[str, ComponentSpec]:
    """Two networks: `generate` makes codes and indices of an image, `decode` an image of codes."""
    sizes = settings.sizes
    groups, patch = sizes["groups"], sizes["patch_px"]
    image = TensorSpec("float32", ("batch", 3, "height", "width"))
    codes = TensorSpec("float32", ("batch", groups * sizes["code_dim"], "rows", "columns"))
    indices = TensorSpec("int32", ("batch", groups, "rows", "columns"))

    px = {"height": 1, "width": 1, "rows": patch, "columns": patch}
    multiples = {"height": patch, "width": patch}
    coded = {"codes": codes, "indices": indices}
    arguments = sizes_of_networks(sizes)
    return {
        "generate": ComponentSpec("hitoksr.generate", {"image": image}, coded, px, multiples, arguments),
        "decode": ComponentSpec("hitoksr.decode", {"codes": codes}, {"image": image}, px, {}, arguments),
    }


def program(settings: Settings) -> Program:
    """One pass over tiles, which are as large as the crops of training."""
    calls = (
        Call("generate", {"image": "image"}, {"codes": "codes"}),
        Call("decode", {"codes": "codes"}, {"image": "result"}),
    )
    grids = {"image": Grid(1, 3, "input"), "result": Grid(1, 3)}
    tiles = Tiles(*(settings.sizes[name] for name in TILING))
    return Program(4, settings.sizes["patch_px"], grids, (Pass("restore", tiles, once=calls),))


def keys(component: str, parameter: str) -> tuple[str, ...]:
    """The names of a parameter: ours, and for DINOv3 also the published ones and those of transformers 5."""
    name = parameter.removeprefix("vision.")
    if not name.startswith("vfm."):
        return (name,)
    public = name.replace("vfm.model.layer.", "vfm.layer.")
    return (name, public, name.removeprefix("vfm."), public.removeprefix("vfm."))


def ignored(origin: str, key: str) -> bool:
    """Whether a key serves training only: the tokenizer's encoder and DINOv3's mask token."""
    return key.startswith("encoder.") or key.endswith("embeddings.mask_token")


def stand_in() -> dict[str, Any]:
    """HiTokSR's file and DINOv3's folder, each with its configuration file."""
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
    keep={
        "generate/generator.stem.*": "the first convolutions read the picture",
        "generate/generator.head*": "the scores decide the choices",
        "generate/vision.*.patch_embeddings.*": "it reads the picture",
        "decode/decoder.embed.*": "it reads the codes",
        "decode/decoder.out.*": "it makes the picture",
    },
    stand_in=stand_in,
)
