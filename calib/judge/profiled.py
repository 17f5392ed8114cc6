"""The layers that an engine really computes in 8 bits, as its backend tells after it has compiled the graph.

A backend may compute a layer in float although the graph asks for 8 bits.
"""

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tilewright.calib.recipe import Recipe
from tilewright.runtime.bundle.manifest import EngineSpec
from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.engines import Engine

__all__ = ["low_layers", "low_share"]

ORT_INTEGER = {
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
}
OPENVINO_LAYERS = {"Convolution", "Deconvolution", "FullyConnected", "MatMul", "RNNCell"}
ITS_SCALE = "/DequantizationMultiply"  # what OpenVINO adds to the name of a layer in 8 bits
EIGHT_BITS = {"i8", "u8", "f8e4m3", "f8e5m2"}


def low_layers(
    bundle: Bundle,
    component: str,
    spec: EngineSpec,
    engine: Engine,
    recipe: Recipe,
    call: tuple[Mapping[str, Any], list[str]],
    weights_dir: Path | None = None,
) -> set[str]:
    """The layers of a component that an open engine computes in 8 bits."""
    names = recipe.quantised if spec.form is None or spec.form.convolutions else _linear(recipe)
    names = {name for name in names if name.startswith(f"{component}/")}
    ran = _openvino(engine) if spec.backend == "openvino" else _ort(bundle, component, spec, call, weights_dir)
    return {name for name in names if ran & _nodes(recipe, name)}


def low_share(recipe: Recipe, low: Iterable[str], kind: str | None = None) -> float:
    """The share of the multiplications of these layers, of all layers or of those of one kind."""
    return recipe.only(low).share(kind)


def _linear(recipe: Recipe) -> set[str]:
    return {name for name in recipe.quantised if recipe.layers[name].kind == "linear"}


def _nodes(recipe: Recipe, layer: str) -> set[str]:
    """The names of a layer's nodes, and of their results."""
    inputs = recipe.layers[layer].inputs
    keys = [layer] if len(inputs) == 1 else [f"{layer}[{name.partition('[')[2]}" for name in inputs]
    return {name for key in keys for name in (key, f"{key}.product")}


def _ort(
    bundle: Bundle,
    component: str,
    spec: EngineSpec,
    call: tuple[Mapping[str, Any], list[str]],
    weights_dir: Path | None,
) -> set[str]:
    """The nodes that ran in 8 bits in a profile of one call."""
    from tilewright.runtime.engines.ort import open_graph

    inputs, outputs = call
    with tempfile.TemporaryDirectory(prefix="tilewright-") as folder:
        engine = open_graph(
            bundle.path(spec.graph),
            bundle.files_of(spec.weights or component, weights_dir),
            precision=spec.precision,
            native=False,
            profile=Path(folder) / "profile",
        )
        engine.run(inputs, outputs)
        events = json.loads(Path(engine.session.end_profiling()).read_text())
        engine.close()
    nodes = [event for event in events if event.get("args", {}).get("op_name") in ORT_INTEGER]
    return {event["name"].removesuffix("_kernel_time") for event in nodes}


def _openvino(engine: Any) -> set[str]:
    """The nodes that the compiled graph has in 8 bits."""
    low = set[str]()
    for op in engine.compiled.get_runtime_model().get_ops():
        facts = {
            name: _text(op.get_rt_info()[name]) for name in ("layerType", "runtimePrecision", "originalLayersNames")
        }
        if facts["layerType"] in OPENVINO_LAYERS and facts["runtimePrecision"] in EIGHT_BITS:
            low |= {name.removesuffix(ITS_SCALE) for name in facts["originalLayersNames"].split(",")}
    return low


def _text(value: Any) -> str:
    return str(value.value if hasattr(value, "value") else value)
