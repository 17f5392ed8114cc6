"""Engines of ONNX Runtime on the CPU, and the form of a graph that it runs fastest."""

from typing import Any

from tilewright.runtime.bundle.manifest import EngineSpec, Memory, Needs

__all__ = ["FROM_BUNDLE", "PRECISIONS", "prepare", "spec"]

FROM_BUNDLE = False  # its rewrites need shapes, which the portable graph does not keep
PRECISIONS = ("float32",)


def prepare(model: Any) -> bool:
    """Rewrite a graph in place; returns whether it changed. Measured in bench/latency.py."""
    from tilewright.export.graph.rewrites.group_norm import group_norm
    from tilewright.export.graph.rewrites.silu_conv import silu_conv

    return group_norm(model) + silu_conv(model) > 0


def spec(precision: str, graph: str, memory: Memory, parameters: int) -> EngineSpec:
    """The description of the engine."""
    needs = Needs(packages={"onnxruntime": "1.22"})
    return EngineSpec(f"ort-{precision}", "ort", "cpu", precision, (graph,), needs, memory=memory)
