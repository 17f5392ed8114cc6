"""Two small networks, one option, one LoRA."""

from tilewright.export.system import ComponentSpec, LoraFile, Option, Origin, Settings, System, finite
from tilewright.export.weights.lora import as_parameters
from tilewright.runtime.bundle.program import Call, Grid, Pass, Program, TensorSpec, Tiles


def components(settings: Settings) -> dict[str, ComponentSpec]:
    """see: image to features. paint: features to image."""
    width = settings.sizes["width"]
    image = {"image": TensorSpec("float32", ("batch", 3, "height", "width"))}
    features = {"features": TensorSpec("float32", ("batch", width, "rows", "columns"))}
    px, multiples = {"height": 1, "width": 1, "rows": 2, "columns": 2}, {"height": 2, "width": 2}
    strength = settings.lora.strength if settings.lora else 1.0
    branches = {module: [rank, scale * strength] for module, (rank, scale) in settings.branches.items()}
    paint = {"width": width, "gain": settings.choices["gain"], "branches": branches}
    return {
        "see": ComponentSpec("toy_restoration.networks.See", image, features, px, multiples, {"width": width}),
        "paint": ComponentSpec("toy_restoration.networks.Paint", features, image, px, {}, paint),
    }


def program(settings: Settings) -> Program:
    """One pass: a tile in, a tile out."""
    calls = (
        Call("see", {"image": "image"}, {"features": "features"}),
        Call("paint", {"features": "features"}, {"image": "result"}),
    )
    grids = {"image": Grid(1, 3, "input"), "result": Grid(1, 3)}
    return Program(2, 2, grids, (Pass("restore", Tiles(64, 16), once=calls),))


SYSTEM = System(
    name="toy",
    title="A toy, x2",
    licence="CC0-1.0",
    presets={"small": {"width": 6}},
    options={
        "gain": Option("how much brighter", kind=finite, default=1.0),
        "lora": Option("LoRA file, with its strength behind a colon if it is not 1"),
        "lora_mode": Option("how a LoRA is taken", choices=("branch", "merge")),
    },
    origins={
        "toy": Origin("weights", ("toy.safetensors",), "the toy's weights"),
        "lora": Origin("lora", (".",), "the toy's LoRA", needed=False, rename=as_parameters),
    },
    lora=LoraFile("lora"),
    components=components,
    program=program,
    origin=lambda component, parameter: "lora" if ".lora_" in parameter else "toy",
)
