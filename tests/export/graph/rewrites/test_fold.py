"""Folding simplifies what it can compute and never reads, copies or renames a weight."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from tilewright.export.graph.rewrites.fold import fold

HEADER = '<ir_version: 10, opset_import: ["" : 23]>'
W = '["location": "w.bin", "offset": "64", "length": "48"]'
V = '["location": "w.bin", "offset": "128", "length": "48"]'
B = '["location": "w.bin", "offset": "0", "length": "12"]'


def parsed(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(text if text.lstrip().startswith("<") else HEADER + text))


def operators(model: ir.Model) -> list[str]:
    return sorted(node.op_type for node in model.graph.all_nodes())


def outside(model: ir.Model) -> dict[str, tuple]:
    """Where every weight's bytes are."""
    tensors = ((name, value.const_value) for name, value in model.graph.initializers.items())
    return {
        name: (str(t.location), t.offset, t.length, t.dtype, tuple(t.shape.numpy()))
        for name, t in tensors
        if isinstance(t, ir.ExternalTensor)
    }


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with the weights; also the current one, so that whoever wants to read them can."""
    np.random.default_rng(0).normal(size=64).astype("<f4").tofile(tmp_path / "w.bin")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(model: ir.Model, folder: Path, **inputs: np.ndarray) -> list[np.ndarray]:
    ir.save(model, folder / "model.onnx")
    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"]).run(None, inputs)


# graph, the operators that are left, the weights that are left
GRAPHS = {
    "a transposed weight stays a transposition": (
        f"""
        g (float[n, 4] x) => (float[n, 3] y) <float[3, 4] w = {W}, float[3] b = {B}> {{
            turned = Transpose <perm = [1, 0]> (w)
            product = MatMul (x, turned)
            y = Add (product, b)
        }}""",
        ["Add", "MatMul", "Transpose"],
        {"w", "b"},
    ),
    "a weight times a constant stays a product": (
        f"""
        g (float[n, 3] x) => (float[n, 3] y) <float[3] b = {B}> {{
            two = Constant <value_float = 2.0> ()
            twice = Mul (b, two)
            y = Add (x, twice)
        }}""",
        ["Add", "Mul"],
        {"b"},
    ),
    "a reshaped and a cast weight stay so": (
        f"""
        g (float[n, 6, 2] x) => (float[n, 6, 2] y) <float[3, 4] w = {W}> {{
            to = Constant <value_ints = [6, 2]> ()
            shaped = Reshape (w, to)
            wide = Cast <to = 11> (shaped)
            narrow = Cast <to = 1> (wide)
            y = Add (x, narrow)
        }}""",
        ["Add", "Cast", "Cast", "Reshape"],
        {"w"},
    ),
    "one of two equal transpositions of a weight goes": (
        f"""
        g (float[n, 4] x) => (float[n, 3] y) <float[3, 4] w = {W}> {{
            one = Transpose <perm = [1, 0]> (w)
            other = Transpose <perm = [1, 0]> (w)
            a = MatMul (x, one)
            b = MatMul (x, other)
            c = Neg (b)
            d = Mul (a, c)
            y = Add (d, a)
        }}""",
        ["Add", "MatMul", "Mul", "Neg", "Transpose"],
        {"w"},
    ),
    "two weights are two though their shapes are equal": (
        f"""
        g (float[3, 4] x) => (float[3, 4] y) <float[3, 4] w = {W}, float[3, 4] v = {V}> {{
            a = Mul (x, w)
            y = Add (a, v)
        }}""",
        ["Add", "Mul"],
        {"w", "v"},
    ),
    "an identity of a weight goes and the weight keeps its name": (
        f"""
        g (float[n, 4] x) => (float[n, 3] y) <float[3, 4] w = {W}> {{
            same = Identity (w)
            turned = Transpose <perm = [1, 0]> (same)
            y = MatMul (x, turned)
        }}""",
        ["MatMul", "Transpose"],
        {"w"},
    ),
    "a weight without effect goes with what it fed": (
        f"""
        g (float[n, 3] x) => (float[n, 3] y) <float[3, 4] w = {W}, float[3] b = {B}> {{
            turned = Transpose <perm = [1, 0]> (w)
            dead = Abs (turned)
            y = Add (x, b)
        }}""",
        ["Add"],
        {"b"},
    ),
    "the shape of a weight is a constant": (
        f"""
        g (float[n, 12] x) => (float[n, 3, 4] y) <float[3, 4] w = {W}> {{
            inner = Shape (w)
            free = Constant <value_ints = [-1]> ()
            to = Concat <axis = 0> (free, inner)
            shaped = Reshape (x, to)
            y = Add (shaped, w)
        }}""",
        ["Add", "Reshape"],
        {"w"},
    ),
    "arithmetic on constants is done once": (
        """
        g (float[n, 12] x) => (float[n, 3, 4] y) {
            three = Constant <value_int = 3> ()
            seven = Constant <value_int = 7> ()
            four = Sub (seven, three)
            axes = Constant <value_ints = [0]> ()
            first = Unsqueeze (three, axes)
            second = Unsqueeze (four, axes)
            free = Constant <value_ints = [-1]> ()
            to = Concat <axis = 0> (free, first, second)
            y = Reshape (x, to)
        }""",
        ["Reshape"],
        set(),
    ),
    "sizes that are known are constants and those that are not stay": (
        """
        g (float[n, 3, 4] x) => (float[n, 12] y) {
            n = Shape <start = 0, end = 1> (x)
            rows = Shape <start = 1, end = 2> (x)
            columns = Shape <start = 2, end = 3> (x)
            both = Mul (rows, columns)
            to = Concat <axis = 0> (n, both)
            y = Reshape (x, to)
        }""",
        ["Concat", "Reshape", "Shape"],
        set(),
    ),
    "functions are written out": (
        f"""
        <ir_version: 10, opset_import: ["" : 23, "mine" : 1]>
        g (float[n, 4] x) => (float[n, 3] y) <float[3, 4] w = {W}> {{ y = mine.linear (x, w) }}
        <domain: "mine", opset_import: ["" : 23]>
        linear (a, m) => (c) {{
            turned = Transpose <perm = [1, 0]> (m)
            c = MatMul (a, turned)
        }}""",
        ["MatMul", "Transpose"],
        {"w"},
    ),
}


@pytest.mark.parametrize(("text", "left", "weights"), GRAPHS.values(), ids=GRAPHS)
def test_folding_leaves_the_answer_the_names_and_the_weights_as_they_were(folder, text, left, weights):
    before, after = parsed(text), parsed(text)
    fold(after)
    assert operators(after) == left
    references = outside(before)
    assert outside(after) == {name: references[name] for name in weights}
    assert not {node.domain for node in after.graph} - {""}
    assert not after.functions
    for ours, theirs in zip(
        (*after.graph.inputs, *after.graph.outputs), (*before.graph.inputs, *before.graph.outputs), strict=True
    ):
        assert (ours.name, ours.shape, ours.dtype) == (theirs.name, theirs.shape, theirs.dtype)
    for n in (1, 3):
        sizes = [d if isinstance(d, int) else n for d in before.graph.inputs[0].shape]
        x = np.random.default_rng(n).normal(size=sizes).astype(np.float32)
        np.testing.assert_array_equal(run(after, folder, x=x)[0], run(before, folder, x=x)[0])


def test_weights_whose_file_is_not_there_yet_are_no_obstacle():
    model = parsed(GRAPHS["a transposed weight stays a transposition"][0].replace("w.bin", "unresolved"))
    fold(model)
    assert {location for location, *_ in outside(model).values()} == {"unresolved"}


def test_references_are_the_very_ones_from_before():
    model = parsed(GRAPHS["functions are written out"][0])
    tensor = model.graph.initializers["w"].const_value
    fold(model)
    assert model.graph.initializers["w"].const_value is tensor


@pytest.mark.parametrize("side", [100, 300])  # 10,000 elements: a constant; 90,000: made when the graph runs
def test_a_constant_that_is_large_is_computed_where_it_is_used(folder, side):
    text = f"""
        g (float[n, {side}, {side}] x) => (float[n, {side}, {side}] y) {{
            row = Constant <value_floats = [{", ".join(["0.5"] * side)}]> ()
            to = Constant <value_ints = [{side}, {side}]> ()
            table = Expand (row, to)
            y = Add (x, table)
        }}"""
    model = parsed(text)
    fold(model)
    assert operators(model) == (["Add"] if side == 100 else ["Add", "Expand"])
    assert sum(value.const_value.nbytes for value in model.graph.initializers.values()) <= 4 * 65_536
    x = np.ones((2, side, side), np.float32)
    np.testing.assert_array_equal(run(model, folder, x=x)[0], x + np.float32(0.5))


def test_constants_are_initializers_and_not_nodes():
    model = parsed(GRAPHS["a weight times a constant stays a product"][0])
    fold(model)
    inside = [v.const_value for n, v in model.graph.initializers.items() if n != "b"]
    assert [tensor.numpy().item() for tensor in inside] == [2.0]


def test_folding_twice_changes_nothing_more():
    for text, _, _ in GRAPHS.values():
        model = parsed(text)
        fold(model)
        once = ir.to_proto(model).SerializeToString()
        fold(model)
        assert ir.to_proto(model).SerializeToString() == once


def test_a_traced_network_keeps_every_weight(traced):
    for file in sorted(traced.glob("*.onnx")):
        model = ir.load(file)
        references, nodes = outside(model), model.graph.num_nodes()
        fold(model)
        assert outside(model) == references
        assert model.graph.num_nodes() < 0.75 * nodes  # measured: 1223 to 647, 256 to 175
        assert "Constant" not in operators(model)
        assert all(v.const_value.size <= 65_536 for v in model.graph.initializers.values())
