"""Engines of TensorRT on an NVIDIA GPU. A plan is compiled from a sealed bundle, on a machine with that kind of GPU."""

import importlib.util
from typing import Any

from tilewright.runtime.bundle.manifest import EngineSpec, Form, Memory, Needs
from tilewright.runtime.engines.machine import compute_capability

__all__ = ["COMPILED", "FORMS", "FROM_BUNDLE", "PRECISIONS", "missing", "prepare", "spec", "typed"]

FROM_BUNDLE = True
COMPILED = True
PRECISIONS = ("float32", "bfloat16")
# INT8 and FP8 in the places that it fuses, and products in float beside them as short as GPUs multiply fastest
FORMS = {"int8": (Form("int8", rest="bfloat16"),), "fp8": (Form("float8_e4m3fn", rest="bfloat16"),)}
OLDEST = "10.16"
LINT = "'tilewright export lint BUNDLE --target tensorrt' and 'export build --dry-run --gpu sm90' work without one"


def missing() -> str | None:
    """What this machine lacks to compile plans, or none."""
    if compute_capability() is None:
        return f"target 'tensorrt' compiles on the machine that has the NVIDIA GPU, and here is none; {LINT}"
    if importlib.util.find_spec("tensorrt") is None:
        return "target 'tensorrt' needs TensorRT: pip install 'tilewright[gpu]'"
    return None


def typed(model: Any, precision: str) -> None:
    """Give a portable graph the types of a precision: TensorRT casts nothing by itself."""
    from onnx_ir.passes.common import ShapeInferencePass

    from tilewright.export.graph.rewrites.sixteen_bits import in_16_bits

    if precision == "bfloat16":
        if any(value.dtype is None for node in model.graph for value in node.outputs):
            ShapeInferencePass()(model)
        in_16_bits(model, precision)


def prepare(model: Any) -> bool:
    """Replace our nodes that are no plugins by standard operators; returns whether there were any."""
    if not model.functions:  # it takes seconds to load all ops
        return False
    from onnx_ir.passes.common import InlinePass

    from tilewright.kernels.face import DOMAIN
    from tilewright.kernels.forms import PLUGINS

    others = {i for i in model.functions if not (i[0] == DOMAIN and i[1] in PLUGINS)}
    if others:
        InlinePass(lambda function: function.identifier() in others)(model)
    return bool(others)


def spec(precision: str, graph: str, memory: Memory, parameters: int) -> EngineSpec:
    """The description of an engine, still without its plan. An open engine has its weights on the GPU."""
    needs = Needs(packages={"tensorrt": OLDEST})
    return EngineSpec(f"tensorrt-{precision}", "tensorrt", "cuda", precision, (graph,), needs, memory=memory)
