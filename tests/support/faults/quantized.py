"""Faults of QuantizeLinear and DequantizeLinear."""

import numpy as np
from onnx import helper

from support.planted import ALSO, T, fault

Q = "quantization"


@fault(Q, "is not zero")
def quantization_around_three(g):
    g.quantized(g.x, zero=g.weight(np.array(3), T.INT8))


@fault(Q, "is not positive")
def quantization_by_a_negative_scale(g):
    g.quantized(g.x, scale=g.weight(-0.5))


@fault(Q, "is computed")
def quantization_by_a_computed_scale(g):
    g.quantized(g.x, scale=g.also("ReduceMax", g.x, keepdims=0))


@fault(Q, "an activation has")
def quantization_of_an_activation_by_channels(g):
    zero = g.weight(np.zeros(g.channels), T.INT8)
    g.quantized(g.x, scale=g.weight(np.ones(g.channels)), zero=zero)


@fault(Q, "it quantizes to UINT8")
def quantization_without_a_sign(g):
    g.quantized(g.x, T.UINT8)


@fault(Q, "its scale is FP32, and its input BF16")
def quantization_by_a_wide_scale(g):
    zero, narrow = g.weight(np.zeros(()), T.INT8), g.weight(0.5, T.BFLOAT16)
    rounded = g.node("QuantizeLinear", g.cast(g.x, T.BFLOAT16), g.weight(0.5), zero)
    g.also("DequantizeLinear", rounded, narrow, zero)


@fault(Q, "not to a DequantizeLinear")
def quantization_that_stays(g):
    g.cast(g.node("QuantizeLinear", g.x, g.weight(0.5), g.weight(np.zeros(()), T.INT8)), T.FLOAT)


@fault(Q, "do not fit axis 0 of 8")
def quantization_with_too_few_scales(g):
    weight, zero = g.weight(np.zeros((8, 4)), T.INT8), g.weight(np.zeros(6), T.INT8)
    g.node("DequantizeLinear", weight, g.weight(np.ones(6)), zero, axis=0)


@fault(Q, "output channels are axis 1")
def quantization_of_input_channels(g):
    count = g.channels
    weight, zero = g.weight(np.zeros((count, 4)), T.INT8), g.weight(np.zeros(count), T.INT8)
    wide = g.node("DequantizeLinear", weight, g.weight(np.ones(count)), zero, axis=0)
    g.also("MatMul", g.tokens(), wide)


FUSION = "fusion of quantized weights"


@fault(FUSION, "a Transpose is between")
def transpose_behind_quantization(g):
    weight = g.also("DequantizeLinear", g.weight(np.zeros((4, g.channels)), T.INT8), g.weight(0.5))
    g.also("MatMul", g.tokens(), g.node("Transpose", weight, perm=[1, 0]))


@fault(FUSION, "a Cast is between")
def cast_behind_quantization(g):
    weight = g.also("DequantizeLinear", g.weight(np.zeros((g.channels, 4)), T.INT8), g.weight(0.5))
    g.also("MatMul", g.cast(g.tokens(), T.FLOAT16), g.node("Cast", weight, to=T.FLOAT16))


@fault(FUSION, "its bias is quantized")
def quantized_bias(g):
    bias = g.also("DequantizeLinear", g.weight(np.zeros(4), T.INT8), g.weight(0.5))
    g.node("Conv", g.x, g.weight(np.zeros((4, g.channels, 1, 1))), bias)


@fault("one quantized type", "INT8 is used before")
def two_quantized_types(g):
    g.quantized(g.x, q=ALSO)
    g.quantized(g.x, T.FLOAT8E4M3FN)


@fault("quantized attention", "Softmax of its attention is quantized, and Q, K, V is not")
def quantized_softmax(g):
    tokens = g.tokens()
    scores = g.also("MatMul", tokens, g.also("Transpose", tokens, perm=[0, 2, 1]))
    g.also("MatMul", g.quantized(g.node("Softmax", scores), q=f"{ALSO}.q"), tokens)


@fault("quantized attention", "Q of its attention is quantized, and K, V is not")
def quantized_query(g):
    node = g.first("Attention")
    scale, zero = g.weight(0.5), g.weight(np.zeros(()), T.INT8)
    pair = [
        helper.make_node("QuantizeLinear", [node.input[0], scale, zero], ["rounded"], name=f"{ALSO}.q"),
        helper.make_node("DequantizeLinear", ["rounded", scale, zero], ["restored"], name=f"{ALSO}.dq"),
    ]
    for at, new in enumerate(pair, list(g.graph.node).index(node)):
        g.graph.node.insert(at, new)
    node.input[0] = "restored"
    return node.name
