"""Weights stored in one type and computed in another: the answers of weights that were cast by hand."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from support.systems import components_of
from tilewright.export.graph.rewrites.cast import cast
from tilewright.export.graph.rewrites.fold import fold
from tilewright.export.graph.trace import network_on_meta
from tilewright.export.systems.hitoksr.system import SYSTEM as HITOKSR
from tilewright.export.targets.ort import prepare
from tilewright.export.weights.files import find

STORED = {
    "bfloat16": (ir.DataType.BFLOAT16, ml_dtypes.bfloat16, torch.bfloat16),
    "float16": (ir.DataType.FLOAT16, np.float16, torch.float16),
    "float32": (ir.DataType.FLOAT, np.float32, torch.float32),
}
NARROW = pytest.mark.parametrize("narrow", ["bfloat16", "float16"])
# w is used twice and once transposed, b once, and half is a constant of the graph and no weight
TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
g (float[n, 4] x) => (float[n, 3] y)
<float[3, 4] w = ["location": "w.bin"], float[3] b = ["location": "w.bin"], float[1] half = {0.5}> {
    turned = Transpose <perm = [1, 0]> (w)
    product = MatMul (x, turned)
    shifted = Add (product, b)
    size = ReduceSum <keepdims = 0> (w)
    sized = Mul (shifted, size)
    y = Mul (sized, half)
}
"""


@pytest.fixture
def values() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {"w": generator.normal(size=(3, 4)), "b": generator.normal(size=3)}


def stored(folder, values, kinds: dict[str, str]) -> ir.Model:
    """The graph over a file that holds each weight in the type given."""
    model = ir.from_proto(onnx.parser.parse_model(TEXT))
    data = b""
    for name, kind in kinds.items():
        dtype, numpy_type, _ = STORED[kind]
        array = values[name].astype(numpy_type)
        model.graph.initializers[name].const_value = ir.ExternalTensor(
            "w.bin", len(data), array.nbytes, dtype, shape=ir.Shape(array.shape), name=name
        )
        data += array.tobytes()
    (folder / "w.bin").write_bytes(data)
    return model


def run(model: ir.Model, folder, x: np.ndarray) -> np.ndarray:
    ir.save(model, folder / "model.onnx")
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def rounded(values, kinds: dict[str, str]) -> dict[str, np.ndarray]:
    return {name: values[name].astype(STORED[kind][1]).astype(np.float32) for name, kind in kinds.items()}


@pytest.mark.parametrize("w", STORED)
@pytest.mark.parametrize("b", STORED)
def test_the_answer_is_that_of_weights_cast_by_hand(tmp_path, values, w, b):
    kinds = {"w": w, "b": b}
    x = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    model = stored(tmp_path, values, kinds)
    cast(model)
    ours = run(model, tmp_path, x)
    by_hand = stored(tmp_path, rounded(values, kinds), {"w": "float32", "b": "float32"})
    np.testing.assert_array_equal(ours, run(by_hand, tmp_path, x))
    exact = rounded(values, kinds)
    # float32 sums of four and twelve terms
    np.testing.assert_allclose(ours, (x @ exact["w"].T + exact["b"]) * exact["w"].sum() / 2, rtol=1e-5, atol=1e-5)


@NARROW
def test_a_weight_is_cast_once_before_its_first_use_and_keeps_its_name_and_bytes(tmp_path, values, narrow):
    model = stored(tmp_path, values, {"w": narrow, "b": "float32"})
    references = {name: model.graph.initializers[name].const_value for name in ("w", "b")}
    cast(model)
    nodes = list(model.graph)
    assert [node.op_type for node in nodes] == ["Cast", "Transpose", "MatMul", "Add", "ReduceSum", "Mul", "Mul"]
    weight, widened = nodes[0].inputs[0], nodes[0].outputs[0]
    assert (weight.name, weight.dtype) == ("w", STORED[narrow][0])
    assert (widened.dtype, widened.shape) == (ir.DataType.FLOAT, ir.Shape([3, 4]))
    assert nodes[1].inputs[0] is widened
    assert nodes[4].inputs[0] is widened
    assert len({value.name for node in nodes for value in node.outputs}) == len(nodes)
    for name, reference in references.items():
        assert model.graph.initializers[name].const_value is reference


def test_weights_stored_as_they_are_computed_are_left_alone(tmp_path, values):
    model = stored(tmp_path, values, {"w": "float32", "b": "float32"})
    before = ir.to_proto(model).SerializeToString()
    cast(model)
    assert ir.to_proto(model).SerializeToString() == before


@NARROW
def test_casting_twice_changes_nothing_more(tmp_path, values, narrow):
    model = stored(tmp_path, values, {"w": narrow, "b": narrow})
    cast(model)
    once = ir.to_proto(model).SerializeToString()
    cast(model)
    assert ir.to_proto(model).SerializeToString() == once


@NARROW
@pytest.mark.slow
def test_a_traced_network_over_narrow_weights_is_the_network_with_widened_ones(traced, graphs, tmp_path, narrow):
    kind, dtype = STORED[narrow][0], STORED[narrow][2]
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(graphs / "weights.safetensors").items()}
    save_file(tensors, tmp_path / "w.safetensors")
    found = find(tmp_path)
    outputs = {}
    picture = torch.rand((1, 3, 32, 48), generator=torch.Generator().manual_seed(3))
    codes = torch.randn((1, 8, 2, 3), generator=torch.Generator().manual_seed(4))
    inputs = {"generate": {"image": picture.numpy()}, "decode": {"codes": codes.numpy()}}
    for component in ("generate", "decode"):
        model = ir.load(traced / f"{component}.onnx")
        fold(model)
        for name, value in model.graph.initializers.items():
            if isinstance(value.const_value, ir.ExternalTensor):
                r = found.tensors[HITOKSR.keys(component, name)[0]]
                value.const_value = ir.ExternalTensor(
                    r.file, r.offset, r.length, kind, shape=ir.Shape(r.shape), name=name
                )
        cast(model)
        prepare(model)
        ir.save(model, tmp_path / f"{component}.onnx")
        onnx.checker.check_model(str(tmp_path / f"{component}.onnx"), full_check=True)
        session = onnxruntime.InferenceSession(tmp_path / f"{component}.onnx", providers=["CPUExecutionProvider"])
        outputs[component] = session.run(None, inputs[component])

    def network(component: str) -> torch.nn.Module:
        made = network_on_meta(components_of("hitoksr", "tiny")[component])
        named = {n: tensors.get(HITOKSR.keys(component, n)[0]) for n, _ in made.named_parameters()}
        made.load_state_dict({n: t.float() for n, t in named.items() if t is not None}, strict=False, assign=True)
        return made.requires_grad_(False)

    np.testing.assert_array_equal(outputs["generate"][1], network("generate")(picture)[1])
    expected = network("decode")(codes).double().numpy()
    # float32 sums in another order over two blocks, as with float32 weights
    assert np.linalg.norm(outputs["decode"][0] - expected) <= 1e-5 * np.linalg.norm(expected)
