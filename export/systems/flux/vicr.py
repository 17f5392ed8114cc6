"""VICR: FLUX.1-Fill makes the restored image as the right half of a diptych, led by a prompt and by CLIP's embedding.

Every tile is its own canvas: the degraded image on the left, the restored one on the right. Prompt and image have
separate passes, so that another prompt for the same image repeats only the passes of the prompt.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tilewright.export.networks import configs
from tilewright.export.system import ComponentSpec, Option, Origin, Preset, Settings, System, UserFiles
from tilewright.export.systems.flux import fill
from tilewright.export.systems.flux.encoder_sizes import bridge_size, clip_vision_sizes, text_sizes, words_size
from tilewright.export.systems.flux.fill_sizes import fill_sizes
from tilewright.export.systems.flux.keys import ignored, keys, origin
from tilewright.export.systems.flux.sizes import PRESETS as SIZES
from tilewright.export.weights.lora import as_parameters
from tilewright.runtime.bundle.program import (
    Call,
    Grid,
    Input,
    Pass,
    Program,
    State,
    Steps,
    TensorFile,
    TensorSpec,
    Text,
)
from tilewright.runtime.errors import UsageError

__all__ = ["SYSTEM"]

PRESETS = {name: sizes for name, sizes in SIZES.items() if name != "demo"}  # the demo's weights are In-Token's
STEPS = 30
OPTIONS = {
    name: option for name, option in fill.BASE_OPTIONS.items() if name not in ("prompt", "prompt_embeds", "fixed_tile")
} | {
    "clip": Option("folder of clip-vit-large-patch14", names=("clip-vit-large-patch14",)),
    "lora": Option("file with LoRA and bridge (vcb.*); its strength behind a colon", names=("vicr.safetensors",)),
    "margin_columns": Option("decode only the right half and so many latent columns beside it", kind=int),
    "no_text": Option("leave the text encoders out: the caller gives embeddings", flag=True),
}
ORIGINS = fill.BASE_ORIGINS | {
    "image_encoder": Origin("clip", (".",), "CLIP ViT-L/14's image tower"),
    "lora": Origin("lora", (".",), "VICR's LoRA and bridge", rename=as_parameters),
}
WORDS = ("t5_ids", "clip_ids")
TOKENIZERS = ("tokenizers/t5.json", "tokenizers/clip.json")
PROMPT = "what the picture shows"
EMBEDS = "the prompt as the text encoders give it, instead of words"


def settings(preset: Preset, options: Mapping[str, Any], files: UserFiles) -> Settings:
    """The choices of a build and the sizes of the files. Text encoders are built in if the files have them."""
    margin = options.get("margin_columns")
    if margin is not None and margin < 0:
        raise UsageError(f"--margin-columns {margin} must be 0 or more; 16 is usual")
    has_text_encoders = all(name in files.tensors for name in ("text_encoder", "text_encoder_2"))
    random = "transformer" not in files.tensors
    text = (has_text_encoders or random) and not options.get("no_text")
    sizes = clip_vision_sizes(fill_sizes(preset, files), preset, files)
    if text:
        sizes = text_sizes(sizes, preset, files)
    else:
        sizes = replace(sizes, words=words_size(preset, files), t5={}, clip_text={})
    sizes = replace(sizes, bridge=bridge_size(sizes, preset, files), siglip={}, siglip_processor={})
    choices = fill.base_choices(sizes, options, STEPS) | {"margin": margin, "text": text}
    return Settings(vars(sizes), choices, files.lora)


def components(settings: Settings) -> dict[str, ComponentSpec]:
    """The networks of the bundle: encode, see, bridge, step, decode, and by choice modulate and text encoders."""
    sizes, choices = fill.sizes_of(settings), settings.choices
    clip, processor = sizes.clip_vision, sizes.clip_processor
    projected = clip["projection_dim"]
    image = TensorSpec("float32", ("batch", 3, "height", "width"))
    embeds = TensorSpec("float32", ("batch", projected))

    look = {
        "config": clip,
        "short": processor["size"]["shortest_edge"],
        "mean": processor["image_mean"],
        "deviation": processor["image_std"],
    }
    bridge = {"width_in": projected, "width": sizes.bridge, "width_out": sizes.pooled}
    px = {"height": 1, "width": 1}
    joined = {"bridge": TensorSpec("float32", ("batch", sizes.pooled))}
    specs = {
        "encode": fill.encode(sizes, diptych=True),
        "see": ComponentSpec("vision.ClipVision", {"image": image}, {"embeds": embeds}, px, arguments=look),
        "bridge": ComponentSpec("vision.Bridge", {"embeds": embeds}, joined, arguments=bridge),
        "step": fill.step(settings, diptych=True),
        "decode": fill.decode(sizes, diptych=True, margin=choices["margin"]),
    }
    if choices["split"]:
        specs["modulate"] = fill.modulate(settings, bridge=True)
    return specs | (fill.text_encoders(sizes) if choices["text"] else {})


def program(settings: Settings) -> Program:
    """The passes text, condition, modulate, sample and decode. All but text run on the same tiles."""
    sizes, choices = fill.sizes_of(settings), settings.choices
    tiles = fill.tiles(settings, (sizes.tile_px, sizes.tile_px))
    steps = Steps("flow_shift", choices["steps"], sizes.multiple**2 // 2, fill.schedule_options(settings))
    inputs, passes, text = fill.caller_inputs(settings), [], "$"
    if choices["text"]:
        inputs |= {name: Input("int64", (1, n)) for name, n in zip(WORDS, (sizes.words, sizes.clip_words), strict=True)}
        encoders = (
            Call("t5", {"ids": "$t5_ids"}, {"context": "context"}),
            Call("clip", {"ids": "$clip_ids"}, {"pooled": "pooled"}),
        )
        passes.append(Pass("text", once=encoders))
        text = ""
    else:
        inputs["context"] = Input("float32", (1, sizes.words, sizes.context))
        inputs["pooled"] = Input("float32", (1, sizes.pooled))
    specs = components(settings)
    look = (
        Call("encode", {"image": "image"}, {"latent": "y"}),
        Call("see", {"image": "image"}, {"embeds": "embeds"}),
        Call("bridge", {"embeds": "embeds"}, {"bridge": "bridge"}),
    )
    passes.append(Pass("condition", tiles, once=look))
    feed = {name: f"${name}" for name in inputs}
    feed |= {"pooled": f"{text}pooled", "bridge": "bridge", "sigmas": "@sigma", "context": f"{text}context"}
    if choices["split"]:
        call = Call("modulate", {n: feed[n] for n in specs["modulate"].inputs}, {"modulation": "modulation"})
        passes.append(Pass("modulate", tiles, steps, once=(call,)))
    feed |= {"z": "z", "y": "y", "sigma": "@sigma", "sigma_next": "@sigma_next", "modulation": "@modulation"}
    state = {"z": State((sizes.channels, f"h/{sizes.spatial}", f"w/{sizes.spatial // 2}"), "noise")}
    each = (Call("step", {n: feed[n] for n in specs["step"].inputs}, {"z_next": "z"}),)
    decode = (Call("decode", {"latent": "z"}, {"image": "result"}),)
    passes += [Pass("sample", tiles, steps, state, each=each), Pass("decode", tiles, once=decode)]
    grids = {"image": Grid(1, 3, "input"), "result": Grid(1, 3)}
    texts = {"prompt": Text(dict(zip(WORDS, TOKENIZERS, strict=True)), help=PROMPT)} if choices["text"] else {}
    embeds = TensorFile({"prompt_embeds": "context", "pooled_prompt_embeds": "pooled"}, EMBEDS)
    return Program(4, sizes.multiple, grids, tuple(passes), inputs, texts, {"prompt_embeds": embeds}, any_scale=True)


def tokenizers(settings: Settings, options: Mapping[str, Any], folder: Path | None) -> dict[str, str]:
    """The tokenizers of the prompt, which each image may have its own of."""
    return fill.tokenizer_texts(fill.sizes_of(settings), folder) if settings.choices["text"] else {}


def stand_in() -> dict[str, Any]:
    """The published folders, and a file with the LoRA and the bridge of the paper."""
    from tilewright.export.graph.trace import parameter_specs
    from tilewright.export.systems.flux import files

    sizes = PRESETS["full"]
    specs = components(settings(Preset("full", sizes, explicit=False), {}, UserFiles({}, {})))
    clip, bridge = (
        {str(keys(name, key)[0]): spec for key, spec in parameter_specs(specs[name]).items()}
        for name in ("see", "bridge")
    )
    double = r"transformer_blocks\.\d+\.(norm1\.linear|attn\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))"
    single = r"single_transformer_blocks\.\d+\.(norm\.linear|attn\.to_[qkv]|proj_mlp|proj_out)"
    base = files.transformer() | files.vae() | files.scheduler() | files.text_encoders()
    of_clip = {
        "model.safetensors": clip,
        "config.json": files.config(configs.CLIP_VISION, sizes.clip_vision),
        "preprocessor_config.json": files.config(configs.CLIP_PROCESSOR, sizes.clip_processor),
    }
    return {
        **{f"FLUX.1-Fill-dev/{name}": content for name, content in base.items()},
        **{f"clip-vit-large-patch14/{name}": content for name, content in of_clip.items()},
        "vicr.safetensors": files.lora_pairs(rf"x_embedder|{double}|{single}", 32) | bridge,
    }


SYSTEM = System(
    name="vicr",
    title="VICR, FLUX.1-Fill as a diptych, words and CLIP through a bridge, 30 steps",
    licence=f"{fill.LICENCE}; CLIP ViT-L/14 (MIT); the system's own weights are the user's",
    base_models=(*fill.BASE_MODELS, "openai/clip-vit-large-patch14"),
    presets=PRESETS,
    options=OPTIONS,
    origins=ORIGINS,
    lora=fill.LORA,
    settings=settings,
    components=components,
    program=program,
    tokenizers=tokenizers,
    keys=keys,
    origin=origin,
    ignored=ignored,
    keep=fill.KEEP,
    stand_in=stand_in,
)
