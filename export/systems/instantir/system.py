"""InstantIR: SDXL restores, steered at every step by a preview that the same UNet makes with a low-rank branch.

What words and image decide for all steps is computed once; a step is preview, aggregate, predict, update. Images within
1024 px are taken whole. Larger ones are tiled: joined after every step, or each tile by itself up to its pixels.
"""

import logging
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.export.system import ComponentSpec, Option, finite
from tilewright.export.systems.instantir.keys import (
    ORIGINS,
    branches_of,
    ignored,
    keys,
    lora_targets,
    named,
    origin,
    origins,
)
from tilewright.export.systems.instantir.sizes import PRESETS, Sizes
from tilewright.export.weights.files import Tensors
from tilewright.export.weights.lora import path_and_strength
from tilewright.runtime.errors import InputError, UsageError
from tilewright.runtime.program import Call, Grid, Input, Pass, Program, State, Steps, TensorSpec, Text, Tiles

__all__ = [
    "LICENCE",
    "OPTIONS",
    "ORIGINS",
    "PARTS",
    "PRESETS",
    "TITLE",
    "build_time",
    "components",
    "constants",
    "ignored",
    "keys",
    "origin",
    "origins",
    "program",
    "settings",
    "stand_in",
    "tokenizers",
]

log = logging.getLogger("tilewright")
TITLE = "InstantIR, SDXL with DINOv2's image tokens and a previewer, 30 steps"
LICENCE = "CreativeML Open RAIL++-M (SDXL); Apache-2.0 (DINOv2, InstantIR)"
PARTS = ("instantir/*.py",)
FLOAT = "float32"
STEPS, GUIDANCE, OFFSET = 30, 7.0, 1
SCHEDULE: dict[str, int | float | str] = {
    "betas": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "spacing_offset": OFFSET,
    "final_alpha": "first",
}
HEAD_WIDTH = 64  # of the resampler, whose file does not tell
PREVIEWER = "previewer_lora_weights"
OPTIONS = {
    "dino": Option("folder of dinov2-large", names=("dinov2-large",)),
    "adapter": Option("adapter.pt", names=("adapter.pt", "models/adapter.pt", "adapter.safetensors")),
    "aggregator": Option("aggregator.pt", names=("aggregator.pt", "models/aggregator.pt", "aggregator.safetensors")),
    "previewer": Option(
        "previewer_lora_weights.bin; its strength behind a colon if it is not 1",
        names=(f"{PREVIEWER}.bin", f"models/{PREVIEWER}.bin", f"{PREVIEWER}.safetensors"),
    ),
    "lora_mode": Option(
        "a branch beside weights that stay where they are, or merged copies", choices=("branch", "merge")
    ),
    "prompt": Option("words; needs the text encoders in the folder of weights"),
    "negative_prompt": Option("words to keep away from"),
    "steps": Option("sampling steps of the program", kind=int),
    "guidance": Option("default strength of classifier-free guidance (default: 7)", kind=finite),
    "dino_positions": Option(
        "DINOv2's position table as the release resized it (default), or as transformers does now",
        choices=("release", "current"),
    ),
    "join": Option("of tiles: their latents after every step, or their pixels", choices=("steps", "pixels")),
    "variant": Option("of weight files that come in several, as in model.fp16.safetensors"),
    "no_text": Option("leave the text encoders out: embeddings are given at run time", flag=True),
}
VOCABULARY = 49408
WORDS = ("ids", "ids_2")
TOKENIZERS = ("tokenizers/clip.json", "tokenizers/clip_2.json")
GATES = ("control_start", "control_end", "preview_start", "preview_end")


def settings(preset: str, given: Mapping[str, Any], found: Mapping[str, Tensors]) -> dict[str, Any]:
    """The choices of a build, and what the files say of InstantIR's own modules."""
    sizes = PRESETS[preset]
    count, strength = given.get("steps", STEPS), path_and_strength(given.get("previewer", ""))[1]
    if not 1 <= count < 1000:
        raise UsageError(f"--steps {count} must lie in 1..999")
    there = all(name in found for name in ("text_encoder", "text_encoder_2"))
    text = (there or "unet" not in found) and not given.get("no_text")
    if not text and (given.get("prompt") or given.get("negative_prompt")):
        raise UsageError("--prompt needs the text encoders; add them under --weights, or leave --no-text out")
    adapter = _adapter(sizes, named(found["adapter"])) if "adapter" in found else {}
    merged = given.get("lora_mode") == "merge"
    if merged and "lora" not in found:
        raise UsageError("--lora-mode merge needs a LoRA to merge; give --previewer FILE")
    if "lora" in found:
        branches = branches_of(found["lora"])
    else:
        depth = adapter.get("resampler", sizes.resampler)["depth"]
        branches = {name: [sizes.rank, 1 / sizes.rank] for name in lora_targets(sizes.unet, depth)}
    return {
        "steps": count,
        "guidance": given.get("guidance", GUIDANCE),
        "prompt": given.get("prompt", ""),
        "negative_prompt": given.get("negative_prompt", ""),
        "text": text,
        "joined": given.get("join", "steps") == "steps",
        "release": given.get("dino_positions", "release") == "release",
        "resampler": sizes.resampler,
        "adaptive": True,
        "hidden": _hidden(found["aggregator"]) if "aggregator" in found else sizes.hidden,
        "lora_scale": strength,
        "merged": merged,
        "branches": branches,
    } | adapter


def _adapter(sizes: Sizes, found: Tensors) -> dict[str, Any]:
    """The resampler's sizes, and whether the image attention follows the time."""
    file = found.sources[min(found.sources)]
    shapes = {key: r.shape for key, r in found.tensors.items()}
    seen = next((shape for key, shape in shapes.items() if key.endswith(".to_k_ip.weight")), None)
    if seen is None or "image_proj.latents" not in shapes:
        raise InputError(f"adapter {file}: holds no image keys with a resampler; give InstantIR's adapter.pt")
    if seen[-1] != sizes.context:
        raise InputError(
            f"adapter {file}: its image keys read {seen[-1]} numbers, SDXL's context has {sizes.context}: it is of"
            " another base model; give InstantIR's adapter.pt"
        )
    adaptive = any(".ln_k_ip." in key for key in shapes)
    if not adaptive:
        log.warning("adapter %s: has no ln_k_ip and ln_v_ip; its norms are taken as plain, without the time", file)
    try:
        return {"resampler": _resampler(sizes, shapes), "adaptive": adaptive}
    except (LookupError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"adapter {file}: its resampler cannot be read ({error}); give InstantIR's adapter.pt"
        ) from None


def _resampler(sizes: Sizes, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    inner, dim = shapes["image_proj.layers.0.0.to_q.weight"]
    head = HEAD_WIDTH if inner % HEAD_WIDTH == 0 else sizes.resampler["head_width"]
    (width_out, _), (_, width_in) = shapes["image_proj.proj_out.weight"], shapes["image_proj.proj_in.weight"]
    if (width_in, width_out) != (sizes.dino["hidden_size"], sizes.context):
        raise ValueError(f"it makes {width_out} numbers of {width_in}, not {sizes.context} of DINOv2's")
    return {
        "dim": dim,
        "depth": len({key.split(".")[2] for key in shapes if key.startswith("image_proj.layers.")}),
        "heads": max(1, inner // head),
        "head_width": head,
        "queries": shapes["image_proj.latents"][1],
        "width_in": width_in,
        "width_out": width_out,
        "multiple": shapes["image_proj.layers.0.1.1.weight"][0] // dim,
    }


def _hidden(found: Tensors) -> int:
    """The width of the aggregator's heads."""
    file = found.sources[min(found.sources)]
    if words := sorted(key for key in found.tensors if ".attn2." in key):
        raise InputError(
            f"aggregator {file}: was saved with text attention ({words[0]!r}), which InstantIR's has not;"
            " give aggregator.pt of InstantX/InstantIR"
        )
    key = "controlnet_mid_block.0.mlp_shared.0.weight"
    if key not in found.tensors or not found.tensors[key].shape:
        raise InputError(f"aggregator {file}: lacks {key!r}; give aggregator.pt of InstantX/InstantIR")
    return found.tensors[key].shape[0]


def _of_tokens(module: str) -> bool:
    """Whether a module makes keys and values of image tokens, once an image."""
    return module.startswith("encoder_hid_proj.") or bool(re.search(r"\.to_[kv]_ip$", module))


NUMBER, CHOICE = TensorSpec(FLOAT, ()), TensorSpec("int64", ())
TABLE, GATE, OF_TILE = TensorSpec(FLOAT, ("steps",)), TensorSpec(FLOAT, (1,)), TensorSpec(FLOAT, ("batch", 1))
IMAGE, LATENT = TensorSpec(FLOAT, ("batch", 3, "height", "width")), TensorSpec(FLOAT, ("batch", 4, "h", "w"))
PREDICTED = TensorSpec(FLOAT, ("batch", 2, 4, "h", "w"))  # without and with the words
TIME = dict.fromkeys(("t", "alpha", "beta"), NUMBER)


class _Specs:
    """The tensors between components that depend on a preset and its files."""

    def __init__(self, sizes: Sizes, settings: Mapping[str, Any]) -> None:
        cells = f"height/{sizes.spatial}", f"width/{sizes.spatial}"
        self.encoded = TensorSpec(FLOAT, ("batch", 4, *cells))
        self.features = TensorSpec(FLOAT, ("batch", sizes.seen, sizes.dino["hidden_size"]))
        self.table = TensorSpec(FLOAT, (1, *self.features.shape[1:]))  # of positions, and features of nothing
        self.context = TensorSpec(FLOAT, (1, sizes.words, sizes.context))
        self.pooled = dict.fromkeys(("pooled", "negative_pooled"), TensorSpec(FLOAT, (1, sizes.pooled)))
        width = 2 * _width_of_layers(sizes)
        self.words = TensorSpec(FLOAT, (2, sizes.words, width))
        self.seen = TensorSpec(FLOAT, ("batch", 2, settings["resampler"]["queries"], width))
        self.residuals = {
            name: TensorSpec(FLOAT, ("batch", 2, channels, *(f"{axis}/{part}" if part > 1 else axis for axis in "hw")))
            for name, (channels, part) in sizes.residuals.items()
        }
        self.px = {"height": 1, "width": 1, "h": sizes.spatial, "w": sizes.spatial}
        self.cells = dict.fromkeys(("h", "w"), sizes.multiple // sizes.spatial)


def components(preset: str, **settings: Any) -> dict[str, ComponentSpec]:
    """text, words, encode, start, see, look, gates, unet, aggregate, step, decode; merged, each role has networks."""
    sizes = PRESETS[preset]
    specs = _Specs(sizes, settings)
    sources = _conditions(sizes, specs) | _sampler(sizes, specs, settings) | _roles(sizes, specs, settings)
    if settings["text"]:
        ids, outputs = (
            TensorSpec("int64", (1, sizes.words)),
            {"context": specs.context, "pooled": specs.pooled["pooled"]},
        )
        arguments = {"text": sizes.text, "text_2": sizes.text_2}
        sources["text"] = ComponentSpec("instantir.Text", dict.fromkeys(WORDS, ids), outputs, arguments=arguments)
    return sources


def _conditions(sizes: Sizes, specs: _Specs) -> dict[str, ComponentSpec]:
    """What is made once of words and image, and the image at the end."""
    contexts = dict.fromkeys(("context", "negative_context"), specs.context)
    looked = {"image": IMAGE, "positions": specs.table}
    pixels = dict.fromkeys(("height", "width"), sizes.multiple)
    vae = {"config": sizes.vae}
    return {
        "words": ComponentSpec("instantir.Words", contexts, {"words": specs.words}, arguments={"config": sizes.unet}),
        "see": ComponentSpec(
            "vision.Dino", looked, {"features": specs.features}, specs.px, arguments=_dino_arguments(sizes)
        ),
        "encode": ComponentSpec("vae.Encode", {"image": IMAGE}, {"latent": specs.encoded}, specs.px, pixels, vae),
        "decode": ComponentSpec("vae.Decode", {"latent": LATENT}, {"image": IMAGE}, specs.px, specs.cells, vae),
    }


def _sampler(sizes: Sizes, specs: _Specs, settings: Mapping[str, Any]) -> dict[str, ComponentSpec]:
    """What a step is beside its predictions."""
    begin = {"latent": LATENT, "noise": LATENT, "alpha": TABLE, "beta": TABLE, "start": CHOICE}
    gates = dict.fromkeys(("control_on", "preview_on"), TensorSpec(FLOAT, ("steps", 1)))
    judged = {"z": LATENT, "y": LATENT, "noise": PREDICTED, "preview": LATENT, "delta": OF_TILE} | specs.pooled | TIME
    judged |= {"adares": CHOICE, "control_scale": NUMBER, "control_on": GATE, "preview_on": GATE}
    found = {"shown": LATENT, "moved": OF_TILE, "control": OF_TILE, "mid": specs.residuals["mid"]} | specs.residuals
    taken = {"z": LATENT, "predicted": PREDICTED, "preview": LATENT, "moved": OF_TILE, "noise": LATENT}
    taken |= {"guidance": NUMBER, "sampler": CHOICE} | TIME | dict.fromkeys(("alpha_next", "beta_next"), NUMBER)
    given = {"z_next": LATENT, "delta": OF_TILE}
    aggregator = {"config": sizes.unet, "spatial": sizes.spatial, "hidden": settings["hidden"]}
    return {
        "start": ComponentSpec("instantir.Start", begin, {"z": LATENT}, specs.px, specs.cells),
        "gates": ComponentSpec("instantir.Gates", {"t": TABLE} | dict.fromkeys(GATES, NUMBER), gates),
        "aggregate": ComponentSpec("instantir.Aggregate", judged, found, specs.px, specs.cells, aggregator),
        "step": ComponentSpec("instantir.Step", taken, given, specs.px, specs.cells, {"offset": OFFSET}),
    }


def _roles(sizes: Sizes, specs: _Specs, settings: Mapping[str, Any]) -> dict[str, ComponentSpec]:
    """The resampler and the UNet: one of each with branches, or one a role."""
    every: dict[str, Any] = {} if settings["merged"] else settings["branches"]
    strength = {} if settings["merged"] else {"lora_scale": NUMBER}
    steered = {"control": OF_TILE} | specs.residuals

    def look() -> ComponentSpec:
        mine = {module: branch for module, branch in every.items() if _of_tokens(module)}
        inputs = {"features": specs.features, "nothing": specs.table} | strength
        arguments = {"config": sizes.unet, "resampler": settings["resampler"], "branches": mine}
        return ComponentSpec("instantir.Look", inputs, {"seen": specs.seen}, arguments=arguments)

    def unet(more: dict[str, TensorSpec]) -> ComponentSpec:
        mine = {module: branch for module, branch in every.items() if not _of_tokens(module)}
        inputs = {"z": LATENT, "words": specs.words, "seen": specs.seen} | specs.pooled | {"t": NUMBER} | strength
        arguments = {"config": sizes.unet, "spatial": sizes.spatial, "adaptive": settings["adaptive"], "branches": mine}
        return ComponentSpec(
            "instantir.Unet", inputs | more, {"predicted": PREDICTED}, specs.px, specs.cells, arguments
        )

    if settings["merged"]:
        return {"look_base": look(), "look_preview": look(), "base": unet(steered), "preview": unet({})}
    return {"look": look(), "unet": unet(steered)}


def _width_of_layers(sizes: Sizes) -> int:
    """Channels of all cross-attentions together."""
    widths, layers = sizes.unet["block_out_channels"], int(sizes.unet["layers_per_block"])
    lengths = sizes.unet["transformer_layers_per_block"]
    kinds = zip(sizes.unet["down_block_types"], reversed(sizes.unet["up_block_types"]), widths, lengths, strict=True)
    total = widths[-1] * lengths[-1]  # of the middle
    for down, up, width, length in kinds:
        total += width * length * (layers * down.startswith("CrossAttn") + (layers + 1) * up.startswith("CrossAttn"))
    return int(total)


def _dino_arguments(sizes: Sizes) -> dict[str, Any]:
    return {"config": sizes.dino, "side": sizes.side, "short": sizes.short}


def build_time(preset: str, **settings: Any) -> dict[str, ComponentSpec]:
    """DINOv2's table of positions at its size here, and what it sees in nothing."""
    sizes = PRESETS[preset]
    table, arguments = _Specs(sizes, settings).table, _dino_arguments(sizes)
    resized = {"config": sizes.dino, "side": sizes.side, "release": settings["release"]}
    return {
        "positions": ComponentSpec("vision.DinoPositions", {}, {"positions": table}, arguments=resized),
        "nothing": ComponentSpec("vision.DinoOfNothing", {"positions": table}, {"nothing": table}, arguments=arguments),
    }


def constants(
    preset: str, run: Callable[..., Any], given: Mapping[str, Any], folder: Path | None, **settings: Any
) -> dict[str, Any]:
    """positions, nothing, and the strength of the previewer's branch in the base role."""
    made: dict[str, Any] = run("positions")
    made |= run("nothing", positions=made["positions"])
    return made if settings["merged"] else made | {"none": np.zeros((), np.float32)}


def program(preset: str, **settings: Any) -> Program:
    """text, words, encode, start, see, sample, decode."""
    sizes = PRESETS[preset]
    tiles = Tiles(sizes.tile_px, sizes.overlap_px, (sizes.tile_px, sizes.tile_px))
    steps = Steps("ddim", settings["steps"], options=SCHEDULE)
    text = "" if settings["text"] else "$"
    contexts = {name: f"{text}{name}" for name in ("context", "negative_context")}
    start = {"latent": "y", "noise": "~noise", "alpha": "@alpha", "beta": "@beta", "start": "$start"}
    see = Call("see", {"image": "image", "positions": "#positions"}, {"features": "features"})
    passes = (
        *((_text(),) if settings["text"] else ()),
        Pass("words", once=(Call("words", contexts, {"words": "words"}),)),
        Pass("encode", tiles, once=(Call("encode", {"image": "image"}, {"latent": "y"}),)),
        Pass("start", tiles, steps, once=(Call("start", start, {"z": "z"}),)),
        Pass("see", tiles, once=(see, *_looks(settings))),
        Pass("sample", tiles, steps, _state(sizes, settings), once=(_gates(),), each=_each(preset, settings, text)),
        Pass("decode", tiles, once=(Call("decode", {"latent": "z"}, {"image": "result"}),)),
    )
    grids = {"image": Grid(1, 3, "input"), "noise": Grid(sizes.spatial, 4), "result": Grid(1, 3)}
    if settings["joined"]:
        grids |= {"y": Grid(sizes.spatial, 4), "z": Grid(sizes.spatial, 4)}
    texts = {
        f"{prefix}prompt": Text(
            {f"{prefix}{name}": file for name, file in zip(WORDS, TOKENIZERS, strict=True)},
            settings[f"{prefix}prompt"],
        )
        for prefix in ("", "negative_")
        if settings["text"]
    }
    files = {
        "prompt_embeds": {
            f"{prefix}{tensor}_embeds": f"{prefix}{value}"
            for prefix in ("", "negative_")
            for tensor, value in (("prompt", "context"), ("pooled_prompt", "pooled"))
        }
    }
    inputs = _inputs(sizes, settings)
    return Program(4, sizes.multiple, grids, passes, inputs, texts, files, any_scale=True)


def _text() -> Pass:
    """Both texts through both encoders."""
    calls = (
        Call(
            "text",
            {name: f"${prefix}{name}" for name in WORDS},
            {name: f"{prefix}{name}" for name in ("context", "pooled")},
        )
        for prefix in ("", "negative_")
    )
    return Pass("text", once=tuple(calls))


def _looks(settings: Mapping[str, Any]) -> tuple[Call, Call]:
    """The image tokens' keys and values, as each role has them."""
    inputs = {"features": "features", "nothing": "#nothing"}
    base, preview = {"seen": "unet_seen"}, {"seen": "preview_seen"}
    if settings["merged"]:
        return Call("look_base", inputs, base), Call("look_preview", inputs, preview)
    strength = {"lora_scale": "$preview_strength"}
    return Call("look", inputs | {"lora_scale": "#none"}, base), Call("look", inputs | strength, preview)


def _each(preset: str, settings: Mapping[str, Any], text: str) -> tuple[Call, ...]:
    """A step: the previewer's prediction, its judgement, the base's prediction, the update."""
    taken, names = components(preset, **settings), list(PRESETS[preset].residuals)
    own = ("z", "y", "words", "preview", "delta", "moved", "control", "predicted", *names)
    rows = ("t", "alpha", "beta", "alpha_next", "beta_next", "control_on", "preview_on")
    known = {name: name for name in own} | {name: f"@{name}" for name in rows}
    known |= {name: f"{text}{name}" for name in ("pooled", "negative_pooled")}
    known |= {name: f"${name}" for name in ("adares", "control_scale", "guidance", "sampler")}

    def call(component: str, outputs: dict[str, str], **sources: str) -> Call:
        return Call(component, {name: (known | sources)[name] for name in taken[component].inputs}, outputs)

    base, preview = ("base", "preview") if settings["merged"] else ("unet", "unet")
    strength, judged = "$preview_strength", {"shown": "preview", "moved": "moved", "control": "control"}
    return (
        call(preview, {"predicted": "preview_noise"}, seen="preview_seen", lora_scale=strength, control="off"),
        call("aggregate", judged | {name: name for name in names}, noise="preview_noise"),
        call(base, {"predicted": "predicted"}, seen="unet_seen", lora_scale="#none"),
        call("step", {"z_next": "z", "delta": "delta"}, noise="~noise"),
    )


def _inputs(sizes: Sizes, settings: Mapping[str, Any]) -> dict[str, Input]:
    """What the caller may choose."""
    inputs = {
        "guidance": Input(FLOAT, default=settings["guidance"]),
        "control_scale": Input(FLOAT, default=1.0),
        "sampler": Input("int64", default=0, choices={"ddim": 0, "ddpm": 1}),
        "adares": Input("int64", default=0, choices={"off": 0, "paper": 1, "code": 2}),
        "start": Input("int64", default=0, choices={"image": 0, "noise": 1}),
    }
    inputs |= {name: Input(FLOAT, default=float(name.endswith("end"))) for name in GATES}
    if not settings["merged"]:
        inputs["preview_strength"] = Input(FLOAT, default=settings["lora_scale"])
    for prefix in ("", "negative_"):
        if settings["text"]:
            inputs |= {f"{prefix}{name}": Input("int64", (1, sizes.words)) for name in WORDS}
        else:
            inputs[f"{prefix}context"] = Input(FLOAT, (1, sizes.words, sizes.context))
            inputs[f"{prefix}pooled"] = Input(FLOAT, (1, sizes.pooled))
    return inputs


def _gates() -> Call:
    inputs = {"t": "@t"} | {name: f"${name}" for name in GATES}
    return Call("gates", inputs, {"control_on": "control_on", "preview_on": "preview_on"})


def _state(sizes: Sizes, settings: Mapping[str, Any]) -> dict[str, State]:
    """What a tile keeps from step to step."""
    state = {
        "preview": State((4, f"h/{sizes.spatial}", f"w/{sizes.spatial}")),
        "delta": State((1,), "ones"),
    }
    if settings["merged"]:
        return state
    residuals = {
        name: State((2, width, *(f"{axis}/{sizes.spatial * size}" for axis in "hw")))
        for name, (width, size) in sizes.residuals.items()
    }
    return state | {"off": State((1,))} | residuals  # the previewer's role takes the last step's, times zero


def tokenizers(preset: str, given: Mapping[str, Any], folder: Path | None, **settings: Any) -> dict[str, str]:
    """Of both text encoders, each with its own padding."""
    if not settings["text"]:
        return {}
    from tilewright.export import tokenizers

    sizes = PRESETS[preset]
    with tempfile.TemporaryDirectory() as temporary:
        if folder is None:
            folder, vocabulary = Path(temporary), sizes.text.get("vocab_size", VOCABULARY)
            tokenizers.put(folder / "tokenizer", tokenizers.stand_in_clip(vocabulary))
            tokenizers.put(folder / "tokenizer_2", tokenizers.stand_in_clip(vocabulary, pads_with_first=True))
        return {
            file: tokenizers.clip(folder / name, sizes.words)
            for file, name in zip(TOKENIZERS, ("tokenizer", "tokenizer_2"), strict=True)
        }


def stand_in(preset: str) -> dict[str, Any]:
    """The published files of SDXL, DINOv2 and InstantIR."""
    from tilewright.export.systems.instantir import files as instantir_files

    chosen = settings("full", {}, {})
    return instantir_files.published(components("full", **chosen) | build_time("full", **chosen))
