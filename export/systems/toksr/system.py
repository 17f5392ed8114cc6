"""TokSR: TA-TiTok or TexTok turns a small tile into 32 tokens, and a transformer led by words restores the tokens.

Tokens describe a whole tile, so tiles can only be joined as pixels. A call reads many weights for few tokens and
costs hardly more with more tiles, so many tiles are run in one call.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tilewright.export.system import ComponentSpec, Option, Origin, Preset, Settings, System, UserFiles, finite
from tilewright.export.systems.toksr.sizes import PRESETS, PUBLISHED_CLIP, SIZE_OPTIONS, sizes_of
from tilewright.runtime.bundle.program import (
    ANY,
    Call,
    Grid,
    Input,
    Pass,
    Program,
    State,
    Steps,
    TensorSpec,
    Text,
    Tiles,
)
from tilewright.runtime.errors import UsageError

__all__ = ["SYSTEM"]

FLOAT = "float32"
STEPS, BATCH = 25, 16  # BATCH: most tiles in a call
TOKENIZER = "tokenizers/clip.json"
SCHEDULE: dict[str, int | float | str] = {
    "betas": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "spacing_offset": 0,
    "final_alpha": "one",
}
OPTIONS = {
    "tokenizer": Option(
        "tatitok_bl32_vae.bin, or a TexTok-VAE of the same names",
        names=("tatitok_bl32_vae.bin", "tatitok_bl32_vae.safetensors"),
    ),
    "clip": Option("folder of clip-vit-large-patch14-336", names=("clip-vit-large-patch14-336",)),
    "dit": Option("file with the denoiser (dit.*)", names=("dit.safetensors",)),
    "prompt": Option("default prompt", default=""),
    "steps": Option("sampling steps of the program", kind=int, default=STEPS),
    "guidance": Option("default strength of guidance; builds it in, for twice the work a step", kind=finite),
    "text_mode": Option("state of the prompt that the denoiser reads", choices=("pooled", "all77"), default="pooled"),
    "prediction": Option("quantity that the denoiser was trained to predict", choices=("eps", "x0"), default="eps"),
}
CHOICES = ("prompt", "steps", "guidance", "text_mode", "prediction")
ORIGIN_OF_COMPONENT = {"text": "text_encoder", "tokenise": "tokenizer", "detokenise": "tokenizer", "step": "dit"}


def settings(preset: Preset, options: Mapping[str, Any], files: UserFiles) -> Settings:
    """The choices of a build, and the sizes of the files."""
    choices = {name: options.get(name, OPTIONS[name].default) for name in CHOICES}
    if not 1 <= choices["steps"] <= 1000:
        raise UsageError(f"--steps {choices['steps']} must lie in 1..1000")
    return Settings(sizes_of(preset, options, files), choices)


def components(settings: Settings) -> dict[str, ComponentSpec]:
    """The networks of the bundle: text, tokenise, step and detokenise."""
    sizes, choices = settings.sizes["tokenizer"], settings.choices
    side = sizes["image"]
    image = TensorSpec(FLOAT, ("batch", 3, side, side))
    tokens = TensorSpec(FLOAT, ("batch", sizes["token"], 1, sizes["latents"]))
    words = {"words": TensorSpec(FLOAT, (ANY, sizes["words"], sizes["text_width"]))}
    pooled = {"pooled": TensorSpec(FLOAT, (ANY, sizes["text_width"]))}
    text = {name: spec.rows("batch") for name, spec in (words | pooled).items()}
    number = TensorSpec(FLOAT, (ANY,))
    label = pooled if choices["text_mode"] == "pooled" else words
    scalars = dict.fromkeys(("t", "alpha", "beta", "alpha_next", "beta_next"), number)
    guided = {} if choices["guidance"] is None else {"guidance": number}
    modes = {name: choices[name] for name in ("text_mode", "prediction")}
    denoiser = {"sizes": sizes, "dit": settings.sizes["dit"] | modes}
    return {
        "text": ComponentSpec(
            "toksr.Text",
            {"ids": TensorSpec("int64", ("batch", sizes["words"]))},
            text,
            # nothing reads this id, but the library warns if it lies outside of the vocabulary, as its default may
            arguments={"config": settings.sizes["clip"] | {"bos_token_id": 0}},
        ),
        "tokenise": ComponentSpec(
            "toksr.Tokenise",
            {"image": image} | (words if sizes["encoder"]["text"] else {}),
            {"condition": tokens},
            arguments={"sizes": sizes},
        ),
        "step": ComponentSpec(
            "toksr.Step",
            {"tokens": tokens, "condition": tokens} | scalars | label | guided,
            {"tokens_next": tokens},
            arguments=denoiser,
        ),
        "detokenise": ComponentSpec(
            "toksr.Detokenise", {"tokens": tokens} | words, {"image": image}, arguments={"sizes": sizes}
        ),
    }


def program(settings: Settings) -> Program:
    """The passes text, tokenise, sample and detokenise. All but text run on the same tiles."""
    sizes, choices, specs = settings.sizes["tokenizer"], settings.choices, components(settings)
    side, guided = sizes["image"], choices["guidance"] is not None
    tiles = Tiles(side, settings.sizes["overlap"], batch=BATCH, fixed_px=(side,))
    steps = Steps("ddim", choices["steps"], options=SCHEDULE)
    inputs = {"ids": Input("int64", (1, sizes["words"]))}
    guidance = Input(FLOAT, default=choices["guidance"], help="how strongly the words lead", least=0)
    inputs |= {"guidance": guidance} if guided else {}
    sources = {name: name for name in ("image", "words", "pooled", "tokens", "condition")} | {"guidance": "$guidance"}
    sources |= {name: f"@{name}" for name in ("t", "alpha", "beta", "alpha_next", "beta_next")}

    def call(component: str, outputs: dict[str, str]) -> Call:
        return Call(component, {name: sources[name] for name in specs[component].inputs}, outputs)

    state = {"tokens": State((sizes["token"], 1, sizes["latents"]), "noise")}
    passes = (
        Pass("text", once=(Call("text", {"ids": "$ids"}, {"words": "words", "pooled": "pooled"}),)),
        Pass("tokenise", tiles, once=(call("tokenise", {"condition": "condition"}),)),
        Pass("sample", tiles, steps, state, each=(call("step", {"tokens_next": "tokens"}),)),
        Pass("detokenise", tiles, once=(call("detokenise", {"image": "result"}),)),
    )
    grids = {"image": Grid(1, 3, "input"), "result": Grid(1, 3)}
    texts = {"prompt": Text({"ids": TOKENIZER}, choices["prompt"], "what the picture shows")}
    return Program(4, sizes["patch"], grids, passes, inputs, texts)


def tokenizers(settings: Settings, options: Mapping[str, Any], folder: Path | None) -> dict[str, str]:
    """CLIP's tokenizer, which pads with zeros: the networks read every position, and were trained with zeros there."""
    from tilewright.export import tokenizers

    rows, length = settings.sizes["clip"]["vocab_size"], settings.sizes["tokenizer"]["words"]
    with tempfile.TemporaryDirectory() as temporary:
        clip = Path(options.get("clip", temporary))
        if "clip" not in options:
            tokenizers.put(clip, tokenizers.stand_in_clip(rows))
        return {TOKENIZER: tokenizers.clip(clip if clip.is_dir() else clip.parent, length, pad_id=0, rows=rows)}


def origin(component: str, parameter: str) -> str:
    """The origin of a component's parameters: each component has one."""
    return ORIGIN_OF_COMPONENT[component]


def keys(component: str, parameter: str) -> tuple[str, ...]:
    """The names of a parameter in files; CLIP's text encoder also lies in files of the whole model, under a prefix."""
    if component == "text":
        name = parameter.removeprefix("model.")
        return (f"text_model.{name}", name)
    return (parameter, parameter.removeprefix("dit."))


def ignored(origin: str, key: str) -> bool:
    """Whether no network reads a key: CLIP's image encoder and its projections."""
    others = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
    return origin == "text_encoder" and (key.startswith(others) or key.endswith("position_ids"))


def stand_in() -> dict[str, Any]:
    """The published tokenizer and text encoder, and a file like the paper's denoiser."""
    from tilewright.export.graph.trace import parameter_specs
    from tilewright.export.tokenizers import stand_in_clip

    published = settings(Preset("full", PRESETS["full"], True), {}, UserFiles({}, {}))
    tensors: dict[str, dict[str, TensorSpec]] = {name: {} for name in ORIGINS}
    for component, source in components(published).items():
        for name, spec in parameter_specs(source).items():
            tensors[ORIGIN_OF_COMPONENT[component]][keys(component, name)[0]] = spec
    folder = "clip-vit-large-patch14-336"
    vocabulary = stand_in_clip(published.sizes["clip"]["vocab_size"])
    return {f"{folder}/{name}": text for name, text in vocabulary.items()} | {
        f"{folder}/config.json": json.dumps(PUBLISHED_CLIP, indent=2),
        "tatitok_bl32_vae.safetensors": tensors["tokenizer"],
        f"{folder}/model.safetensors": tensors["text_encoder"],
        "dit.safetensors": tensors["dit"],
    }


ORIGINS = {
    "tokenizer": Origin("tokenizer", (".",), "TA-TiTok's or TexTok's VAE"),
    "text_encoder": Origin("clip", (".",), "CLIP ViT-L/14-336's text tower"),
    "dit": Origin("dit", (".",), "TokSR's denoiser"),
}
SYSTEM = System(
    name="toksr",
    title="TokSR, 32 tokens a tile of 256 px through TA-TiTok and a DiT, 25 steps",
    licence="Apache-2.0 (TA-TiTok), MIT (CLIP ViT-L/14); the system's own weights are the user's",
    base_models=("openai/clip-vit-large-patch14",),
    presets=PRESETS,
    options=OPTIONS | SIZE_OPTIONS,
    origins=ORIGINS,
    settings=settings,
    components=components,
    program=program,
    tokenizers=tokenizers,
    keys=keys,
    origin=origin,
    ignored=ignored,
    keep={
        "*patch_embed.*": "it reads the picture",
        "*conv_out.*": "it makes the picture or the tokens",
        "*decoder_embed.*": "it reads the tokens",
        "*ffn.*": "it makes the picture",
        "step/*embed.*": "it reads the tokens",
        "step/*time.*": "it scales and shifts every block",
        "step/*label.*": "it reads the words",
        "step/out.*": "it makes the tokens",
    },
    stand_in=stand_in,
)
