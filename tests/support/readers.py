"""Eight tools that read ONNX files, none of them ours: each opens a graph where it lies, and runs it where it can."""

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from polygraphy.backend.onnx import OnnxFromPath
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

QUANTIZED = ["Conv", "Gemm", "MatMul"]  # by default ONNX Runtime also takes ONNX's Attention for its own, another one
UNSIGNED = QuantType.QUInt8  # ONNX Runtime turns signed ones into these as it loads, and forgets an attribute
Feed = Mapping[str, Any]
Run = Callable[[Path, Feed, Path], dict[str, Any] | None]  # graph, inputs, a folder to write to -> outputs, if it runs


def onnx_runtime(graph: Path, feed: Feed, work: Path) -> dict[str, Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


def onnx_checker(graph: Path, feed: Feed, work: Path) -> None:
    onnx.checker.check_model(str(graph), full_check=True)


def onnx_shape_inference(graph: Path, feed: Feed, work: Path) -> None:
    model = onnx.load(graph)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    typed = {value.name for value in inferred.graph.value_info if value.type.tensor_type.elem_type}
    assert {name for node in inferred.graph.node for name in node.output if name} <= typed | {
        output.name for output in inferred.graph.output
    }


def openvino_cpu(graph: Path, feed: Feed, work: Path) -> dict[str, Any]:
    precise = {"INFERENCE_PRECISION_HINT": "f32"}  # where the CPU has bfloat16, OpenVINO would take that
    compiled = openvino.Core().compile_model(str(graph), "CPU", precise)
    answer = compiled([next(np.array(feed[name]) for name in port.names if name in feed) for port in compiled.inputs])
    outputs = {output.name for output in onnx.load(graph, load_external_data=False).graph.output}
    return {name: answer[port] for port in compiled.outputs for name in port.names if name in outputs}


def polygraphy(graph: Path, feed: Feed, work: Path) -> dict[str, Any]:
    assert OnnxFromPath(str(graph))().graph.node
    with OnnxrtRunner(SessionFromOnnx(str(graph), providers=["cpu"])) as runner:
        return dict(runner.infer(dict(feed)))


def onnx_runtime_dynamic(graph: Path, feed: Feed, work: Path) -> None:
    quantize_dynamic(str(graph), str(work / "dynamic.onnx"), op_types_to_quantize=QUANTIZED)
    onnx_runtime(work / "dynamic.onnx", feed, work)


class _One(CalibrationDataReader):
    def __init__(self, feed: Feed) -> None:
        self.left = [dict(feed)]

    def get_next(self) -> dict[str, Any] | None:
        return self.left.pop() if self.left else None


def onnx_runtime_static(graph: Path, feed: Feed, work: Path) -> None:
    quantize_static(
        str(graph), str(work / "static.onnx"), _One(feed), op_types_to_quantize=QUANTIZED, activation_type=UNSIGNED
    )
    onnx_runtime(work / "static.onnx", feed, work)


READERS: dict[str, Run] = {
    "onnxruntime": onnx_runtime,
    "onnx.checker": onnx_checker,
    "onnx.shape_inference": onnx_shape_inference,
    "openvino": openvino_cpu,
    "polygraphy": polygraphy,
    "quantize_dynamic": onnx_runtime_dynamic,
    "quantize_static": onnx_runtime_static,
}


def netron(graphs: Iterable[Path], work: Path) -> dict[str, Any]:
    """What Netron's window would show of graphs: file -> nodes, and each weight's SHA-256."""
    package = Path(str(importlib.util.find_spec("netron").origin)).parent  # type: ignore[union-attr]
    folder = work / "netron"
    shutil.copytree(package, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (folder / "package.json").write_text('{"type": "module"}')  # as its own repository says; the wheel leaves it out
    script = Path(__file__).with_name("netron.mjs")
    done = subprocess.run(["node", script, folder, *graphs], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers
