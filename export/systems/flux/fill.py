"""What In-Token Learning and VICR share: FLUX.1-Fill's sizes, its build options, its LoRA and its modulation table."""

import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.export.system import ComponentSpec, Option, Origin, finite
from tilewright.export.systems.flux.keys import keys
from tilewright.export.systems.flux.sizes import CLIP_VOCABULARY, PRESETS, Sizes
from tilewright.export.weights import lora
from tilewright.export.weights.files import Tensors, resolve
from tilewright.runtime.errors import InputError, UsageError
from tilewright.runtime.inputs import tensors_of
from tilewright.runtime.program import Input, TensorSpec, Tiles
from tilewright.runtime.schedules import flow_shift
from tilewright.runtime.text import encode

__all__ = [
    "BASE_OPTIONS",
    "BASE_ORIGINS",
    "LICENCE",
    "base_settings",
    "caller_inputs",
    "decode_source",
    "encode_source",
    "modulate_source",
    "modulation_tables",
    "prompt_constants",
    "schedule_options",
    "step_source",
    "text_sources",
    "tiles",
    "tokenizer_texts",
]

LICENCE = "FLUX.1 [dev] Non-Commercial License (FLUX.1-Fill-dev)"
FLOAT = "float32"

BASE_ORIGINS = {
    "transformer": Origin("weights", ("transformer", "flux1-fill-dev.safetensors"), "FLUX.1-Fill-dev's transformer"),
    "vae": Origin("weights", ("vae", "ae.safetensors"), "FLUX.1-Fill-dev's VAE"),
    "text_encoder": Origin("weights", ("text_encoder",), "FLUX.1-Fill-dev's CLIP text encoder", needed=False),
    "text_encoder_2": Origin("weights", ("text_encoder_2",), "FLUX.1-Fill-dev's T5 text encoder", needed=False),
}


def _tiles(text: str) -> list[int]:
    """Sides from `1024` or `512,1024`."""
    sides = text.split(",")
    if not all(side.isdigit() and int(side) for side in sides):
        raise UsageError(f"--fixed-tile {text!r} is no list of sizes; write 1024 or 512,1024")
    return [int(side) for side in sides]


BASE_OPTIONS = {
    "lora": Option("LoRA file, with its strength behind a colon if it is not 1"),
    "lora_mode": Option(
        "a branch beside weights that stay where they are, or merged copies", choices=("branch", "merge")
    ),
    "prompt": Option("words; needs the text encoders in the folder of weights"),
    "prompt_embeds": Option("safetensors with prompt_embeds and pooled_prompt_embeds", names=("prompt.safetensors",)),
    "steps": Option("sampling steps of the program", kind=int),
    "min_mu": Option("bound of the schedule's shift on small tiles (default: the preset's)", kind=finite),
    "max_mu": Option("bound of the schedule's shift on large tiles (default: none)", kind=finite),
    "guidance": Option("guidance that the model was distilled for (default: 30)", kind=finite),
    "fixed_tile": Option("only these tile sizes: their modulation is computed now", kind=_tiles),
    "exact_scalars": Option("sigma and guidance as they are, or rounded as in bfloat16", choices=("on", "off")),
    "no_split_modulation": Option("keep the modulation's weights in the step", flag=True),
}


def base_settings(
    preset: str, given: Mapping[str, Any], origins: Mapping[str, Tensors | None], steps: int
) -> dict[str, Any]:
    """What both systems let one choose."""
    split, fixed = not given.get("no_split_modulation"), given.get("fixed_tile") or []
    sizes = PRESETS[preset]
    if fixed and not split:
        raise UsageError("--fixed-tile computes the modulation at build; leave --no-split-modulation out")
    if wrong := [px for px in fixed if px % sizes.multiple]:
        raise UsageError(f"--fixed-tile {wrong[0]} is no multiple of {sizes.multiple}; use one")
    count = given.get("steps", steps)
    if not 1 <= count <= 1000:
        raise UsageError(f"--steps {count} must lie in 1..1000")
    least, most = (given.get(name, default) for name, default in (("min_mu", sizes.min_mu), ("max_mu", None)))
    if least is not None and most is not None and least > most:
        raise UsageError(f"--min-mu {least} lies above --max-mu {most}; give a smaller one")
    _check_fill(sizes, origins.get("transformer"))
    _, strength = lora.path_and_strength(given.get("lora", ""))
    return {
        "steps": count,
        "mu": {"min_mu": least, "max_mu": most},
        "guidance": given.get("guidance", 30.0),
        "fixed": fixed,
        "exact": given.get("exact_scalars", "on") == "on",
        "split": split,
        "lora_scale": strength,
        "merged": given.get("lora_mode") == "merge",
        "branches": _branches(preset, origins),
    }


def _check_fill(sizes: Sizes, found: Tensors | None) -> None:
    """Refuse a checkpoint of another FLUX by the columns of its image embedder."""
    if found is None:
        return
    key = next((k for k in ("x_embedder.weight", "img_in.weight") if k in found.tensors), None)
    wanted = sizes.transformer["in_channels"]
    if key is not None and (columns := found.tensors[key].shape[-1]) != wanted:
        raise InputError(
            f"weights {found.folder / found.tensors[key].file}: {key!r} takes {columns} channels, FLUX.1-Fill takes"
            f" {wanted}: this is another FLUX, without mask channels; give FLUX.1-Fill-dev"
        )


def _branches(preset: str, origins: Mapping[str, Tensors | None]) -> dict[str, list[float]]:
    """Module -> rank and scale of every adapter, each checked against the base weights."""
    found, base = origins.get("lora"), origins.get("transformer")
    if found is None:
        return {}
    adapters, _ = lora.read(found)
    shapes = {}
    for module in adapters:
        weight = resolve(base, keys("step", f"transformer.{module}.weight")) if base else None
        if weight is not None:
            shapes[f"{module}.weight"] = weight.shape
    if base:
        lora.parameters_of(adapters, shapes, found)
    return {module: [a.rank, a.scale] for module, a in sorted(adapters.items())}


def _in_graph(settings: Mapping[str, Any]) -> dict[str, list[float]]:
    """The branches that graphs hold."""
    return {} if settings["merged"] else dict(settings["branches"])


def _branching(settings: Mapping[str, Any]) -> bool:
    """Whether the graphs take a LoRA scale."""
    return bool(settings["branches"]) and not settings["merged"]


def _modulated(settings: Mapping[str, Any]) -> bool:
    """Whether branches reach the modulation."""
    names = [m for m in settings["branches"] if re.search(r"norm\w*\.linear$|^time_text_embed\.", m)]
    return bool(names) and _branching(settings)


def step_source(preset: str, settings: Mapping[str, Any], *, diptych: bool = False, seen: int = 0) -> ComponentSpec:
    """One Euler step on a latent; `seen` image tokens follow the words."""
    sizes = PRESETS[preset]
    wide = "w2" if diptych else "w"
    latent = TensorSpec(FLOAT, ("batch", sizes.channels, "h", wide))
    inputs = {"z": latent, "y": latent, "context": TensorSpec(FLOAT, (1, sizes.words, sizes.t5["d_model"]))}
    if seen:
        inputs["seen"] = TensorSpec(FLOAT, ("batch", seen, sizes.t5["d_model"]))
    if settings["split"]:
        rows = (sizes.rows, sizes.dim)
        inputs["modulation"] = TensorSpec(FLOAT, ("batch", *rows) if diptych else rows)
    else:
        inputs |= _pooled(sizes, bridge=diptych)
    inputs |= {"sigma": TensorSpec(FLOAT, ()), "sigma_next": TensorSpec(FLOAT, ())}
    if _branching(settings):
        inputs["lora_scale"] = TensorSpec(FLOAT, ())
    arguments = {
        "config": sizes.transformer,
        "diptych": diptych,
        "mask": settings.get("mask", 0.0),
        "split": settings["split"],
        "exact": settings["exact"],
        "branches": _in_graph(settings),
    }
    px = {"h": sizes.spatial, "w": sizes.spatial, "w2": sizes.spatial // 2}
    return ComponentSpec("flux.Step", inputs, {"z_next": latent}, px, {"h": 2, wide: 4 if diptych else 2}, arguments)


def modulate_source(preset: str, settings: Mapping[str, Any], *, one_text: bool) -> ComponentSpec:
    """The modulation of all steps."""
    sizes = PRESETS[preset]
    rows = ("steps", sizes.rows, sizes.dim)
    inputs = _pooled(sizes, bridge=not one_text) | {"sigmas": TensorSpec(FLOAT, ("steps",))}
    if _modulated(settings):
        inputs["lora_scale"] = TensorSpec(FLOAT, ())
    outputs = {"modulation": TensorSpec(FLOAT, rows if one_text else ("batch", *rows))}
    arguments = {"config": sizes.transformer, "exact": settings["exact"], "one_text": one_text}
    return ComponentSpec("flux.Modulate", inputs, outputs, arguments=arguments | {"branches": _in_graph(settings)})


def _pooled(sizes: Sizes, *, bridge: bool) -> dict[str, TensorSpec]:
    """What modulates besides time."""
    width = sizes.transformer["pooled_projection_dim"]
    inputs = {"pooled": TensorSpec(FLOAT, (1, width)), "guidance": TensorSpec(FLOAT, ())}
    return inputs | ({"bridge": TensorSpec(FLOAT, ("batch", width))} if bridge else {})


def encode_source(preset: str, *, diptych: bool = False) -> ComponentSpec:
    """Image to latent."""
    sizes = PRESETS[preset]
    image, latent = _pictures(sizes, diptych)
    multiples = dict.fromkeys(("height", "width"), sizes.multiple)
    arguments = {"config": sizes.vae, "diptych": diptych}
    return ComponentSpec("vae.Encode", {"image": image}, {"latent": latent}, _px(sizes), multiples, arguments)


def decode_source(preset: str, *, diptych: bool = False, margin: int | None = None) -> ComponentSpec:
    """Latent to image."""
    sizes = PRESETS[preset]
    image, latent = _pictures(sizes, diptych)
    multiples = {"h": 2, "w2" if diptych else "w": 4 if diptych else 2}
    arguments = {"config": sizes.vae, "diptych": diptych, "margin": margin}
    return ComponentSpec("vae.Decode", {"latent": latent}, {"image": image}, _px(sizes), multiples, arguments)


def _pictures(sizes: Sizes, diptych: bool) -> tuple[TensorSpec, TensorSpec]:
    image = TensorSpec(FLOAT, ("batch", 3, "height", "width"))
    return image, TensorSpec(FLOAT, ("batch", sizes.channels, "h", "w2" if diptych else "w"))


def _px(sizes: Sizes) -> dict[str, int]:
    return {"height": 1, "width": 1, "h": sizes.spatial, "w": sizes.spatial, "w2": sizes.spatial // 2}


def text_sources(preset: str) -> dict[str, ComponentSpec]:
    """Words' ids to what the transformer reads of them."""
    sizes = PRESETS[preset]
    ids, clip_ids = (TensorSpec("int64", (1, n)) for n in (sizes.words, sizes.clip_words))
    context = {"context": TensorSpec(FLOAT, (1, sizes.words, sizes.t5["d_model"]))}
    pooled = {"pooled": TensorSpec(FLOAT, (1, sizes.clip_text["hidden_size"]))}
    return {
        "t5": ComponentSpec("text.T5", {"ids": ids}, context, arguments={"config": sizes.t5}),
        "clip": ComponentSpec("text.ClipText", {"ids": clip_ids}, pooled, arguments={"config": sizes.clip_text}),
    }


def tiles(preset: str, settings: Mapping[str, Any], whole_px: tuple[int, int] | None = None) -> Tiles:
    """How a system cuts large images; fixed sizes leave nothing whole."""
    sizes, fixed = PRESETS[preset], tuple(settings["fixed"])
    if not fixed:
        return Tiles(sizes.tile_px, sizes.overlap_px, whole_px or sizes.whole_px)
    overlap = fixed[0] * sizes.overlap_px // sizes.tile_px // sizes.multiple * sizes.multiple
    return Tiles(fixed[0], overlap, fixed_px=fixed)


def caller_inputs(settings: Mapping[str, Any]) -> dict[str, Input]:
    """What may be chosen at run time; a table made at build has chosen already."""
    inputs = {}
    if not settings["fixed"]:
        inputs["guidance"] = Input(FLOAT, default=settings["guidance"])
    if _branching(settings) and not (settings["fixed"] and _modulated(settings)):
        inputs["lora_scale"] = Input(FLOAT, default=settings["lora_scale"])
    return inputs


def tokenizer_texts(preset: str, folder: Path | None) -> dict[str, str]:
    """T5's and CLIP's tokenizers as single files; without a folder, synthetic ones of the same kind."""
    from tilewright.export import tokenizers

    sizes = PRESETS[preset]
    with tempfile.TemporaryDirectory() as temporary:
        if folder is None:
            folder = Path(temporary)
            vocabulary = sizes.clip_text.get("vocab_size", CLIP_VOCABULARY)
            tokenizers.put(folder / "tokenizer", tokenizers.stand_in_clip(vocabulary))
            t5 = tokenizers.stand_in_t5(sizes.t5["vocab_size"])
            tokenizers.put(folder / "tokenizer_2", {"tokenizer.json": t5})
        return {
            "tokenizers/t5.json": tokenizers.t5(folder / "tokenizer_2", sizes.words),
            "tokenizers/clip.json": tokenizers.clip(folder / "tokenizer", sizes.clip_words),
        }


def prompt_constants(
    preset: str, run: Callable[..., Any], given: Mapping[str, Any], folder: Path | None, words: str | None
) -> dict[str, Any]:
    """context and pooled of the fixed prompt: given as tensors, or of words by the text encoders."""
    sizes = PRESETS[preset]
    if words is not None:
        t5, clip = tokenizer_texts(preset, folder).values()
        context = run("t5", ids=_ids(t5, words, sizes.words))
        return context | run("clip", ids=_ids(clip, words, sizes.clip_words))
    path = Path(given["prompt_embeds"])
    shapes: dict[str, tuple[int, ...]] = {
        "prompt_embeds": (1, sizes.words, sizes.t5["d_model"]),
        "pooled_prompt_embeds": (1, sizes.clip_text["hidden_size"]),
    }
    held = tensors_of(path, tuple(shapes))
    for name, shape in shapes.items():
        if held[name].shape != shape:
            there = list(held[name].shape)
            raise InputError(f"{path}: {name!r} has shape {there}, not {list(shape)}; save what the text encoders give")
    context, pooled = (np.asarray(held[name], np.float32) for name in shapes)
    return {"context": context, "pooled": pooled}


def _ids(tokenizer: str, words: str, length: int) -> Any:
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        file.write(tokenizer)
        file.flush()
        return encode(Path(file.name), words, length)


def modulation_tables(preset: str, run: Callable[..., Any], settings: Mapping[str, Any], pooled: Any) -> dict[str, Any]:
    """For each fixed tile size, its rows of every step; `modulation.TOKENS` where there are several."""
    sizes, tables = PRESETS[preset], {}
    scale = {"lora_scale": np.float32(settings["lora_scale"])} if _modulated(settings) else {}
    for px in settings["fixed"]:
        tokens = (px // sizes.multiple) ** 2
        sigmas = flow_shift(settings["steps"], tokens, **settings["mu"])["sigma"]
        made = run("modulate", pooled=pooled, guidance=np.float32(settings["guidance"]), sigmas=sigmas, **scale)
        tables["modulation" if len(settings["fixed"]) == 1 else f"modulation.{tokens}"] = made["modulation"]
    if settings["fixed"] and _modulated(settings):
        tables["lora_scale"] = np.array(settings["lora_scale"], np.float32)  # the table holds it already
    return tables


def schedule_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of the program's `flow_shift`."""
    return {name: bound for name, bound in settings["mu"].items() if bound is not None}
