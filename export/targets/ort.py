"""The graph as ONNX Runtime on the CPU runs it best."""

import onnx_ir as ir

from tilewright.export.rewrites.group_norm import group_norm

__all__ = ["prepare"]


def prepare(model: ir.Model) -> None:
    """Rewrite in place; measured in bench/hitoksr_latency.py."""
    group_norm(model)
