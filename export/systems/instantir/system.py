"""InstantIR: SDXL restores, steered at every step by a preview that the same UNet makes with a low-rank branch.

A step is preview, aggregate, predict, update; all that is the same for every step is computed once before. Images that
fit in a tile are taken whole. Tiles of larger ones are joined after every step, or only as pixels at the end.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tilewright.export.system import Lora, Option, Preset, Run, Settings, System, UserFiles, finite
from tilewright.export.systems.instantir.components import build_time, components
from tilewright.export.systems.instantir.keys import LORA, ORIGINS, ignored, keys, lora_targets, origin
from tilewright.export.systems.instantir.program import TOKENIZERS, program
from tilewright.export.systems.instantir.read import TEXTS, sizes_of
from tilewright.export.systems.instantir.sizes import PRESETS, RANKS, Sizes
from tilewright.runtime.errors import UsageError

__all__ = ["SYSTEM"]

STEPS, GUIDANCE = 30, 7.0
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
        "branch: the LoRA runs beside the weights; merge: it is added to copies of them", choices=("branch", "merge")
    ),
    "resampler_heads": Option("heads of the adapter's resampler, which no file tells (default: of width 64)", kind=int),
    "prompt": Option("default prompt; needs the text encoders in the folder of weights"),
    "negative_prompt": Option("default text to keep away from"),
    "steps": Option("sampling steps of the program", kind=int),
    "guidance": Option("default strength of classifier-free guidance (default: 7)", kind=finite),
    "dino_positions": Option(
        "DINOv2's position table as the release resized it (default), or as transformers does now",
        choices=("release", "current"),
    ),
    "join": Option("join tiles as latents after every step, or as pixels at the end", choices=("steps", "pixels")),
    "variant": Option("variant of weight files to use, such as fp16 for model.fp16.safetensors"),
    "no_text": Option("leave the text encoders out: the caller gives embeddings", flag=True),
}


def settings(preset: Preset, options: Mapping[str, Any], files: UserFiles) -> Settings:
    """The choices of a build, and the sizes of the files."""
    count = options.get("steps", STEPS)
    if not 1 <= count < 1000:
        raise UsageError(f"--steps {count} must lie in 1..999")
    encoders = all(name in files.tensors for name in TEXTS)
    text = (encoders or "unet" not in files.tensors) and not options.get("no_text")
    if not text and (options.get("prompt") or options.get("negative_prompt")):
        raise UsageError("--prompt needs the text encoders; add them under --weights, or leave --no-text out")
    sizes = sizes_of(preset, files, text=text, heads=options.get("resampler_heads"))
    from tilewright.runtime.plan.schedules import ddim

    ddim(count, 1, **sizes.schedule)  # refuses steps that leave the schedule
    choices = {
        "steps": count,
        "guidance": options.get("guidance", GUIDANCE),
        "prompt": options.get("prompt", ""),
        "negative_prompt": options.get("negative_prompt", ""),
        "text": text,
        "joined": options.get("join", "steps") == "steps",
        "release": options.get("dino_positions", "release") == "release",
    }
    return Settings(asdict(sizes), choices, files.lora or _random_lora(sizes, RANKS[preset.name]))


def _random_lora(sizes: Sizes, rank: int) -> Lora:
    """Low-rank branches at every module that the released previewer adapts, with its alpha of 1."""
    targets = lora_targets(sizes.unet, sizes.resampler["depth"])
    return Lora(LORA.origin, 1.0, False, {module: [rank, 1 / rank] for module in targets})


def constants(settings: Settings, run: Run, options: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """DINOv2's position embeddings, its features of an empty image, and `none`: the strength 0 for the base."""
    import numpy as np

    tensors = run("positions")
    tensors |= run("nothing", positions=tensors["positions"])
    return tensors if settings.merged else tensors | {"none": np.zeros(1, np.float32)}


def tokenizers(settings: Settings, options: Mapping[str, Any], folder: Path | None) -> dict[str, str]:
    """The tokenizers of both text encoders, each with its own padding."""
    if not settings.choices["text"]:
        return {}
    from tilewright.export import tokenizers

    sizes = Sizes(**settings.sizes)
    with tempfile.TemporaryDirectory() as temporary:
        if folder is None:
            folder, vocabulary = Path(temporary), sizes.text["vocab_size"]
            tokenizers.put(folder / "tokenizer", tokenizers.stand_in_clip(vocabulary))
            tokenizers.put(folder / "tokenizer_2", tokenizers.stand_in_clip(vocabulary, pads_with_first=True))
        return {
            file: tokenizers.clip(folder / name, sizes.words)
            for file, name in zip(TOKENIZERS, ("tokenizer", "tokenizer_2"), strict=True)
        }


def stand_in() -> dict[str, Any]:
    """The published files of SDXL, DINOv2 and InstantIR."""
    from tilewright.export.systems.instantir.stand_in import published

    full = settings(Preset("full", PRESETS["full"], False), {}, UserFiles({}, {}))
    return published(components(full) | build_time(full))


SYSTEM = System(
    name="instantir",
    title="InstantIR, SDXL with DINOv2's image tokens and a previewer, 30 steps",
    licence="CreativeML Open RAIL++-M (SDXL); Apache-2.0 (DINOv2, InstantIR)",
    base_models=("stabilityai/stable-diffusion-xl-base-1.0", "facebook/dinov2-large", "InstantX/InstantIR"),
    presets=PRESETS,
    origins=ORIGINS,
    options=OPTIONS,
    lora=LORA,
    settings=settings,
    components=components,
    build_time=build_time,
    constants=constants,
    program=program,
    tokenizers=tokenizers,
    keys=keys,
    origin=origin,
    ignored=ignored,
    keep={
        "*conv_in.*": "it reads the picture or the latent",
        "*conv_out.*": "it makes the picture or the latent",
        "*conv_shortcut.*": "it carries a block's input past the block",
        "*embedding*": "it scales and shifts every block",
        "*.mul.*": "it scales a whole block",
        "*.add.*": "it shifts a whole block",
        "*.norm*.linear.*": "it scales and shifts a normalisation",
        "*.patch_embeddings.*": "it reads the picture",
    },
    stand_in=stand_in,
)
