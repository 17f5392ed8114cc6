"""Checks of what an engine returns: its shapes, and that its numbers are finite."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tilewright.runtime.bundle.program import ANY, Call
from tilewright.runtime.errors import AccuracyError, BundleError
from tilewright.runtime.execute.devices import Device
from tilewright.runtime.execute.queue import Batch
from tilewright.runtime.plan.lower import Block, Graph

__all__ = ["not_finite", "wrong_shape"]


def wrong_shape(
    batch: Batch, call: Call, feed: Mapping[str, Any], results: Mapping[str, Any], signature: Any
) -> BundleError | None:
    """An error if an output has another shape than its grid or its component's signature says."""
    work, block, _ = batch.nodes[0]
    grids, plan = work.graph.program.grids, block.plan
    sizes = {"batch": len(batch.nodes)}
    if signature:
        for name, array in feed.items():
            named = zip(signature.inputs[name].shape, array.shape, strict=False)
            sizes |= {dim: size for dim, size in named if isinstance(dim, str) and dim != ANY}
    for name, target in call.outputs.items():
        shape = tuple(results[name].shape)
        right: tuple[Any, ...] = shape
        if grid := grids.get(target):
            cells = (plan.tile_height // grid.px, plan.tile_width // grid.px)
            right = (len(batch.nodes), grid.channels, *cells)
        elif signature:
            dims = signature.outputs[name].shape
            right = tuple(sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in dims)
            if len(right) == len(shape):  # a size that no input has is as the first output says
                sizes |= {dim: size for dim, size in zip(right, shape, strict=True) if isinstance(dim, str)}
                right = tuple(size if isinstance(dim, str) else dim for dim, size in zip(right, shape, strict=True))
        if shape != right:
            return BundleError(
                f"{_when(work.graph, block)}: {call.run}.{name} has shape {list(shape)}, not {list(right)}; verify"
                " the bundle with 'tilewright export verify'"
            )
    return None


def not_finite(
    device: Device, graph: Graph, block: Block, call: Call, results: Mapping[str, Any]
) -> AccuracyError | None:
    """An error if an output holds a number that is not finite."""
    for name in call.outputs:
        if device.finite(results[name]):
            continue
        output = device.get(results[name])
        finite = np.isfinite(output)
        return AccuracyError(
            f"{_when(graph, block)}: {call.run}.{name} holds {output[~finite].flat[0]},"
            f" {output.size - np.count_nonzero(finite)} of {output.size} numbers are not finite; check the weights,"
            " and the bundle with 'tilewright export verify'"
        )
    return None


def _when(graph: Graph, block: Block) -> str:
    """The place of a block in the program, as a user knows it."""
    moment = {"each": f"step {block.step + 1}", "shared": "once"}.get(block.section, block.section)
    return f"pass {graph.program.passes[block.place].name!r}, {moment}"
