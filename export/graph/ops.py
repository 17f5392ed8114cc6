"""Our ops in graphs: one node `tilewright::Name` each, and a model-local function that says it in standard operators.

A backend with a kernel for the node takes it; any other runs the function's body.
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

__all__ = ["attach", "function", "give_function", "inline", "translations"]

FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]


def translations() -> dict[Any, Callable[..., Any]]:
    """For the exporter: what each of our PyTorch ops becomes."""
    ops = ((getattr(torch.ops.tilewright, op.name).default, op.face) for op in KERNELS.values() if op.face)
    return {torch_op: _translation(torch_op, face) for torch_op, face in ops}


def _translation(torch_op: Any, face: Face) -> Callable[..., Any]:
    emit = getattr(_opset(), face.name)
    arguments_of = torch_op._schema.arguments
    parameters = [argument.name for argument in arguments_of]
    defaults = {a.name: a.default_value for a in arguments_of if a.has_default_value()}
    inputs, attributes = plain(face.inputs), plain(face.attributes)

    def translate(*arguments: Any, **named: Any) -> Any:
        said = defaults | dict(zip(parameters, arguments, strict=False)) | named
        given = {name: value for name, value in said.items() if value is not None}
        if rest := given.keys() - {*inputs, *attributes}:
            raise BuildError(f"{torch_op} with {', '.join(sorted(rest))} has no ONNX form")
        return emit(*(given.get(name) for name in inputs), **{name: given[name] for name in attributes})

    return translate


@functools.cache
def _opset() -> onnxscript.values.Opset:
    """Our domain, known to onnx in this process: the exporter emits no node without a schema."""
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


def attach(model: ir.Model) -> None:
    """Give every node of ours its function."""
    faces = {op.face.name: op.face for op in KERNELS.values() if op.face}
    for node in model.graph:
        if node.domain == DOMAIN:
            give_function(model, node, faces[node.op_type])


def give_function(model: ir.Model, node: ir.Node, face: Face) -> None:
    """Let the model say what this node means, by a name of its own for every set of inputs that is left out."""
    given = {name: v for name, v in zip(plain(face.inputs), node.inputs, strict=False) if v is not None}
    made = ir.serde.deserialize_function(function(face, frozenset(given), model.opset_imports[""]))
    for i, value in enumerate(given.values()):
        node.replace_input_with(i, value)
    node.resize_inputs(len(given))
    node.op_type = made.name
    model.functions.setdefault(made.identifier(), made)
    model.opset_imports.setdefault(DOMAIN, VERSION)


def function(face: Face, given: frozenset[str], opset: int) -> onnx.FunctionProto:
    """The op in standard operators, for these of its inputs."""
    inputs, outputs, attributes = (
        [n for n in plain(face.inputs) if n in given],
        plain(face.outputs),
        plain(face.attributes),
    )
    head = f'<domain: "{DOMAIN}", opset_import: ["": {opset}]> {face.called(given)}'
    named = f"<{', '.join(attributes)}>" if attributes else ""
    text = f"{head} {named} ({', '.join(inputs)}) => ({', '.join(outputs)}) {{ {face.body(given)} }}"
    return onnx.parser.parse_function(text)


def inline(model: ir.Model) -> None:
    """Standard operators in the place of our nodes."""
    InlinePass()(model)
