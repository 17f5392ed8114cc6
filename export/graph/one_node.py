"""A graph with one of our nodes, to run an op in ONNX Runtime by standard operators or by a native kernel."""

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from tilewright.export.graph.ops import function
from tilewright.export.graph.trace import OPSET
from tilewright.kernels.face import DOMAIN, VERSION, plain
from tilewright.kernels.sample import Sample, sample
from tilewright.kernels.table import Op
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.errors import EnvironmentMismatch

__all__ = ["call_in_ort", "native_kernels", "one_node"]

ELEMENTS = {torch.float32: onnx.TensorProto.FLOAT, torch.float16: onnx.TensorProto.FLOAT16}
KINDS: dict[str, Callable[[Any], Any]] = {"int": int, "float": float}


def one_node(call: Sample, *, body: bool, constant: bool = False) -> onnx.ModelProto:
    """A graph of the call's node, with or without its function. With `constant` only the first input is an input."""
    face = call.op.face
    assert face is not None
    tensors = _inputs(call)
    definition = function(face, frozenset(tensors), OPSET)
    attributes = dict(_attribute(call, *attribute.split(":")) for attribute in face.attributes)
    outputs = [_output(name, call.dtype) for name in face.outputs]
    node = helper.make_node(definition.name, list(tensors), [o.name for o in outputs], domain=DOMAIN, **attributes)
    graph_inputs = list(tensors)[:1] if constant else list(tensors)
    graph = helper.make_graph(
        [node],
        face.name,
        [
            helper.make_tensor_value_info(name, ELEMENTS[tensors[name].dtype], tensors[name].shape)
            for name in graph_inputs
        ],
        outputs,
        [numpy_helper.from_array(a.numpy(), name) for name, a in tensors.items() if name not in graph_inputs],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, opset_imports=opsets, functions=[definition] if body else [], ir_version=10)


def _inputs(call: Sample) -> dict[str, Tensor]:
    assert call.op.face is not None
    named = zip(plain(call.op.face.inputs), call.arguments, strict=False)
    return {name: a for name, a in named if a is not None}


def _attribute(call: Sample, name: str, kind: str) -> tuple[str, Any]:
    default = inspect.signature(call.op.reference).parameters[name].default
    return name, KINDS[kind](call.options.get(name, default))


def _output(name: str, dtype: torch.dtype) -> onnx.ValueInfoProto:
    bare, _, kind = name.partition(":")
    return helper.make_tensor_value_info(bare, onnx.TensorProto.INT32 if kind == "int32" else ELEMENTS[dtype], None)


def call_in_ort(
    call: Sample, *, library: Path | None = None, constant: bool = False, threads: int = 0
) -> Callable[[], tuple[Tensor, ...]]:
    """A function that runs the call in standard operators, or by the library's kernel; without one it is refused."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    # contenders take turns, and idle threads of one must not occupy the cores of the next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if library:
        try:
            options.register_custom_ops_library(str(library))
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise EnvironmentMismatch(
                f"native kernels {library} do not load ({one_line(str(error))}); run make native"
            ) from error
    model = one_node(call, body=library is None, constant=constant)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    input_names = {i.name for i in session.get_inputs()}
    feed = {name: a.numpy() for name, a in _inputs(call).items() if name in input_names}
    return lambda: tuple(torch.from_numpy(array) for array in session.run(None, feed))


def native_kernels(library: Path, ops: Iterable[Op]) -> set[str]:
    """The names of ops for which the library has a kernel."""
    native = set()
    for op in ops:
        if op.face is None:
            continue
        try:
            call_in_ort(sample(op, "small", torch.float32), library=library)
        except EnvironmentMismatch:
            raise
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            if "is not a registered function/op" not in str(error):
                raise
        else:
            native.add(op.name)
    return native
