"""Faults of files, operators, plugins, types and sizes."""

from collections.abc import Callable

import numpy as np
from onnx import helper

from support.planted import ALSO, FAULTS, HERE, Fault, Planted, T, fault, place

VERSIONS, PLACES = "versions of ONNX", "places of weights"


@fault(VERSIONS, "IR version 40")
def ir_version(g):
    g.model.ir_version = 40
    return ""


@fault(VERSIONS, "opset 26")
def opset(g):
    for owner in (g.model, *g.model.functions):
        for imported in owner.opset_import:
            if imported.domain == "":
                imported.version = 26
    return ""


@fault(VERSIONS, "is of opset 22")
def opset_of_a_function(g):
    function = g.model.functions[0]
    for imported in function.opset_import:
        if imported.domain == "":
            imported.version = 22
    return f"{function.domain}::{function.name}"


def _moved(key: str, change: Callable[[str], str]) -> Callable[[Planted], str]:
    def plant(g: Planted) -> str:
        tensor = g.external()
        entry = place(tensor)[key]
        entry.value = change(entry.value)
        return tensor.name

    return plant


OUTSIDE = {
    "a_parent_folder": ("location", lambda text: f"../{text}", "outside of the graph's folder"),
    "an_absolute_path": ("location", lambda text: f"/models/{text}", "outside of the graph's folder"),
    "a_missing_file": ("location", lambda text: f"{text}.gone", "there is no"),
    "a_wrong_length": ("length", lambda text: str(int(text) - 4), "bytes, and"),
    "a_place_past_the_end": ("offset", lambda text: str(2**40), "past the end"),
    "a_crooked_place": ("offset", lambda text: str(int(text) - 2), "which 4 does not divide"),
}
for named, (key, change, text) in OUTSIDE.items():
    FAULTS[named] = Fault(PLACES, text, _moved(key, change))


@fault("operators", "TensorRT has no Bernoulli")
def missing_operator(g):
    g.node("Bernoulli", g.x)


@fault("operators", "TensorRT has no Bernoulli")
def missing_operator_in_a_function(g):
    body = [helper.make_node("Bernoulli", ["a"], ["b"], name=HERE)]
    function = helper.make_function("garden", "Noisy", ["a"], ["b"], body, [helper.make_opsetid("", 23)])
    g.model.functions.append(function)
    g.model.opset_import.append(helper.make_opsetid("garden", 1))
    g.also("Noisy", g.x, domain="garden")


@fault("operators", "no function for it")
def operator_of_another_runtime(g):
    g.model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    g.node("QuickGelu", g.x, domain="com.microsoft")


@fault("operators", "no function for it")
def form_of_our_op_without_a_plugin(g):
    node = g.first("QkvNormRope")
    node.op_type = "QkvNormRope_without_norm_q"
    return node.name


@fault("operators", "came with TensorRT 11.0")
def operator_of_tensorrt_11(g):
    g.node("Swish", g.x)


@fault("operators", "opset 23 has no Upsample")
def operator_of_an_old_opset(g):
    g.node("Upsample", g.x, g.weight(np.ones(4)))


@fault("plugins", "'epsilon' is not written")
def attribute_of_a_plugin(g):
    node = g.first("QkvNormRope")
    node.attribute.remove(next(a for a in node.attribute if a.name == "epsilon"))
    return node.name


@fault("plugins", "is BF16, and the plugin takes FP32 there")
def type_of_a_plugin(g):
    node = g.first("QkvNormRope")
    cast = helper.make_node("Cast", [node.input[1]], ["narrow"], name=ALSO, to=T.BFLOAT16)
    g.graph.node.insert(list(g.graph.node).index(node), cast)
    node.input[1] = "narrow"
    return node.name


@fault("plugins", "dynamic dimension beside batch and tokens")
def channels_of_a_plugin(g):
    node = g.first("QkvNormRope")
    node.input[0] = g.input("tokens", T.FLOAT, ["batch", "count", "channels"])
    return node.name


@fault("plugins", "it has 5 inputs")
def inputs_of_a_plugin(g):
    node = g.first("QkvNormRope")
    del node.input[-1]
    return node.name


@fault("types", "float64")
def float64(g):
    g.cast(g.node("Cast", g.x, to=T.DOUBLE), T.FLOAT)


@fault("types", "is complex")
def complex_weight(g):
    return g.weight(np.array([1.0, 1.0j]), T.COMPLEX64)


@fault("types", "UINT8 within the graph")
def uint8(g):
    g.cast(g.node("Cast", g.x, to=T.UINT8), T.FLOAT)


@fault("types", "is STRING")
def text_constant(g):
    g.node("Constant", value_string="words")


@fault("types", "is no tensor")
def sequence(g):
    g.graph.input.append(helper.make_tensor_sequence_value_info("several", T.FLOAT, None))
    return "several"


@fault("types of operators", "BF16, and GridSample takes FP16, FP32")
def grid_sample_in_bfloat16(g):
    grid = g.cast(g.weight(np.zeros((1, 2, 2, 2))), T.BFLOAT16)
    g.node("GridSample", g.cast(g.x, T.BFLOAT16), grid)


@fault("types of operators", "INT64, and CumSum takes")
def running_sum_of_sizes(g):
    g.node("CumSum", g.also("Shape", g.x), g.weight(np.array(0), T.INT64))


@fault("types of operators", "BOOL, and Equal takes")
def equal_booleans(g):
    boolean = g.cast(g.x, T.BOOL)
    g.node("Equal", boolean, boolean)


@fault("one type a node", "BF16")
def sum_of_two_types(g):
    g.node("Add", g.cast(g.x, T.BFLOAT16), g.x)


@fault("one type a node", "INT32")
def sizes_of_two_types(g):
    g.node("Add", g.also("Shape", g.x), g.weight(np.ones(4), T.INT32))


@fault("one type a node", "BF16")
def norm_with_a_scale_of_another_type(g):
    g.node("RMSNormalization", g.tokens(), g.cast(g.weight(np.ones(g.channels)), T.BFLOAT16))


@fault("shapes", "the rank of this input is not told")
def input_without_a_rank(g):
    return g.input("anything", T.FLOAT, None)


@fault("shapes", "a size of zero")
def nothing(g):
    g.node("Slice", g.x, g.ints(0), g.ints(0), g.ints(1))


@fault("shapes", "9 dimensions")
def nine_dimensions(g):
    g.node("Reshape", g.x, g.ints(1, 1, 1, 1, 1, 1, 1, 1, -1))


@fault("shapes", "more than 2,147,483,647 numbers")
def too_many_numbers(g):
    g.node("ConstantOfShape", g.ints(65536, 65536))


@fault("sizes from data", "known only after it ran")
def places_that_are_not_zero(g):
    g.node("NonZero", g.x)


@fault("sizes from data", "depends on the numbers of an input")
def range_up_to_a_brightness(g):
    zero, one = (g.weight(np.array(i), T.INT64) for i in (0, 1))
    g.node("Range", zero, g.size(), one)


@fault("sizes from data", "depends on the numbers of an input")
def reshape_to_a_brightness(g):
    g.node("Reshape", g.x, g.also("Unsqueeze", g.size(), g.ints(0)))
