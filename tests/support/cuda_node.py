"""A session of one of our nodes in the library of CUDA ops, run on tensors where they lie."""

import inspect
import shutil
import subprocess
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, ValueInfoProto, helper
from torch import Tensor

from tilewright.kernels.jit import triton
from tilewright.kernels.table import KERNELS, Op

NATIVE = Path(__file__).parents[2] / "kernels" / "native"
TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int32: TensorProto.INT32,
}
Call = tuple[Op, tuple[Any, ...], dict[str, Any]]  # arguments in the order of the face, attributes


def small(name: str, dtype: torch.dtype) -> Call:
    """The small case of the table."""
    generator = torch.Generator().manual_seed(3)
    op = KERNELS[name]
    return op, *op.cases["small"](lambda *shape, dtype=dtype: torch.randn(shape, generator=generator).to(dtype))


def cuda_headers() -> Path:
    """Those that come with Triton."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "include"


def built(folder: Path, *options: str) -> Path:
    """The library, compiled without a warning."""
    if not shutil.which("cmake") or not shutil.which("c++"):
        pytest.skip("needs cmake and a C++ compiler")
    configure = ["cmake", "-S", NATIVE, "-B", folder, "-DTILEWRIGHT_CUDA=ON", f"-DCUDA_INCLUDE_DIR={cuda_headers()}"]
    configured = subprocess.run([*configure, *options], capture_output=True, text=True)
    if "Could NOT find OnnxRuntime" in configured.stderr:
        pytest.skip("needs ONNX Runtime's headers: make native")
    assert configured.returncode == 0, configured.stderr
    make = ["cmake", "--build", folder, "--target", "tilewright_cuda"]
    made = subprocess.run(make, capture_output=True, text=True)
    assert made.returncode == 0 and "warning:" not in made.stdout + made.stderr, made.stdout + made.stderr
    return folder / "libtilewright_cuda.so"


def session(library: Path, call: Call, provider: str = "CPUExecutionProvider") -> ort.InferenceSession:
    """The node alone, for any sizes."""
    op, arguments, options = call
    inputs = dict(zip((name.rstrip("?") for name in op.face.inputs), arguments, strict=False))
    given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    defaults = inspect.signature(op.reference).parameters
    attributes = {}
    for name, kind in (attribute.split(":") for attribute in op.face.attributes):
        attributes[name] = {"int": int, "float": float}[kind](options.get(name, defaults[name].default))
    results = [output.partition(":") for output in op.face.outputs]
    called = op.face.node_name(given)
    node = helper.make_node(called, list(given), [name for name, *_ in results], domain="tilewright", **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [value(name, t.dtype, [f"{name}_{axis}" for axis in range(t.ndim)]) for name, t in given.items()],
        [value(name, torch.int32 if kind else arguments[0].dtype, None) for name, _, kind in results],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("tilewright", 1)]
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    settings.register_custom_ops_library(str(library))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), settings, providers=[provider])


def value(name: str, dtype: torch.dtype, shape: list[str] | None) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TYPES[dtype], shape)


def run(engine: ort.InferenceSession, call: Call, device: str = "cpu", place: Any = torch.empty_like) -> list[Tensor]:
    """What the session makes of the call, written into tensors that `place` makes."""
    op, arguments, options = call
    described = op.run(*(a if a is None else a.to("meta") for a in arguments), **options)
    described = [described] if isinstance(described, Tensor) else described
    outputs = [place(torch.empty_like(output, device="cpu")) for output in described]
    given = [argument for argument in arguments if argument is not None]
    binding = engine.io_binding()
    for bind, slots, tensors in (
        (binding.bind_input, engine.get_inputs(), given),
        (binding.bind_output, engine.get_outputs(), outputs),
    ):
        for slot, tensor in zip(slots, tensors, strict=True):
            bind(slot.name, device, 0, TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
    engine.run_with_iobinding(binding)
    return outputs


def run_on_arrays(engine: Any, call: Call) -> list[Any]:
    """The same by way of NumPy."""
    given = [tensor.numpy() for tensor in call[1] if tensor is not None]
    return engine.run(None, {slot.name: array for slot, array in zip(engine.get_inputs(), given, strict=True)})


def refusal(library: Path, call: Call, **changed: Tensor | None) -> str:
    """The line that a run says, with some inputs changed."""
    op, arguments, options = call
    names = [name.rstrip("?") for name in op.face.inputs]
    call = op, tuple(changed.get(name, tensor) for name, tensor in zip(names, arguments, strict=False)), options
    engine = session(library, call)
    with pytest.raises(Exception, match="tilewright") as raised:
        run_on_arrays(engine, call)
    (line,) = str(raised.value).splitlines()
    return line
