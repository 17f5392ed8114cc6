"""The form of a graph that ONNX Runtime runs fastest on the CPU."""

import onnx_ir as ir

from tilewright.export.graph.rewrites.group_norm import group_norm
from tilewright.export.graph.rewrites.silu_conv import silu_conv

__all__ = ["prepare"]


def prepare(model: ir.Model) -> bool:
    """Rewrite a graph in place; returns whether it changed. Measured in bench/latency.py."""
    return group_norm(model) + silu_conv(model) > 0
