"""InstantIR's program: its passes, the calls of a step, and the inputs that the caller may set."""

from tilewright.export.system import Settings
from tilewright.export.systems.instantir.components import FLOAT, GATES, WORDS, components
from tilewright.export.systems.instantir.sizes import Sizes
from tilewright.runtime.bundle.program import Call, Grid, Input, Pass, Program, State, Steps, TensorFile, Text, Tiles

__all__ = ["TOKENIZERS", "program"]

TOKENIZERS = ("tokenizers/clip.json", "tokenizers/clip_2.json")
ADARES = "adaptive restoration: off as released, or as the paper or the code computes it"
GATED = (
    "share of the steps that pass before the input picture leads",
    "share of the steps after which it no longer leads",
    "share of the steps that pass before previews are made",
    "share of the steps after which no preview is made",
)


def program(settings: Settings) -> Program:
    """The passes text, words, encode, start, see, sample and decode."""
    sizes, choices = Sizes(**settings.sizes), settings.choices
    tiles = Tiles(sizes.tile_px, sizes.overlap_px, (sizes.tile_px, sizes.tile_px))
    steps = Steps("ddim", choices["steps"], options=sizes.schedule)
    text = "" if choices["text"] else "$"  # "$" marks inputs of the caller
    contexts = {name: f"{text}{name}" for name in ("context", "negative_context")}
    start = {"latent": "y", "noise": "~noise", "alpha": "@alpha", "beta": "@beta", "start": "$start"}
    see = Call("see", {"image": "image", "positions": "#positions"}, {"features": "features"})
    passes = (
        *((_text(),) if choices["text"] else ()),
        Pass("words", once=(Call("words", contexts, {"words": "words"}),)),
        Pass("encode", tiles, once=(Call("encode", {"image": "image"}, {"latent": "y"}),)),
        Pass("start", tiles, steps, once=(Call("start", start, {"z": "z"}),)),
        Pass("see", tiles, once=(see, *_looks(settings))),
        Pass("sample", tiles, steps, _state(sizes, settings), once=(_gates(),), each=_each(sizes, settings, text)),
        Pass("decode", tiles, once=(Call("decode", {"latent": "z"}, {"image": "result"}),)),
    )
    grids = {"image": Grid(1, 3, "input"), "noise": Grid(sizes.spatial, 4), "result": Grid(1, 3)}
    if choices["joined"]:
        grids |= {"y": Grid(sizes.spatial, 4), "z": Grid(sizes.spatial, 4)}
    texts = {
        f"{prefix}prompt": Text(
            {f"{prefix}{name}": file for name, file in zip(WORDS, TOKENIZERS, strict=True)},
            choices[f"{prefix}prompt"],
            "what the picture keeps away from" if prefix else "what the picture shows",
        )
        for prefix in ("", "negative_")
        if choices["text"]
    }
    files = {
        "prompt_embeds": TensorFile(
            {
                f"{prefix}{tensor}_embeds": f"{prefix}{value}"
                for prefix in ("", "negative_")
                for tensor, value in (("prompt", "context"), ("pooled_prompt", "pooled"))
            },
            "both prompts as the text encoders give them, instead of words",
        )
    }
    inputs = _inputs(sizes, settings)
    return Program(4, sizes.multiple, grids, passes, inputs, texts, files, any_scale=True)


def _text() -> Pass:
    """Prompt and negative prompt, each through both text encoders."""
    calls = (
        Call(
            "text",
            {name: f"${prefix}{name}" for name in WORDS},
            {name: f"{prefix}{name}" for name in ("context", "pooled")},
        )
        for prefix in ("", "negative_")
    )
    return Pass("text", once=tuple(calls))


def _looks(settings: Settings) -> tuple[Call, Call]:
    """Keys and values of the image tokens, for the base and for the previewer."""
    inputs = {"features": "features", "nothing": "#nothing"}
    base, preview = {"seen": "unet_seen"}, {"seen": "preview_seen"}
    if settings.merged:
        return Call("look_base", inputs, base), Call("look_preview", inputs, preview)
    strength = {"lora_scale": "$preview_strength"}
    return Call("look", inputs | {"lora_scale": "#none"}, base), Call("look", inputs | strength, preview)


def _each(sizes: Sizes, settings: Settings, text: str) -> tuple[Call, ...]:
    """The calls of a step: the previewer predicts, the aggregator compares, the base predicts, the latent moves on."""
    parts, names = components(settings), list(sizes.residuals)
    values = ("z", "y", "words", "preview", "delta", "moved", "control", "predicted", *names)
    rows = ("t", "alpha", "beta", "alpha_next", "beta_next", "control_on", "preview_on")
    feed = {name: name for name in values} | {name: f"@{name}" for name in rows}
    feed |= {name: f"{text}{name}" for name in ("pooled", "negative_pooled")}
    feed |= {name: f"${name}" for name in ("adares", "control_scale", "guidance", "sampler")}

    def call(component: str, outputs: dict[str, str], **sources: str) -> Call:
        return Call(component, {name: (feed | sources)[name] for name in parts[component].inputs}, outputs)

    base, preview = ("base", "preview") if settings.merged else ("unet", "unet")
    strength, aggregate_outputs = "$preview_strength", {"shown": "preview", "moved": "moved", "control": "control"}
    return (
        call(preview, {"predicted": "preview_noise"}, seen="preview_seen", lora_scale=strength, control="off"),
        call("aggregate", aggregate_outputs | {name: name for name in names}, noise="preview_noise"),
        call(base, {"predicted": "predicted"}, seen="unet_seen", lora_scale="#none"),
        call("step", {"z_next": "z", "delta": "delta"}, noise="~noise"),
    )


def _inputs(sizes: Sizes, settings: Settings) -> dict[str, Input]:
    """The inputs that the caller may set."""
    inputs = {
        "guidance": Input(FLOAT, default=settings.choices["guidance"], help="how strongly the words lead", least=0),
        "control_scale": Input(FLOAT, default=1.0, help="how strongly the input picture leads", least=0),
        "sampler": Input("int64", default=0, choices={"ddim": 0, "ddpm": 1}, help="ddpm adds noise each step"),
        "adares": Input("int64", default=0, choices={"off": 0, "paper": 1, "code": 2}, help=ADARES),
        "start": Input("int64", default=0, choices={"image": 0, "noise": 1}, help="what sampling begins with"),
    }
    inputs |= {
        name: Input(FLOAT, default=float(name.endswith("end")), help=help_, least=0, most=1)
        for name, help_ in zip(GATES, GATED, strict=True)
    }
    if not settings.merged:
        strength = settings.lora.strength if settings.lora else 1.0
        inputs["preview_strength"] = Input(FLOAT, default=strength, help="strength of the previewer's LoRA")
    for prefix in ("", "negative_"):
        if settings.choices["text"]:
            inputs |= {f"{prefix}{name}": Input("int64", (1, sizes.words)) for name in WORDS}
        else:
            inputs[f"{prefix}context"] = Input(FLOAT, (1, sizes.words, sizes.context))
            inputs[f"{prefix}pooled"] = Input(FLOAT, (1, sizes.pooled))
    return inputs


def _gates() -> Call:
    inputs = {"t": "@t"} | {name: f"${name}" for name in GATES}
    return Call("gates", inputs, {"control_on": "control_on", "preview_on": "preview_on"})


def _state(sizes: Sizes, settings: Settings) -> dict[str, State]:
    """The values that a tile keeps from step to step."""
    state = {
        "preview": State((4, f"h/{sizes.spatial}", f"w/{sizes.spatial}")),
        "delta": State((1,), "ones"),
    }
    if settings.merged:
        return state
    residuals = {
        name: State((2, width, *(f"{axis}/{sizes.spatial * size}" for axis in "hw")))
        for name, (width, size) in sizes.residuals.items()
    }
    # the previewer is not steered: it reads the residuals of the step before, times `off`, which is zero
    return state | {"off": State((1,))} | residuals
