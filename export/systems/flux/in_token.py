"""In-Token Learning: FLUX.1-Fill restores by channels, with what SigLIP and Redux see beside a fixed prompt.

The prompt is the same for every image, so its embeddings are constants. All tiles of a step read and write one global
latent; large images differ from small ones by their tile plan only.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tilewright.export.system import ComponentSpec, Option, Origin
from tilewright.export.systems.flux import files as flux_files
from tilewright.export.systems.flux import fill as flux
from tilewright.export.systems.flux.keys import ignored, keys, origin, origins
from tilewright.export.systems.flux.sizes import PRESETS
from tilewright.export.weights.lora import as_parameters
from tilewright.runtime.program import Call, Grid, Pass, Program, Steps, TensorSpec

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

TITLE = "In-Token Learning, FLUX.1-Fill by channels, SigLIP and Redux, 28 steps"
LICENCE = f"{flux.LICENCE}, FLUX.1-Redux-dev (the same); the system's own weights are the user's"
PARTS = ("flux/*.py",)
STEPS = 28
PROMPT = "A sharp, clean photograph with natural detail."
OPTIONS = flux.BASE_OPTIONS | {
    "redux": Option("folder of FLUX.1-Redux-dev", names=("FLUX.1-Redux-dev",)),
    "lora": Option(flux.BASE_OPTIONS["lora"].help, names=("in-token.safetensors",)),
    "mask": Option("what the mask channels hold: nothing, or everything to be made", choices=("0", "1")),
}
ORIGINS = flux.BASE_ORIGINS | {
    "image_encoder": Origin("redux", ("image_encoder",), "FLUX.1-Redux-dev's SigLIP"),
    "image_embedder": Origin("redux", ("image_embedder", "flux1-redux-dev.safetensors"), "FLUX.1-Redux-dev"),
    "lora": Origin("lora", (".",), "the system's LoRA", needed=False, read=as_parameters),
}


def settings(preset: str, given: Mapping[str, Any], origins: Mapping[str, Any]) -> dict[str, Any]:
    """The choices of a build; the prompt is given as embeddings, as words, or is our own."""
    words = None if given.get("prompt_embeds") else given.get("prompt", PROMPT)
    chosen = {"mask": float(given.get("mask", 0)), "words": words}
    return flux.base_settings(preset, given, origins, STEPS) | chosen


def components(preset: str, **settings: Any) -> dict[str, ComponentSpec]:
    """encode, see, redux, step, decode, and modulate unless it runs at build."""
    sizes = PRESETS[preset]
    seen = (sizes.siglip["image_size"] // sizes.siglip["patch_size"]) ** 2
    image = TensorSpec("float32", ("batch", 3, "height", "width"))
    features = TensorSpec("float32", ("batch", seen, sizes.siglip["hidden_size"]))
    tokens = TensorSpec("float32", ("batch", seen, sizes.t5["d_model"]))

    px, siglip = {"height": 1, "width": 1}, {"config": sizes.siglip}
    redux = {"width_in": sizes.siglip["hidden_size"], "width_out": sizes.t5["d_model"]}
    sources = {
        "encode": flux.encode_source(preset),
        "see": ComponentSpec("vision.Siglip", {"image": image}, {"features": features}, px, arguments=siglip),
        "redux": ComponentSpec("vision.Redux", {"features": features}, {"tokens": tokens}, arguments=redux),
        "step": flux.step_source(preset, settings, seen=seen),
        "decode": flux.decode_source(preset),
    }
    if settings["split"] and not settings["fixed"]:
        sources["modulate"] = flux.modulate_source(preset, settings, one_text=True)
    return sources


def build_time(preset: str, **settings: Any) -> dict[str, ComponentSpec]:
    """The text encoders, where words were given, and modulate where steps and tiles are fixed."""
    sources = flux.text_sources(preset) if settings["words"] is not None else {}
    if settings["fixed"]:
        sources["modulate"] = flux.modulate_source(preset, settings, one_text=True)
    return sources


def program(preset: str, **settings: Any) -> Program:
    """encode, see, sample joined every step, decode."""
    sizes = PRESETS[preset]
    tiles = flux.tiles(preset, settings)
    steps = Steps("flow_shift", settings["steps"], sizes.multiple**2, flux.schedule_options(settings))
    inputs = {name: f"${name}" for name in flux.caller_inputs(settings)}
    conditions = {"context": "#context", "seen": "seen", "lora_scale": "#lora_scale"}  # if no input of that name is
    conditions |= {"modulation": "@modulation"} if settings["split"] else {"pooled": "#pooled"}
    step = {"z": "z", "y": "y", "sigma": "@sigma", "sigma_next": "@sigma_next"} | conditions
    taken = components(preset, **settings)
    passes = []
    if "modulate" in taken:
        feed = {"pooled": "#pooled", "sigmas": "@sigma"} | inputs
        call = Call("modulate", _taken(feed, taken["modulate"]), {"modulation": "modulation"})
        passes.append(Pass("modulate", tiles, steps, once=(call,)))
    look = (
        Call("see", {"image": "image"}, {"features": "features"}),
        Call("redux", {"features": "features"}, {"tokens": "seen"}),
    )
    passes += [
        Pass("encode", tiles, once=(Call("encode", {"image": "image"}, {"latent": "y"}),)),
        Pass("see", tiles, once=look),
        Pass("sample", tiles, steps, each=(Call("step", _taken(step | inputs, taken["step"]), {"z_next": "z"}),)),
        Pass("decode", tiles, once=(Call("decode", {"latent": "z"}, {"image": "result"}),)),
    ]
    grids = {
        "image": Grid(1, 3, "input"),
        "y": Grid(sizes.spatial, sizes.channels),
        "z": Grid(sizes.spatial, sizes.channels, "noise"),
        "result": Grid(1, 3),
    }
    return Program(4, sizes.multiple, grids, tuple(passes), flux.caller_inputs(settings), any_scale=True)


def _taken(feed: Mapping[str, str], source: ComponentSpec) -> dict[str, str]:
    return {name: feed[name] for name in source.inputs}


def constants(
    preset: str, run: Callable[..., Any], given: Mapping[str, Any], folder: Path | None, **settings: Any
) -> dict[str, Any]:
    """The prompt, and the modulation of fixed tiles."""
    made = flux.prompt_constants(preset, run, given, folder, settings["words"])
    return made | flux.modulation_tables(preset, run, settings, made["pooled"])


def tokenizers(preset: str, given: Mapping[str, Any], folder: Path | None, **settings: Any) -> dict[str, str]:
    """None at run time: the prompt is fixed."""
    return {}


def stand_in(preset: str) -> dict[str, Any]:
    """The published folders, the LoRA's usual targets, and the prompt's embeddings."""
    from tilewright.export.graph.trace import parameter_specs

    sizes = PRESETS["full"]
    sources = components("full", **settings("full", {"prompt_embeds": "prompt.safetensors"}, {}))
    siglip, redux = (
        {str(keys(name, key)[0]): spec for key, spec in parameter_specs(sources[name]).items()}
        for name in ("see", "redux")
    )
    targets = r"(single_)?transformer_blocks\.\d+\.(attn\.\w+(\.0)?|ff(_context)?\.net\.(0\.proj|2))"
    embeds = {
        "prompt_embeds": TensorSpec("bfloat16", (1, sizes.words, sizes.t5["d_model"])),
        "pooled_prompt_embeds": TensorSpec("bfloat16", (1, sizes.clip_text["hidden_size"])),
    }
    fill = flux_files.transformer() | flux_files.vae()
    return {f"FLUX.1-Fill-dev/{name}": tensors for name, tensors in fill.items()} | {
        "FLUX.1-Redux-dev/image_encoder/model.safetensors": {k: flux_files.bfloat16(s) for k, s in siglip.items()},
        "FLUX.1-Redux-dev/image_embedder/diffusion_pytorch_model.safetensors": {
            k: flux_files.bfloat16(s) for k, s in redux.items()
        },
        "in-token.safetensors": flux_files.lora_pairs(targets, 384),
        "prompt.safetensors": embeds,
    }
