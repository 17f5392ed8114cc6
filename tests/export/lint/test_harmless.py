"""What TensorRT takes has no findings, although it looks like a fault: planted into the same real graph."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from support.planted import Planted, T
from tilewright.export.lint.lint import lint_graph
from tilewright.runtime.bundle.read import read_bundle

HARMLESS = {}


def harmless(plant):
    HARMLESS[plant.__name__] = plant
    return plant


@harmless
def resize_by_nearest_and_by_linear(g):
    scales = g.weight([1.0, 1.0, 2.0, 2.0])
    g.node("Resize", g.x, "", scales, mode="nearest", nearest_mode="floor")
    g.node("Resize", g.x, "", scales, mode="linear", coordinate_transformation_mode="align_corners")


@harmless
def a_picture_of_bytes_cast_at_once(g):
    g.node("Cast", g.input("bytes", T.UINT8, ["batch", 3, "height", "width"]), to=T.FLOAT)


@harmless
def a_result_of_bytes(g):
    result = g.node("Cast", g.x, to=T.UINT8)
    g.graph.output.append(helper.make_tensor_value_info(result, T.UINT8, ["batch", g.channels, "rows", "columns"]))


@harmless
def bfloat16_throughout(g):
    narrow = g.cast(g.tokens(), T.BFLOAT16)
    scale = g.cast(g.weight(np.ones(g.channels)), T.BFLOAT16)
    normed = g.node("LayerNormalization", narrow, scale)
    g.node("MatMul", normed, g.cast(g.weight(np.ones((g.channels, 4))), T.BFLOAT16))


@harmless
def sizes_from_shapes(g):
    rows = g.node("Gather", g.node("Shape", g.x), g.weight(np.array(2), T.INT64))
    zero, one = (g.weight(np.array(i), T.INT64) for i in (0, 1))
    g.node("Range", zero, g.node("Mul", rows, rows), one)
    g.node("Slice", g.x, g.ints(0), g.node("Unsqueeze", rows, g.ints(0)), g.ints(2))


@harmless
def a_scalar_by_an_empty_list_of_sizes(g):
    g.node("Reshape", g.node("ReduceMax", g.x), g.weight(np.zeros(0), T.INT64))


@harmless
def top_of_a_constant_number(g):
    g.node("TopK", g.x, g.ints(3839), outputs=2)


@harmless
def int8_linear_with_a_scale_for_each_output(g):
    weight = g.weight(np.ones((g.channels, 4)), T.INT8)
    wide = g.node("DequantizeLinear", weight, g.weight(np.ones(4)), g.weight(np.zeros(4), T.INT8), axis=1)
    product = g.node("MatMul", g.quantized(g.tokens()), wide)
    g.node("Add", product, g.weight(np.ones(4)))


@harmless
def int8_gemm_whose_weight_is_transposed_by_the_operator(g):
    weight, zero = g.weight(np.ones((4, g.channels)), T.INT8), g.weight(np.zeros(4), T.INT8)
    wide = g.node("DequantizeLinear", weight, g.weight(np.ones(4)), zero, axis=0)
    g.node("Gemm", g.quantized(g.node("Reshape", g.tokens(), g.ints(-1, g.channels))), wide, transB=1)


@harmless
def int8_convolution_whose_weight_is_quantized_in_the_graph(g):
    weight, scale = g.weight(np.ones((4, g.channels, 3, 3))), g.weight(np.ones(4))
    zero = g.weight(np.zeros(4), T.INT8)
    rounded = g.node("QuantizeLinear", weight, scale, zero, axis=0)
    wide = g.node("DequantizeLinear", rounded, scale, zero, axis=0)
    g.node("Conv", g.quantized(g.x), wide, g.weight(np.ones(4)))


@harmless
def fp8_linear_in_bfloat16(g):
    scale = g.weight(0.5, T.BFLOAT16)
    wide = g.node("DequantizeLinear", g.weight(np.ones((g.channels, 4)), T.FLOAT8E4M3FN), scale)
    g.node("MatMul", g.quantized(g.cast(g.tokens(), T.BFLOAT16), T.FLOAT8E4M3FN, scale), wide)


@harmless
def attention_that_is_quantized_in_all_parts(g):
    tokens = g.tokens()
    turned = g.quantized(g.node("Transpose", tokens, perm=[0, 2, 1]))
    scores = g.node("Softmax", g.node("MatMul", g.quantized(tokens), turned))
    g.node("MatMul", g.quantized(scores), g.quantized(tokens))


@harmless
def branches_of_one_rank_and_a_loop_of_three_rounds(g):
    info, node = helper.make_tensor_value_info, helper.make_node
    bright = g.node("Greater", g.node("ReduceMax", g.x, keepdims=0), g.weight(0.5))
    branches = {
        f"{name}_branch": helper.make_graph(
            [node(op, [g.x], [f"{name}.result"])], name, [], [info(f"{name}.result", T.FLOAT, list("abcd"))]
        )
        for name, op in (("then", "Abs"), ("else", "Neg"))
    }
    g.node("If", bright, **branches)
    body = helper.make_graph(
        [node("Identity", ["go"], ["goes"]), node("Neg", ["a"], ["b"]), node("Abs", ["a"], ["c"])],
        "body",
        [info("i", T.INT64, []), info("go", T.BOOL, []), info("a", T.FLOAT, [1, 2])],
        [info("goes", T.BOOL, []), info("b", T.FLOAT, [1, 2]), info("c", T.FLOAT, [1, 2])],
    )
    g.node("Loop", g.weight(np.array(3), T.INT64), "", g.weight(np.zeros((1, 2))), outputs=2, body=body)


@harmless
def a_function_of_standard_operators(g):
    body = [helper.make_node("Neg", ["a"], ["b"])]
    g.model.functions.append(
        helper.make_function("garden", "Turned", ["a"], ["b"], body, [helper.make_opsetid("", 23)])
    )
    g.model.opset_import.append(helper.make_opsetid("garden", 1))
    g.node("Turned", g.x, domain="garden")


@pytest.mark.parametrize("name", HARMLESS)
def test_it_has_no_findings(hitoksr_tiny, tmp_path, name):
    bundle = read_bundle(hitoksr_tiny)
    places = bundle.files_of("decode")
    planted = Planted(onnx.load(bundle.path("decode.onnx"), load_external_data=False))
    before = len(planted.graph.node)
    HARMLESS[name](planted)
    assert len(planted.graph.node) > before
    onnx.save(planted.model, tmp_path / "planted.onnx")
    findings, _ = lint_graph("decode", tmp_path / "planted.onnx", lambda location: places.get(location, Path(location)))
    assert findings == []


@pytest.mark.parametrize(("opset", "kind", "faults"), [(18, T.FLOAT16, 1), (19, T.FLOAT16, 0), (18, T.FLOAT, 0)])
def test_scales_of_16_bits_need_opset_19(tmp_path, opset, kind, faults):
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, kind, ["n"]) for name in ("x", "y")]
    weights = [helper.make_tensor("scale", kind, [], [0.5]), helper.make_tensor("zero", T.INT8, [], [0])]
    graph = helper.make_graph(nodes, "pair", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save(model, tmp_path / "pair.onnx")
    findings, _ = lint_graph("pair", tmp_path / "pair.onnx", tmp_path.joinpath)
    assert ["needs opset 19" in finding.problem for finding in findings] == [True] * faults
