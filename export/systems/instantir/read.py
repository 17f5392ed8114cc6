"""The sizes of a build, from the configuration files of SDXL and DINOv2 and the shapes of InstantIR's tensors."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tilewright.export.networks import shapes
from tilewright.export.networks.configs import (
    BIT_PROCESSOR,
    CLIP_TEXT,
    CLIP_TEXT_PROJECTED,
    DINOV2,
    NOISE_SCHEDULERS,
    UNET,
    VAE,
)
from tilewright.export.system import Preset, UserFiles
from tilewright.export.systems.instantir import modules
from tilewright.export.systems.instantir.sizes import Sizes
from tilewright.export.weights.config import Config, read_one_of
from tilewright.export.weights.sizes import FileSizes, config_beside, file_of, network_sizes
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.errors import InputError, UsageError

__all__ = ["TEXTS", "sizes_of"]

log = logging.getLogger("tilewright")
MOST_SKIPS = 9  # the UNet's graph takes residuals for no more skip connections
# the projection of this encoder is not read
CLIP_L = replace(
    CLIP_TEXT,
    defaults={key: value for key, value in CLIP_TEXT.defaults.items() if key != "projection_dim"},
    moot=(*CLIP_TEXT.moot, "projection_dim"),
)
TEXTS = ("text_encoder", "text_encoder_2")


def sizes_of(preset: Preset, files: UserFiles, *, text: bool, heads: int | None) -> Sizes:
    """All sizes. The preset has those that no file tells, `heads` is the number of the resampler's heads."""
    usual: Sizes = preset.sizes
    encoders = files if text else replace(files, tensors={})  # without text they are not read
    texts = (
        _network(CLIP_L, "text_encoder", preset, usual.text, encoders, shapes.clip_text),
        _network(CLIP_TEXT_PROJECTED, "text_encoder_2", preset, usual.text_2, encoders, shapes.clip_text),
    )
    unet = _unet(preset, files, texts[1]["projection_dim"] if text else None)
    vae = _network(VAE, "vae", preset, usual.vae, files, shapes.vae)
    dino = _network(DINOV2, "dino", preset, usual.dino, files, shapes.dinov2)
    context = int(unet["cross_attention_dim"])
    sizes = replace(
        usual,
        unet=unet,
        vae=vae,
        text=texts[0],
        text_2=texts[1],
        dino=dino,
        pixels=_pixels(preset, files),
        schedule=_schedule(preset, files),
        resampler=modules.resampler(preset, files, context, dino["hidden_size"], heads),
        hidden=modules.hidden(preset, files),
        adaptive=modules.adaptive(files),
        words=texts[0]["max_position_embeddings"] if text else usual.words,
    )
    _check(sizes, files, text=text)
    return _tiled(sizes, usual)


def _unet(preset: Preset, files: UserFiles, pooled: int | None) -> dict[str, Any]:
    """The UNet's sizes. Its added embedding holds the pooled text and six sinusoids, so one width tells the other."""
    usual, key = preset.sizes.unet, "add_embedding.linear_1.weight"
    if pooled and "unet" in files.tensors and key in files.tensors["unet"].tensors:
        joined = files.tensors["unet"].tensors[key].shape[-1]
        usual = usual | {"addition_time_embed_dim": (joined - pooled) // 6}
    return _network(UNET, "unet", preset, usual, files, shapes.unet)


def _network(
    config: Config,
    origin: str,
    preset: Preset,
    usual: Mapping[str, Any],  # the preset's, of this network
    files: UserFiles,
    sizes_from_shapes: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]],
) -> dict[str, Any]:
    """Every size of a network: from its configuration file, or without one from shapes and the preset."""
    whole = _for_each_block({**config.defaults, **usual})
    if origin not in files.tensors:
        return whole
    weights = FileSizes(
        f"weights {file_of(files.tensors[origin])}", _by_shapes(config, origin, files, sizes_from_shapes)
    )
    file_sizes = config_beside(config, files.places[origin])
    if file_sizes:
        # only sizes that the preset names are compared with the file, not the defaults of the class
        file_sizes, whole = FileSizes(file_sizes.source, _for_each_block(file_sizes.sizes)), _for_each_block(usual)
    else:
        whole |= _heads(whole, weights.sizes)
    other_sizes = file_sizes.sizes if file_sizes else whole
    shape_sizes = {
        key: _filled(value, other_sizes[key]) for key, value in weights.sizes.items() if key in config.defaults
    }
    sizes = network_sizes(origin, preset, whole, file_sizes, FileSizes(weights.source, shape_sizes))
    if file_sizes is None and (complaint := config.fits({key: _tuples(value) for key, value in sizes.items()})):
        raise InputError(one_line(f"{weights.source}: {complaint}; add its {config.file}"))
    return sizes


def _by_shapes(
    config: Config,
    origin: str,
    files: UserFiles,
    sizes_from_shapes: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]],
) -> dict[str, Any]:
    """The sizes that shapes tell, and those that must have one value. Files of another network are refused."""
    source, advice = f"weights {file_of(files.tensors[origin])}", f"give {config.classes[0]} as it was published"
    try:
        shape_sizes = sizes_from_shapes(
            {key: reference.shape for key, reference in files.tensors[origin].tensors.items()}
        )
    except KeyError as error:
        raise InputError(one_line(f"{source}: holds no {error}; {advice}")) from None
    except (ValueError, LookupError) as error:
        raise InputError(one_line(f"{source}: has other shapes ({error}); {advice}")) from None
    for key, only in config.must.items():
        if shape_sizes.get(key, only) != only:
            raise InputError(one_line(f"{source}: has {key} {shape_sizes[key]}, this graph does only {only}; {advice}"))
    return dict(config.must) | shape_sizes


def _for_each_block(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes where one number for all blocks of the UNet is repeated for each block."""
    lists = {
        key: [sizes[key]] * len(sizes["block_out_channels"])
        for key in ("attention_head_dim", "transformer_layers_per_block")
        if isinstance(sizes.get(key), int)
    }
    return {**sizes, **lists}


def _heads(sizes: Mapping[str, Any], shape_sizes: Mapping[str, Any]) -> dict[str, Any]:
    """As many heads of the preset's width as fit into the network's width."""
    if "attention_head_dim" in sizes:  # despite its name, this is the number of heads
        head = sizes["block_out_channels"][-1] // sizes["attention_head_dim"][-1]
        return {"attention_head_dim": [max(1, width // head) for width in shape_sizes["block_out_channels"]]}
    if "num_attention_heads" not in sizes:
        return {}
    head = sizes["hidden_size"] // sizes["num_attention_heads"]
    return {"num_attention_heads": max(1, shape_sizes["hidden_size"] // head)}


def _filled(value: Any, fallback: Any) -> Any:
    """A size from shapes; its numbers that shapes leave open have no effect and are filled from the fallback."""
    if not isinstance(value, list) or None not in value:
        return value
    others = fallback if len(fallback) == len(value) else [1] * len(value)
    return [other if number is None else number for number, other in zip(value, others, strict=True)]


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _pixels(preset: Preset, files: UserFiles) -> dict[str, Any]:
    """The settings of DINOv2's image processor: it resizes the shortest side, cuts out a square, normalises colours."""
    usual: dict[str, Any] = preset.sizes.pixels
    if "dino" not in files.places:
        return usual
    path = _folder(files.places["dino"]) / BIT_PROCESSOR.file
    values = BIT_PROCESSOR.read(path)
    pixels = values and {
        "side": values["crop_size"]["height"],
        "short": values["size"]["shortest_edge"],
        "mean": list(values["image_mean"]),
        "deviation": list(values["image_std"]),
    }
    return _file_or_preset("dino", preset, usual, path, pixels)


def _schedule(preset: Preset, files: UserFiles) -> dict[str, Any]:
    """The noise levels of SDXL's scheduler. Its class does not matter, as the sampler is always DDIM or DDPM."""
    from tilewright.runtime.plan.schedules import ddim

    usual: dict[str, Any] = preset.sizes.schedule
    if "unet" not in files.places:
        return usual
    path = _folder(files.places["unet"]).parent / "scheduler" / NOISE_SCHEDULERS[0].file
    values = read_one_of(NOISE_SCHEDULERS, path)
    schedule = values and {
        "betas": values["beta_schedule"],
        "beta_start": values["beta_start"],
        "beta_end": values["beta_end"],
        "spacing_offset": values["steps_offset"],
        "final_alpha": "one" if values["set_alpha_to_one"] else "first",
    }
    try:
        ddim(1, 1, **(schedule or usual))
    except UsageError as error:
        raise InputError(f"config {path}: {error}") from None
    return _file_or_preset("scheduler", preset, usual, path, schedule)


def _file_or_preset(
    what: str, preset: Preset, usual: dict[str, Any], path: Path, sizes: dict[str, Any] | None
) -> dict[str, Any]:
    """The sizes of a file, or with a warning those of the preset if there is no file."""
    if sizes is None:
        values = ", ".join(f"{name} {value}" for name, value in usual.items())
        log.warning("%s: %s is missing; using %s; add it if they differ", what, path, values)
        return usual
    return network_sizes(what, preset, usual, FileSizes(f"config {path}", sizes), None)


def _folder(place: Path) -> Path:
    """A folder of weights, or the folder of a file of weights."""
    return place if place.is_dir() else place.parent


def _check(sizes: Sizes, files: UserFiles, *, text: bool) -> None:
    """Refuse networks that do not fit each other or the graphs."""
    where = {origin: _source(origin, files) for origin in ("unet", "vae", *TEXTS, "dino")}
    unet, encoders = sizes.unet, (sizes.text, sizes.text_2)
    skips = len(sizes.residuals) - 1
    if skips > MOST_SKIPS:
        raise InputError(
            f"{where['unet']}: {len(unet['block_out_channels'])} blocks of {unet['layers_per_block']} layers"
            f" have {skips} skips, the graph takes {MOST_SKIPS}; give SDXL's UNet"
        )
    if sizes.vae["latent_channels"] != unet["in_channels"]:
        raise _unlike(where["vae"], "latent_channels", sizes.vae, where["unet"], f"takes {unet['in_channels']}")
    if sizes.pixels["side"] < sizes.dino["patch_size"]:
        complaint = f"cuts out {sizes.pixels['side']} px"
        place = _folder(files.places["dino"]) / BIT_PROCESSOR.file if "dino" in files.places else "the preset"
        raise _unlike(where["dino"], "patch_size", sizes.dino, str(place), complaint)
    if sizes.pooled < 1:
        width, key = 6 * int(unet["addition_time_embed_dim"]), "projection_class_embeddings_input_dim"
        raise _unlike(where["unet"], key, unet, "its six sinusoids", f"take {width}")
    if not text:
        return
    widths = [encoder["hidden_size"] for encoder in encoders]
    if sum(widths) != sizes.context:
        texts = f"{where[TEXTS[0]]} and {where[TEXTS[1]]}"
        raise _unlike(where["unet"], "cross_attention_dim", unet, texts, f"make {widths[0]} + {widths[1]}")
    if sizes.text_2["projection_dim"] != sizes.pooled:
        raise _unlike(where[TEXTS[1]], "projection_dim", sizes.text_2, where["unet"], f"takes {sizes.pooled}")
    words = "max_position_embeddings"
    if sizes.text[words] != sizes.text_2[words]:
        raise _unlike(where[TEXTS[0]], words, sizes.text, where[TEXTS[1]], f"has {sizes.text_2[words]}")


def _source(origin: str, files: UserFiles) -> str:
    """For messages: where the sizes of an origin's network come from."""
    if origin not in files.tensors:
        return "the preset"
    config = _folder(files.places[origin]) / "config.json"
    return f"config {config}" if config.is_file() else f"weights {file_of(files.tensors[origin])}"


def _unlike(source: str, key: str, sizes: Mapping[str, Any], other: str, complaint: str) -> InputError:
    return InputError(f"{source}: {key!r} is {sizes[key]}, {other} {complaint}; give files of one model")


def _tiled(sizes: Sizes, usual: Sizes) -> Sizes:
    """Tiles as large as the UNet's training pictures. They overlap by the same share as the preset's."""
    multiple, sample = sizes.multiple, sizes.unet["sample_size"]
    tile = sample * sizes.spatial if isinstance(sample, int) else usual.tile_px
    tile = max(multiple, tile // multiple * multiple)
    overlap = -(-tile * usual.overlap_px // (usual.tile_px * multiple)) * multiple
    return replace(sizes, tile_px=tile, overlap_px=min(overlap, tile // 2 // multiple * multiple))
