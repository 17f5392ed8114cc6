"""Rules about operators: TensorRT has each of them, or each is a plugin of ours."""

from collections.abc import Iterator

import onnx
import onnx_ir as ir

from tilewright.export.lint.graph import Complaint, Graph, type_of
from tilewright.export.lint.table import TABLE
from tilewright.kernels.face import DOMAIN, plain
from tilewright.kernels.forms import PLUGINS, TABLES, forms

__all__ = ["operators", "plugins", "schema"]

STANDARD = ("", "ai.onnx")
INSTEAD = {
    "BitShift": "multiply or divide by a power of two",
    "Col2Im": "write it as ConvTranspose with a constant weight, or as Reshape, Transpose and Pad",
    "Compress": "gather with indices that the program computes",
    "DFT": "multiply by a constant matrix of cosines and sines",
    "DynamicQuantizeLinear": "quantize with constant scales: QuantizeLinear and DequantizeLinear",
    "MatMulInteger": "write it as QuantizeLinear, DequantizeLinear and MatMul",
    "QLinearConv": "write it as QuantizeLinear, DequantizeLinear and Conv",
    "QLinearMatMul": "write it as QuantizeLinear, DequantizeLinear and MatMul",
    "Unique": "compute it outside of the graph, as its result has no size that is known before",
}
FLOATS = ("FP32", "FP16", "BF16")


def schema(node: ir.Node, graph: Graph) -> onnx.defs.OpSchema | None:
    """The definition of a standard operator in the graph's opset."""
    try:
        return onnx.defs.get_schema(node.op_type, graph.opset, "")
    except (onnx.defs.SchemaError, ValueError):
        return None


def operators(graph: Graph) -> Iterator[Complaint]:
    """Every operator is in the table, or is a plugin, or has a function of standard operators."""
    for node in graph.nodes:
        if node.domain not in STANDARD:
            yield from _others(graph, node)
        elif node.op_type in TABLE.missing or (node.op_type not in TABLE.types):
            yield Complaint(
                f"{'TensorRT' if onnx.defs.has(node.op_type) else 'ONNX'} has no {node.op_type}",
                INSTEAD.get(node.op_type, "write it in operators that TensorRT has"),
                node,
            )
        elif node.op_type in TABLE.since:
            yield Complaint(
                f"{node.op_type} came with TensorRT {TABLE.since[node.op_type]}, and {TABLE.versions[0]} has none",
                "write it in older operators",
                node,
            )
        elif onnx.defs.has(node.op_type) and ((known := schema(node, graph)) is None or known.deprecated):
            yield Complaint(
                f"opset {graph.opset} has no {node.op_type}",
                "export the graph in the opset that has it",
                node,
            )


def _others(graph: Graph, node: ir.Node) -> Iterator[Complaint]:
    if (node.domain == DOMAIN and node.op_type in PLUGINS) or node.op_identifier() in graph.model.functions:
        return
    yield Complaint(
        "it is no operator of ONNX and no plugin of ours, and the graph has no function for it",
        "give the graph a function of standard operators for it",
        node,
    )


def plugins(graph: Graph) -> Iterator[Complaint]:
    """Our plugins get what they were compiled for: their inputs, written attributes, one type, fixed channels."""
    faces = {name: (face, inputs) for name, (_, face, inputs) in forms().items()}
    for node in graph.nodes:
        if node.domain != DOMAIN or node.op_type not in faces:
            continue
        face, names = faces[node.op_type]
        if len(node.inputs) != len(names) or None in node.inputs:
            yield Complaint(
                f"it has {sum(v is not None for v in node.inputs)} inputs, and the plugin takes {', '.join(names)}",
                "name the node for the inputs that it has, as tilewright.kernels.face does",
                node,
            )
            continue
        if unwritten := [name for name in plain(face.attributes) if name not in node.attributes]:
            yield Complaint(f"attribute {unwritten[0]!r} is not written", "write out every attribute of a plugin", node)
        inputs = dict(zip(names, node.inputs, strict=True))
        types = {name: kind for name, value in inputs.items() if (kind := type_of(value))}
        main = next((kind for name, kind in types.items() if name not in TABLES), "FP32")
        for name, kind in types.items():
            allowed = (main, "FP32") if name in TABLES else (main,)
            if kind not in FLOATS or kind not in allowed:
                yield Complaint(
                    f"input {name!r} is {kind}, and the plugin takes {' or '.join(dict.fromkeys(allowed))} there",
                    "give all inputs the same type of FP32, FP16 and BF16",
                    node,
                )
                break
        for name, value in inputs.items():
            shape = value.shape if value is not None and value.shape is not None else ()
            if any(_dynamic(d) for i, d in enumerate(shape) if i not in (0, len(shape) - 2)):
                yield Complaint(
                    f"input {name!r} has a dynamic dimension beside batch and tokens",
                    "fix channels, heads and codes: the plugin is compiled for them",
                    node,
                )
                break


def _dynamic(dimension: int | ir.SymbolicDim) -> bool:
    """Whether a dimension is free. onnx names those that it cannot infer `unk__1`."""
    return not isinstance(dimension, int) and not str(dimension.value).startswith("unk__")
