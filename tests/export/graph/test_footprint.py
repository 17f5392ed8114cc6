"""Working memory against graphs whose peak is counted by hand, and against what a real run holds."""

from itertools import pairwise

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.export.graph.footprint import footprint, peak_alive
from tilewright.runtime.bundle.manifest import Memory


def parsed(body: str) -> ir.Model:
    """A graph whose intermediate shapes are written with it; opset 23 for Attention."""
    return ir.from_proto(onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 23]>' + body))


def value(name: str, *shape: int | str, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def chain(*shapes: tuple[int | str, ...]) -> ir.Model:
    """An input and one node after another, each with one output of the next shape."""
    values = [value(f"v{i}", *shape) for i, shape in enumerate(shapes)]
    nodes = [ir.Node("", "Op", [before], outputs=[after]) for before, after in pairwise(values)]
    return ir.Model(ir.Graph([values[0]], [values[-1]], nodes=nodes, opset_imports={"": 23}), ir_version=10)


# x is 4n bytes (float), 8n (double), n (bool)
PEAKS = {
    # x, a; then a goes and x, b, y stay: but x, a, b were alive together with nothing freed before b was made
    "a chain": (
        "g (float[n] x) => (float[n] y) <float[n] a, float[n] b> { a = Abs (x) b = Neg (a) y = Exp (b) }",
        3 * 4,
    ),
    # a, b and c are one block: x, a, y
    "reshapes copy nothing": (
        "g (float[n] x) => (float[n] y) <float[n] a, float[n, 1] b, float[n] c, int64[1] last = {1}>"
        " { a = Abs (x) b = Unsqueeze (a, last) c = Squeeze (b, last) y = Add (a, c) }",
        3 * 4,
    ),
    # x, a, b, then c; a is kept until it is added at the end: x, a, c, y
    "a shortcut": (
        "g (float[n] x) => (float[n] y) <float[n] a, float[n] b, float[n] c>"
        " { a = Abs (x) b = Neg (a) c = Exp (b) y = Add (c, a) }",
        4 * 4,
    ),
    # x and four branches alive at once, and the first sum while they are
    "branches": (
        "g (float[n] x) => (float[n] y) <float[n] a, float[n] b, float[n] c, float[n] d, float[n] e, float[n] f>"
        " { a = Abs (x) b = Neg (x) c = Exp (x) d = Sin (x) e = Add (a, b) f = Add (c, d) y = Add (e, f) }",
        6 * 4,
    ),
    # the double is the largest: x and a and the double; then the double and b
    "types of other widths": (
        "g (float[n] x) => (float[n] y) <bool[n] a, double[n] b>"
        " { a = IsNaN (x) b = Cast <to = 11> (a) y = Cast <to = 1> (b) }",
        4 + 8 + 4,
    ),
    # an output of the graph stays although its last reader is early: x, kept, a, y
    "an output made early": (
        "g (float[n] x) => (float[n] kept, float[n] y) <float[n] a> { kept = Abs (x) a = Neg (kept) y = Exp (a) }",
        4 * 4,
    ),
    # what nobody reads is gone after its node: x and both halves, then x, a, y
    "an output that nobody reads": (
        "g (float[n] x) => (float[n] y) <float[n] a, float[n] idle, float[n] b>"
        " { a, idle = Split <axis = 0, num_outputs = 2> (x) b = Neg (a) y = Exp (b) }",
        3 * 4,
    ),
    # weights are no working memory: x, y
    "weights": (
        "g (float[n] x) => (float[n] y) <float[1000] w = ['location': 'w.bin'], float[1] s = {2}> { y = Mul (x, s) }",
        2 * 4,
    ),
    # used twice by one node, freed once: x, a; a, b, x; x, b, y
    "a value used twice at once": (
        "g (float[n] x) => (float[n] y) <float[n] a, float[n] b> { a = Abs (x) b = Mul (a, a) y = Exp (b) }",
        3 * 4,
    ),
    # inputs stay, read or not: the caller holds them
    "two inputs": ("g (float[n] x, float[n] z) => (float[n] y) <float[n] a> { a = Abs (x) y = Exp (a) }", 4 * 4),
}


@pytest.mark.parametrize(("text", "per_n"), PEAKS.values(), ids=PEAKS)
@pytest.mark.parametrize("n", [1, 1000])
def test_the_peak_is_the_one_counted_by_hand(text, per_n, n):
    assert peak_alive(parsed(text.replace("'", '"')), {"n": n}) == per_n * n


# shape of the middle of three values, its elements for h = 6, w = 10
EXPRESSIONS = {
    "a number": ((7,), 7),
    "a name": (("h",), 6),
    "a product": (("4*h",), 24),
    "a sum": (("h*w + 5",), 65),
    "a difference": (("h*w - h + 1",), 55),
    "brackets": (("2*(h + w)",), 32),
    "a whole quotient": (("(h*w)//7",), 8),
    "a remainder": (("w % 4",), 2),
    "a power": (("h**2",), 36),
    "a sign": (("-h + w",), 4),
    "the largest": (("Max(1, h, w)",), 10),
    "the smallest": (("Min(h, w)",), 6),
    "a quotient rounded up": (("CeilToInt(FloatTrueDiv(ToFloat(h) - 0.5, 1.0))",), 6),
    "a product of quotients rounded up": (
        ("CeilToInt(FloatTrueDiv(ToFloat(h), 4.0))*CeilToInt(FloatTrueDiv(ToFloat(w), 4.0))",),
        6,
    ),
    "several axes": (("h", "2*w", 3), 360),
    "no axis": ((), 1),
    "a size that depends on values": (("u0",), 0),
    "a function that is not known": (("Mystery(h)",), 0),
    "no expression": (("h h",), 0),
}


@pytest.mark.parametrize(("shape", "elements"), EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_shapes_are_expressions_in_the_free_sizes(shape, elements):
    model = chain((0,), shape, (0,))  # nothing but the middle takes memory
    assert peak_alive(model, {"h": 6, "w": 10}) == 4 * elements


def test_a_value_without_shape_or_type_counts_nothing():
    model = chain(("n",), ("n",), ("n",))
    model.graph[0].outputs[0].shape = None
    assert peak_alive(model, {"n": 10}) == 2 * 40
    model.graph[0].outputs[0].type = None
    assert peak_alive(model, {"n": 10}) == 2 * 40


def attention(heads: int, queries: str, keys: str) -> ir.Model:
    """Scores of Attention are no value of the graph."""
    q, y = (value(name, "batch", heads, queries, 8) for name in "qy")
    k, v = (value(name, "batch", heads, keys, 8) for name in "kv")
    node = ir.Node("", "Attention", [q, k, v], outputs=[y])
    return ir.Model(ir.Graph([q, k, v], [y], nodes=[node], opset_imports={"": 23}), ir_version=10)


def sizes_at(side: int) -> dict[str, int]:
    return {"batch": 1, "h": side // 16, "w": side // 16, "height": side, "width": side}


def test_attention_adds_its_scores():
    memory = footprint(attention(3, "h*w", "h*w + 5"), sizes_at)
    # 3 heads of N x (N + 5) floats, N = 4096 tokens at 1024 px; it grows as the square of the pixels
    assert memory.per_px2 == pytest.approx(4 * 3 * 4096 * 4101 / 1024**4, rel=1e-5)
    tokens = {side: (side // 16) ** 2 for side in (256, 1024)}
    alive = {side: 4 * 3 * 8 * (2 * n + 2 * (n + 5)) for side, n in tokens.items()}  # q, y, k, v
    assert memory.per_px == pytest.approx((alive[1024] - alive[256]) / (1024**2 - 256**2), rel=1e-5)
    assert (memory.fixed, memory.per_tile) == (0, 4 * 3 * 8 * 2 * 5)


def test_attention_on_tokens_has_the_same_scores():
    q, y = (value(name, "batch", "h*w", 24) for name in "qy")
    k, v = (value(name, "batch", "h*w + 5", 24) for name in "kv")
    heads = [ir.AttrInt64(name, 3) for name in ("q_num_heads", "kv_num_heads")]
    node = ir.Node("", "Attention", [q, k, v], heads, outputs=[y])
    model = ir.Model(ir.Graph([q, k, v], [y], nodes=[node], opset_imports={"": 23}), ir_version=10)
    assert footprint(model, sizes_at) == footprint(attention(3, "h*w", "h*w + 5"), sizes_at)


def test_the_largest_attention_counts_and_not_all_of_them():
    one, two = attention(3, "h*w", "h*w"), attention(5, "h*w", "h*w")
    nodes = [node for model in (one, two) for node in model.graph]
    inputs = [*one.graph.inputs, *two.graph.inputs]
    outputs = [*one.graph.outputs, *two.graph.outputs]
    for model in (one, two):
        model.graph.inputs.clear()
        model.graph.outputs.clear()
        model.graph.remove(list(model.graph))
    both = ir.Model(ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 23}), ir_version=10)
    assert footprint(both, sizes_at).per_px2 == pytest.approx(4 * 5 * 4096**2 / 1024**4, rel=1e-5)


def test_the_need_of_a_plain_network_is_a_line_over_the_pixels():
    # picture 12 bytes a pixel, features 4 * 8 bytes a pixel, tokens 4 * 32 for every 16 x 16 and 5 more of them
    model = chain(("batch", 3, "height", "width"), ("batch", 8, "height", "width"), ("batch", "h*w + 5", 32))
    memory = footprint(model, sizes_at)
    assert memory.per_px == pytest.approx(12 + 32 + 4 * 32 / 256, rel=1e-5)
    assert (memory.fixed, memory.per_tile) == (0, 5 * 32 * 4)
    assert memory.per_px2 == 0


def test_a_constant_need_is_fixed():
    assert footprint(chain((10,), (20,)), sizes_at) == Memory(fixed=120.0)


def need(memory: Memory, pixels: float) -> float:
    return memory.fixed + memory.per_tile + memory.per_px * pixels + memory.per_px2 * pixels**2


def tiny_sizes(component: str, batch: int, rows: int, columns: int) -> dict[str, int]:
    if component == "decode":
        return {"batch": batch, "rows": rows, "columns": columns, "height": 16 * rows, "width": 16 * columns}
    sizes = {"batch": batch, "height": 16 * rows, "width": 16 * columns, "rows": rows, "columns": columns}
    return sizes | {"height_units": rows, "width_units": columns}


COMPONENTS = pytest.mark.parametrize("component", ["generate", "decode"])


@COMPONENTS
def test_the_need_of_a_traced_network_covers_its_peak_and_grows_with_the_picture(graphs, component):
    model = ir.load(graphs / f"{component}.model.onnx")
    memory = footprint(model, lambda side: tiny_sizes(component, 1, side // 16, side // 16))
    assert memory.per_px > 12  # at least the picture
    tokens = 4096 + (5 if component == "generate" else 0)  # the vision model's class and register tokens
    assert memory.per_px2 == pytest.approx(4 * 2 * tokens**2 / 1024**4, rel=1e-5)
    needs = [need(memory, (16 * n) ** 2) for n in range(1, 129)]
    assert all(after > before for before, after in pairwise(needs))
    for n in (16, 20, 33, 64, 128):
        peak = peak_alive(model, tiny_sizes(component, 1, n, n))
        assert needs[n - 1] >= peak
        # the coefficients have six digits; what is on top of the peak is the scores
        assert needs[n - 1] - memory.per_px2 * (16 * n) ** 4 == pytest.approx(peak, rel=1e-3)


@pytest.mark.slow
@COMPONENTS
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_the_peak_of_a_traced_network_never_shrinks_with_the_picture(graphs, component, data):
    model = ir.load(graphs / f"{component}.model.onnx")
    small = [data.draw(st.integers(1, 40)) for _ in range(3)]
    large = [size + data.draw(st.integers(0, 40)) for size in small]
    assert peak_alive(model, tiny_sizes(component, *small)) <= peak_alive(model, tiny_sizes(component, *large))


@COMPONENTS
@pytest.mark.parametrize("size", [(2, 4, 3), (1, 1, 1)], ids=str)
def test_the_written_shapes_are_those_of_a_run(graphs, tmp_path, component, size):
    """Every value of the graph as an output; the bytes that the expressions give are those that ONNX Runtime makes."""
    batch, rows, columns = size
    model = ir.load(graphs / f"{component}.model.onnx")
    sizes = tiny_sizes(component, *size)
    values = [v for node in model.graph for v in node.outputs if v.name and v not in model.graph.outputs]
    lengths = {v.name: peak_alive(alone(v), sizes) for v in values}
    model.graph.outputs.extend(values)
    ir.save(model, tmp_path / "all.onnx")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graphs))
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(tmp_path / "all.onnx", options, ["CPUExecutionProvider"])
    inputs = {
        "generate": {"image": np.full((batch, 3, 16 * rows, 16 * columns), 0.5, np.float32)},
        "decode": {"codes": np.zeros((batch, 8, rows, columns), np.float32)},
    }[component]
    made = dict(zip(lengths, session.run(list(lengths), inputs), strict=True))
    assert {name: array.nbytes for name, array in made.items()} == lengths


def alone(v: ir.Value) -> ir.Model:
    """A graph that holds nothing but one value of this type and shape."""
    return ir.Model(
        ir.Graph([ir.Value(name="v", shape=v.shape, type=v.type)], [], nodes=[], opset_imports={"": 23}), ir_version=10
    )
