"""Quantise the graphs of a folder with a tool of others. It runs in an environment that has the tool, not tilewright.

FOLDER holds COMPONENT.onnx as `tilewright export onnx --fold` writes them, and COMPONENT.npz with inputs of calls: each
array is NUMBER/INPUT. Every tool has its defaults. The result is FOLDER/TOOL/COMPONENT.onnx or .xml; prints JSON.
"""

import argparse
import importlib.metadata
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

PACKAGES = ("nncf", "openvino", "onnxruntime", "onnx", "torch", "optimum-quanto", "nvidia-modelopt")


def calls_of(path: Path) -> list[dict[str, np.ndarray]]:
    calls: dict[int, dict[str, np.ndarray]] = {}
    for key, array in np.load(path).items():
        number, _, name = key.partition("/")
        calls.setdefault(int(number), {})[name] = array
    return [calls[number] for number in sorted(calls)]


def loaded(graph: Path) -> Any:
    return onnx.load(graph, load_external_data=True)


def nncf(graph: Path, calls: list[dict[str, np.ndarray]], out: Path) -> None:
    """In OpenVINO's format, as nncf's reader of ONNX fails on nodes with an input left out."""
    import nncf
    import openvino

    model = openvino.Core().read_model(graph)
    quantised = nncf.quantize(model, nncf.Dataset(calls), model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(quantised, out.with_suffix(".xml"), compress_to_fp16=False)


def ort(graph: Path, calls: list[dict[str, np.ndarray]], out: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left: Iterator[dict[str, np.ndarray]] = iter(calls)

        def get_next(self) -> Any:
            return next(self.left, None)

    prepared = out.with_suffix(".prepared.onnx")
    onnx.save(onnx.shape_inference.infer_shapes(loaded(graph)), prepared)  # its own preparation fails with this onnx
    options = {"quant_format": QuantFormat.QDQ, "per_channel": True}
    quantize_static(str(prepared), str(out), Reader(), **options)
    prepared.unlink()


def quanto(graph: Path, calls: list[dict[str, np.ndarray]], out: Path) -> None:
    """The weights of linear layers and convolutions as quanto's qfloat8. It computes in float with these numbers."""
    import torch
    from optimum.quanto import freeze, qfloat8, quantize

    model = loaded(graph)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Gemm", "Conv") or node.input[1] not in tensors:
            continue
        tensor = tensors[node.input[1]]
        turned = node.op_type == "MatMul" or not any(a.name == "transB" and a.i for a in node.attribute)
        numbers = numpy_helper.to_array(tensor)
        if node.op_type == "Conv":
            layer: Any = torch.nn.Conv2d(numbers.shape[1], numbers.shape[0], numbers.shape[2:], bias=False)
            turned = False
        elif numbers.ndim == 2:
            layer = torch.nn.Linear(*(numbers.shape if turned else numbers.shape[::-1]), bias=False)
        else:
            continue
        layer.weight.data = torch.from_numpy(np.ascontiguousarray(numbers.T if turned else numbers))
        holder = torch.nn.Sequential(layer)
        quantize(holder, weights=qfloat8)
        freeze(holder)
        stored = holder[0].weight.dequantize().detach().numpy()
        new = numpy_helper.from_array(np.ascontiguousarray(stored.T if turned else stored), tensor.name)
        tensor.CopyFrom(new)
    onnx.save(model, out)


def modelopt(graph: Path, calls: list[dict[str, np.ndarray]], out: Path) -> None:
    from modelopt.onnx.quantization import quantize

    batched = {name: np.concatenate([call[name] for call in calls]) for name in calls[0]}
    quantize(
        str(graph),
        quantize_mode="int8",
        calibration_data=batched,
        calibration_eps=["cpu"],
        output_path=str(out),
    )


TOOLS = {"nncf": nncf, "ort": ort, "quanto": quanto, "modelopt": modelopt}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    (arguments.folder / arguments.tool).mkdir(exist_ok=True)
    start = time.process_time()
    for graph in sorted(arguments.folder.glob("*.onnx")):
        calls = calls_of(graph.with_suffix(".npz"))
        TOOLS[arguments.tool](graph, calls, arguments.folder / arguments.tool / graph.name)
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    print(json.dumps({"cpu_seconds": time.process_time() - start, "versions": versions}))


if __name__ == "__main__":
    main()
