"""The sizes of InstantIR's own modules. No configuration file is published, so the shapes of tensors tell them."""

import logging
from collections.abc import Mapping
from typing import Any

from tilewright.export.system import Preset, Tensors, UserFiles
from tilewright.export.systems.instantir.keys import named
from tilewright.export.weights.sizes import FileSizes, file_of, network_sizes
from tilewright.runtime.errors import InputError, UsageError

__all__ = ["adaptive", "hidden", "resampler"]

log = logging.getLogger("tilewright")
HEAD_WIDTH = 64  # width of the published resampler's heads
HEADS = ("heads", "head_width")  # sizes of the resampler that no shape tells
IN_BLOCK = "image_proj.layers."


def resampler(preset: Preset, files: UserFiles, context: int, features: int, heads: int | None) -> dict[str, int]:
    """The sizes of the resampler, which turns features of DINOv2 into image tokens as wide as the context."""
    usual: dict[str, int] = preset.sizes.resampler
    if "adapter" not in files.tensors:
        sizes = usual | {"width_in": features, "width_out": context}
        return _with_heads(sizes, usual["heads"] * usual["head_width"], usual["heads"] if heads is None else heads)
    adapter, file = named(files.tensors["adapter"]), file_of(files.tensors["adapter"])
    shapes = {key: reference.shape for key, reference in adapter.tensors.items()}
    read = next((shape for key, shape in shapes.items() if key.endswith(".to_k_ip.weight")), None)
    if read is None or "image_proj.latents" not in shapes:
        raise InputError(f"adapter {file}: holds no image keys with a resampler; give InstantIR's adapter.pt")
    if read[-1] != context:
        raise InputError(
            f"adapter {file}: its image keys read {read[-1]} numbers, SDXL's context has {context}: it is of"
            " another base model; give InstantIR's adapter.pt"
        )
    try:
        sizes, inner = _resampler(shapes)
        if (sizes["width_in"], sizes["width_out"]) != (features, context):
            widths = f"it makes {sizes['width_out']} numbers of {sizes['width_in']}"
            raise ValueError(f"{widths}, not {context} of DINOv2's {features}")
    except (LookupError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"adapter {file}: its resampler cannot be read ({error}); give InstantIR's adapter.pt"
        ) from None
    others = {key: value for key, value in usual.items() if key not in HEADS}
    sizes = network_sizes("adapter", preset, others, None, FileSizes(f"adapter {file}", sizes))
    if heads is None:
        width = next((w for w in (HEAD_WIDTH, usual["head_width"]) if inner % w == 0), inner)
        heads = inner // width
        log.warning(
            "adapter %s: does not tell its resampler's heads; using %d of width %d; set them with"
            " --resampler-heads if they differ",
            file,
            heads,
            width,
        )
    return _with_heads(sizes, inner, heads)


def _with_heads(sizes: Mapping[str, int], inner: int, heads: int) -> dict[str, int]:
    if heads < 1 or inner % heads:
        raise UsageError(f"--resampler-heads {heads} does not divide the resampler's {inner} channels; give another")
    return dict(sizes) | dict(zip(HEADS, (heads, inner // heads), strict=True))


def _resampler(shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, int], int]:
    """The resampler's sizes without its heads, and the width of all heads together."""
    inner, dim = shapes[f"{IN_BLOCK}0.0.to_q.weight"]
    (width_out, _), (_, width_in) = shapes["image_proj.proj_out.weight"], shapes["image_proj.proj_in.weight"]
    sizes = {
        "dim": dim,
        "depth": len({key.split(".")[2] for key in shapes if key.startswith(IN_BLOCK)}),
        "queries": shapes["image_proj.latents"][1],
        "width_in": width_in,
        "width_out": width_out,
        "multiple": shapes[f"{IN_BLOCK}0.1.1.weight"][0] // dim,
    }
    return sizes, inner


def adaptive(files: UserFiles) -> bool:
    """Whether the norms of the image attention depend on the time step."""
    adapter = files.tensors.get("adapter")
    if adapter is None or any(".ln_k_ip." in key for key in adapter.tensors):
        return True
    file = file_of(files.tensors["adapter"])
    log.warning("adapter %s: has no ln_k_ip and ln_v_ip; using plain norms that ignore the time step", file)
    return False


def hidden(preset: Preset, files: UserFiles) -> int:
    """The width of the aggregator's heads."""
    usual: dict[str, Any] = {"hidden": preset.sizes.hidden}
    if "aggregator" not in files.tensors:
        return int(usual["hidden"])
    aggregator, file = files.tensors["aggregator"], file_of(files.tensors["aggregator"])
    width = _hidden(aggregator, file)
    _check_like_unet(aggregator, file, files)
    network_sizes("aggregator", preset, usual, None, FileSizes(f"aggregator {file}", {"hidden": width}))
    return width


def _hidden(aggregator: Tensors, file: str) -> int:
    if words := sorted(key for key in aggregator.tensors if ".attn2." in key):
        raise InputError(
            f"aggregator {file}: has text attention ({words[0]!r}), and InstantIR's has none;"
            " give aggregator.pt of InstantX/InstantIR"
        )
    key = "controlnet_mid_block.0.mlp_shared.0.weight"
    if key not in aggregator.tensors or not aggregator.tensors[key].shape:
        raise InputError(f"aggregator {file}: lacks {key!r}; give aggregator.pt of InstantX/InstantIR")
    return int(aggregator.tensors[key].shape[0])


def _check_like_unet(aggregator: Tensors, file: str, files: UserFiles) -> None:
    """Refuse an aggregator whose layers have other shapes than the layers of the same name in the UNet."""
    unet = files.tensors.get("unet")
    if unet is None:
        return
    for key, tensor in aggregator.tensors.items():
        other = unet.tensors.get(key)
        if other and other.shape != tensor.shape:
            raise InputError(
                f"aggregator {file}: {key!r} has shape {list(tensor.shape)}, {file_of(unet)} has"
                f" {list(other.shape)}: it is of another base model; give aggregator.pt of InstantX/InstantIR"
            )
