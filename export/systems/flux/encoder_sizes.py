"""The sizes of the encoders around FLUX.1-Fill, read from the user's configuration files and tensor shapes."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tilewright.export.networks import configs
from tilewright.export.system import Preset, UserFiles
from tilewright.export.systems.flux.sizes import CLIP_TEXT, Sizes
from tilewright.export.systems.flux.user_files import (
    Shapes,
    check_joint,
    config_sizes,
    folder_of_model,
    sizes_of,
    source_of,
    warn_of_usual,
)
from tilewright.export.weights.config import Config, read_json
from tilewright.export.weights.sizes import FileSizes, file_of, folder_of, network_sizes
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.errors import InputError

__all__ = ["bridge_size", "clip_vision_sizes", "siglip_sizes", "text_sizes", "words_size"]

LONGEST = 4096  # words; a tokenizer without a limit names a huge number instead


def text_sizes(sizes: Sizes, preset: Preset, files: UserFiles) -> Sizes:
    """Add the sizes of both text encoders, and the number of words that their tokenizers take."""
    usual: Sizes = preset.sizes
    t5 = _encoder(configs.T5, "text_encoder_2", preset, files, usual.t5)
    clip = _encoder(CLIP_TEXT, "text_encoder", preset, files, usual.clip_text)
    first, second, transformer = (
        source_of(origin, preset, files) for origin in ("text_encoder", "text_encoder_2", "transformer")
    )
    check_joint(f"{second} has d_model", t5["d_model"], f"{transformer} has joint_attention_dim", sizes.context)
    width = clip["hidden_size"]
    check_joint(f"{first} has hidden_size", width, f"{transformer} has pooled_projection_dim", sizes.pooled)
    most = clip["max_position_embeddings"]
    clip_words = _length("tokenizer", {"clip_words": usual.clip_words}, preset, files, most)
    return replace(sizes, t5=t5, clip_text=clip, words=words_size(preset, files), clip_words=clip_words)


def words_size(preset: Preset, files: UserFiles) -> int:
    """The number of ids that T5 reads."""
    return _length("tokenizer_2", {"words": preset.sizes.words}, preset, files, LONGEST)


def _length(tokenizer: str, usual: dict[str, int], preset: Preset, files: UserFiles, most: int) -> int:
    (name,) = usual
    folder = folder_of_model(files)
    file = folder / tokenizer / "tokenizer_config.json" if folder else None
    length = read_json(file).get("model_max_length") if file and file.is_file() else None
    if type(length) is not int or not 2 <= length <= LONGEST:
        return min(usual[name], most)
    config = FileSizes(f"config {file}", {name: min(length, most)})
    return int(network_sizes(tokenizer, preset, usual, config, None)[name])


def _encoder(config: Config, origin: str, preset: Preset, files: UserFiles, usual: Mapping[str, Any]) -> dict[str, Any]:
    if origin not in files.tensors:
        return dict(usual)
    shapes = Shapes("clip" if origin == "text_encoder" else "t5", files.tensors[origin])
    shape_sizes = _clip_shape_sizes(shapes) if origin == "text_encoder" else _t5_shape_sizes(shapes)
    return sizes_of(config, origin, preset, files, usual, shape_sizes)


def _t5_shape_sizes(shapes: Shapes) -> dict[str, Any]:
    block = "model.encoder.block.{}.layer."
    attention, dense = f"{block.format(0)}0.SelfAttention.", f"{block.format(0)}1.DenseReluDense."
    heads, inner = shapes.side(f"{attention}relative_attention_bias.weight", 1), shapes.side(f"{attention}q.weight", 0)
    plain = shapes.side(f"{dense}wi.weight", 0)  # only the first T5 has this weight, and no gates
    return {
        "vocab_size": shapes.side("model.shared.weight", 0),
        "d_model": shapes.side("model.shared.weight", 1),
        "num_heads": heads,
        "d_kv": inner // heads if heads and inner else None,
        "d_ff": plain or shapes.side(f"{dense}wi_0.weight", 0),
        "feed_forward_proj": "relu" if plain else None,
        "num_layers": shapes.blocks(f"{block}0.SelfAttention.q.weight") or None,
        "relative_attention_num_buckets": shapes.side(f"{attention}relative_attention_bias.weight", 0),
    }


def _clip_shape_sizes(shapes: Shapes) -> dict[str, Any]:
    return {
        "vocab_size": shapes.side("model.embeddings.token_embedding.weight", 0),
        "hidden_size": shapes.side("model.embeddings.token_embedding.weight", 1),
        "intermediate_size": shapes.side("model.encoder.layers.0.mlp.fc1.weight", 0),
        "num_hidden_layers": shapes.blocks("model.encoder.layers.{}.mlp.fc1.weight") or None,
        "max_position_embeddings": shapes.side("model.embeddings.position_embedding.weight", 0),
    }


# the image encoders


def siglip_sizes(sizes: Sizes, preset: Preset, files: UserFiles) -> Sizes:
    """Add the sizes of SigLIP and its image processor. Check Redux, which lies between SigLIP and the transformer."""
    usual: Sizes = preset.sizes
    siglip = _vision(configs.SIGLIP, preset, files, usual.siglip, "model.")
    processor = _processor(configs.SIGLIP_PROCESSOR, preset, files, usual.siglip_processor, siglip["image_size"])
    if "image_embedder" in files.tensors:
        _check_redux(siglip["hidden_size"], sizes.context, preset, files)
    return replace(sizes, siglip=siglip, siglip_processor=processor)


def _check_redux(width_in: int, width_out: int, preset: Preset, files: UserFiles) -> None:
    """Refuse a Redux whose widths are not those of SigLIP and the transformer."""
    shapes, ends = (
        Shapes("redux", files.tensors["image_embedder"]),
        {"redux_dim": width_in, "txt_in_features": width_out},
    )
    first, last = shapes.side("model.redux_up.weight", 1), shapes.side("model.redux_down.weight", 0)
    shape_sizes = {"redux_dim": first, "txt_in_features": last}
    between = replace(preset, explicit=False)  # a preset has no widths for Redux: its neighbours decide them
    redux = sizes_of(configs.REDUX, "image_embedder", between, files, ends, shape_sizes)
    embedder, encoder, transformer = (
        source_of(origin, preset, files) for origin in ("image_embedder", "image_encoder", "transformer")
    )
    check_joint(f"{embedder} has redux_dim", redux["redux_dim"], f"{encoder} has hidden_size", width_in)
    features = redux["txt_in_features"]
    check_joint(f"{embedder} has txt_in_features", features, f"{transformer} has joint_attention_dim", width_out)


def clip_vision_sizes(sizes: Sizes, preset: Preset, files: UserFiles) -> Sizes:
    """Add the sizes of CLIP's image encoder and its image processor."""
    usual: Sizes = preset.sizes
    clip = _vision(configs.CLIP_VISION, preset, files, usual.clip_vision, "model.vision_model.")
    processor = _processor(configs.CLIP_PROCESSOR, preset, files, usual.clip_processor, clip["image_size"])
    return replace(sizes, clip_vision=clip, clip_processor=processor)


def _vision(config: Config, preset: Preset, files: UserFiles, usual: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    if "image_encoder" not in files.tensors:
        return dict(usual)
    shapes = Shapes("see", files.tensors["image_encoder"])
    shape_sizes = {
        "hidden_size": shapes.side(f"{prefix}embeddings.patch_embedding.weight", 0, axes=4),
        "intermediate_size": shapes.side(f"{prefix}encoder.layers.0.mlp.fc1.weight", 0),
        "num_hidden_layers": shapes.blocks(f"{prefix}encoder.layers.{{}}.mlp.fc1.weight") or None,
        "patch_size": shapes.side(f"{prefix}embeddings.patch_embedding.weight", 2, axes=4),
    }
    if "projection_dim" in usual:
        shape_sizes["projection_dim"] = shapes.side("model.visual_projection.weight", 0)
    positions = shapes.side(f"{prefix}embeddings.position_embedding.weight", 0)
    if positions and shape_sizes["patch_size"]:
        classes = 1 if shapes.shape(f"{prefix}embeddings.class_embedding") else 0
        cells, patch = math.isqrt(positions - classes), shape_sizes["patch_size"]
        file_sizes = config_sizes(config, "image_encoder", files)
        # several sides have as many patches: 384 and 378 px both have 27 of 14, so the named side comes first
        candidates = (file_sizes.sizes["image_size"] if file_sizes else 0, usual["image_size"])
        shape_sizes["image_size"] = next((side for side in candidates if side // patch == cells), cells * patch)
    return sizes_of(config, "image_encoder", preset, files, usual, shape_sizes)


def _processor(config: Config, preset: Preset, files: UserFiles, usual: Mapping[str, Any], side: int) -> dict[str, Any]:
    """The settings of the image processor, which must make images of the side that the encoder takes."""
    square, cut = {"height": side, "width": side}, "crop_size" in usual
    fitting = dict(usual) | ({"size": {"shortest_edge": side}, "crop_size": square} if cut else {"size": square})
    if "image_encoder" not in files.places:
        return fitting
    folder = folder_of(files.places["image_encoder"])
    folders = [folder, folder.parent / "feature_extractor"] if folder.name == "image_encoder" else [folder]
    file = next((f / config.file for f in folders if (f / config.file).is_file()), folders[-1] / config.file)
    values = config.read(file)
    if values is None:
        warn_of_usual("image processor", file, preset, fitting)
        return fitting
    image_side = values["crop_size" if cut else "size"]["height"]
    encoder = source_of("image_encoder", preset, files)
    check_joint(f"config {file} makes images of", image_side, f"{encoder} takes images of", side)
    return network_sizes("image processor", preset, fitting, FileSizes(f"config {file}", values), None)


def bridge_size(sizes: Sizes, preset: Preset, files: UserFiles) -> int:
    """The width of VICR's bridge, which lies between CLIP's embedding and the pooled text."""
    if "lora" not in files.tensors:
        return int(preset.sizes.bridge)
    tensors = files.tensors["lora"]
    file, shapes = file_of(tensors), Shapes("bridge", tensors)
    first, last = shapes.shape("fc1.weight"), shapes.shape("fc2.weight")
    if len(first) != 2 or len(last) != 2:
        some = ", ".join(sorted(tensors.tensors)[:3])
        raise InputError(
            one_line(
                f"weights {file}: holds {some}, but no bridge (vcb.fc1.weight, vcb.fc2.weight, ...);"
                " give VICR's file, which has LoRA and bridge"
            )
        )
    clip, transformer = source_of("image_encoder", preset, files), source_of("transformer", preset, files)
    embedding = sizes.clip_vision["projection_dim"]
    check_joint(f"weights {file}: the bridge takes", first[1], f"{clip} has projection_dim", embedding)
    check_joint(f"weights {file}: the bridge gives", last[0], f"{transformer} has pooled_projection_dim", sizes.pooled)
    file_sizes = FileSizes(f"weights {file}", {"bridge": first[0]})
    return int(network_sizes("bridge", preset, {"bridge": preset.sizes.bridge}, None, file_sizes)["bridge"])
