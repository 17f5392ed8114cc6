"""The sizes of a build: SDXL's and DINOv2's configuration files, and the shapes of InstantIR's own files."""

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
from tilewright.export.weights.sizes import Said, config_beside, file_of, network_sizes
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.errors import InputError, UsageError

__all__ = ["TEXTS", "sizes_of"]

log = logging.getLogger("tilewright")
MOST_SKIPS = 9  # that the UNet's graph takes residuals for
# whose projection is not read
CLIP_L = replace(
    CLIP_TEXT,
    defaults={key: value for key, value in CLIP_TEXT.defaults.items() if key != "projection_dim"},
    moot=(*CLIP_TEXT.moot, "projection_dim"),
)
TEXTS = ("text_encoder", "text_encoder_2")


def sizes_of(preset: Preset, files: UserFiles, *, text: bool, heads: int | None) -> Sizes:
    """All sizes; what no file tells is the preset's. `heads` are the resampler's, which no file tells."""
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
    """SDXL's UNet; beside a pooled text of known width it takes six sinusoids."""
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
    shown: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]],
) -> dict[str, Any]:
    """All that the network honours: as its configuration says, or by shapes and the preset where there is none."""
    whole = _for_each_block({**config.defaults, **usual})
    if origin not in files.tensors:
        return whole
    weights = Said(f"weights {file_of(files.tensors[origin])}", _by_shapes(config, origin, files, shown))
    said = config_beside(config, files.places[origin])
    if said:
        # the preset is held against a file by what it names, not by what its class takes without
        said, whole = Said(said.source, _for_each_block(said.sizes)), _for_each_block(usual)
    else:
        whole |= _heads(whole, weights.sizes)
    known = said.sizes if said else whole
    told = {key: _filled(value, known[key]) for key, value in weights.sizes.items() if key in config.defaults}
    sizes = network_sizes(origin, preset, whole, said, Said(weights.source, told))
    if said is None and (complaint := config.fits({key: _tuples(value) for key, value in sizes.items()})):
        raise InputError(one_line(f"{weights.source}: {complaint}; add its {config.file}"))
    return sizes


def _by_shapes(
    config: Config,
    origin: str,
    files: UserFiles,
    shown: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]],
) -> dict[str, Any]:
    """What shapes tell, and what has only one value; files of another network are refused."""
    source, advice = f"weights {file_of(files.tensors[origin])}", f"give {config.classes[0]} as it was published"
    try:
        told = shown({key: reference.shape for key, reference in files.tensors[origin].tensors.items()})
    except KeyError as error:
        raise InputError(one_line(f"{source}: holds no {error}; {advice}")) from None
    except (ValueError, LookupError) as error:
        raise InputError(one_line(f"{source}: has other shapes ({error}); {advice}")) from None
    for key, only in config.must.items():
        if told.get(key, only) != only:
            raise InputError(one_line(f"{source}: has {key} {told[key]}, this graph does only {only}; {advice}"))
    return dict(config.must) | told


def _for_each_block(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes with lists of numbers, one for each block of the UNet, where a number may stand for all."""
    lists = {
        key: [sizes[key]] * len(sizes["block_out_channels"])
        for key in ("attention_head_dim", "transformer_layers_per_block")
        if isinstance(sizes.get(key), int)
    }
    return {**sizes, **lists}


def _heads(sizes: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """Heads as wide as the preset's, so many as there is room for."""
    if "attention_head_dim" in sizes:  # which is their number, whatever the name says
        head = sizes["block_out_channels"][-1] // sizes["attention_head_dim"][-1]
        return {"attention_head_dim": [max(1, width // head) for width in told["block_out_channels"]]}
    if "num_attention_heads" not in sizes:
        return {}
    head = sizes["hidden_size"] // sizes["num_attention_heads"]
    return {"num_attention_heads": max(1, told["hidden_size"] // head)}


def _filled(told: Any, known: Any) -> Any:
    """What shapes tell. The numbers that shapes leave open have no effect, and are taken from elsewhere."""
    if not isinstance(told, list) or None not in told:
        return told
    others = known if len(known) == len(told) else [1] * len(told)
    return [other if value is None else value for value, other in zip(told, others, strict=True)]


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _pixels(preset: Preset, files: UserFiles) -> dict[str, Any]:
    """What DINOv2's image processor does: the shortest side is resized, a square is cut out, colours are normalised."""
    usual: dict[str, Any] = preset.sizes.pixels
    if "dino" not in files.places:
        return usual
    path = _folder(files.places["dino"]) / BIT_PROCESSOR.file
    said = BIT_PROCESSOR.read(path)
    pixels = said and {
        "side": said["crop_size"]["height"],
        "short": said["size"]["shortest_edge"],
        "mean": list(said["image_mean"]),
        "deviation": list(said["image_std"]),
    }
    return _said_or_usual("dino", preset, usual, path, pixels)


def _schedule(preset: Preset, files: UserFiles) -> dict[str, Any]:
    """The noise levels of SDXL's scheduler, whichever it is: the sampler is DDIM or DDPM."""
    from tilewright.runtime.plan.schedules import ddim

    usual: dict[str, Any] = preset.sizes.schedule
    if "unet" not in files.places:
        return usual
    path = _folder(files.places["unet"]).parent / "scheduler" / NOISE_SCHEDULERS[0].file
    said = read_one_of(NOISE_SCHEDULERS, path)
    schedule = said and {
        "betas": said["beta_schedule"],
        "beta_start": said["beta_start"],
        "beta_end": said["beta_end"],
        "spacing_offset": said["steps_offset"],
        "final_alpha": "one" if said["set_alpha_to_one"] else "first",
    }
    try:
        ddim(1, 1, **(schedule or usual))
    except UsageError as error:
        raise InputError(f"config {path}: {error}") from None
    return _said_or_usual("scheduler", preset, usual, path, schedule)


def _said_or_usual(
    what: str, preset: Preset, usual: dict[str, Any], path: Path, sizes: dict[str, Any] | None
) -> dict[str, Any]:
    """What a file says, or the preset's where it is not there, which is said."""
    if sizes is None:
        values = ", ".join(f"{name} {value}" for name, value in usual.items())
        log.warning("%s: %s is not there; taken are %s; add it if they differ", what, path, values)
        return usual
    return network_sizes(what, preset, usual, Said(f"config {path}", sizes), None)


def _folder(place: Path) -> Path:
    """A folder of weights, or the folder of a file of weights."""
    return place if place.is_dir() else place.parent


def _check(sizes: Sizes, files: UserFiles, *, text: bool) -> None:
    """Refuse networks that do not fit each other, or that the graphs cannot hold."""
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
    """Who tells the sizes of an origin's network."""
    if origin not in files.tensors:
        return "the preset"
    config = _folder(files.places[origin]) / "config.json"
    return f"config {config}" if config.is_file() else f"weights {file_of(files.tensors[origin])}"


def _unlike(source: str, key: str, sizes: Mapping[str, Any], other: str, complaint: str) -> InputError:
    return InputError(f"{source}: {key!r} is {sizes[key]}, {other} {complaint}; give files of one model")


def _tiled(sizes: Sizes, usual: Sizes) -> Sizes:
    """Tiles as large as the UNet was trained on, which overlap as the preset's do."""
    multiple, sample = sizes.multiple, sizes.unet["sample_size"]
    tile = sample * sizes.spatial if isinstance(sample, int) else usual.tile_px
    tile = max(multiple, tile // multiple * multiple)
    overlap = -(-tile * usual.overlap_px // (usual.tile_px * multiple)) * multiple
    return replace(sizes, tile_px=tile, overlap_px=min(overlap, tile // 2 // multiple * multiple))
