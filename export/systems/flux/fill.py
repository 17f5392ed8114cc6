"""FLUX.1-Fill, which In-Token Learning and VICR share: options, components, tiles, prompt and modulation tables."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tilewright.export.system import ComponentSpec, LoraFile, Option, Origin, Run, Settings, finite
from tilewright.export.systems.flux.keys import named_by_diffusers
from tilewright.export.systems.flux.sizes import SCHEDULE, Sizes
from tilewright.runtime.bundle.program import ANY, Input, TensorSpec, Tiles
from tilewright.runtime.errors import InputError, UsageError

__all__ = [
    "BASE_MODELS",
    "BASE_OPTIONS",
    "BASE_ORIGINS",
    "KEEP",
    "LICENCE",
    "LORA",
    "SCHEDULE_OPTIONS",
    "base_choices",
    "caller_inputs",
    "decode",
    "encode",
    "modulate",
    "modulation_tables",
    "prompt_constants",
    "schedule_options",
    "sizes_of",
    "step",
    "text_encoders",
    "tiles",
    "tokenizer_texts",
]

KEEP = {  # layers that stay in float when others compute in 8 bits
    "modulate/*": "it runs once, and scales and shifts every block",
    "*.context_embedder.*": "it reads the words and the pictures",
    "*.x_embedder.*": "it reads the latent",
    "step/transformer.proj_out.*": "it makes the latent",
    "*.conv_in.*": "it reads the picture or the latent",
    "*.conv_out.*": "it makes the picture or the latent",
    "*.conv_shortcut.*": "it carries a block's input past the block",
    "*.patch_embedding.*": "it reads the picture",
}
LORA = LoraFile("lora")
SCHEDULE_OPTIONS = {  # key of the scheduler's configuration file -> option of the schedule `flow_shift`
    "base_shift": "base_shift",
    "max_shift": "max_shift",
    "base_image_seq_len": "base_tokens",
    "max_image_seq_len": "max_tokens",
}
LICENCE = "FLUX.1 [dev] Non-Commercial License (FLUX.1-Fill-dev)"
BASE_MODELS = ("black-forest-labs/FLUX.1-Fill-dev",)
FLOAT = "float32"
NUMBER = TensorSpec(FLOAT, (ANY,))
GUIDANCE = "strength of the guidance that the model was distilled for"

BASE_ORIGINS = {
    "transformer": Origin("weights", ("transformer", "flux1-fill-dev.safetensors"), "FLUX.1-Fill-dev's transformer"),
    "vae": Origin("weights", ("vae", "ae.safetensors"), "FLUX.1-Fill-dev's VAE", rename=named_by_diffusers),
    "text_encoder": Origin("weights", ("text_encoder",), "FLUX.1-Fill-dev's CLIP text encoder", needed=False),
    "text_encoder_2": Origin("weights", ("text_encoder_2",), "FLUX.1-Fill-dev's T5 text encoder", needed=False),
}


def _tiles(text: str) -> list[int]:
    """The sides in a text like `1024` or `512,1024`."""
    sides = text.split(",")
    if not all(side.isdigit() and int(side) for side in sides):
        raise UsageError(f"--fixed-tile {text!r} is no list of sizes; write 1024 or 512,1024")
    return [int(side) for side in sides]


BASE_OPTIONS = {
    "lora": Option("LoRA file, with its strength behind a colon if it is not 1"),
    "lora_mode": Option(
        "branch: the LoRA runs beside the weights; merge: it is added to copies of them", choices=("branch", "merge")
    ),
    "prompt": Option("text of the prompt; needs the text encoders in the folder of weights"),
    "prompt_embeds": Option("file with prompt_embeds and pooled_prompt_embeds", names=("prompt.safetensors",)),
    "steps": Option("sampling steps of the program", kind=int),
    "min_mu": Option("lower bound of the schedule's shift, for small tiles (default: none)", kind=finite),
    "max_mu": Option("upper bound of the schedule's shift, for large tiles (default: none)", kind=finite),
    "guidance": Option("guidance that the model was distilled for (default: 30)", kind=finite),
    "fixed_tile": Option("tile sizes in px, the only ones to run; their modulation is computed now", kind=_tiles),
    "exact_scalars": Option("on: sigma and guidance in float32; off: rounded to bfloat16", choices=("on", "off")),
    "no_split_modulation": Option("compute the modulation in every step, not once before them", flag=True),
}


def base_choices(sizes: Sizes, options: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The choices of a build that both systems have."""
    split, fixed = not options.get("no_split_modulation"), options.get("fixed_tile") or []
    if fixed and not split:
        raise UsageError("--fixed-tile computes the modulation at build; leave --no-split-modulation out")
    if wrong := [px for px in fixed if px % sizes.multiple]:
        raise UsageError(f"--fixed-tile {wrong[0]} is no multiple of {sizes.multiple}; use one")
    count = options.get("steps", steps)
    if not 1 <= count <= 1000:
        raise UsageError(f"--steps {count} must lie in 1..1000")
    least, most = options.get("min_mu"), options.get("max_mu")
    if least is not None and most is not None and least > most:
        raise UsageError(f"--min-mu {least} lies above --max-mu {most}; give a smaller one")
    return {
        "steps": count,
        "mu": {"min_mu": least, "max_mu": most},
        "guidance": options.get("guidance", 30.0),
        "fixed": fixed,
        "exact": options.get("exact_scalars", "on") == "on",
        "split": split,
    }


def sizes_of(settings: Settings) -> Sizes:
    """The sizes in a build's settings."""
    return Sizes(**settings.sizes)


def _modulated(settings: Settings) -> bool:
    """Whether the LoRA has branches in the modulation."""
    return any(re.search(r"norm\w*\.linear$|^time_text_embed\.", module) for module in settings.branches)


def step(settings: Settings, *, diptych: bool = False, image_tokens: int = 0) -> ComponentSpec:
    """One Euler step on a latent. So many image tokens follow the words."""
    sizes, choices = sizes_of(settings), settings.choices
    wide = "w2" if diptych else "w"
    latent = TensorSpec(FLOAT, ("batch", sizes.channels, "h", wide))
    inputs = {"z": latent, "y": latent, "context": TensorSpec(FLOAT, (ANY, sizes.words, sizes.context))}
    if image_tokens:
        inputs["seen"] = TensorSpec(FLOAT, ("batch", image_tokens, sizes.context))
    if choices["split"]:
        inputs["modulation"] = TensorSpec(FLOAT, ("batch" if diptych else ANY, sizes.rows, sizes.dim))
    else:
        inputs |= _pooled(sizes, ANY, bridge=diptych)
    inputs |= {"sigma": NUMBER, "sigma_next": NUMBER}
    if settings.branches:
        inputs["lora_scale"] = NUMBER
    arguments = {
        "config": sizes.transformer,
        "diptych": diptych,
        "mask": choices.get("mask", 0.0),
        "split": choices["split"],
        "exact": choices["exact"],
        "branches": settings.branches,
    }
    px = {"h": sizes.spatial, "w": sizes.spatial, "w2": sizes.spatial // 2}
    return ComponentSpec("flux.Step", inputs, {"z_next": latent}, px, {"h": 2, wide: 4 if diptych else 2}, arguments)


def modulate(settings: Settings, *, bridge: bool) -> ComponentSpec:
    """The modulation of all steps in one call."""
    sizes = sizes_of(settings)
    inputs = _pooled(sizes, ANY if bridge else "batch", bridge=bridge) | {"sigmas": TensorSpec(FLOAT, (ANY, "steps"))}
    if _modulated(settings):
        inputs["lora_scale"] = NUMBER
    outputs = {"modulation": TensorSpec(FLOAT, ("batch", "steps", sizes.rows, sizes.dim))}
    arguments = {"config": sizes.transformer, "exact": settings.choices["exact"]}
    return ComponentSpec("flux.Modulate", inputs, outputs, arguments=arguments | {"branches": settings.branches})


def _pooled(sizes: Sizes, axis: str, *, bridge: bool) -> dict[str, TensorSpec]:
    """The inputs that decide the modulation, besides time."""
    inputs = {"pooled": TensorSpec(FLOAT, (axis, sizes.pooled)), "guidance": NUMBER}
    return inputs | ({"bridge": TensorSpec(FLOAT, ("batch", sizes.pooled))} if bridge else {})


def encode(sizes: Sizes, *, diptych: bool = False) -> ComponentSpec:
    """The VAE's encoder, from image to latent."""
    image, latent = _pictures(sizes, diptych)
    multiples = dict.fromkeys(("height", "width"), sizes.multiple)
    arguments = {"config": sizes.vae, "diptych": diptych}
    return ComponentSpec("vae.Encode", {"image": image}, {"latent": latent}, _px(sizes), multiples, arguments)


def decode(sizes: Sizes, *, diptych: bool = False, margin: int | None = None) -> ComponentSpec:
    """The VAE's decoder, from latent to image."""
    image, latent = _pictures(sizes, diptych)
    multiples = {"h": 2, "w2" if diptych else "w": 4 if diptych else 2}
    arguments = {"config": sizes.vae, "diptych": diptych, "margin": margin}
    return ComponentSpec("vae.Decode", {"latent": latent}, {"image": image}, _px(sizes), multiples, arguments)


def _pictures(sizes: Sizes, diptych: bool) -> tuple[TensorSpec, TensorSpec]:
    image = TensorSpec(FLOAT, ("batch", 3, "height", "width"))
    return image, TensorSpec(FLOAT, ("batch", sizes.channels, "h", "w2" if diptych else "w"))


def _px(sizes: Sizes) -> dict[str, int]:
    return {"height": 1, "width": 1, "h": sizes.spatial, "w": sizes.spatial, "w2": sizes.spatial // 2}


def text_encoders(sizes: Sizes) -> dict[str, ComponentSpec]:
    """T5 and CLIP: from the ids of words to the tensors that the transformer reads."""
    ids, clip_ids = (TensorSpec("int64", ("batch", n)) for n in (sizes.words, sizes.clip_words))
    context = {"context": TensorSpec(FLOAT, ("batch", sizes.words, sizes.context))}
    pooled = {"pooled": TensorSpec(FLOAT, ("batch", sizes.pooled))}
    return {
        "t5": ComponentSpec("text.T5", {"ids": ids}, context, arguments={"config": sizes.t5}),
        "clip": ComponentSpec("text.ClipText", {"ids": clip_ids}, pooled, arguments={"config": sizes.clip_text}),
    }


def tiles(settings: Settings, whole_px: tuple[int, int] | None = None) -> Tiles:
    """How a system cuts images. With fixed sizes, every tile has one of them, and no image is taken whole."""
    sizes, fixed = sizes_of(settings), tuple(settings.choices["fixed"])
    if not fixed:
        high, wide = whole_px or sizes.whole_px
        return Tiles(sizes.tile_px, sizes.overlap_px, (high, wide))
    overlap = fixed[0] * sizes.overlap_px // sizes.tile_px // sizes.multiple * sizes.multiple
    return Tiles(fixed[0], overlap, fixed_px=fixed)


def caller_inputs(settings: Settings) -> dict[str, Input]:
    """The inputs that a caller may set. Those that a table of the build depends on are not among them."""
    inputs, fixed = {}, settings.choices["fixed"]
    if not fixed:
        inputs["guidance"] = Input(FLOAT, default=settings.choices["guidance"], help=GUIDANCE, least=0)
    if settings.branches and not (fixed and _modulated(settings)):
        inputs["lora_scale"] = Input(FLOAT, default=_strength(settings), help="strength of the LoRA")
    return inputs


def _strength(settings: Settings) -> float:
    return settings.lora.strength if settings.lora else 1.0


def tokenizer_texts(sizes: Sizes, folder: Path | None) -> dict[str, str]:
    """The tokenizers of T5 and CLIP, one file each. Without a folder they are synthetic, of the same kind."""
    from tilewright.export import tokenizers

    with tempfile.TemporaryDirectory() as temporary:
        if folder is None:
            folder = Path(temporary)
            tokenizers.put(folder / "tokenizer", tokenizers.stand_in_clip(sizes.clip_text["vocab_size"]))
            t5 = tokenizers.stand_in_t5(sizes.t5["vocab_size"])
            tokenizers.put(folder / "tokenizer_2", {"tokenizer.json": t5})
        return {
            "tokenizers/t5.json": tokenizers.t5(folder / "tokenizer_2", sizes.words),
            "tokenizers/clip.json": tokenizers.clip(folder / "tokenizer", sizes.clip_words),
        }


def prompt_constants(
    settings: Settings, run: Run, options: Mapping[str, Any], folder: Path | None, words: str | None
) -> dict[str, Any]:
    """`context` and `pooled` of the fixed prompt: from the text encoders, or from the user's file of embeddings."""
    import numpy as np

    from tilewright.runtime.inputs import tensors_of

    sizes = sizes_of(settings)
    if words is not None:
        t5, clip = tokenizer_texts(sizes, folder).values()
        context = run("t5", ids=_ids(t5, words, sizes.words))
        return context | run("clip", ids=_ids(clip, words, sizes.clip_words))
    path = Path(options["prompt_embeds"])
    shapes: dict[str, tuple[int, ...]] = {
        "prompt_embeds": (1, sizes.words, sizes.context),
        "pooled_prompt_embeds": (1, sizes.pooled),
    }
    tensors = tensors_of(path, tuple(shapes))
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise InputError(
                f"{path}: {name!r} has shape {list(tensors[name].shape)}, not {list(shape)};"
                " save what the text encoders give"
            )
    embeds = [np.asarray(tensors[name], np.float32) for name in shapes]
    return dict(zip(("context", "pooled"), embeds, strict=True))


def _ids(tokenizer: str, words: str, length: int) -> Any:
    from tilewright.runtime.text import token_ids

    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        file.write(tokenizer)
        file.flush()
        return token_ids(Path(file.name), words, length)


def modulation_tables(settings: Settings, run: Run, pooled: Any) -> dict[str, Any]:
    """The modulation of every step for each fixed tile size; with several sizes, one table `modulation.TOKENS` each."""
    import numpy as np

    from tilewright.runtime.plan.schedules import flow_shift

    sizes, choices, tables = sizes_of(settings), settings.choices, {}
    strength, guidance = (np.array([number], np.float32) for number in (_strength(settings), choices["guidance"]))
    scale = {"lora_scale": strength} if _modulated(settings) else {}
    for px in choices["fixed"]:
        tokens = (px // sizes.multiple) ** 2
        sigmas = flow_shift(choices["steps"], tokens, **schedule_options(settings))["sigma"]
        rows = run("modulate", pooled=pooled, guidance=guidance, sigmas=sigmas[None], **scale)
        tables["modulation" if len(choices["fixed"]) == 1 else f"modulation.{tokens}"] = rows["modulation"]
    if choices["fixed"] and _modulated(settings):
        tables["lora_scale"] = strength  # the strength that the table was computed with
    return tables


def schedule_options(settings: Settings) -> dict[str, Any]:
    """The options of `flow_shift` that differ from its defaults."""
    schedule, names = sizes_of(settings).schedule, SCHEDULE_OPTIONS
    line = {names[name]: schedule[name] for name in names if schedule[name] != SCHEDULE[name]}
    return line | {name: bound for name, bound in settings.choices["mu"].items() if bound is not None}
