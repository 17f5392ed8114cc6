"""Engines of ONNX Runtime on an NVIDIA GPU, and the types that its CUDA kernels take."""

from typing import Any

from tilewright.runtime.bundle.manifest import EngineSpec, Form, Memory, Needs
from tilewright.runtime.errors import BuildError

__all__ = ["COMPILED", "FORMS", "FROM_BUNDLE", "PRECISIONS", "missing", "prepare", "spec", "typed"]

FROM_BUNDLE = True
COMPILED = True
PRECISIONS = ("float32", "bfloat16", "float16")
FORMS: dict[str, tuple[Form, ...]] = {}
OLDEST = {"float32": (7, 5), "bfloat16": (8, 0), "float16": (7, 5)}  # compute capability
# standard operators whose CUDA kernels in ONNX Runtime 1.31 take both; GroupNormalization and Resize have no bfloat16
SHORT_KERNELS = {"Attention", "Cast", "Conv", "Gemm", "MatMul"}


def missing() -> str | None:
    """Nothing: its graphs are written on any machine."""
    return None


def prepare(model: Any) -> bool:
    """Replace our nodes by standard operators, which CUDA's provider has; returns whether there were any."""
    from tilewright.export.graph.ops import inline
    from tilewright.export.graph.tidy import tidy

    if not model.functions:
        return False
    inline(model)
    tidy(model)
    return True


def typed(model: Any, precision: str) -> None:
    """Give a graph without our nodes the types of a precision. A type without a kernel is refused."""
    from onnx_ir.passes.common import ShapeInferencePass

    from tilewright.export.graph.rewrites.sixteen_bits import TYPES, in_16_bits

    if precision == "float32":
        return
    ShapeInferencePass()(model)
    in_16_bits(model, precision)
    for node in model.graph:
        short = any(value is not None and value.dtype == TYPES[precision] for value in node.inputs)
        if short and node.op_type not in SHORT_KERNELS:
            raise BuildError(f"target 'cuda' has no kernel of {node.op_type} in {precision} ({node.name}); use float32")


def spec(precision: str, graph: str, memory: Memory, parameters: int) -> EngineSpec:
    """The description of the engine."""
    needs = Needs((), OLDEST[precision], {"onnxruntime": "1.22"})
    return EngineSpec(f"cuda-{precision}", "cuda", "cuda", precision, (graph,), needs, memory=memory)
