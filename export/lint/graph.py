"""A graph as the rules see it: functions inlined except plugins, types and shapes inferred, constants at hand."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from tilewright.export.lint.table import kind
from tilewright.kernels.face import DOMAIN
from tilewright.kernels.forms import PLUGINS

__all__ = ["STANDARD", "Complaint", "Graph", "Rule", "definition", "dims", "name_of", "prepared", "type_of"]

STANDARD = ("", "ai.onnx")  # the domains of standard operators
FUNCTION = "function"  # the key of metadata that names the function of an inlined node
SIZES = {"Shape", "Size"}


@dataclass(frozen=True)
class Complaint:
    """What is wrong with a node, a value or the whole graph, and what to do."""

    problem: str
    remedy: str
    node: ir.Node | None = None
    value: str = ""  # the name of an input or weight, if no node is at fault


@dataclass(frozen=True)
class Graph:
    """A graph that was made ready for the rules."""

    model: ir.Model
    files: Callable[[str], Path]  # location of external data -> the file
    nodes: list[ir.Node]  # also those of subgraphs, without those that are misused
    misused: list[tuple[ir.Node, str]]  # nodes that are not as ONNX defines their operators, and why
    functions: frozenset[str]  # operators whose functions were inlined
    constants: set[ir.Value] = field(default_factory=set)  # weights, and all that is computed from weights alone
    data: set[ir.Value] = field(default_factory=set)  # all that depends on the numbers of an input, not on sizes alone

    @property
    def opset(self) -> int:
        """The opset of standard operators."""
        return self.model.opset_imports.get("", self.model.opset_imports.get("ai.onnx", 0))

    def array(self, value: ir.Value | None) -> npt.NDArray[Any] | None:
        """The numbers of a constant, if it is a weight or comes from a Constant node."""
        if value is None:
            return None
        producer = value.producer()
        if producer is not None and producer.op_type == "Identity":
            return self.array(producer.inputs[0])
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is None:
            return None
        if isinstance(tensor, ir.ExternalTensor):
            path = self.files(str(tensor.location))
            named, shape = tensor.name or "", tensor.shape
            tensor = ir.ExternalTensor(
                path.name, tensor.offset, tensor.length, tensor.dtype, shape=shape, name=named, base_dir=path.parent
            )
            try:
                return np.asarray(tensor.numpy())
            except (OSError, ValueError):  # the rule about places says so
                return np.zeros(0)
        return np.asarray(tensor.numpy())


Rule = Callable[[Graph], Iterator[Complaint]]


def name_of(node: ir.Node) -> tuple[str, str]:
    """The name of a node, or of its first result, and its operator with the function that it is from."""
    named = node.name or next((str(value.name) for value in node.outputs if value.name), "")
    op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    inside = node.metadata_props.get(FUNCTION)
    return named, f"{op} in {inside}" if inside else op


def dims(value: ir.Value | None) -> list[int | None] | None:
    """The dimensions of a value, with none for a dynamic one; none if its rank is unknown."""
    if value is None or value.shape is None:
        return None
    return [d if isinstance(d, int) else None for d in value.shape]


def type_of(value: ir.Value | None) -> str | None:
    """The type of a value in the table's words; none if it is unknown."""
    return None if value is None or value.dtype is None else kind(value.dtype)


def definition(node: ir.Node, opset: int) -> onnx.defs.OpSchema | None:
    """ONNX's definition of a standard operator in this opset."""
    try:
        return onnx.defs.get_schema(node.op_type, opset, "")
    except (onnx.defs.SchemaError, ValueError):
        return None


def _misuse(node: ir.Node, opset: int) -> str:
    """The first way in which a node is not as ONNX defines its operator, or nothing."""
    known = definition(node, opset) if node.domain in STANDARD else None
    if known is None or known.deprecated:
        return ""
    for what, values, least, most in (
        ("inputs", node.inputs, known.min_input, known.max_input),
        ("outputs", node.outputs, known.min_output, known.max_output),
    ):
        if not least <= len(values) <= most:
            return f"it has {len(values)} {what}, and {node.op_type} at least {least} and at most {most}"
    for formal, value in zip(known.inputs, node.inputs, strict=False):
        if value is None and formal.option == onnx.defs.OpSchema.FormalParameterOption.Single:
            return f"its input {formal.name!r} is left out"
    for name, attribute in known.attributes.items():
        if name not in node.attributes:
            if attribute.required:
                return f"its attribute {name!r} is left out"
        elif node.attributes[name].type.name != (kind := str(attribute.type).rpartition(".")[2]):
            return f"its attribute {name!r} is no {kind}"
    return ""


def prepared(model: ir.Model, files: Callable[[str], Path]) -> Graph:
    """Make a graph ready for the rules, in place."""
    opset = model.opset_imports.get("", 0)
    fitting = {i for i, f in model.functions.items() if f.opset_imports.get("", opset) == opset}
    inlined = {i for i in fitting if not (i[0] == DOMAIN and i[1] in PLUGINS)}
    for identifier in inlined:
        for node in model.functions[identifier].all_nodes():
            node.metadata_props[FUNCTION] = "::".join(identifier[:2])
    InlinePass(lambda function: function.identifier() in inlined)(model)
    _infer(model, fitting)
    misused = [(node, why) for node in model.graph.all_nodes() if (why := _misuse(node, opset))]
    excluded = {node for node, _ in misused}
    nodes = [node for node in model.graph.all_nodes() if node not in excluded]
    graph = Graph(model, files, nodes, misused, frozenset("::".join(i[:2]) for i in inlined))
    _trace(graph)
    return graph


def _infer(model: ir.Model, functions: set[ir.OperatorIdentifier]) -> None:
    """Infer types and shapes, in a copy whose plugins are inlined too."""
    copy = model.clone()
    InlinePass(lambda function: function.identifier() in functions)(copy)
    for node in copy.graph.all_nodes():
        if node.op_type == "GroupNormalization" and not node.domain:
            node.op_type = "InstanceNormalization"  # onnx infers nothing behind the other
    # not onnx_ir's pass: it leaves out larger constants, which may be sizes
    told = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(copy), strict_mode=False, data_prop=True))
    inferred = {value.name: value for node in told.graph.all_nodes() for value in node.outputs}
    for node in model.graph.all_nodes():
        for value in node.outputs:
            known = inferred.get(value.name)
            if known is not None and known.shape is not None:  # a scalar's shape is empty
                value.shape = known.shape
            if known is not None and known.type is not None:
                value.type = known.type


def _trace(graph: Graph) -> None:
    """Find constants and values that depend on data."""
    for owner in graph.model.graphs():
        graph.data.update(value for value in owner.inputs if not value.is_initializer())
        graph.constants.update(owner.initializers.values())
    for node in graph.nodes:
        inputs = [value for value in node.inputs if value is not None]
        nested = any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
        if nested or (node.op_type not in SIZES and any(value in graph.data for value in inputs)):
            graph.data.update(node.outputs)
        elif all(value in graph.constants for value in inputs) and not node.op_type.startswith("Random"):
            graph.constants.update(node.outputs)
