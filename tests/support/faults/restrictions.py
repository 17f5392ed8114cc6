"""Faults of single operators."""

import numpy as np
import onnx
from onnx import helper

from support.planted import ALSO, Planted, T, fault

R = "restrictions of operators"


@fault(R, "mode 'cubic'")
def cubic_resize(g):
    g.node("Resize", g.x, "", g.weight([1.0, 1.0, 2.0, 2.0]), mode="cubic")


@fault(R, "antialias")
def resize_with_antialias(g):
    g.node("Resize", g.x, "", g.weight([1.0, 1.0, 0.5, 0.5]), mode="linear", antialias=1)


@fault(R, "'half_pixel_symmetric'")
def resize_with_other_coordinates(g):
    scales = g.weight([1.0, 1.0, 2.0, 2.0])
    g.node("Resize", g.x, "", scales, mode="linear", coordinate_transformation_mode="half_pixel_symmetric")


@fault(R, "'not_larger'")
def resize_that_keeps_the_ratio(g):
    g.node("Resize", g.x, "", "", g.ints(1, 8, 64, 64), keep_aspect_ratio_policy="not_larger")


@fault(R, "softcap")
def attention_with_softcap(g):
    node = g.first("Attention")
    kept = [a for a in node.attribute if a.name != "softcap"]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("softcap", 30.0)])
    return node.name


@fault(R, "Q has not 4 dimensions")
def attention_of_three_dimensions(g):
    tokens = g.tokens()
    g.node("Attention", tokens, tokens, tokens, q_num_heads=2, kv_num_heads=2)


@fault(R, "computed")
def reduction_along_computed_axes(g):
    g.node("ReduceMean", g.x, g.four())


@fault(R, "computed")
def unsqueeze_at_computed_axes(g):
    g.node("Unsqueeze", g.x, g.four())


@fault(R, "computed")
def running_sum_along_a_computed_axis(g):
    g.node("CumSum", g.x, g.also("Squeeze", g.four()))


@fault(R, "K is 4000")
def top_of_too_many(g):
    g.node("TopK", g.x, g.ints(4000), outputs=2)


@fault(R, "unsorted")
def top_unsorted(g):
    g.node("TopK", g.x, g.ints(4), outputs=2, axis=1, sorted=0)


@fault(R, "K is computed")
def top_of_a_computed_number(g):
    g.node("TopK", g.x, g.four(), outputs=2, axis=1)


@fault(R, "reduction is 'add'")
def scatter_that_adds(g):
    first = g.also("Slice", g.x, g.ints(0), g.ints(1))
    g.node("ScatterND", g.x, g.weight(np.zeros((1, 1)), T.INT64), first, reduction="add")


@fault(R, "indices are used")
def pool_with_indices(g):
    g.node("MaxPool", g.x, outputs=2, kernel_shape=[2, 2])


@fault(R, "over 1 dimensions")
def pool_of_one_dimension(g):
    g.node("AveragePool", g.also("Reshape", g.x, g.ints(0, g.channels, -1)), kernel_shape=[2])


@fault(R, "dilations [2, 2]")
def pool_with_dilations(g):
    g.node("AveragePool", g.x, kernel_shape=[2, 2], dilations=[2, 2])


@fault(R, "mean or deviation")
def norm_with_its_mean(g):
    g.node("LayerNormalization", g.tokens(), g.weight(np.ones(g.channels)), outputs=2)


@fault(R, "TensorRT takes small letters")
def einsum_of_capitals(g):
    g.node("Einsum", g.x, equation="Bchw->B")


@fault(R, "ignores its seed")
def noise(g):
    g.node("RandomNormalLike", g.x, seed=1.0)


@fault(R, "training_mode")
def dropout_in_training(g):
    g.node("Dropout", g.x, g.weight(0.5), g.weight(np.array(True), T.BOOL))


@fault(R, "depth")
def one_hot_of_a_computed_depth(g):
    g.node("OneHot", g.ints(0, 1), g.four(), g.weight([0.0, 1.0]))


@fault(R, "4 dimensions of space")
def convolution_of_four_dimensions(g):
    shape = [1, g.channels, 2, 2, 2, 2]
    g.node("Conv", g.also("Reshape", g.x, g.ints(*shape)), g.weight(np.zeros((1, g.channels, 1, 1, 1, 1))))


@fault(R, "must have 4")
def grid_sample_of_five_dimensions(g):
    g.node("GridSample", g.also("Unsqueeze", g.x, g.ints(2)), g.weight(np.zeros((1, 1, 2, 2, 3))))


@fault(R, "differ before and after")
def deformed_convolution_with_pads(g):
    weight, offset = g.weight(np.zeros((1, g.channels, 1, 1))), g.weight(np.zeros((1, 2, 2, 2)))
    g.node("DeformConv", g.x, weight, offset, pads=[0, 0, 1, 1])


@fault(R, "size of its input is dynamic")
def eye_of_a_dynamic_size(g):
    g.node("EyeLike", g.also("Reshape", g.x, g.ints(0, -1)))


@fault(R, "size of its axis is dynamic")
def hardmax_of_a_dynamic_axis(g):
    g.node("Hardmax", g.x, axis=3)


@fault(R, "batch first")
def lstm_with_a_layout(g):
    weights = [g.weight(np.zeros((1, 8, width))) for width in (g.channels, 2)]
    g.node("LSTM", g.tokens(), *weights, hidden_size=2, layout=1)


@fault(R, "different activations")
def rnn_with_two_activations(g):
    weights = [g.weight(np.zeros((2, 2, width))) for width in (g.channels, 2)]
    words = ["Tanh", "Relu"]
    g.node("RNN", g.tokens(), *weights, hidden_size=2, direction="bidirectional", activations=words)


@fault(R, "position_ids are INT32")
def positions_of_32_bits(g):
    tables = [g.weight(np.zeros((8, 1))) for _ in range(2)]
    heads = g.also("Reshape", g.tokens(), g.ints(0, 1, -1, g.channels))
    g.node("RotaryEmbedding", heads, *tables, g.weight(np.zeros((1, 4)), T.INT32), rotary_embedding_dim=2)


@fault(R, "its branches give ranks 4 and 1")
def branches_of_two_ranks(g):
    then = _branch("then", helper.make_node("Identity", [g.x], ["kept"], name=ALSO), 4)
    flat = helper.make_node("Reshape", [g.x, g.ints(-1)], ["flat"], name=ALSO)
    bright = g.also("Greater", g.also("ReduceMax", g.x, keepdims=0), g.weight(0.5))
    g.node("If", bright, then_branch=then, else_branch=_branch("else", flat, 1))


@fault(R, "both branches name a result 'same'")
def branches_with_one_name(g):
    branches = [_branch(name, helper.make_node(op, [g.x], ["same"], name=ALSO), 4) for name, op in BRANCHES]
    bright = g.also("Greater", g.also("ReduceMax", g.x, keepdims=0), g.weight(0.5))
    g.node("If", bright, then_branch=branches[0], else_branch=branches[1])


BRANCHES = (("then", "Abs"), ("else", "Neg"))


def _branch(name: str, node: onnx.NodeProto, rank: int) -> onnx.GraphProto:
    shape = [f"{name}{i}" for i in range(rank)]
    return helper.make_graph([node], name, [], [helper.make_tensor_value_info(node.output[0], T.FLOAT, shape)])


@fault(R, "the number of rounds is not a constant")
def loop_of_unknown_rounds(g):
    _loop(g, g.also("Squeeze", g.also("Shape", g.also("Shape", g.x))), [1, 2])


@fault(R, "changes its shape from round to round")
def loop_that_grows(g):
    _loop(g, g.weight(np.array(3), T.INT64), [1, 4])


def _loop(g: Planted, rounds: str, after: list[int]) -> None:
    info, node = helper.make_tensor_value_info, helper.make_node
    nodes = [
        node("Identity", ["go"], ["going"], name=f"{ALSO}.a"),
        node("Concat" if after == [1, 4] else "Sum", ["a", "a"], ["b"], name=f"{ALSO}.b"),
        node("Identity", ["a"], ["c"], name=f"{ALSO}.c"),
    ]
    if after == [1, 4]:
        nodes[1].attribute.append(helper.make_attribute("axis", 1))
    inputs = [info("i", T.INT64, []), info("go", T.BOOL, []), info("a", T.FLOAT, [1, 2])]
    outputs = [info("going", T.BOOL, []), info("b", T.FLOAT, after), info("c", T.FLOAT, [1, 2])]
    body = helper.make_graph(nodes, "body", inputs, outputs)
    g.node("Loop", rounds, "", g.weight(np.zeros((1, 2))), outputs=2, body=body)
