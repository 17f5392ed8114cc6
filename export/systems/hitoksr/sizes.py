"""The sizes of HiTokSR: presets, and what the user's files say of theirs.

The folder may hold a config.json of ours, named HiTokSR, and DINOv3's own. Shapes decide what the files are silent on.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tilewright.export.networks.configs import DINOV3
from tilewright.export.system import Option, Preset, Tensors, UserFiles
from tilewright.export.weights.config import Config, read_config
from tilewright.export.weights.sizes import Said, Shapes, blocks, file_of, network_sizes, shapes_of
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.errors import InputError, UsageError

__all__ = ["OPTIONS", "ORIGIN", "PRESETS", "PUBLISHED_VISION", "TILING", "of_networks", "sizes_and_licence"]

ORIGIN = "hitoksr"
HEAD_WIDTH = 64  # the usual one; no shape shows it
TILING = ("tile_px", "overlap_px")  # sizes that no network has
PUBLISHED_VISION = {  # DINOv3-B's configuration file, less what serves training
    "architectures": ["DINOv3ViTModel"],
    "hidden_act": "gelu",
    "hidden_size": 768,
    "image_size": 224,
    "intermediate_size": 3072,
    "key_bias": False,
    "layer_norm_eps": 1e-05,
    "layerscale_value": 1.0,
    "mlp_bias": True,
    "model_type": "dinov3_vit",
    "num_attention_heads": 12,
    "num_channels": 3,
    "num_hidden_layers": 12,
    "num_register_tokens": 4,
    "patch_size": 16,
    "pos_embed_rescale": 2.0,
    "proj_bias": True,
    "query_bias": True,
    "rope_theta": 100.0,
    "use_gated_mlp": False,
    "value_bias": True,
}
PRESETS: dict[str, dict[str, Any]] = {
    "full": {
        "dim": 768,
        "heads": 12,
        "depth": 12,
        "mlp_dim": 2048,
        "patch_px": 16,
        "groups": 4,
        "codes": 4096,
        "code_dim": 8,
        "stem": (64, 128, 256, 512, 768),
        "stem_blocks": 2,
        "stem_norm_groups": 32,
        "class_layers": (3, 6, 9, 12),
        "vision": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "patch_size": 16,
            "num_register_tokens": 4,
        },
        "tile_px": 512,
        "overlap_px": 64,
    },
    "demo": {
        "dim": 256,
        "heads": 4,
        "depth": 3,
        "mlp_dim": 512,
        "patch_px": 4,
        "groups": 4,
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
        "tile_px": 96,
        "overlap_px": 32,
    },
    "tiny": {
        "dim": 32,
        "heads": 2,
        "depth": 2,
        "mlp_dim": 64,
        "patch_px": 16,
        "groups": 4,
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
        "tile_px": 512,
        "overlap_px": 64,
    },
}
CONFIG = Config(
    ("HiTokSR",),
    {name: size for name, size in PRESETS["full"].items() if name != "vision"} | {"vision": {}, "licence": ""},
)


def _layers(text: str) -> list[int]:
    """Layers from `3,6,9,12`."""
    layers = text.split(",")
    if not all(layer.isdigit() for layer in layers):
        raise UsageError(one_line(f"--class-layers {text!r} is no list of layers; write 3,6,9,12"))
    return [int(layer) for layer in layers]


OPTIONS = {
    "heads": Option("attention heads, where no config.json says them", kind=int),
    "vision_heads": Option("attention heads of DINOv3, where no config.json says them", kind=int),
    "stem_norm_groups": Option("groups of the stem's norms, where no config.json says them", kind=int),
    "class_layers": Option("layers of DINOv3 whose class token is read, as 3,6,9,12", kind=_layers),
    "tile_px": Option("side of the tiles, where no config.json says it", kind=int),
    "overlap_px": Option("what tiles share, where no config.json says it", kind=int),
}
TELLING = {  # tensors that show sizes -> how many axes they have
    "generator.blocks.0.mlp.gate.weight": 2,
    "generator.stem.0.weight": 4,
    "decoder.out.weight": 2,
    "quantizer.codebook": 3,
}
VISION_TELLING = {
    "embeddings.patch_embeddings.weight": 4,
    "embeddings.register_tokens": 3,
    "layer.0.attention.q_proj.weight": 2,
    "layer.0.mlp.up_proj.weight": 2,
}
ADVICE = "give HiTokSR's files; docs/hitoksr.md names its tensors"


def of_networks(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that networks have."""
    return {name: size for name, size in sizes.items() if name not in TILING}


def sizes_and_licence(preset: Preset, options: Mapping[str, Any], files: UserFiles) -> tuple[dict[str, Any], str]:
    """The sizes of a build, and the licence that the configuration file names, or nothing."""
    config, vision_config = _configs(files.places[ORIGIN]) if ORIGIN in files.places else (None, None)
    licence = config.sizes.get("licence", "") if config else ""
    if config:
        apart = ("licence", "vision")
        config = Said(config.source, {name: size for name, size in config.sizes.items() if name not in apart})
    usual, class_tokens = dict(preset.sizes), None
    usual_vision = {**DINOV3.defaults, **usual.pop("vision")}
    shown, shown_vision = None, None
    if tensors := files.tensors.get(ORIGIN):
        source = f"weights {file_of(tensors)}"
        shown, shown_vision = Said(source, _shown(tensors)), Said(source, _shown_vision(tensors))
        class_tokens = blocks(tensors.tensors, "generator.cls.")
    if shown and shown_vision and not preset.asked:
        width, layers = shown_vision.sizes["hidden_size"], shown_vision.sizes["num_hidden_layers"]
        usual_vision["num_attention_heads"] = _heads(width, usual_vision["num_attention_heads"])
        usual["heads"] = _heads(shown.sizes["dim"], usual["heads"])
        usual["class_layers"] = [layers * (i + 1) // class_tokens for i in range(class_tokens or 0)]  # evenly
    tile = options.get("tile_px") or (config.sizes if config else {}).get("tile_px", usual["tile_px"])
    patch = shown.sizes["patch_px"] if shown else usual["patch_px"]
    share = tile * usual["overlap_px"] // usual["tile_px"]
    usual["overlap_px"] = min(max(share, patch), tile // 2) // patch * patch
    heads = {"num_attention_heads": ("--vision-heads", options.get("vision_heads"))}
    vision = network_sizes("DINOv3", preset, usual_vision, vision_config, shown_vision, heads)
    flags = {name: (f"--{name.replace('_', '-')}", options.get(name)) for name in OPTIONS if name != "vision_heads"}
    sizes = network_sizes("HiTokSR", preset, usual, config, shown, flags) | {"vision": vision}
    if complaint := next(_complaints(sizes, class_tokens), None):
        source = next((said.source for said in (config, shown) if said), "HiTokSR")
        raise InputError(one_line(f"{source}: {complaint}; correct config.json or the options"))
    return sizes, licence


def _heads(width: int, usual: int) -> int:
    return usual if width % HEAD_WIDTH else width // HEAD_WIDTH


def _configs(place: Path) -> tuple[Said | None, Said | None]:
    """What our own configuration file says, and what DINOv3's does."""
    files = sorted(place.rglob("config.json")) if place.is_dir() else [place.parent / "config.json"]
    said: dict[str, list[Said]] = {"HiTokSR": [], "DINOv3": []}
    for file in (file for file in files if file.is_file()):
        document = read_config(file, (*CONFIG.classes, *DINOV3.classes))
        if document.get("_class_name") not in CONFIG.classes:
            said["DINOv3"].append(Said(f"config {file}", DINOV3.of(document, file)))
            continue
        sizes = CONFIG.of(document, file)
        said["HiTokSR"].append(Said(f"config {file}", {name: sizes[name] for name in sizes if name in document}))
        if inner := document.get("vision"):
            said["DINOv3"].append(Said(f"config {file}", DINOV3.of(inner, file)))
    for name, several in said.items():
        if len(several) > 1:
            both = f"{several[0].source.removeprefix('config ')} and {several[1].source.removeprefix('config ')}"
            raise InputError(one_line(f"config of {name}: {both} are two of one network; keep one of them"))
    return tuple(next(iter(several), None) for several in said.values())  # type: ignore[return-value]


def _spelled(key: str) -> str:
    """A key of the vision model as it is published."""
    return key.removeprefix("vfm.").replace("model.layer.", "layer.")


def _shown_vision(tensors: Tensors) -> dict[str, Any]:
    """The sizes that DINOv3's tensors show."""
    shapes = shapes_of("weights", tensors, VISION_TELLING, "give DINOv3's files beside HiTokSR's", _spelled)
    width, _, patch, _ = shapes["embeddings.patch_embeddings.weight"]
    layer = "layer.0.attention"
    return {
        "hidden_size": width,
        "intermediate_size": shapes["layer.0.mlp.up_proj.weight"][0],
        "num_hidden_layers": blocks(shapes, "layer."),
        "patch_size": patch,
        "num_register_tokens": shapes["embeddings.register_tokens"][1],
        "use_gated_mlp": "layer.0.mlp.gate_proj.weight" in shapes,
        "mlp_bias": "layer.0.mlp.up_proj.bias" in shapes,
        "proj_bias": f"{layer}.o_proj.bias" in shapes,
        **{f"{name}_bias": f"{layer}.{name[0]}_proj.bias" in shapes for name in ("query", "key", "value")},
    }


def _shown(tensors: Tensors) -> dict[str, Any]:
    """The sizes that our own tensors show."""
    shapes = shapes_of("weights", tensors, TELLING, ADVICE)
    groups, codes, width = shapes["quantizer.codebook"]
    mlp_dim, dim = shapes["generator.blocks.0.mlp.gate.weight"]
    stem = _stem(shapes)
    inner = len({key.split(".")[2] for key in shapes if key.startswith("generator.stem.") and ".conv1." in key})
    return {
        "dim": dim,
        "depth": blocks(shapes, "generator.blocks."),
        "mlp_dim": mlp_dim,
        "patch_px": math.isqrt(shapes["decoder.out.weight"][0] // 3),
        "groups": groups,
        "codes": codes,
        "code_dim": width,
        "stem": stem,
        "stem_blocks": inner // max(1, len(stem)),
    }


def _stem(shapes: Shapes) -> list[int]:
    """Channels of each level: those of the 3x3 convolutions between residual blocks, in their order."""
    convolutions = {
        int(key.split(".")[2]): shape
        for key, shape in shapes.items()
        if key.startswith("generator.stem.") and key.count(".") == 3 and len(shape) == 4 and shape[2] == 3
    }
    return [convolutions[place][0] for place in sorted(convolutions)]


def _complaints(sizes: Mapping[str, Any], class_tokens: int | None) -> Iterator[str]:
    """What is wrong with sizes together."""
    vision, patch, layers = sizes["vision"], sizes["patch_px"], sizes["class_layers"]
    tile, overlap, levels = sizes["tile_px"], sizes["overlap_px"], len(sizes["stem"])
    for heads, width in ((sizes["heads"], sizes["dim"]), (vision["num_attention_heads"], vision["hidden_size"])):
        if not _splits(width, heads):
            yield f"{heads} heads do not cut a width of {width} into parts that 4 divides"
    if sizes["stem_norm_groups"] < 1 or any(channels % sizes["stem_norm_groups"] for channels in sizes["stem"]):
        yield f"stem_norm_groups {sizes['stem_norm_groups']} do not divide the stem's channels {list(sizes['stem'])}"
    if 2 ** (levels - 1) != patch or vision["patch_size"] != patch:
        yield (
            f"patches are {patch} px in the decoder, {2 ** (levels - 1)} px in a stem of {levels} levels and"
            f" {vision['patch_size']} px in DINOv3"
        )
    if list(layers) != sorted(set(layers)) or not all(1 <= layer <= vision["num_hidden_layers"] for layer in layers):
        yield f"class_layers {list(layers)} are not in order among DINOv3's {vision['num_hidden_layers']}"
    if class_tokens is not None and len(layers) != class_tokens:
        yield f"class_layers {list(layers)} are {len(layers)}, the generator reads {class_tokens} class tokens"
    if tile < 1 or tile % patch or overlap % patch or not 0 <= 2 * overlap <= tile:
        yield f"tiles of {tile} px that share {overlap} are not on patches of {patch} px, or share more than half"


def _splits(width: int, heads: int) -> bool:
    """Whether positions, which turn a quarter of a head by rows and one by columns, fit."""
    return heads > 0 and width % heads == 0 and width // heads % 4 == 0
