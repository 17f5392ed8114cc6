"""Rules about the file of a graph: versions, size, and the places of weights."""

from collections.abc import Iterator

import onnx_ir as ir

from tilewright.export.lint.graph import Complaint, Graph
from tilewright.export.lint.table import TABLE
from tilewright.runtime.errors import amount

__all__ = ["LARGEST", "places", "too_large", "versions"]

LARGEST = 2**31 - 1  # bytes of a protocol buffer


def too_large(size: int) -> Complaint | None:
    """A file that no reader of protocol buffers opens."""
    if size <= LARGEST:
        return None
    return Complaint(
        f"the graph's file has {amount(size)}, and a protocol buffer holds 2 GiB",
        "keep the weights in files beside the graph, as external data",
    )


def versions(graph: Graph) -> Iterator[Complaint]:
    """The versions of ONNX that the graph is written in."""
    model, opsets, irs = graph.model, TABLE.opsets, TABLE.ir_versions
    if model.ir_version not in irs:
        yield Complaint(
            f"IR version {model.ir_version} is not within {irs[0]} to {irs[-1]}",
            "write the graph with an older IR version, such as 10",
        )
    if graph.opset not in opsets:
        yield Complaint(
            f"opset {graph.opset or 'without a number'} is not within {opsets[0]} to {opsets[-1]}",
            "convert the graph with onnx.version_converter, or export it again",
        )
    for identifier, function in model.functions.items():
        opset = function.opset_imports.get("", graph.opset)
        if opset != graph.opset:
            yield Complaint(
                f"function {'::'.join(identifier[:2])} is of opset {opset}, and the graph of opset {graph.opset}",
                "write both in one opset",
                value="::".join(identifier[:2]),
            )


def places(graph: Graph) -> Iterator[Complaint]:
    """The places of weights in other files."""
    for name, value in graph.model.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            fault = _fault(graph, value.const_value)
            if fault:
                yield Complaint(*fault, value=name)


def _fault(graph: Graph, tensor: ir.ExternalTensor) -> tuple[str, str] | None:
    location, offset = str(tensor.location), tensor.offset or 0
    parts = location.replace("\\", "/").split("/")
    if ".." in parts or location.startswith(("/", "\\")) or ":" in parts[0]:
        return (
            f"its bytes are in {location!r}, outside of the graph's folder",
            "put the file beside or beneath the graph; `tilewright export onnx` does it",
        )
    path = graph.files(location)
    if not path.is_file():
        return f"its bytes are in {location!r}, and there is no {path}", "put the file there, or export again"
    needed = tensor.nbytes
    length = needed if tensor.length is None else tensor.length
    if length != needed:
        return f"its shape and type need {needed} bytes, and {length} are named", "export the graph again"
    if offset + length > path.stat().st_size:
        return f"its bytes reach past the end of {location!r}", "copy the file again, or export again"
    size = max(1, int(tensor.dtype.itemsize))
    if offset % size:
        return (
            f"its bytes begin at {offset}, which {size} does not divide, so no array can be mapped there",
            f"align weights to multiples of {size} bytes or more",
        )
    return None
