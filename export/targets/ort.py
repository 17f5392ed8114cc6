"""Engines of ONNX Runtime on the CPU, and the form of a graph that it runs fastest."""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from tilewright.export.graph.rewrites.group_norm import group_norm
from tilewright.export.graph.rewrites.heads import heads
from tilewright.export.graph.rewrites.reshape import reshape
from tilewright.export.graph.rewrites.silu_conv import silu_conv
from tilewright.runtime.bundle.manifest import EngineSpec, Needs

__all__ = ["prepare", "spec"]


def prepare(model: ir.Model) -> bool:
    """Rewrite a graph in place; returns whether it changed. Measured in bench/latency.py."""
    changed = heads(model) + group_norm(model)
    reshape(model)
    changed += silu_conv(model)
    RemoveUnusedNodesPass()(model)
    return changed > 0


def spec(name: str, graph: str) -> EngineSpec:
    """The description of the engine."""
    return EngineSpec(name, "ort", "cpu", "float32", (graph,), Needs(packages={"onnxruntime": "1.22"}))
