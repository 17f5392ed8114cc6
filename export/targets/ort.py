"""Engines of ONNX Runtime on the CPU, and the form of a graph that it runs fastest."""

from typing import Any

from tilewright.runtime.bundle.manifest import EngineSpec, Form, Memory, Needs

__all__ = ["COMPILED", "FORMS", "FROM_BUNDLE", "PRECISIONS", "missing", "prepare", "spec"]

FROM_BUNDLE = False  # its rewrites need shapes, which the portable graph does not keep
COMPILED = False
PRECISIONS = ("float32",)
FORMS = {
    # convolutions of integers would also return integers, which costs accuracy; and with inputs in int8, layers that
    # share an input run in float
    "int8": (Form("uint8", convolutions=False),),
    "fp8": (Form("float8_e4m3fn"),),  # it has no products of 8-bit floats: such an engine shows the accuracy
}


def missing() -> str | None:
    """Nothing: its engines are graphs, which are made anywhere."""
    return None


def prepare(model: Any) -> bool:
    """Rewrite a graph in place; returns whether it changed. Measured in bench/latency.py."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    from tilewright.export.graph.rewrites.group_norm import group_norm
    from tilewright.export.graph.rewrites.heads import heads
    from tilewright.export.graph.rewrites.reshape import reshape
    from tilewright.export.graph.rewrites.silu_conv import silu_conv

    changed = heads(model) + group_norm(model)
    reshape(model)
    changed += silu_conv(model)
    RemoveUnusedNodesPass()(model)
    return changed > 0


def spec(precision: str, graph: str, memory: Memory, parameters: int) -> EngineSpec:
    """The description of the engine."""
    needs = Needs(packages={"onnxruntime": "1.22"})
    return EngineSpec(f"ort-{precision}", "ort", "cpu", precision, (graph,), needs, memory=memory)
