"""TokSR: a transformer restores the 32 tokens of a small tile, led by words; TA-TiTok or TexTok makes them of pixels.

A tile is all the network ever sees, and its tokens mean nothing beside those of another: tiles are joined as pixels. A
few tokens read many weights, so that the cost of a call hardly grows with its tiles: they are run many at a time.
"""

import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tilewright.export.system import ComponentSpec, Option, Origin, finite
from tilewright.export.weights.files import Tensors
from tilewright.runtime.errors import InputError, UsageError
from tilewright.runtime.program import Call, Grid, Input, Pass, Program, State, Steps, TensorSpec, Text, Tiles

__all__ = [
    "LICENCE",
    "OPTIONS",
    "ORIGINS",
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

TITLE = "TokSR, 32 tokens a tile of 256 px through TA-TiTok and a DiT, 25 steps"
LICENCE = "Apache-2.0 (TA-TiTok), MIT (CLIP ViT-L/14); the system's own weights are the user's"
FLOAT = "float32"
STEPS, BATCH, LARGEST_BATCH = 25, 16, 31
HEAD_WIDTH = 64  # of every published size, which files do not tell
VOCABULARY = 49408
TOKENIZER = "tokenizers/clip.json"
SCHEDULE: dict[str, int | float | str] = {
    "betas": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "spacing_offset": 0,
    "final_alpha": "one",
}

_BASE = {"width": 768, "layers": 12, "heads": 12}
_LARGE = {"width": 1024, "layers": 24, "heads": 16}
_SMALL = {"width": 32, "layers": 2, "heads": 2}
_CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_PUBLISHED = {"image": 256, "patch": 16, "latents": 32, "token": 16, "words": 77, "text_width": 768, "scale": 0.7525}
PRESETS: dict[str, dict[str, Any]] = {
    "full": {  # the public TA-TiTok, whose encoder reads no words
        "tokenizer": _PUBLISHED | {"encoder": _BASE | {"text": False}, "decoder": _LARGE},
        "clip": _CLIP,
        "dit": _BASE,
        "overlap": 32,
    },
    "textok": {  # the paper's own tokenizer
        "tokenizer": _PUBLISHED | {"encoder": _BASE | {"text": True}, "decoder": _BASE},
        "clip": _CLIP,
        "dit": _BASE,
        "overlap": 32,
    },
    "tiny": {
        "tokenizer": {
            "image": 32,
            "patch": 8,
            "latents": 4,
            "token": 4,
            "words": 8,
            "text_width": 16,
            "scale": 0.7525,
            "encoder": _SMALL | {"text": True},
            "decoder": _SMALL,
        },
        "clip": {
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 8,
            "bos_token_id": 62,
        },
        "dit": _SMALL,
        "overlap": 8,
    },
}
OPTIONS = {
    "tokenizer": Option(
        "tatitok_bl32_vae.bin, or a TexTok-VAE of the same names",
        names=("tatitok_bl32_vae.bin", "tatitok_bl32_vae.safetensors"),
    ),
    "clip": Option("folder of clip-vit-large-patch14-336", names=("clip-vit-large-patch14-336",)),
    "dit": Option("file with the denoiser (dit.*)", names=("dit.safetensors",)),
    "prompt": Option("default words"),
    "steps": Option("sampling steps of the program", kind=int),
    "guidance": Option("build guidance in, for twice the work a step; its default strength", kind=finite),
    "text_mode": Option("what the denoiser reads of the words", choices=("pooled", "all77")),
    "prediction": Option("what the denoiser was trained to say", choices=("eps", "x0")),
    "batch": Option(f"tiles in a call (default: {BATCH})", kind=int),
}
ORIGINS = {
    "tokenizer": Origin("tokenizer", (".",), "TA-TiTok's or TexTok's VAE"),
    "text_encoder": Origin("clip", (".",), "CLIP ViT-L/14-336's text tower"),
    "dit": Origin("dit", (".",), "TokSR's denoiser"),
}
TELLING = {  # tensors that tell a tokenizer's sizes -> how many axes they have
    "latent_tokens": 2,
    "encoder.patch_embed.weight": 4,
    "encoder.conv_out.weight": 4,
    "encoder.positional_embedding": 2,
    "encoder.transformer.0.ln_1.weight": 1,
    "decoder.decoder_embed.weight": 2,
    "decoder.text_guidance_proj.weight": 2,
    "decoder.text_guidance_positional_embedding": 2,
    "decoder.transformer.0.ln_1.weight": 1,
}
DIT_TELLING = {"dit.embed.weight": 2, "dit.positions.weight": 2, "dit.label.weight": 2, "dit.blocks.0.ln_1.weight": 1}
OF_COMPONENT = {"text": "text_encoder", "tokenise": "tokenizer", "detokenise": "tokenizer", "step": "dit"}


def settings(preset: str, given: Mapping[str, Any], found: Mapping[str, Tensors]) -> dict[str, Any]:
    """The choices of a build, and the sizes that files tell."""
    sizes = PRESETS[preset]
    count, batch = given.get("steps", STEPS), given.get("batch", BATCH)
    if not 1 <= count <= 1000:
        raise UsageError(f"--steps {count} must lie in 1..1000")
    if not 1 <= batch <= LARGEST_BATCH:
        raise UsageError(f"--batch {batch} must lie in 1..{LARGEST_BATCH}")
    tokenizer, dit = sizes["tokenizer"], sizes["dit"] | {"output_projection": True}
    if "tokenizer" in found:
        tokenizer = tokenizer | _tokenizer_sizes(found["tokenizer"], tokenizer)
    if "dit" in found:
        dit = dit | _dit_sizes(found["dit"], tokenizer, dit)
    chosen = {"text_mode": given.get("text_mode", "pooled"), "prediction": given.get("prediction", "eps")}
    return {
        "steps": count,
        "batch": batch,
        "prompt": given.get("prompt", ""),
        "guidance": given.get("guidance"),
        "tokenizer": tokenizer,
        "dit": dit | chosen,
    }


def _shapes(
    file: Path, found: Tensors, wanted: Mapping[str, int], advice: str, prefix: str = ""
) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape; those that tell sizes must be there, of so many axes."""
    shapes = {prefix + key.removeprefix(prefix): r.shape for key, r in found.tensors.items()}
    for key, axes in wanted.items():
        if len(shapes.get(key, ())) != axes:
            what = f"{key!r} has shape {list(shapes[key])}" if key in shapes else f"lacks {key!r}"
            raise InputError(f"{file}: {what}; {advice}")
    return shapes


def _count(names: Mapping[str, Any], before: str) -> int:
    """How many numbered blocks there are."""
    return len({name.removeprefix(before).split(".")[0] for name in names if name.startswith(before)})


def _heads(width: int, usual: int) -> int:
    return width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else usual


def _tokenizer_sizes(found: Tensors, usual: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer's own sizes; refused where it is of another kind."""
    file, advice = found.folder / min(found.sources), "give tatitok_bl32_vae.bin, or another text-aware VAE"
    if codes := sorted(key for key in found.tensors if key.startswith("quantize.")):
        raise InputError(f"tokenizer {file}: has a quantiser ({codes[0]!r}), TokSR's tokens are continuous; {advice}")
    shapes = _shapes(file, found, TELLING, f"no tokenizer that can be used; {advice}")
    patch = shapes["encoder.patch_embed.weight"][2]
    cells, inner = shapes["encoder.positional_embedding"]
    width, token = shapes["decoder.decoder_embed.weight"]
    if shapes["encoder.conv_out.weight"][0] != 2 * token:
        raise InputError(f"tokenizer {file}: its encoder gives no mean and variance of {token} numbers; {advice}")
    words, _ = shapes["decoder.text_guidance_positional_embedding"]
    _, text_width = shapes["decoder.text_guidance_proj.weight"]
    if (words, text_width) != (usual["words"], usual["text_width"]):
        raise InputError(
            f"tokenizer {file}: reads {words} words of {text_width} numbers, CLIP here gives {usual['words']} of"
            f" {usual['text_width']}; is this the right preset?"
        )
    return {
        "image": patch * math.isqrt(cells - 1),
        "patch": patch,
        "latents": shapes["latent_tokens"][0],
        "token": token,
        "encoder": {
            "width": inner,
            "layers": _count(shapes, "encoder.transformer."),
            "heads": _heads(inner, usual["encoder"]["heads"]),
            "text": "encoder.text_guidance_proj.weight" in shapes,
        },
        "decoder": {
            "width": width,
            "layers": _count(shapes, "decoder.transformer."),
            "heads": _heads(width, usual["decoder"]["heads"]),
        },
    }


def _dit_sizes(found: Tensors, tokenizer: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """A denoiser's own sizes; refused where it is of another tokenizer."""
    file = found.folder / min(found.sources)
    shapes = _shapes(file, found, DIT_TELLING, "no denoiser that can be used; docs/toksr.md names its tensors", "dit.")
    width, token = shapes["dit.embed.weight"]
    latents, text_width = shapes["dit.positions.weight"][0], shapes["dit.label.weight"][1]
    wanted = tuple(tokenizer[name] for name in ("latents", "token", "text_width"))
    if (latents, token, text_width) != wanted:
        raise InputError(
            f"denoiser {file}: is for {latents} tokens of {token} numbers, words of {text_width}; the tokenizer gives"
            f" {wanted[0]} of {wanted[1]}, words of {wanted[2]}; give the two that were trained together"
        )
    return {
        "width": width,
        "layers": _count(shapes, "dit.blocks."),
        "heads": _heads(width, usual["heads"]),
        "output_projection": any(key.endswith(".attn.out.weight") for key in shapes),
    }


def components(preset: str, **settings: Any) -> dict[str, ComponentSpec]:
    """text, tokenise, step, detokenise."""
    sizes, dit = settings["tokenizer"], settings["dit"]
    side = sizes["image"]
    image = TensorSpec(FLOAT, ("batch", 3, side, side))
    tokens = TensorSpec(FLOAT, ("batch", sizes["token"], 1, sizes["latents"]))
    words = {"words": TensorSpec(FLOAT, (1, sizes["words"], sizes["text_width"]))}
    pooled = {"pooled": TensorSpec(FLOAT, (1, sizes["text_width"]))}
    number = TensorSpec(FLOAT, ())
    label = pooled if dit["text_mode"] == "pooled" else words
    scalars = dict.fromkeys(("t", "alpha", "beta", "alpha_next", "beta_next"), number)
    guided = {} if settings["guidance"] is None else {"guidance": number}
    denoiser = {"sizes": sizes, "dit": dit}
    return {
        "text": ComponentSpec(
            "toksr.Text",
            {"ids": TensorSpec("int64", (1, sizes["words"]))},
            words | pooled,
            arguments={"config": PRESETS[preset]["clip"]},
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


def build_time(preset: str, **settings: Any) -> dict[str, ComponentSpec]:
    """Nothing runs at build."""
    return {}


def program(preset: str, **settings: Any) -> Program:
    """text; then tokenise, sample and detokenise, each on the same tiles."""
    sizes, taken = settings["tokenizer"], components(preset, **settings)
    side, guided = sizes["image"], settings["guidance"] is not None
    overlap = min(PRESETS[preset]["overlap"], side // 2) // sizes["patch"] * sizes["patch"]
    tiles = Tiles(side, overlap, batch=settings["batch"], fixed_px=(side,))
    steps = Steps("ddim", settings["steps"], options=SCHEDULE)
    inputs = {"ids": Input("int64", (1, sizes["words"]))}
    inputs |= {"guidance": Input(FLOAT, default=settings["guidance"])} if guided else {}
    known = {name: name for name in ("image", "words", "pooled", "tokens", "condition")} | {"guidance": "$guidance"}
    known |= {name: f"@{name}" for name in ("t", "alpha", "beta", "alpha_next", "beta_next")}

    def call(component: str, outputs: dict[str, str]) -> Call:
        return Call(component, {name: known[name] for name in taken[component].inputs}, outputs)

    state = {"tokens": State((sizes["token"], 1, sizes["latents"]), "noise")}
    passes = (
        Pass("text", once=(Call("text", {"ids": "$ids"}, {"words": "words", "pooled": "pooled"}),)),
        Pass("tokenise", tiles, once=(call("tokenise", {"condition": "condition"}),)),
        Pass("sample", tiles, steps, state, each=(call("step", {"tokens_next": "tokens"}),)),
        Pass("detokenise", tiles, once=(call("detokenise", {"image": "result"}),)),
    )
    grids = {"image": Grid(1, 3, "input"), "result": Grid(1, 3)}
    texts = {"prompt": Text({"ids": TOKENIZER}, settings["prompt"])}
    return Program(4, sizes["patch"], grids, passes, inputs, texts)


def constants(
    preset: str, run: Callable[..., Any], given: Mapping[str, Any], folder: Path | None, **settings: Any
) -> dict[str, Any]:
    """The program reads none."""
    return {}


def tokenizers(preset: str, given: Mapping[str, Any], folder: Path | None, **settings: Any) -> dict[str, str]:
    """CLIP's, padded with zeros behind the end: every position is attended to, and the networks learned those."""
    from tilewright.export import tokenizers

    with tempfile.TemporaryDirectory() as temporary:
        clip = Path(given["clip"]) if "clip" in given else Path(temporary)
        if "clip" not in given:
            vocabulary = PRESETS[preset]["clip"].get("vocab_size", VOCABULARY)
            tokenizers.put(clip, tokenizers.stand_in_clip(vocabulary))
        length = settings["tokenizer"]["words"]
        return {TOKENIZER: tokenizers.clip(clip if clip.is_dir() else clip.parent, length, pad_id=0)}


def origins(component: str) -> set[str]:
    """Each has its own file."""
    return {OF_COMPONENT[component]}


def origin(component: str, parameter: str) -> str:
    """Each has its own file."""
    return OF_COMPONENT[component]


def keys(component: str, parameter: str) -> tuple[str, ...]:
    """The tokenizer's published names; CLIP's, with and without the tower's; the denoiser's own."""
    if component == "text":
        name = parameter.removeprefix("model.")
        return (f"text_model.{name}", name)
    return (parameter, parameter.removeprefix("dit."))


def ignored(origin: str, key: str) -> bool:
    """CLIP's other tower and its projections."""
    others = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
    return origin == "text_encoder" and (key.startswith(others) or key.endswith("position_ids"))


def stand_in(preset: str) -> dict[str, Any]:
    """The public tokenizer and text tower, and a denoiser of the paper's kind."""
    from tilewright.export.graph.trace import parameter_specs
    from tilewright.export.tokenizers import stand_in_clip

    held: dict[str, dict[str, TensorSpec]] = {name: {} for name in ORIGINS}
    for component, source in components("full", **settings("full", {}, {})).items():
        for name, spec in parameter_specs(source).items():
            held[OF_COMPONENT[component]][keys(component, name)[0]] = spec
    texts = {f"clip-vit-large-patch14-336/{name}": text for name, text in stand_in_clip(VOCABULARY).items()}
    return texts | {
        "tatitok_bl32_vae.safetensors": held["tokenizer"],
        "clip-vit-large-patch14-336/model.safetensors": held["text_encoder"],
        "dit.safetensors": held["dit"],
    }
