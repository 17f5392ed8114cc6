"""In-Token Learning: FLUX.1-Fill takes the degraded image as channels, and reads image tokens of SigLIP and Redux.

The prompt is the same for every image, so its embeddings are constants. All tiles of a step read and write one latent
of the whole image; large images differ from small ones by their tile plan only.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tilewright.export.networks import configs
from tilewright.export.system import ComponentSpec, Option, Origin, Preset, Run, Settings, System, UserFiles
from tilewright.export.systems.flux import fill
from tilewright.export.systems.flux.encoder_sizes import siglip_sizes, text_sizes
from tilewright.export.systems.flux.fill_sizes import fill_sizes
from tilewright.export.systems.flux.keys import ignored, keys, origin
from tilewright.export.systems.flux.sizes import PRESETS, Sizes
from tilewright.export.weights.lora import as_parameters
from tilewright.export.weights.sizes import FileSizes, network_sizes
from tilewright.runtime.bundle.program import Call, Grid, Pass, Program, Steps, TensorSpec

__all__ = ["SYSTEM"]

STEPS = 28
PROMPT = "A sharp, clean photograph with natural detail."
OPTIONS = fill.BASE_OPTIONS | {
    "redux": Option("folder of FLUX.1-Redux-dev", names=("FLUX.1-Redux-dev",)),
    "lora": Option(fill.BASE_OPTIONS["lora"].help, names=("in-token.safetensors",)),
    "mask": Option("value of the mask channels: 0, keep every pixel; 1, make every pixel anew", choices=("0", "1")),
}
ORIGINS = fill.BASE_ORIGINS | {
    "image_encoder": Origin("redux", ("image_encoder",), "FLUX.1-Redux-dev's SigLIP"),
    "image_embedder": Origin("redux", ("image_embedder", "flux1-redux-dev.safetensors"), "FLUX.1-Redux-dev"),
    "lora": Origin("lora", (".",), "the system's LoRA", needed=False, rename=as_parameters),
}


def settings(preset: Preset, options: Mapping[str, Any], files: UserFiles) -> Settings:
    """The choices of a build and the sizes of the files. The prompt is embeddings, words, or the default words."""
    words = None if options.get("prompt_embeds") else options.get("prompt", PROMPT)
    sizes = siglip_sizes(fill_sizes(preset, files), preset, files)
    if words is None:
        sizes = replace(sizes, words=_words_of_file(preset, Path(options["prompt_embeds"])), t5={}, clip_text={})
    else:
        sizes = text_sizes(sizes, preset, files)
    sizes = replace(sizes, clip_vision={}, clip_processor={}, bridge=0)
    choices = fill.base_choices(sizes, options, STEPS) | {"mask": float(options.get("mask", 0)), "words": words}
    return Settings(vars(sizes), choices, files.lora)


def _words_of_file(preset: Preset, path: Path) -> int:
    """The number of words in the file of the prompt's embeddings."""
    from tilewright.runtime.inputs import tensors_of

    usual: Sizes = preset.sizes
    shape = tensors_of(path, ("prompt_embeds",))["prompt_embeds"].shape
    if len(shape) != 3 or not shape[1]:
        return usual.words  # `constants` refuses the file later, with the tensor's name and shape
    file_sizes = FileSizes(f"embeddings {path}", {"words": shape[1]})
    return int(network_sizes("prompt", preset, {"words": usual.words}, file_sizes, None)["words"])


def components(settings: Settings) -> dict[str, ComponentSpec]:
    """The networks of the bundle: encode, see, redux, step, decode, and modulate unless the build runs it."""
    sizes = fill.sizes_of(settings)
    siglip, processor = sizes.siglip, sizes.siglip_processor
    image_tokens = (siglip["image_size"] // siglip["patch_size"]) ** 2
    image = TensorSpec("float32", ("batch", 3, "height", "width"))
    features = TensorSpec("float32", ("batch", image_tokens, siglip["hidden_size"]))
    tokens = TensorSpec("float32", ("batch", image_tokens, sizes.context))

    px = {"height": 1, "width": 1}
    look = {"config": siglip, "mean": processor["image_mean"], "deviation": processor["image_std"]}
    redux = {"width_in": siglip["hidden_size"], "width_out": sizes.context}
    specs = {
        "encode": fill.encode(sizes),
        "see": ComponentSpec("vision.Siglip", {"image": image}, {"features": features}, px, arguments=look),
        "redux": ComponentSpec("vision.Redux", {"features": features}, {"tokens": tokens}, arguments=redux),
        "step": fill.step(settings, image_tokens=image_tokens),
        "decode": fill.decode(sizes),
    }
    if settings.choices["split"] and not settings.choices["fixed"]:
        specs["modulate"] = fill.modulate(settings, bridge=False)
    return specs


def build_time(settings: Settings) -> dict[str, ComponentSpec]:
    """The networks that the build runs: text encoders for a prompt of words, modulate for fixed tiles."""
    specs = fill.text_encoders(fill.sizes_of(settings)) if settings.choices["words"] is not None else {}
    if settings.choices["fixed"]:
        specs["modulate"] = fill.modulate(settings, bridge=False)
    return specs


def program(settings: Settings) -> Program:
    """The passes encode, see, sample and decode. Tiles of the latent are joined after every step."""
    sizes, choices = fill.sizes_of(settings), settings.choices
    tiles = fill.tiles(settings)
    steps = Steps("flow_shift", choices["steps"], sizes.multiple**2, fill.schedule_options(settings))
    inputs = {name: f"${name}" for name in fill.caller_inputs(settings)}
    conditions = {"context": "#context", "seen": "seen", "lora_scale": "#lora_scale"}  # `inputs` override them
    conditions |= {"modulation": "@modulation"} if choices["split"] else {"pooled": "#pooled"}
    feed = {"z": "z", "y": "y", "sigma": "@sigma", "sigma_next": "@sigma_next"} | conditions | inputs
    specs = components(settings)
    passes = []
    if "modulate" in specs:
        feed_modulate = {"pooled": "#pooled", "sigmas": "@sigma"} | inputs
        call = Call("modulate", _inputs_of(feed_modulate, specs["modulate"]), {"modulation": "modulation"})
        passes.append(Pass("modulate", tiles, steps, once=(call,)))
    look = (
        Call("see", {"image": "image"}, {"features": "features"}),
        Call("redux", {"features": "features"}, {"tokens": "seen"}),
    )
    passes += [
        Pass("encode", tiles, once=(Call("encode", {"image": "image"}, {"latent": "y"}),)),
        Pass("see", tiles, once=look),
        Pass("sample", tiles, steps, each=(Call("step", _inputs_of(feed, specs["step"]), {"z_next": "z"}),)),
        Pass("decode", tiles, once=(Call("decode", {"latent": "z"}, {"image": "result"}),)),
    ]
    grids = {
        "image": Grid(1, 3, "input"),
        "y": Grid(sizes.spatial, sizes.channels),
        "z": Grid(sizes.spatial, sizes.channels, "noise"),
        "result": Grid(1, 3),
    }
    return Program(4, sizes.multiple, grids, tuple(passes), fill.caller_inputs(settings), any_scale=True)


def _inputs_of(feed: Mapping[str, str], spec: ComponentSpec) -> dict[str, str]:
    return {name: feed[name] for name in spec.inputs}


def constants(settings: Settings, run: Run, options: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """The embeddings of the prompt, and the modulation of fixed tiles."""
    prompt = fill.prompt_constants(settings, run, options, folder, settings.choices["words"])
    return prompt | fill.modulation_tables(settings, run, prompt["pooled"])


def stand_in() -> dict[str, Any]:
    """The published folders, a LoRA for its usual modules, and the embeddings of a prompt."""
    from tilewright.export.graph.trace import parameter_specs
    from tilewright.export.systems.flux import files

    sizes = PRESETS["full"]
    specs = components(settings(Preset("full", sizes, explicit=False), {}, UserFiles({}, {})))
    siglip, redux = (
        {str(keys(name, key)[0]): files.bfloat16(spec) for key, spec in parameter_specs(specs[name]).items()}
        for name in ("see", "redux")
    )
    targets = r"(single_)?transformer_blocks\.\d+\.(attn\.\w+(\.0)?|ff(_context)?\.net\.(0\.proj|2))"
    embeds = {
        "prompt_embeds": TensorSpec("bfloat16", (1, sizes.words, sizes.context)),
        "pooled_prompt_embeds": TensorSpec("bfloat16", (1, sizes.pooled)),
    }
    base = files.transformer() | files.vae() | files.scheduler()
    widths = {"redux_dim": sizes.siglip["hidden_size"], "txt_in_features": sizes.context}
    of_redux = {
        "image_encoder/model.safetensors": siglip,
        "image_encoder/config.json": files.config(configs.SIGLIP, sizes.siglip),
        "image_embedder/diffusion_pytorch_model.safetensors": redux,
        "image_embedder/config.json": files.config(configs.REDUX, widths),
        "feature_extractor/preprocessor_config.json": files.config(configs.SIGLIP_PROCESSOR, sizes.siglip_processor),
    }
    return {
        **{f"FLUX.1-Fill-dev/{name}": content for name, content in base.items()},
        **{f"FLUX.1-Redux-dev/{name}": content for name, content in of_redux.items()},
        "in-token.safetensors": files.lora_pairs(targets, 384),
        "prompt.safetensors": embeds,
    }


SYSTEM = System(
    name="in-token",
    title="In-Token Learning, FLUX.1-Fill by channels, SigLIP and Redux, 28 steps",
    licence=f"{fill.LICENCE}, FLUX.1-Redux-dev (the same); the system's own weights are the user's",
    base_models=(*fill.BASE_MODELS, "black-forest-labs/FLUX.1-Redux-dev"),
    licences={"demo": "Apache-2.0: trained by tools/train"},
    presets=PRESETS,
    options=OPTIONS,
    origins=ORIGINS,
    lora=fill.LORA,
    settings=settings,
    components=components,
    build_time=build_time,
    program=program,
    constants=constants,
    keys=keys,
    origin=origin,
    ignored=ignored,
    keep=fill.KEEP,
    stand_in=stand_in,
)
