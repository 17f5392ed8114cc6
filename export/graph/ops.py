"""Our ops in graphs: a node `tilewright::Name`, and a function in the model with the same result in standard operators.

A backend with a kernel for the node runs the kernel. Any other runs the function.
"""

import functools
from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
from onnx_ir.passes.common import InlinePass

from tilewright.kernels.face import DOMAIN, VERSION, Face, plain
from tilewright.kernels.table import KERNELS
from tilewright.runtime.errors import BuildError

__all__ = ["function", "give_function", "give_functions", "inline", "node_names", "translations"]

FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]


def translations() -> dict[Any, Callable[..., Any]]:
    """For the exporter: a translation of each of our PyTorch ops into its node."""
    return {torch_op: _translation(torch_op, face) for torch_op, face in _faces().items()}


def node_names() -> dict[Any, str]:
    """Each of our PyTorch ops -> the name of its node with all inputs."""
    return {torch_op: face.name for torch_op, face in _faces().items()}


def _faces() -> dict[Any, Face]:
    return {getattr(torch.ops.tilewright, op.name).default: op.face for op in KERNELS.values() if op.face}


def _translation(torch_op: Any, face: Face) -> Callable[..., Any]:
    emit = getattr(_opset(), face.name)
    arguments_of = torch_op._schema.arguments
    parameters = [argument.name for argument in arguments_of]
    defaults = {a.name: a.default_value for a in arguments_of if a.has_default_value()}
    inputs, attributes = plain(face.inputs), plain(face.attributes)

    def translate(*arguments: Any, **named: Any) -> Any:
        values = defaults | dict(zip(parameters, arguments, strict=False)) | named
        present = {name: value for name, value in values.items() if value is not None}
        if rest := present.keys() - {*inputs, *attributes}:
            raise BuildError(f"{torch_op} with {', '.join(sorted(rest))} has no ONNX form")
        return emit(*(present.get(name) for name in inputs), **{name: present[name] for name in attributes})

    return translate


@functools.cache
def _opset() -> onnxscript.values.Opset:
    """Our domain with its schemas, registered in this process: the exporter writes no node without a schema."""
    schema = onnx.defs.OpSchema
    for face in (op.face for op in KERNELS.values() if op.face):
        kinds = [(f"T{i}", FLOATS, "") for i in range(len(face.inputs))]
        inputs = [
            schema.FormalParameter(
                name.rstrip("?"),
                f"T{i}",
                param_option=schema.FormalParameterOption.Optional if name.endswith("?") else _SINGLE,
            )
            for i, name in enumerate(face.inputs)
        ]
        outputs = [
            schema.FormalParameter(name.split(":")[0], "tensor(int32)" if name.endswith(":int32") else "T0")
            for name in face.outputs
        ]
        attributes = [
            schema.Attribute(name.split(":")[0], getattr(schema.AttrType, name.split(":")[1].upper()), "")
            for name in face.attributes
        ]
        onnx.defs.register_schema(
            schema(
                face.name,
                DOMAIN,
                VERSION,
                inputs=inputs,
                outputs=outputs,
                type_constraints=kinds,
                attributes=attributes,
            )
        )
    return onnxscript.values.Opset(DOMAIN, VERSION)


_SINGLE = onnx.defs.OpSchema.FormalParameterOption.Single


def give_functions(model: ir.Model) -> None:
    """Give each of our nodes its function."""
    faces = {op.face.name: op.face for op in KERNELS.values() if op.face}
    for node in model.graph:
        if node.domain == DOMAIN:
            give_function(model, node, faces[node.op_type])


def give_function(model: ir.Model, node: ir.Node, face: Face) -> None:
    """Add the node's function to the model. The name of both tells which inputs are left out."""
    present = {name: v for name, v in zip(plain(face.inputs), node.inputs, strict=False) if v is not None}
    definition = ir.serde.deserialize_function(function(face, frozenset(present), model.opset_imports[""]))
    for i, value in enumerate(present.values()):
        node.replace_input_with(i, value)
    node.resize_inputs(len(present))
    node.op_type = definition.name
    model.functions.setdefault(definition.identifier(), definition)
    model.opset_imports.setdefault(DOMAIN, VERSION)


def function(face: Face, present: frozenset[str], opset: int) -> onnx.FunctionProto:
    """The op in standard operators, with only these inputs."""
    inputs, outputs, attributes = (
        [n for n in plain(face.inputs) if n in present],
        plain(face.outputs),
        plain(face.attributes),
    )
    head = f'<domain: "{DOMAIN}", opset_import: ["": {opset}]> {face.node_name(present)}'
    named = f"<{', '.join(attributes)}>" if attributes else ""
    text = f"{head} {named} ({', '.join(inputs)}) => ({', '.join(outputs)}) {{ {face.body(present)} }}"
    return onnx.parser.parse_function(text)


def inline(model: ir.Model) -> None:
    """Replace our nodes by standard operators."""
    InlinePass()(model)
