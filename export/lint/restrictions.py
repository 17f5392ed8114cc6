"""Rules of single operators: the published restrictions that a graph alone can break."""

from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir

from tilewright.export.lint.graph import Complaint, Graph, dims, type_of
from tilewright.export.lint.operators import STANDARD
from tilewright.export.lint.table import TABLE

__all__ = ["RESTRICTIONS", "restrictions"]

Faults = Iterator[tuple[str, str]]  # what is wrong, and what to do
Restriction = Callable[[Graph, ir.Node], Faults]


def restrictions(graph: Graph) -> Iterator[Complaint]:
    """Every node keeps the restrictions of its operator."""
    for node in graph.nodes:
        restriction = RESTRICTIONS.get(node.op_type) if node.domain in STANDARD else None
        if restriction is not None:
            for fault in restriction(graph, node):
                yield Complaint(*fault, node)


def _input(node: ir.Node, i: int) -> ir.Value | None:
    return node.inputs[i] if i < len(node.inputs) else None


def _given(values: Any, *places: int) -> bool:
    """Whether a node has one of these optional inputs or outputs."""
    return any(i < len(values) and values[i] is not None and values[i].name for i in places)


def _text(node: ir.Node, name: str, default: str = "") -> str:
    return node.attributes.get_string(name, default) or default


def _number(node: ir.Node, name: str, default: int = 0) -> int:
    value = node.attributes.get_int(name, default)
    return default if value is None else int(value)


def _numbers(node: ir.Node, name: str) -> list[int]:
    return list(node.attributes.get_ints(name, ()) or ())


def _constant(place: int, what: str) -> Restriction:
    def restriction(graph: Graph, node: ir.Node) -> Faults:
        value = _input(node, place)
        if value is not None and graph.array(value) is None:
            yield f"{what} {value.name!r} is computed, and must be a constant", f"give {what} as a constant"

    return restriction


def _attention(graph: Graph, node: ir.Node) -> Faults:
    for i, name in enumerate(("Q", "K", "V", "attn_mask")):
        shape = dims(_input(node, i))
        if (shape is not None and len(shape) != 4) or (i == 0 and "q_num_heads" in node.attributes):
            yield f"{name} has not 4 dimensions", "reshape to [batch, heads, tokens, width] before, and back after"
            break
    if _given(node.inputs, 4, 5, 6):
        yield "it has past keys or values, or lengths of keys", "give it Q, K, V and a mask alone"
    if _given(node.outputs, 1, 2, 3):
        yield "its second to fourth outputs are used", "use the first output alone"
    if node.attributes.get_float("softcap", 0.0) or _number(node, "qk_matmul_output_mode"):
        yield "it has softcap or qk_matmul_output_mode", "write the attention as MatMul, Softmax and MatMul"
    mask = type_of(_input(node, 3))
    if mask not in (None, "BOOL", "FP32", "FP16", "BF16"):
        yield f"its mask is {mask}", "make the mask BOOL, or of the type of Q"


def _pool(graph: Graph, node: ir.Node) -> Faults:
    kernel = _numbers(node, "kernel_shape")
    if node.op_type != "LpPool" and len(kernel) not in (2, 3):
        yield f"it pools over {len(kernel)} dimensions, and TensorRT over 2 or 3", "reshape to two dimensions before"
    if set(_numbers(node, "dilations")) - {1}:
        yield f"it has dilations {_numbers(node, 'dilations')}", "gather every n-th row and column before"
    if node.op_type == "MaxPool" and _given(node.outputs, 1):
        yield "its indices are used", "use the first output alone"


def _convolution(graph: Graph, node: ir.Node) -> Faults:
    shape = dims(_input(node, 1))
    if shape is not None and not 3 <= len(shape) <= 5:
        yield f"it has {len(shape) - 2} dimensions of space, and TensorRT takes 1 to 3", "split it into smaller ones"
    if shape is not None and None in shape:
        yield "the shape of its weight is not known", "give the weight a fixed shape"


def _deform_conv(graph: Graph, node: ir.Node) -> Faults:
    pads, shape = _numbers(node, "pads"), dims(_input(node, 0))
    half = len(pads) // 2
    if shape is not None and len(shape) not in (3, 4):
        yield f"it has {len(shape) - 2} dimensions of space, and TensorRT takes 1 or 2", "split it"
    if pads[:half] != pads[half:]:
        yield f"its pads {pads} differ before and after", "pad with a Pad node before"


def _constant_node(graph: Graph, node: ir.Node) -> Faults:
    if "sparse_value" in node.attributes:  # a rule about types finds strings
        yield "it holds a sparse tensor", "hold a plain tensor"


def _dropout(graph: Graph, node: ir.Node) -> Faults:
    value = _input(node, 2)
    training = graph.array(value)
    if value is not None and (training is None or bool(training.any())):
        yield "its training_mode is not the constant false", "export the network in evaluation mode"


def _einsum(graph: Graph, node: ir.Node) -> Faults:
    letters = _text(node, "equation").replace("...", "").replace("->", "").replace(",", "").replace(" ", "")
    if bad := sorted(set(letters) - set("abcdefghijklmnopqrstuvwxyz")):
        yield f"its equation has {bad[0]!r}, and TensorRT takes small letters", "rename the letters to a to z"


def _eye_like(graph: Graph, node: ir.Node) -> Faults:
    if None in (dims(_input(node, 0)) or [None]):
        yield "the size of its input is dynamic", "compare two Ranges with Equal, and cast"


def _recurrent(graph: Graph, node: ir.Node) -> Faults:
    strings = node.attributes.get_strings("activations", ()) or ()
    if _text(node, "direction", "forward") == "bidirectional":
        half = len(strings) // 2
        if strings[:half] != strings[half:]:
            yield "its two directions have different activations", "use the same activations in both directions"
    if node.op_type == "LSTM" and _number(node, "input_forget"):
        yield "it couples the gates of input and forgetting", "write the gates apart"
    if node.op_type == "LSTM" and _number(node, "layout"):
        yield "its layout is batch first", "transpose before and after, with layout 0"


def _grid_sample(graph: Graph, node: ir.Node) -> Faults:
    shape = dims(_input(node, 0))
    if shape is not None and len(shape) != 4:
        yield f"its input has {len(shape)} dimensions, and must have 4", "sample slices of 4 dimensions"


def _hardmax(graph: Graph, node: ir.Node) -> Faults:
    shape = dims(_input(node, 0))
    if shape is not None and shape[_number(node, "axis", -1)] is None:
        yield "the size of its axis is dynamic", "fix this size"


def _if(graph: Graph, node: ir.Node) -> Faults:
    one, other = (node.attributes[name].as_graph().outputs for name in ("then_branch", "else_branch"))
    for first, second in zip(one, other, strict=False):
        ranks = [len(shape) for shape in map(dims, (first, second)) if shape is not None]
        if len(set(ranks)) > 1:
            yield f"its branches give ranks {ranks[0]} and {ranks[1]}", "give both branches results of one rank"
        if first.name == second.name:
            yield f"both branches name a result {first.name!r}", "name the results of both branches differently"


def _layer_norm(graph: Graph, node: ir.Node) -> Faults:
    if _given(node.outputs, 1, 2):
        yield "its mean or deviation is used", "use the first output alone, and compute the others with ReduceMean"


def _loop(graph: Graph, node: ir.Node) -> Faults:
    body: Any = node.attributes["body"].as_graph()
    carried = len(node.inputs) - 2
    if len(node.outputs) > carried and not _counted(graph, node, body):
        yield "it collects results, and the number of rounds is not a constant", "give the rounds as a constant"
    for before, after in zip(body.inputs[2:], body.outputs[1 : 1 + carried], strict=False):
        first, second = dims(before), dims(after)
        if first is not None and second is not None and _differ(first, second):
            yield f"{before.name!r} changes its shape from round to round", "carry values of one shape"


def _counted(graph: Graph, node: ir.Node, body: Any) -> bool:
    """Whether a loop's rounds are a constant: a constant count, and a condition that never ends it before."""
    ends = body.outputs[0]
    while (producer := ends.producer()) is not None and producer.op_type == "Identity":
        ends = producer.inputs[0]
    constant = graph.array(ends)
    goes_on = ends is body.inputs[1] or (constant is not None and bool(constant.all()))
    return graph.array(_input(node, 0)) is not None and goes_on


def _differ(first: list[int | None], second: list[int | None]) -> bool:
    if len(first) != len(second):
        return True
    return any(a != b for a, b in zip(first, second, strict=True) if a is not None and b is not None)


def _pad(graph: Graph, node: ir.Node) -> Faults:
    mode = _text(node, "mode", "constant")
    if mode not in TABLE.pad_modes:
        yield f"mode {mode!r} is none of {', '.join(TABLE.pad_modes)}", "pad in one of these modes"


def _random(graph: Graph, node: ir.Node) -> Faults:
    yield "TensorRT ignores its seed, so no result can be repeated", "give the noise as an input of the graph"


def _resize(graph: Graph, node: ir.Node) -> Faults:
    defaults = {
        "coordinate_transformation_mode": "half_pixel",
        "mode": "nearest",
        "nearest_mode": "round_prefer_floor",
        "keep_aspect_ratio_policy": "stretch",
    }
    for name, allowed in TABLE.resize.items():
        value = _text(node, name, defaults[name])
        if value not in allowed:
            cubic = name == "mode" and value == "cubic"
            yield (
                f"{name} {value!r} is none of {', '.join(allowed)}",
                "multiply by a matrix of weights for each axis" if cubic else "use one of these",
            )
    if _number(node, "antialias"):
        yield "it has antialias", "multiply by a matrix of weights for each axis"
    axes, shape = _numbers(node, "axes"), dims(_input(node, 0))
    scales = _input(node, 2)
    computed = scales is not None and scales.name and graph.array(scales) is None
    if axes and computed and (shape is None or axes != list(range(len(shape)))):
        yield f"its scales are computed, and are for axes {axes} alone", "give a scale for each axis"


def _rotary(graph: Graph, node: ir.Node) -> Faults:
    kind = type_of(_input(node, 3))
    if kind not in (None, "INT64"):
        yield f"its position_ids are {kind}", "cast position_ids to INT64"


def _scatter_nd(graph: Graph, node: ir.Node) -> Faults:
    if (how := _text(node, "reduction", "none")) != "none":
        yield f"its reduction is {how!r}", "scatter without a reduction, or multiply by a matrix of zeros and ones"


def _stft(graph: Graph, node: ir.Node) -> Faults:
    yield from _constant(1, "frame_step")(graph, node)
    yield from _constant(2, "window")(graph, node)
    shape = dims(_input(node, 0))
    if shape is not None and len(shape) == 3 and shape[2] == 2:
        yield "its signal is complex", "transform real and imaginary parts apart"


def _tensor_scatter(graph: Graph, node: ir.Node) -> Faults:
    ranks = [len(shape) for shape in (dims(_input(node, 0)), dims(_input(node, 1))) if shape is not None]
    if set(ranks) - {4}:
        yield "its cache or update has not 4 dimensions", "reshape both to 4 dimensions"
    if _number(node, "axis", -2) not in (-2, 2):
        yield f"it writes along axis {_number(node, 'axis', -2)}", "write along the axis before the last"


def _top_k(graph: Graph, node: ir.Node) -> Faults:
    value = _input(node, 1)
    k = graph.array(value)
    if value is not None and k is None:
        yield "K is computed, so nobody can tell whether TensorRT takes it", "give K as a constant"
    elif k is not None and int(k.max(initial=0)) >= TABLE.largest_k:
        yield f"K is {int(k.max())}, and must be less than {TABLE.largest_k}", "take fewer, or sort in parts"
    if not _number(node, "sorted", 1):
        yield "it asks for unsorted results", "ask for sorted results"


_AXES = _constant(1, "the list of axes")
REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
# operator -> the check of its restrictions; rules about types and about Q/DQ are elsewhere
RESTRICTIONS: dict[str, Restriction] = {
    "Attention": _attention,
    "AveragePool": _pool,
    "Constant": _constant_node,
    "Conv": _convolution,
    "ConvTranspose": _convolution,
    "CumSum": _constant(1, "the axis"),
    "DeformConv": _deform_conv,
    "Dropout": _dropout,
    "Einsum": _einsum,
    "EyeLike": _eye_like,
    "GRU": _recurrent,
    "GridSample": _grid_sample,
    "Hardmax": _hardmax,
    "If": _if,
    "LSTM": _recurrent,
    "LayerNormalization": _layer_norm,
    "Loop": _loop,
    "LpPool": _pool,
    "MaxPool": _pool,
    "OneHot": _constant(1, "depth"),
    "Pad": _pad,
    "RNN": _recurrent,
    "RandomNormal": _random,
    "RandomNormalLike": _random,
    "RandomUniform": _random,
    "RandomUniformLike": _random,
    "Resize": _resize,
    "RotaryEmbedding": _rotary,
    "STFT": _stft,
    "ScatterND": _scatter_nd,
    "Squeeze": _AXES,
    "TensorScatter": _tensor_scatter,
    "TopK": _top_k,
    "Unsqueeze": _AXES,
    **{f"Reduce{name}": _AXES for name in REDUCTIONS},
}
