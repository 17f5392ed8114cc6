"""Rules about types: each value has a type that TensorRT has, and a node's numbers have one type (strong typing)."""

from collections import defaultdict
from collections.abc import Iterator

import onnx_ir as ir

from tilewright.export.lint.graph import Complaint, Graph, type_of
from tilewright.export.lint.operators import STANDARD, schema
from tilewright.export.lint.table import TABLE

__all__ = ["mixed_types", "operator_types", "value_types"]

FLOATS = ("FP32", "FP16", "BF16")
# the types of an operator's numbers, by their names in ONNX's definition, if they are not those of its first input
NUMBERS = {
    "Attention": ("T1", "T2"),
    "BatchNormalization": ("T", "T1", "T2"),
    "BlackmanWindow": ("T2",),
    "Cast": ("T1", "T2"),
    "CastLike": ("T1", "T2"),
    "ConstantOfShape": ("T2",),
    "EyeLike": ("T2",),
    "GridSample": ("T1", "T2"),
    "HammingWindow": ("T2",),
    "HannWindow": ("T2",),
    "If": ("V",),
    "Loop": ("V",),
    "OneHot": ("T3",),
    "RMSNormalization": ("T", "V"),
    "RandomNormalLike": ("T2",),
    "RandomUniformLike": ("T2",),
    "Where": ("T",),
}
QUANTIZED = {"DequantizeLinear", "QuantizeLinear"}
# operators whose inputs may have several types
MIXED = {"Cast", "CastLike", "Dropout", "If", "Loop", "Resize", "Scan", "Upsample"} | QUANTIZED


def value_types(graph: Graph) -> Iterator[Complaint]:
    """Every value has a type that TensorRT has."""
    inputs = [value for owner in graph.model.graphs() for value in owner.inputs]
    weights = [value for owner in graph.model.graphs() for value in owner.initializers.values()]
    for value in dict.fromkeys([*inputs, *weights]):
        if fault := _fault(value):
            yield Complaint(*fault, value=str(value.name))
    for node in graph.nodes:
        read = {value.type for value in node.inputs if value is not None}
        for value in node.outputs:
            if value.type not in read and (fault := _fault(value)):  # told once, where the type begins
                yield Complaint(*fault, node)
                break


def _fault(value: ir.Value) -> tuple[str, str] | None:
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        return f"{value.name!r} is no tensor, but a {type(value.type).__name__}", "use tensors alone"
    kind = type_of(value)
    if kind is None or kind in TABLE.tensors or kind == "UNDEFINED":
        return None
    if kind == "UINT8":
        uses = [use.node.op_type for use in value.uses()]
        producer = value.producer()
        if value.is_graph_input() and not value.is_initializer() and set(uses) <= {"Cast"}:
            return None
        if value.is_graph_output() and producer is not None and producer.op_type == "Cast" and not uses:
            return None
        if QUANTIZED & {*uses, producer.op_type if producer else ""}:
            return None  # a rule of its own
        return f"{value.name!r} is UINT8 within the graph", "cast an input before its first use, an output at the end"
    if kind == "DOUBLE":
        return f"{value.name!r} is float64, which TensorRT computes in float32", "compute it in float32"
    if kind.startswith("COMPLEX"):
        return f"{value.name!r} is complex", "compute real and imaginary parts as two real numbers"
    return f"{value.name!r} is {kind}, which TensorRT has not", "cast it to one of " + _listed(TABLE.tensors)


def _listed(kinds: frozenset[str]) -> str:
    return ", ".join(sorted(kinds))


def operator_types(graph: Graph) -> Iterator[Complaint]:
    """Every operator gets and gives types that it takes."""
    for node in graph.nodes:
        allowed = TABLE.types.get(node.op_type)
        if node.domain not in STANDARD or allowed is None:
            continue
        for label, value in _numbers(graph, node):
            kind, producer = type_of(value), value.producer()
            if kind in TABLE.quantized and producer is not None and producer.op_type == "QuantizeLinear":
                continue  # a rule of its own
            if kind in TABLE.tensors and kind not in allowed:
                yield Complaint(
                    f"{label} is {kind}, and {node.op_type} takes {_listed(allowed)}",
                    f"cast around the node, for example to {_nearest(str(kind), allowed)}",
                    node,
                )
                break


def _nearest(kind: str, allowed: frozenset[str]) -> str:
    order = ("FP16", "FP32") if kind in ("BF16", "FP8") else ("INT32", "INT64", "FP32")
    return next((other for other in order if other in allowed), _listed(allowed))


def _numbers(graph: Graph, node: ir.Node) -> Iterator[tuple[str, ir.Value]]:
    """The inputs and outputs that hold an operator's numbers, with names."""
    definition = schema(node, graph)
    if definition is None:
        return
    first = (definition.inputs or definition.outputs)[0].type_str
    names = NUMBERS.get(node.op_type, (first,))
    for what, values, formals in (
        ("input", node.inputs, definition.inputs),
        ("output", node.outputs, definition.outputs),
    ):
        for i, value in enumerate(values):
            if value is not None and formals and formals[min(i, len(formals) - 1)].type_str in names:
                yield f"{what} {value.name!r}", value


def mixed_types(graph: Graph) -> Iterator[Complaint]:
    """All numbers that a node reads have one type: nothing is cast that the graph does not cast."""
    for node in graph.nodes:
        definition = schema(node, graph) if node.domain in STANDARD and node.op_type not in MIXED else None
        if definition is None or not definition.inputs:
            continue
        groups: dict[str, dict[str, str]] = defaultdict(dict)  # type's name in the definition -> input -> type
        for i, value in enumerate(node.inputs):
            kind = type_of(value)
            if value is None or kind is None:
                continue
            variable = definition.inputs[min(i, len(definition.inputs) - 1)].type_str
            groups["floats" if kind in FLOATS else variable][str(value.name)] = kind
            groups[variable][str(value.name)] = kind
        for kinds in groups.values():
            if len(set(kinds.values())) > 1:
                listed = ", ".join(f"{name!r} {kind}" for name, kind in kinds.items())
                yield Complaint(f"its inputs have several types: {listed}", "cast all of them to one type", node)
                break
