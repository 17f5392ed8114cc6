"""Quantised graphs: what ONNX Runtime and OpenVINO compute with them, beside a quantiser written in PyTorch."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from support.graphs import parsed
from support.layered import HIDDEN, LAYERS, layered, numbers
from tilewright.calib import Recipe, collect, insert, make_recipe, quantised_weights, read_observations
from tilewright.calib.recipe.layers import StandardGraph, standard_graph
from tilewright.calib.unweighted import in_eight_bits
from tilewright.export.lint.lint import lint_graph
from tilewright.runtime.bundle.manifest import Form
from tilewright.runtime.bundle.read import Bundle, read_bundle
from tilewright.runtime.bundle.weights import location
from tilewright.runtime.engines import openvino, ort

NEAR = 1e-5
INPUTS = {  # layer -> the tensors that enter it, before they are quantised
    "show/stem.weight": ("image",),
    "show/up.weight": ("matrix",),
    "show/gate.weight": ("matrix",),
    "show/down.weight": ("active", "large"),
    "show/out.weight": ("planes",),
}
RESULTS = dict(zip(LAYERS, ("features", "high", "gated", "low", "change"), strict=True))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return read_bundle(layered(tmp_path / "layers.bundle"))


@pytest.fixture
def statistics(bundle: Bundle, pictures: Path) -> Path:
    collect(bundle, pictures, pictures.parent / "s.safetensors")
    return pictures.parent / "s.safetensors"


def recipe_of(bundle: Bundle, statistics: Path, format: str, **options: Any) -> Recipe:
    return make_recipe(bundle, *read_observations(statistics), format, **options)


def graph_file(
    bundle: Bundle, recipe: Recipe, folder: Path, form: Form | None = None, shown: tuple[str, ...] = ()
) -> tuple[Path, dict[str, Path]]:
    """A quantised graph that also returns these tensors, and its files."""
    graph: StandardGraph = standard_graph(bundle, "show")
    codes = quantised_weights({"show": graph}, recipe, folder / "weights", recipe.format)
    model: onnx.ModelProto = ir.to_proto(insert(graph, recipe, codes, form))
    known = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in shown if name not in known)
    onnx.save(model, folder / "show.onnx")
    files = bundle.files_of("show") | {location(c.reference): c.path for c in codes.values()}
    return folder / "show.onnx", files


def stored(x: Tensor, scale: Tensor, zero: Tensor, lowest: int, highest: int, axis: int | None = None) -> Tensor:
    """Numbers after they were stored in 8 bits, by PyTorch's own quantiser."""
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, lowest, highest)
    return torch.fake_quantize_per_channel_affine(x, scale, zero, axis, lowest, highest)


def reference(x: list[Tensor], weight: Tensor, bias: Tensor | None, recipe: Recipe, layer: str, form: Form) -> Tensor:
    """The layer in PyTorch: every input and the weight are stored in 8 bits first."""
    if weight.ndim == 4:
        entered = quantised_input(x[0], recipe, recipe.layers[layer].inputs[0], form)
        return torch.conv2d(entered, quantised_weight(weight, form), padding=weight.shape[-1] // 2)
    total, start = torch.zeros(()), 0
    for part, name in zip(x, recipe.layers[layer].inputs, strict=True):
        columns = weight[:, start : start + part.shape[-1]]
        if factors := recipe.inputs[name].factors:
            columns = columns * torch.tensor(factors)
        total = total + quantised_input(part, recipe, name, form) @ quantised_weight(columns, form).T
        start += part.shape[-1]
    return total if bias is None else total + bias


def quantised_input(x: Tensor, recipe: Recipe, name: str, form: Form) -> Tensor:
    lowest, highest = recipe.inputs[name].range
    amax = torch.tensor(max(-lowest, highest), dtype=torch.float64)
    if form.inputs == "float8_e4m3fn":
        scale = (amax / 448).float()
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    if form.inputs == "int8":
        return stored(x, (amax / 127).float(), torch.tensor(0), -128, 127)
    low, high = min(lowest, 0.0), max(highest, 0.0)
    scale = torch.tensor((high - low) / 255, dtype=torch.float32)
    return stored(x, scale, torch.tensor(round(-low / float(scale))), 0, 255)


def quantised_weight(weight: Tensor, form: Form) -> Tensor:
    if form.inputs == "float8_e4m3fn":
        scale = (weight.abs().max().double() / 448).float()
        return (weight / scale).to(torch.float8_e4m3fn).float() * scale
    amax = weight.abs().flatten(1).amax(1).double()
    scale = (amax / 127).float()
    return stored(weight, scale, torch.zeros(len(scale), dtype=torch.int32), -128, 127, 0)


FORMS = [("int8", "int8", None), ("int8", "uint8", None), ("int8", "int8", 0.5), ("fp8", "float8_e4m3fn", None)]


@pytest.mark.parametrize(("format", "inputs", "smooth"), FORMS)
def test_each_layer_computes_what_a_quantiser_in_pytorch_does(
    bundle: Bundle, statistics: Path, tmp_path: Path, format: str, inputs: str, smooth: float | None
) -> None:
    recipe, form = recipe_of(bundle, statistics, format, smooth=smooth), Form(inputs)
    assert sorted(recipe.quantised) == sorted(LAYERS)
    shown = tuple(dict.fromkeys([*(i for names in INPUTS.values() for i in names), *RESULTS.values()]))
    path, files = graph_file(bundle, recipe, tmp_path, form, tuple(n for n in shown if n != "image"))
    image = np.random.default_rng(1).random((1, 3, 16, 16), np.float32)
    engine = ort.open_graph(path, files, precision=format, native=False)
    values = engine.run({"image": image}, [n for n in shown if n != "image"]) | {"image": image}
    weights = {name: torch.from_numpy(array) for name, array in numbers().items()}
    for layer, names in INPUTS.items():
        stem = layer.removeprefix("show/")
        bias = weights.get(stem.replace("weight", "bias"))
        x = [torch.from_numpy(values[name]) for name in names]
        expected = reference(x, weights[stem], bias, recipe, layer, form).numpy()
        error = np.linalg.norm(values[RESULTS[layer]] - expected) / np.linalg.norm(expected)
        assert error <= NEAR, layer


def test_openvino_computes_the_same_picture_from_the_same_graph(
    bundle: Bundle, statistics: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(bundle, statistics, "int8")
    path, files = graph_file(bundle, recipe, tmp_path)
    image = np.random.default_rng(1).random((1, 3, 16, 16), np.float32)
    pictures = [e.run({"image": image}, ["picture"])["picture"] for e in (
        ort.open_graph(path, files, precision="int8", native=False), openvino.open_graph(path, files))]  # fmt: skip
    exact = ort.open_graph(bundle.path("show.onnx"), bundle.files_of("show")).run({"image": image}, ["picture"])
    lost = np.linalg.norm(pictures[0] - exact["picture"])
    assert 0 < np.linalg.norm(pictures[1] - pictures[0]) < lost / 2  # both round, and hardly ever to other codes


def test_the_graph_has_the_pairs_that_tensorrt_fuses(bundle: Bundle, statistics: Path, tmp_path: Path) -> None:
    recipe = recipe_of(bundle, statistics, "int8", smooth=0.5)
    path, files = graph_file(bundle, recipe, tmp_path)
    model = onnx.load(path, load_external_data=False)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QuantizeLinear") == 5  # both layers that read the matrix share a pair
    assert kinds.count("DequantizeLinear") == 5 + 6  # and down.weight has two parts
    findings, _ = lint_graph("show", path, lambda name: files[name])
    assert not [finding for finding in findings if "quanti" in finding.rule]


def test_halves_of_a_joined_input_have_scales_of_their_own(bundle: Bundle, statistics: Path) -> None:
    recipe = recipe_of(bundle, statistics, "int8")
    first, second = recipe.layers["show/down.weight"].inputs
    assert (first, second) == (f"show/joined[0:{HIDDEN}]", f"show/joined[{HIDDEN}:{2 * HIDDEN}]")
    sizes = [max(-e.range[0], e.range[1]) for e in (recipe.inputs[first], recipe.inputs[second])]
    assert sizes[1] > 5 * sizes[0]


def test_smoothing_makes_the_channels_alike_and_the_picture_closer(
    bundle: Bundle, statistics: Path, tmp_path: Path
) -> None:
    image = np.random.default_rng(1).random((1, 3, 16, 16), np.float32)
    exact = ort.open_graph(bundle.path("show.onnx"), bundle.files_of("show")).run({"image": image}, ["picture"])
    errors = []
    for smooth in (None, 0.5):
        recipe = recipe_of(bundle, statistics, "int8", method="absmax", smooth=smooth)
        smoothed = {name for name, entering in recipe.inputs.items() if entering.factors}
        assert smoothed == ({"show/matrix"} if smooth else set())  # no normalisation stands before the others
        recipe = recipe.only(["show/up.weight", "show/gate.weight"])
        folder = tmp_path / str(smooth)
        folder.mkdir()
        engine = ort.open_graph(*graph_file(bundle, recipe, folder), precision="int8", native=False)
        errors.append(np.linalg.norm(engine.run({"image": image}, ["picture"])["picture"] - exact["picture"]))
    assert errors[1] < errors[0] / 1.5


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_a_layer_may_read_the_result_of_another_one(format: str) -> None:
    numbers = "{1, 2, 3, 4, 5, 6, 7, 8, 8, 7, 6, 5, 4, 3, 2, 1}"
    model = parsed(f"""g (float[n, 4] x) => (float[n, 4] y) <float[4, 4] a = {numbers}, float[4, 4] b = {numbers}> {{
            u = Gemm (x, a)
            y = Gemm <transB = 1> (u, b)
        }}""")
    graph = in_eight_bits("show", model, format, Form({"int8": "int8", "fp8": "float8_e4m3fn"}[format])).graph
    known = {*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)}
    assert all(value in known for node in graph for value in node.inputs) and graph.outputs[0] in known
    kinds = [node.op_type for node in graph]
    assert kinds == ["QuantizeLinear", *["DequantizeLinear"] * 2, "MatMul"] * 2
    assert [value.name for value in graph.outputs] == ["y"]
