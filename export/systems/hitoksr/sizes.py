"""The sizes of HiTokSR: its presets, and reading sizes from the user's files.

A folder may hold two files config.json: one of class HiTokSR and one of DINOv3. Shapes decide what they leave open.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tilewright.export.networks.configs import DINOV3
from tilewright.export.system import Option, Preset, Tensors, UserFiles
from tilewright.export.weights.config import Config, read_config
from tilewright.export.weights.sizes import FileSizes, Shapes, blocks, file_of, network_sizes, shapes_of
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.errors import InputError, UsageError

__all__ = ["OPTIONS", "ORIGIN", "PRESETS", "PUBLISHED_VISION", "TILING", "sizes_and_licence", "sizes_of_networks"]

ORIGIN = "hitoksr"
HEAD_WIDTH = 64  # the usual width; no tensor's shape tells it
TILING = ("tile_px", "overlap_px")  # sizes that no network has
PUBLISHED_VISION = {  # the configuration file of DINOv3-B without the keys of training
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
    """Layer numbers from `3,6,9,12`."""
    layers = text.split(",")
    if not all(layer.isdigit() for layer in layers):
        raise UsageError(one_line(f"--class-layers {text!r} is not a list of layers; write 3,6,9,12"))
    return [int(layer) for layer in layers]


OPTIONS = {
    "heads": Option("attention heads, if no config.json has them", kind=int),
    "vision_heads": Option("attention heads of DINOv3, if no config.json has them", kind=int),
    "stem_norm_groups": Option("groups of the stem's norms, if no config.json has them", kind=int),
    "class_layers": Option("layers of DINOv3 whose class token is read, as 3,6,9,12", kind=_layers),
    "tile_px": Option("side of the tiles, if no config.json has it", kind=int),
    "overlap_px": Option("pixels that neighbouring tiles share, if no config.json has them", kind=int),
}
SIZE_TENSORS = {  # tensors whose shapes tell sizes -> their number of axes
    "generator.blocks.0.mlp.gate.weight": 2,
    "generator.stem.0.weight": 4,
    "decoder.out.weight": 2,
    "quantizer.codebook": 3,
}
VISION_SIZE_TENSORS = {
    "embeddings.patch_embeddings.weight": 4,
    "embeddings.register_tokens": 3,
    "layer.0.attention.q_proj.weight": 2,
    "layer.0.mlp.up_proj.weight": 2,
}
ADVICE = "give HiTokSR's files; docs/hitoksr.md names its tensors"


def sizes_of_networks(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of networks, without those of tiles."""
    return {name: size for name, size in sizes.items() if name not in TILING}


def sizes_and_licence(preset: Preset, options: Mapping[str, Any], files: UserFiles) -> tuple[dict[str, Any], str]:
    """The sizes of a build, and the licence in the configuration file, or an empty text."""
    config, vision_config = _configs(files.places[ORIGIN]) if ORIGIN in files.places else (None, None)
    licence = config.sizes.get("licence", "") if config else ""
    if config:
        apart = ("licence", "vision")
        config = FileSizes(config.source, {name: size for name, size in config.sizes.items() if name not in apart})
    usual, class_tokens = dict(preset.sizes), None
    usual_vision = {**DINOV3.defaults, **usual.pop("vision")}
    shape_sizes, vision_shape_sizes = None, None
    if tensors := files.tensors.get(ORIGIN):
        source = f"weights {file_of(tensors)}"
        shape_sizes, vision_shape_sizes = (
            FileSizes(source, _shape_sizes(tensors)),
            FileSizes(source, _vision_shape_sizes(tensors)),
        )
        class_tokens = blocks(tensors.tensors, "generator.cls.")
    if shape_sizes and vision_shape_sizes and not preset.explicit:
        width, layers = vision_shape_sizes.sizes["hidden_size"], vision_shape_sizes.sizes["num_hidden_layers"]
        usual_vision["num_attention_heads"] = _heads(width, usual_vision["num_attention_heads"])
        usual["heads"] = _heads(shape_sizes.sizes["dim"], usual["heads"])
        usual["class_layers"] = [layers * (i + 1) // class_tokens for i in range(class_tokens or 0)]  # evenly
    tile = options.get("tile_px") or (config.sizes if config else {}).get("tile_px", usual["tile_px"])
    patch = shape_sizes.sizes["patch_px"] if shape_sizes else usual["patch_px"]
    share = tile * usual["overlap_px"] // usual["tile_px"]
    usual["overlap_px"] = min(max(share, patch), tile // 2) // patch * patch
    heads = {"num_attention_heads": ("--vision-heads", options.get("vision_heads"))}
    vision = network_sizes("DINOv3", preset, usual_vision, vision_config, vision_shape_sizes, heads)
    flags = {name: (f"--{name.replace('_', '-')}", options.get(name)) for name in OPTIONS if name != "vision_heads"}
    sizes = network_sizes("HiTokSR", preset, usual, config, shape_sizes, flags) | {"vision": vision}
    if complaint := next(_complaints(sizes, class_tokens), None):
        source = config.source if config else shape_sizes.source if shape_sizes else "HiTokSR"
        raise InputError(one_line(f"{source}: {complaint}; correct config.json or the options"))
    return sizes, licence


def _heads(width: int, usual: int) -> int:
    return usual if width % HEAD_WIDTH else width // HEAD_WIDTH


def _configs(place: Path) -> tuple[FileSizes | None, FileSizes | None]:
    """The sizes in HiTokSR's configuration file and those in DINOv3's, or none."""
    files = sorted(place.rglob("config.json")) if place.is_dir() else [place.parent / "config.json"]
    configs: dict[str, list[FileSizes]] = {"HiTokSR": [], "DINOv3": []}
    for file in (file for file in files if file.is_file()):
        document = read_config(file, (*CONFIG.classes, *DINOV3.classes))
        if document.get("_class_name") not in CONFIG.classes:
            configs["DINOv3"].append(FileSizes(f"config {file}", DINOV3.values_from(document, file)))
            continue
        sizes = CONFIG.values_from(document, file)
        configs["HiTokSR"].append(
            FileSizes(f"config {file}", {name: sizes[name] for name in sizes if name in document})
        )
        if inner := document.get("vision"):
            configs["DINOv3"].append(FileSizes(f"config {file}", DINOV3.values_from(inner, file)))
    for name, candidates in configs.items():
        if len(candidates) > 1:
            both = f"{candidates[0].source.removeprefix('config ')} and {candidates[1].source.removeprefix('config ')}"
            raise InputError(one_line(f"config of {name}: {both} describe the same network; keep one of them"))
    return tuple(next(iter(candidates), None) for candidates in configs.values())  # type: ignore[return-value]


def _spelled(key: str) -> str:
    """The published name of a tensor of DINOv3."""
    return key.removeprefix("vfm.").replace("model.layer.", "layer.")


def _vision_shape_sizes(tensors: Tensors) -> dict[str, Any]:
    """The sizes of DINOv3 that the shapes of its tensors tell."""
    shapes = shapes_of("weights", tensors, VISION_SIZE_TENSORS, "give DINOv3's files beside HiTokSR's", _spelled)
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


def _shape_sizes(tensors: Tensors) -> dict[str, Any]:
    """The sizes that the shapes of HiTokSR's own tensors tell."""
    shapes = shapes_of("weights", tensors, SIZE_TENSORS, ADVICE)
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
    """The channels of each level of the stem, from the 3x3 convolutions between its residual blocks."""
    convolutions = {
        int(key.split(".")[2]): shape
        for key, shape in shapes.items()
        if key.startswith("generator.stem.") and key.count(".") == 3 and len(shape) == 4 and shape[2] == 3
    }
    return [convolutions[place][0] for place in sorted(convolutions)]


def _complaints(sizes: Mapping[str, Any], class_tokens: int | None) -> Iterator[str]:
    """Sizes that do not fit each other, one sentence each."""
    vision, patch, layers = sizes["vision"], sizes["patch_px"], sizes["class_layers"]
    tile, overlap, levels = sizes["tile_px"], sizes["overlap_px"], len(sizes["stem"])
    for heads, width in ((sizes["heads"], sizes["dim"]), (vision["num_attention_heads"], vision["hidden_size"])):
        if not _splits(width, heads):
            yield f"{heads} heads do not cut a width of {width} into equal parts of a multiple of 4"
    if sizes["stem_norm_groups"] < 1 or any(channels % sizes["stem_norm_groups"] for channels in sizes["stem"]):
        yield f"stem_norm_groups {sizes['stem_norm_groups']} do not divide the stem's channels {list(sizes['stem'])}"
    if 2 ** (levels - 1) != patch or vision["patch_size"] != patch:
        yield (
            f"patches have {patch} px in the decoder, {2 ** (levels - 1)} px in a stem of {levels} levels and"
            f" {vision['patch_size']} px in DINOv3"
        )
    if list(layers) != sorted(set(layers)) or not all(1 <= layer <= vision["num_hidden_layers"] for layer in layers):
        yield f"class_layers {list(layers)} are not rising numbers from 1 to DINOv3's {vision['num_hidden_layers']}"
    if class_tokens is not None and len(layers) != class_tokens:
        yield f"class_layers {list(layers)} are {len(layers)}, the generator reads {class_tokens} class tokens"
    if tile < 1 or tile % patch or overlap % patch or not 0 <= 2 * overlap <= tile:
        yield f"tiles of {tile} px with an overlap of {overlap} are no multiples of {patch} px, or share more than half"


def _splits(width: int, heads: int) -> bool:
    """Whether 4 divides the heads' width: positions rotate pairs of channels, half by the row, half by the column."""
    return heads > 0 and width % heads == 0 and width // heads % 4 == 0
