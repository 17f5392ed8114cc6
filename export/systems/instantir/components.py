"""InstantIR's networks as components, with the inputs and outputs of each."""

import re
from typing import Any

from tilewright.export.system import ComponentSpec, Settings
from tilewright.export.systems.instantir.sizes import Sizes
from tilewright.runtime.bundle.program import ANY, TensorSpec

__all__ = ["FLOAT", "GATES", "WORDS", "build_time", "components"]

FLOAT = "float32"
WORDS = ("ids", "ids_2")
GATES = ("control_start", "control_end", "preview_start", "preview_end")
NUMBER, CHOICE = TensorSpec(FLOAT, (ANY,)), TensorSpec("int64", (ANY,))
TABLE, GATE, PER_TILE = (TensorSpec(FLOAT, shape) for shape in ((ANY, "steps"), (ANY, 1), ("batch", 1)))
IMAGE, LATENT = TensorSpec(FLOAT, ("batch", 3, "height", "width")), TensorSpec(FLOAT, ("batch", 4, "h", "w"))
PREDICTED = TensorSpec(FLOAT, ("batch", 2, 4, "h", "w"))  # without the prompt, and with it
TIME = dict.fromkeys(("t", "alpha", "beta"), NUMBER)


class _Specs:
    """The specs of tensors between components that depend on sizes."""

    def __init__(self, sizes: Sizes) -> None:
        cells = f"height/{sizes.spatial}", f"width/{sizes.spatial}"
        self.encoded = TensorSpec(FLOAT, ("batch", 4, *cells))
        self.features = TensorSpec(FLOAT, ("batch", sizes.features, sizes.dino["hidden_size"]))
        self.table = self.features.rows(ANY)  # DINOv2's positions, and its empty image
        self.context = TensorSpec(FLOAT, ("batch", sizes.words, sizes.context))
        self.pooled = dict.fromkeys(("pooled", "negative_pooled"), TensorSpec(FLOAT, (ANY, sizes.pooled)))
        width = sizes.keys_and_values
        self.words = TensorSpec(FLOAT, (ANY, 2, sizes.words, width))
        self.image_tokens = TensorSpec(FLOAT, ("batch", 2, sizes.resampler["queries"], width))
        self.residuals = {
            name: TensorSpec(FLOAT, ("batch", 2, channels, *(f"{axis}/{part}" if part > 1 else axis for axis in "hw")))
            for name, (channels, part) in sizes.residuals.items()
        }
        self.px = {"height": 1, "width": 1, "h": sizes.spatial, "w": sizes.spatial}
        self.cells = dict.fromkeys(("h", "w"), sizes.multiple // sizes.spatial)


def components(settings: Settings) -> dict[str, ComponentSpec]:
    """The networks of the bundle. With a merged LoRA, the base and the previewer have a UNet and a resampler each."""
    sizes = Sizes(**settings.sizes)
    specs = _Specs(sizes)
    parts = _conditions(sizes, specs) | _sampler(sizes, specs) | _roles(sizes, specs, settings)
    if settings.choices["text"]:
        ids = dict.fromkeys(WORDS, TensorSpec("int64", ("batch", sizes.words)))
        outputs = {"context": specs.context, "pooled": TensorSpec(FLOAT, ("batch", sizes.pooled))}
        arguments = {"text": sizes.text, "text_2": sizes.text_2}
        parts["text"] = ComponentSpec("instantir.Text", ids, outputs, arguments=arguments)
    return parts


def _conditions(sizes: Sizes, specs: _Specs) -> dict[str, ComponentSpec]:
    """The networks that run once an image: words, see, encode and decode."""
    contexts = dict.fromkeys(("context", "negative_context"), specs.context)
    see_inputs = {"image": IMAGE, "positions": specs.table}
    pixels = dict.fromkeys(("height", "width"), sizes.multiple)
    vae = {"config": sizes.vae}
    words = {"words": specs.words.rows("batch")}
    return {
        "words": ComponentSpec("instantir.Words", contexts, words, arguments={"config": sizes.unet}),
        "see": ComponentSpec(
            "vision.Dino", see_inputs, {"features": specs.features}, specs.px, arguments=_dino_arguments(sizes)
        ),
        "encode": ComponentSpec("vae.Encode", {"image": IMAGE}, {"latent": specs.encoded}, specs.px, pixels, vae),
        "decode": ComponentSpec("vae.Decode", {"latent": LATENT}, {"image": IMAGE}, specs.px, specs.cells, vae),
    }


def _sampler(sizes: Sizes, specs: _Specs) -> dict[str, ComponentSpec]:
    """The parts of the sampler besides the UNet."""
    start_inputs = {"latent": LATENT, "noise": LATENT, "alpha": TABLE, "beta": TABLE, "start": CHOICE}
    gates = dict.fromkeys(("control_on", "preview_on"), TensorSpec(FLOAT, ("batch", "steps", 1)))
    gate_inputs = {"t": TensorSpec(FLOAT, ("batch", "steps"))} | dict.fromkeys(GATES, TensorSpec(FLOAT, ("batch",)))
    aggregate_inputs = (
        {"z": LATENT, "y": LATENT, "noise": PREDICTED, "preview": LATENT, "delta": PER_TILE} | specs.pooled | TIME
    )
    aggregate_inputs |= {"adares": CHOICE, "control_scale": NUMBER, "control_on": GATE, "preview_on": GATE}
    aggregate_outputs = {
        "shown": LATENT,
        "moved": PER_TILE,
        "control": PER_TILE,
        "mid": specs.residuals["mid"],
    } | specs.residuals
    step_inputs = {"z": LATENT, "predicted": PREDICTED, "preview": LATENT, "moved": PER_TILE, "noise": LATENT}
    step_inputs |= {"guidance": NUMBER, "sampler": CHOICE} | TIME | dict.fromkeys(("alpha_next", "beta_next"), NUMBER)
    step_outputs = {"z_next": LATENT, "delta": PER_TILE}
    aggregator = {"config": sizes.unet, "spatial": sizes.spatial, "hidden": sizes.hidden}
    return {
        "start": ComponentSpec("instantir.Start", start_inputs, {"z": LATENT}, specs.px, specs.cells),
        "gates": ComponentSpec("instantir.Gates", gate_inputs, gates),
        "aggregate": ComponentSpec(
            "instantir.Aggregate", aggregate_inputs, aggregate_outputs, specs.px, specs.cells, aggregator
        ),
        "step": ComponentSpec(
            "instantir.Step",
            step_inputs,
            step_outputs,
            specs.px,
            specs.cells,
            {"offset": sizes.schedule["spacing_offset"]},
        ),
    }


def _roles(sizes: Sizes, specs: _Specs, settings: Settings) -> dict[str, ComponentSpec]:
    """The resampler and the UNet: one of each with branches, or with a merged LoRA one for base and previewer each."""
    strength = {} if settings.merged else {"lora_scale": NUMBER}
    steered = {"control": PER_TILE} | specs.residuals

    def look() -> ComponentSpec:
        branches = {module: pair for module, pair in settings.branches.items() if _of_tokens(module)}
        inputs = {"features": specs.features, "nothing": specs.table} | strength
        arguments = {"config": sizes.unet, "resampler": sizes.resampler, "branches": branches}
        return ComponentSpec("instantir.Look", inputs, {"seen": specs.image_tokens}, arguments=arguments)

    def unet(more: dict[str, TensorSpec]) -> ComponentSpec:
        branches = {module: pair for module, pair in settings.branches.items() if not _of_tokens(module)}
        inputs = (
            {"z": LATENT, "words": specs.words, "seen": specs.image_tokens} | specs.pooled | {"t": NUMBER} | strength
        )
        arguments = {"config": sizes.unet, "spatial": sizes.spatial, "adaptive": sizes.adaptive, "branches": branches}
        return ComponentSpec(
            "instantir.Unet", inputs | more, {"predicted": PREDICTED}, specs.px, specs.cells, arguments
        )

    if settings.merged:
        return {"look_base": look(), "look_preview": look(), "base": unet(steered), "preview": unet({})}
    return {"look": look(), "unet": unet(steered)}


def _dino_arguments(sizes: Sizes) -> dict[str, Any]:
    return {"config": sizes.dino} | sizes.pixels


def build_time(settings: Settings) -> dict[str, ComponentSpec]:
    """The networks that the build runs: DINOv2's position embeddings at this size, its features of an empty image."""
    sizes = Sizes(**settings.sizes)
    table, arguments = _Specs(sizes).table, _dino_arguments(sizes)
    resized = {"config": sizes.dino, "side": sizes.pixels["side"], "release": settings.choices["release"]}
    return {
        "positions": ComponentSpec("vision.DinoPositions", {}, {"positions": table}, arguments=resized),
        "nothing": ComponentSpec("vision.DinoOfNothing", {"positions": table}, {"nothing": table}, arguments=arguments),
    }


def _of_tokens(module: str) -> bool:
    """Whether a module makes keys and values of image tokens, which happens once an image."""
    return module.startswith("encoder_hid_proj.") or bool(re.search(r"\.to_[kv]_ip$", module))
