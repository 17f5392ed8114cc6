"""The portable graphs of a system without its weights, which a linter does not need."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tilewright.export.build.request import Request
from tilewright.export.build.stages.trace import traced

__all__ = ["portable_graphs"]


def portable_graphs(name: str, preset: str) -> Iterator[tuple[str, Any]]:
    """The name and the graph of every component of a system in the sizes of a preset, as a build writes them."""
    import onnx_ir as ir

    from tilewright.export.graph.rewrites.forget_shapes import forget_shapes
    from tilewright.export.graph.tidy import tidy

    for component, spec in Request(name, preset, Path(), seed=0).components.items():
        model = ir.load(traced(f"{name}.{component}", spec))
        tidy(model)
        forget_shapes(model)
        yield component, model
