"""VICR: FLUX.1-Fill restores as the right half of a diptych, led by the image's words and by what CLIP sees.

Every tile is a canvas of its own, [image | to be made]. What the words decide is apart from what the image decides, so
that a round with other words repeats only the former.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tilewright.export.system import ComponentSpec, Option, Origin
from tilewright.export.systems.flux import files as flux_files
from tilewright.export.systems.flux import fill as flux
from tilewright.export.systems.flux.keys import ignored, keys, origin, origins
from tilewright.export.systems.flux.sizes import PRESETS as SIZES
from tilewright.export.weights.lora import as_parameters
from tilewright.runtime.errors import UsageError
from tilewright.runtime.program import Call, Grid, Input, Pass, Program, State, Steps, TensorSpec, Text

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

PRESETS = {name: sizes for name, sizes in SIZES.items() if name != "demo"}  # nobody trained a small one
TITLE = "VICR, FLUX.1-Fill as a diptych, words and CLIP through a bridge, 30 steps"
LICENCE = f"{flux.LICENCE}; CLIP ViT-L/14 (MIT); the system's own weights are the user's"
PARTS = ("flux/*.py",)
STEPS = 30
OPTIONS = {
    name: option for name, option in flux.BASE_OPTIONS.items() if name not in ("prompt", "prompt_embeds", "fixed_tile")
} | {
    "clip": Option("folder of clip-vit-large-patch14", names=("clip-vit-large-patch14",)),
    "lora": Option("file with LoRA and bridge (vcb.*); its strength behind a colon", names=("vicr.safetensors",)),
    "margin_columns": Option("decode the right panel and so many latent columns, not the canvas", kind=int),
    "no_text": Option("leave the text encoders out: embeddings are given at run time", flag=True),
}
ORIGINS = flux.BASE_ORIGINS | {
    "image_encoder": Origin("clip", (".",), "CLIP ViT-L/14's image tower"),
    "lora": Origin("lora", (".",), "VICR's LoRA and bridge", read=as_parameters),
}
WORDS = ("t5_ids", "clip_ids")


def settings(preset: str, given: Mapping[str, Any], origins: Mapping[str, Any]) -> dict[str, Any]:
    """The choices of a build; text encoders are built in where they are there."""
    margin = given.get("margin_columns")
    if margin is not None and margin < 0:
        raise UsageError(f"--margin-columns {margin} must be 0 or more; 16 is usual")
    there = all(origins.get(name) is not None for name in ("text_encoder", "text_encoder_2"))
    random = origins.get("transformer") is None
    text = (there or random) and not given.get("no_text")
    chosen: dict[str, Any] = {"margin": margin, "text": text}
    return flux.base_settings(preset, given, origins, STEPS) | chosen


def components(preset: str, **settings: Any) -> dict[str, ComponentSpec]:
    """encode, see, bridge, modulate, step, decode, and the text encoders where they are built in."""
    sizes = SIZES[preset]
    projected, pooled = sizes.clip_vision["projection_dim"], sizes.transformer["pooled_projection_dim"]
    image = TensorSpec("float32", ("batch", 3, "height", "width"))
    embeds = TensorSpec("float32", ("batch", projected))

    clip, bridge = {"config": sizes.clip_vision}, {"width_in": projected, "width": sizes.bridge, "width_out": pooled}
    px = {"height": 1, "width": 1}
    joined = {"bridge": TensorSpec("float32", ("batch", pooled))}
    sources = {
        "encode": flux.encode_source(preset, diptych=True),
        "see": ComponentSpec("vision.ClipVision", {"image": image}, {"embeds": embeds}, px, arguments=clip),
        "bridge": ComponentSpec("vision.Bridge", {"embeds": embeds}, joined, arguments=bridge),
        "step": flux.step_source(preset, settings, diptych=True),
        "decode": flux.decode_source(preset, diptych=True, margin=settings["margin"]),
    }
    if settings["split"]:
        sources["modulate"] = flux.modulate_source(preset, settings, one_text=False)
    return sources | (flux.text_sources(preset) if settings["text"] else {})


def build_time(preset: str, **settings: Any) -> dict[str, ComponentSpec]:
    """Nothing runs at build: words and image decide the modulation."""
    return {}


def program(preset: str, **settings: Any) -> Program:
    """text, then condition, modulate, sample and decode, each on the same tiles."""
    sizes = SIZES[preset]
    tiles = flux.tiles(preset, settings, (sizes.tile_px, sizes.tile_px))
    steps = Steps("flow_shift", settings["steps"], sizes.multiple**2 // 2, flux.schedule_options(settings))
    inputs, passes, text = flux.caller_inputs(settings), [], "$"
    if settings["text"]:
        inputs |= {name: Input("int64", (1, n)) for name, n in zip(WORDS, (sizes.words, sizes.clip_words), strict=True)}
        encoders = (
            Call("t5", {"ids": "$t5_ids"}, {"context": "context"}),
            Call("clip", {"ids": "$clip_ids"}, {"pooled": "pooled"}),
        )
        passes.append(Pass("text", once=encoders))
        text = ""
    else:
        inputs["context"] = Input("float32", (1, sizes.words, sizes.t5["d_model"]))
        inputs["pooled"] = Input("float32", (1, sizes.clip_text["hidden_size"]))
    own = {name: f"${name}" for name in inputs}
    taken = components(preset, **settings)
    look = (
        Call("encode", {"image": "image"}, {"latent": "y"}),
        Call("see", {"image": "image"}, {"embeds": "embeds"}),
        Call("bridge", {"embeds": "embeds"}, {"bridge": "bridge"}),
    )
    passes.append(Pass("condition", tiles, once=look))
    given = own | {"pooled": f"{text}pooled", "bridge": "bridge", "sigmas": "@sigma", "context": f"{text}context"}
    if settings["split"]:
        call = Call("modulate", {n: given[n] for n in taken["modulate"].inputs}, {"modulation": "modulation"})
        passes.append(Pass("modulate", tiles, steps, once=(call,)))
    given |= {"z": "z", "y": "y", "sigma": "@sigma", "sigma_next": "@sigma_next", "modulation": "@modulation"}
    state = {"z": State((sizes.channels, f"h/{sizes.spatial}", f"w/{sizes.spatial // 2}"), "noise")}
    each = (Call("step", {n: given[n] for n in taken["step"].inputs}, {"z_next": "z"}),)
    decode = (Call("decode", {"latent": "z"}, {"image": "result"}),)
    passes += [Pass("sample", tiles, steps, state, each=each), Pass("decode", tiles, once=decode)]
    grids = {"image": Grid(1, 3, "input"), "result": Grid(1, 3)}
    texts = {"prompt": Text(dict(zip(WORDS, TOKENIZERS, strict=True)))} if settings["text"] else {}
    files = {"prompt_embeds": {"prompt_embeds": "context", "pooled_prompt_embeds": "pooled"}}
    return Program(4, sizes.multiple, grids, tuple(passes), inputs, texts, files, any_scale=True)


TOKENIZERS = ("tokenizers/t5.json", "tokenizers/clip.json")


def constants(
    preset: str, run: Callable[..., Any], given: Mapping[str, Any], folder: Path | None, **settings: Any
) -> dict[str, Any]:
    """The program reads none."""
    return {}


def tokenizers(preset: str, given: Mapping[str, Any], folder: Path | None, **settings: Any) -> dict[str, str]:
    """For the words of each image."""
    return flux.tokenizer_texts(preset, folder) if settings["text"] else {}


def stand_in(preset: str) -> dict[str, Any]:
    """The published folders, and the LoRA and bridge as the paper describes them."""
    from tilewright.export.graph.trace import parameter_specs

    sources = components("full", **settings("full", {}, {}))
    clip, bridge = (
        {str(keys(name, key)[0]): spec for key, spec in parameter_specs(sources[name]).items()}
        for name in ("see", "bridge")
    )
    double = r"transformer_blocks\.\d+\.(norm1\.linear|attn\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))"
    single = r"single_transformer_blocks\.\d+\.(norm\.linear|attn\.to_[qkv]|proj_mlp|proj_out)"
    fill = flux_files.transformer() | flux_files.vae() | flux_files.text_encoders()
    return {f"FLUX.1-Fill-dev/{name}": tensors for name, tensors in fill.items()} | {
        "clip-vit-large-patch14/model.safetensors": clip,
        "vicr.safetensors": flux_files.lora_pairs(rf"x_embedder|{double}|{single}", 32) | bridge,
    }
