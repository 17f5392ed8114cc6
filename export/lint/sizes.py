"""Rules about shapes: each rank is known and small, no size is zero, and no size depends on the numbers of an image."""

from collections.abc import Iterator
from math import prod

import onnx_ir as ir

from tilewright.export.lint.graph import Complaint, Graph, dims
from tilewright.export.lint.operators import STANDARD
from tilewright.export.lint.table import TABLE

__all__ = ["shapes", "sizes_from_data"]

LARGEST = 2**31 - 1  # elements that indices of 32 bits reach
SIZED_BY = {  # operator -> its inputs that decide the size of its result
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Pad": (1,),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (2, 3),
    "Slice": (1, 2, 4),
    "Split": (1,),
    "Tile": (1,),
}
COUNTED = {"NonZero": "the places that are not zero", "NonMaxSuppression": "the boxes that are left"}
LISTS = {"Concat", "ConstantOfShape", "Expand", "Reshape", "Resize", "Slice", "Squeeze", "Tile", "Unsqueeze"}


def shapes(graph: Graph) -> Iterator[Complaint]:
    """Ranks are known where they come in, no rank and no tensor is too large, and no size is zero."""
    for owner in graph.model.graphs():
        for value in owner.initializers.values():
            if fault := _fault(value):
                yield Complaint(*fault, value=str(value.name))
    for value in graph.model.graph.inputs:
        if value.is_initializer():
            continue
        if value.shape is None and isinstance(value.type, ir.TensorType):
            yield Complaint(
                "the rank of this input is not told, and a profile needs a range for every dimension",
                "write the input's shape, with names for free sizes",
                value=str(value.name),
            )
        elif fault := _fault(value):
            yield Complaint(*fault, value=str(value.name))
    for node in graph.nodes:
        inputs = [v for v in node.inputs if v is not None]
        if any(_fault(value) for value in inputs):
            continue  # of the same origin
        for value in node.outputs:
            if fault := _fault(value):
                yield Complaint(*fault, node)
                break


def _fault(value: ir.Value) -> tuple[str, str] | None:
    shape = dims(value)
    if shape is None:
        return None
    known = [d for d in shape if d is not None]
    if len(shape) > TABLE.longest_shape:
        return (
            f"{value.name!r} has {len(shape)} dimensions, and TensorRT takes {TABLE.longest_shape}",
            "join dimensions with Reshape",
        )
    if 0 in known and not (len(shape) == 1 and all(use.node.op_type in LISTS for use in value.uses())):
        return f"{value.name!r} of shape {_text(shape)} has a size of zero", "leave out what computes nothing"
    if len(known) == len(shape) and prod(known) > LARGEST:
        return (
            f"{value.name!r} of shape {_text(shape)} has more than {LARGEST:,} numbers, which 32 bits do not index",
            "split it",
        )
    return None


def _text(shape: list[int | None]) -> str:
    return f"[{', '.join('?' if d is None else str(d) for d in shape)}]"


def sizes_from_data(graph: Graph) -> Iterator[Complaint]:
    """No size depends on the numbers of an input: then memory is known, and CUDA graphs are possible."""
    for node in graph.nodes:
        if node.domain not in STANDARD:
            continue
        if node.op_type in COUNTED:
            yield Complaint(
                f"its size is the number of {COUNTED[node.op_type].removeprefix('the ')}, known only after it ran",
                "use a mask of a fixed size, with Where",
                node,
            )
        for i in SIZED_BY.get(node.op_type, ()):
            value = node.inputs[i] if i < len(node.inputs) else None
            if value is not None and value in graph.data:
                yield Complaint(
                    f"its size comes from {value.name!r}, which depends on the numbers of an input",
                    "compute sizes from Shape and constants",
                    node,
                )
                break
