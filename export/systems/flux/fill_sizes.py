"""The sizes of FLUX.1-Fill, read from the user's files: transformer, VAE, schedule and tiles.

Sizes come from configuration files and from the shapes of tensors, which must agree. The preset has the others.
"""

from dataclasses import replace
from typing import Any

from tilewright.export.networks import configs
from tilewright.export.system import Preset, UserFiles
from tilewright.export.systems.flux.keys import named_by_diffusers
from tilewright.export.systems.flux.sizes import Sizes
from tilewright.export.systems.flux.user_files import (
    Shapes,
    check_joint,
    folder_of_model,
    sizes_of,
    source_of,
    warn_of_usual,
)
from tilewright.export.weights.config import read_config
from tilewright.export.weights.sizes import FileSizes, file_of, folder_of, network_sizes
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.errors import InputError

__all__ = ["fill_sizes"]


def fill_sizes(preset: Preset, files: UserFiles) -> Sizes:
    """The preset's sizes with those of the user's transformer, VAE and schedule, and with tiles that fit them."""
    usual: Sizes = preset.sizes
    vae, side = _vae(preset, files)
    transformer = _transformer(preset, files)
    sizes = replace(usual, transformer=transformer, vae=vae, schedule=_schedule(preset, files))
    _check_channels(sizes, preset, files)
    tile = max(1, (side or usual.tile_px) // sizes.multiple) * sizes.multiple
    overlap = tile * usual.overlap_px // usual.tile_px // sizes.multiple * sizes.multiple
    if not overlap and tile >= 2 * sizes.multiple:
        overlap = sizes.multiple
    whole = usual.whole_px if tile == usual.tile_px else (tile, tile)
    return replace(sizes, tile_px=tile, overlap_px=overlap, whole_px=whole)


# the transformer


def _transformer(preset: Preset, files: UserFiles) -> dict[str, Any]:
    usual = preset.sizes.transformer
    if "transformer" not in files.tensors:
        return dict(usual)
    shapes, file = Shapes("step", files.tensors["transformer"]), file_of(files.tensors["transformer"])
    shape_sizes = _transformer_shape_sizes(shapes)
    in_channels, out_channels = shape_sizes.get("in_channels"), shape_sizes.get("out_channels")
    if in_channels and out_channels and in_channels <= 2 * out_channels:
        raise InputError(
            one_line(
                f"weights {file}: the transformer takes {in_channels} channels and gives {out_channels}:"
                " this is another FLUX, without mask channels; give FLUX.1-Fill-dev"
            )
        )
    if shape_sizes and not shape_sizes["guidance_embeds"]:
        raise InputError(one_line(f"weights {file}: the transformer takes no guidance; give FLUX.1-Fill-dev"))
    return sizes_of(configs.FLUX, "transformer", preset, files, usual, shape_sizes)


def _transformer_shape_sizes(shapes: Shapes) -> dict[str, Any]:
    double, single = "transformer.transformer_blocks.{}", "transformer.single_transformer_blocks.{}"
    norm = ".attn.norm_q.weight"
    inner, width = shapes.side("transformer.x_embedder.weight", 0), None
    for block in (double, single):
        width = width or shapes.side(block.format(0) + norm, 0, axes=1)
    shape_sizes: dict[str, Any] = {
        "in_channels": shapes.side("transformer.x_embedder.weight", 1),
        "out_channels": shapes.side("transformer.proj_out.weight", 0),
        "attention_head_dim": width,
        "num_attention_heads": inner // width if inner and width else None,
        "joint_attention_dim": shapes.side("transformer.context_embedder.weight", 1),
        "pooled_projection_dim": shapes.side("transformer.time_text_embed.text_embedder.linear_1.weight", 1),
        "guidance_embeds": bool(shapes.shape("transformer.time_text_embed.guidance_embedder.linear_1.weight")),
    }
    counts = {"num_layers": shapes.blocks(double + norm), "num_single_layers": shapes.blocks(single + norm)}
    return shape_sizes | counts if inner else {}


def _check_channels(sizes: Sizes, preset: Preset, files: UserFiles) -> None:
    """Refuse channels that do not fit: a token has four cells of noise, of image and of mask, a cell all its pixels."""
    transformer, vae = (source_of(origin, preset, files) for origin in ("transformer", "vae"))
    gives, takes = (sizes.transformer[name] for name in ("out_channels", "in_channels"))
    needed = 4 * sizes.channels
    check_joint(f"{transformer} has out_channels", gives, f"{vae} needs", needed)
    check_joint(f"{transformer} has in_channels", takes, f"{vae} needs", 2 * needed + 4 * sizes.spatial**2)


# the VAE


def _vae(preset: Preset, files: UserFiles) -> tuple[dict[str, Any], int | None]:
    """The sizes of the VAE, and the side of the pictures that it was trained on if its file names one."""
    usual = preset.sizes.vae
    if "vae" not in files.tensors:
        return dict(usual), None
    shape_sizes = _vae_shape_sizes(Shapes("encode", named_by_diffusers(files.tensors["vae"])))
    sizes = sizes_of(configs.VAE, "vae", preset, files, usual, shape_sizes)
    file = folder_of(files.places["vae"]) / configs.VAE.file
    side = read_config(file, configs.VAE.classes).get("sample_size") if file.is_file() else None
    return sizes, side if type(side) is int and side > 0 else None


def _vae_shape_sizes(shapes: Shapes) -> dict[str, Any]:
    block = "encoder.down_blocks.{}.resnets.0.conv1.weight"
    widths = tuple(shapes.shape(block.format(i))[0] for i in range(shapes.blocks(block)))
    moments = shapes.side("encoder.conv_out.weight", 0, axes=4)
    if not widths:
        return {}
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": shapes.blocks("encoder.down_blocks.0.resnets.{}.conv1.weight"),
        "latent_channels": moments // 2 if moments else None,
        "use_quant_conv": bool(shapes.shape("quant_conv.weight")),
        "use_post_quant_conv": bool(shapes.shape("post_quant_conv.weight")),
    }


def _schedule(preset: Preset, files: UserFiles) -> dict[str, Any]:
    folder, usual = folder_of_model(files), preset.sizes.schedule
    if folder is None:
        return dict(usual)
    file = folder / "scheduler" / configs.FLOW.file
    values = configs.FLOW.read(file)
    if values is None:
        warn_of_usual("scheduler", file, preset, usual)
        return dict(usual)
    return network_sizes("scheduler", preset, usual, FileSizes(f"config {file}", values), None)
