"""The files that a graph names, against onnx's own reading of it, wherever a graph can name one."""

import random
from collections.abc import Iterator

import onnx
import pytest
from google.protobuf.descriptor import Descriptor
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tilewright.runtime.bundle.external_data import INSIDE, KINDS, External, external_data, relocated
from tilewright.runtime.errors import BundleError

ENDS = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])], [helper.make_empty_tensor_value_info("y")]
IDENTITY = helper.make_node("Identity", ["x"], ["y"])


def outside(name: str = "w", kind: int = TensorProto.FLOAT, shape=(2, 3), **says) -> TensorProto:
    """A tensor whose bytes lie in a file."""
    tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in ({"location": "a/b.bin", "offset": 64, "length": 24} | says).items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def graph_of(*initializers: TensorProto, nodes=(IDENTITY,)) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "graph", *ENDS, list(initializers))


def model_of(*initializers: TensorProto, nodes=(IDENTITY,), functions=()) -> onnx.ModelProto:
    return helper.make_model(graph_of(*initializers, nodes=nodes), functions=list(functions))


def refusal(graph: bytes) -> str:
    with pytest.raises(BundleError) as caught:
        external_data(graph, "model.onnx")
    assert str(caught.value).startswith("model.onnx: ")
    return str(caught.value)


def messages(root: Descriptor) -> dict[str, dict[int, str]]:
    """Message -> field -> the message it holds, of all that may lie below a message."""
    found: dict[str, dict[int, str]] = {}
    left = [root]
    while left:
        message = left.pop()
        below = {f.number: f.message_type for f in message.fields if f.message_type}
        left += [kind for kind in below.values() if kind.name not in found and kind.name != message.name]
        found[message.name] = {number: kind.name for number, kind in below.items()}
    return found


def test_the_walk_goes_wherever_onnx_has_a_place_for_a_tensor():
    below = messages(onnx.ModelProto.DESCRIPTOR)
    holders = {"TensorProto"}
    for _ in below:
        holders |= {name for name, fields in below.items() if holders & set(fields.values())}
    expected = {m: {n: kind for n, kind in below[m].items() if kind in holders} for m in holders - {"TensorProto"}}
    assert expected == INSIDE


def test_types_are_named_as_onnx_numbers_them():
    for number, name in KINDS.items():
        known = {"float32": "float", "float64": "double", "float8_e4m3fn": "float8e4m3fn", "float8_e5m2": "float8e5m2"}
        assert TensorProto.DataType.Name(number).lower() == known.get(name, name)


@pytest.mark.parametrize("kind", KINDS)
def test_an_initializer_in_a_file_is_found_as_it_is(kind):
    inside = helper.make_tensor("location", TensorProto.FLOAT, [1], [0])
    data = model_of(inside, outside("one", kind, ()), outside("two", kind, (1, 300, 70000))).SerializeToString()
    assert external_data(data, "") == {
        "one": External("a/b.bin", 64, 24, KINDS[kind], ()),
        "two": External("a/b.bin", 64, 24, KINDS[kind], (1, 300, 70000)),
    }


def test_a_graph_without_files_names_none():
    assert external_data(model_of(helper.make_tensor("w", TensorProto.FLOAT, [1], [0])).SerializeToString(), "") == {}
    assert external_data(b"", "") == {}


def places() -> Iterator[tuple[str, onnx.ModelProto]]:
    tensor, body = outside("hidden"), graph_of(outside("hidden"))
    node = helper.make_node
    yield "a constant", model_of(nodes=[node("Constant", [], ["y"], value=tensor)])
    listed = node("Identity", ["x"], ["y"])
    listed.attribute.add(name="many", type=onnx.AttributeProto.TENSORS).tensors.append(tensor)
    yield "a list", model_of(nodes=[listed])
    yield "a branch", model_of(nodes=[node("If", ["x"], ["y"], then_branch=body, else_branch=body)])
    deep = graph_of(nodes=[node("Loop", ["x"], ["y"], body=body)])
    yield "a branch of a branch", model_of(nodes=[node("If", ["x"], ["y"], then_branch=deep, else_branch=deep)])
    called = [node("Constant", [], ["y"], value=tensor)]
    opsets = [helper.make_opsetid("", 20)]
    yield "a function", model_of(functions=[helper.make_function("own", "f", ["x"], ["y"], called, opsets)])
    sparse = model_of()
    sparse.graph.sparse_initializer.add().values.CopyFrom(tensor)
    yield "a sparse initializer", sparse
    trained = model_of()
    trained.training_info.add().initialization.CopyFrom(body)
    yield "training", trained


@pytest.mark.parametrize(("place", "model"), places(), ids=[place for place, _ in places()])
def test_a_file_that_is_named_elsewhere_is_refused(place, model):
    assert "'hidden' reads 'a/b.bin' but is no initializer of the graph" in refusal(model.SerializeToString())


def test_a_tensor_that_names_a_file_without_saying_that_it_lies_there_counts():
    tensor = outside()
    tensor.data_location = TensorProto.DEFAULT
    assert external_data(model_of(tensor).SerializeToString(), "").keys() == {"w"}


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (outside(length="-1"), "'-1' is no offset and no length"),
        (outside(offset="0x10"), "'0x10' is no offset"),
        (outside(length=""), "'' is no offset"),
        (outside(offset="\u0663"), "is no offset"),
        (outside(checksum="abc"), "'w' says its 'checksum', which no bundle does"),
        (outside(kind=TensorProto.STRING), "'w' is of type 8"),
    ],
)
def test_what_no_bundle_says_is_refused(tensor, words):
    assert words in refusal(model_of(tensor).SerializeToString())


def test_what_is_said_twice_is_refused():
    twice = outside()
    twice.external_data.add(key="location", value="c.bin")
    assert "'w' says its 'location' twice" in refusal(model_of(twice).SerializeToString())
    assert "two initializers are named 'w'" in refusal(model_of(outside(), outside()).SerializeToString())


@pytest.mark.parametrize("data", [b"\xff", b"\x3a\xff\xff\xff\xff\x0f", b"not a graph", b"\x0b\x0c", b"\xff" * 20])
def test_what_is_no_graph_is_refused(data):
    assert "not an ONNX graph" in refusal(data)


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False))
def test_a_damaged_graph_is_refused_in_one_way_or_read(draw: random.Random):
    data = bytearray(model_of(outside("one"), outside("two")).SerializeToString())
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data))
        data[at : at + draw.choice([0, 1, 1, 5])] = draw.randbytes(draw.choice([0, 1, 1, 3]))
    try:
        external_data(bytes(data), "model.onnx")
    except BundleError as error:
        assert str(error).startswith("model.onnx: ")


def test_a_graph_with_other_places_is_the_same_but_for_them():
    model = model_of(outside("one"), outside("two", checks=""), helper.make_tensor("in", TensorProto.FLOAT, [1], [7]))
    del model.graph.initializer[1].external_data[3:]
    moved = onnx.load_from_string(
        relocated(model.SerializeToString(), {"two": ("c" * 300, 5, 2**40), "in": ("d", 0, 1)})
    )
    said = {entry.key: entry.value for entry in moved.graph.initializer[1].external_data}
    assert said == {"location": "c" * 300, "offset": "5", "length": str(2**40)}
    moved.graph.initializer[1].CopyFrom(model.graph.initializer[1])
    assert moved == model
