"""What a caller gives: words become ids, files become tensors, arguments both; all else is refused in one line."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tilewright.runtime.bundle.program import Input
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.errors import BundleError, InputError, UsageError
from tilewright.runtime.inputs import gather, read_tensors, tensors_of, value_of

TINT = np.float32([[0.5, 0.25, 2]])


def refusal(kind: type[Exception], act, *arguments) -> str:
    with pytest.raises(kind) as caught:
        act(*arguments)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 500
    return text


def written(path: Path, **tensors: tuple[str, list[int], bytes]) -> Path:
    """A safetensors file of any type, put together by hand."""
    header, data = {}, b""
    for name, (dtype, shape, block) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(block)]}
        data += block
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def bfloat16(*numbers: float) -> bytes:
    """The high halves of float32 numbers."""
    return b"".join(struct.pack("<f", number)[2:] for number in numbers)


@pytest.fixture
def bundle(tinted):
    """The bundle that words lead, read."""
    return read_bundle(tinted)


# Words


@pytest.mark.parametrize(
    ("words", "ids"),
    [
        ("dim warm red", [3, 4, 5, 1, 0, 0]),
        ("", [1, 0, 0, 0, 0, 0]),
        ("--x", [7, 1, 0, 0, 0, 0]),
        ("dim unheard", [3, 2, 1, 0, 0, 0]),
    ],
)
def test_words_become_the_ids_of_their_input(bundle, words, ids):
    made = gather(bundle, {"prompt": words, "gain": 2})
    assert (made["ids"].dtype, made["ids"].tolist()) == (np.int64, [ids])
    assert made.keys() == {"ids", "gain"} and made["gain"] == 2


def test_a_text_gives_ids_to_every_input_it_names(tint, tinting):
    twice = replace(tinting.texts["prompt"], ids={"ids": "tokenizers/words.json", "more": "tokenizers/words.json"})
    inputs = tinting.inputs | {"more": Input("int64", (1, 6))}
    made = gather(
        read_bundle(tint(program=replace(tinting, texts={"prompt": twice}, inputs=inputs))), {"prompt": "red"}
    )
    assert made["ids"].tolist() == made["more"].tolist() == [[5, 1, 0, 0, 0, 0]]


def test_a_text_that_is_not_given_is_the_programs_own(bundle):
    assert gather(bundle, {})["ids"].tolist() == [[6, 6, 6, 1, 0, 0]]


def test_ids_that_are_given_come_before_the_programs_own_words(bundle):
    ids = np.array([[5, 4, 3, 1, 0, 0]])
    assert gather(bundle, {"ids": ids})["ids"].tolist() == ids.tolist()


def test_a_text_without_a_default_must_be_given_and_is_named_as_the_caller_knows_it(tint, tinting):
    program = replace(tinting, texts={"prompt": replace(tinting.texts["prompt"], default=None)})
    whole = read_bundle(tint(program=program))
    assert gather(whole, {}) == {}
    said = refusal(UsageError, value_of, program, "ids", {}, {})
    assert said == "prompt has no default; give it a value"
    assert value_of(program, "ids", gather(whole, {"prompt": "red"}), {}).tolist() == [[5, 1, 0, 0, 0, 0]]


def test_words_that_are_too_many_are_refused(bundle):
    said = refusal(UsageError, gather, bundle, {"prompt": "red " * 6})
    assert said == "the text 'red red red red red red ' has 7 tokens, the network takes 6; use a shorter one"


# Files


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_a_file_becomes_the_values_it_stands_for_and_no_words_are_made_up(bundle, tmp_path, dtype):
    save_file({"look.tint": TINT.astype(dtype), "else": np.zeros(3)}, tmp_path / "look.safetensors")
    for path in (tmp_path / "look.safetensors", str(tmp_path / "look.safetensors")):
        made = gather(bundle, {"look": path})
        assert made.keys() == {"tint"}
        assert (made["tint"].dtype, made["tint"].tolist()) == (np.float32, TINT.tolist())


def test_a_file_in_bfloat16_is_widened(bundle, tmp_path):
    path = written(tmp_path / "look", **{"look.tint": ("BF16", [1, 3], bfloat16(0.5, -0.25, 2))})
    made = gather(bundle, {"look": path})["tint"]
    assert (made.dtype, made.tolist()) == (np.float32, [[0.5, -0.25, 2]])


def test_a_file_may_hold_inputs_instead_of_values(tint, tinting, tmp_path):
    text, see, paint = tinting.passes
    text = replace(text, once=(replace(text.once[0], outputs={"tint": "unread"}),))
    paint = replace(paint, once=(replace(paint.once[0], inputs=paint.once[0].inputs | {"tint": "$tint"}),))
    inputs = tinting.inputs | {"tint": Input("float32", (1, 3))}
    whole = read_bundle(tint(program=replace(tinting, passes=(text, see, paint), inputs=inputs)))
    said = refusal(UsageError, value_of, whole.program, "tint", {}, {})
    assert said == "look has no default; give it a value"  # as the caller knows it
    save_file({"look.tint": TINT}, tmp_path / "look.safetensors")
    made = gather(whole, {"look": tmp_path / "look.safetensors"})
    assert value_of(whole.program, "tint", made, {}).tolist() == TINT.tolist()
    save_file({"look.tint": TINT[:, :2].copy()}, tmp_path / "look.safetensors")
    assert "has shape [1, 2], this bundle takes [1, 3]" in refusal(
        InputError, gather, whole, {"look": tmp_path / "look.safetensors"}
    )


@pytest.mark.parametrize(
    "tensor", [TINT[0], TINT[None], np.zeros((1, 4), np.float32), np.zeros((3, 1), np.float32), np.float32(1)]
)
def test_a_tensor_of_another_shape_is_refused(bundle, tmp_path, tensor):
    save_file({"look.tint": np.asarray(tensor)}, tmp_path / "look.safetensors")
    said = refusal(InputError, gather, bundle, {"look": tmp_path / "look.safetensors"})
    shape = list(np.shape(tensor))
    assert said == (
        f"{tmp_path / 'look.safetensors'}: 'look.tint' has shape {shape}, this bundle takes [1, 3]; use its own"
    )


def test_a_value_of_the_job_is_one_row(tinted, tmp_path):
    """Its component gives a row for each tile of a call, and the call of a job has one."""
    save_file({"look.tint": np.ones((2, 3), np.float32)}, tmp_path / "look.safetensors")
    message = refusal(InputError, gather, read_bundle(tinted), {"look": tmp_path / "look.safetensors"})
    assert "has shape [2, 3], this bundle takes [1, 3]" in message


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_a_tensor_that_numpy_cannot_hold_is_refused(bundle, tmp_path, dtype):
    path = written(tmp_path / "look", **{"look.tint": (dtype, [1, 3], bytes(3))})
    said = refusal(InputError, gather, bundle, {"look": path})
    assert said.startswith(f"{path}: 'look.tint' is float8_")
    assert said.endswith("give a safetensors file with look.tint")


def test_a_file_without_the_tensor_is_refused_and_says_what_it_holds(bundle, tmp_path):
    save_file(dict.fromkeys("dcba", TINT), tmp_path / "look.safetensors")
    assert refusal(InputError, gather, bundle, {"look": tmp_path / "look.safetensors"}) == (
        f"{tmp_path / 'look.safetensors'}: lacks the tensor 'look.tint' and holds a, b, c; give one with look.tint"
    )


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"hello, world\n" * 9, bytes(range(256)), None])
def test_a_file_that_holds_no_tensors_is_refused(bundle, tmp_path, content):
    path = tmp_path / "look.safetensors"
    if content is not None:
        path.write_bytes(content)
    said = refusal(InputError, gather, bundle, {"look": path})
    assert said.startswith(f"{path}: ")
    assert "look.tint" in said
    assert refusal(InputError, gather, bundle, {"look": tmp_path}).startswith(f"{tmp_path}: Is a directory; ")


def test_an_empty_file_of_tensors_lacks_them(bundle, tmp_path):
    path = written(tmp_path / "look")
    assert read_tensors(path) == {}
    assert "holds nothing" in refusal(InputError, gather, bundle, {"look": path})


# Values given as they are


@pytest.mark.parametrize("value", [TINT, TINT.astype(np.float64), TINT.tolist(), TINT.astype(np.float16)])
def test_a_value_given_as_it_is_becomes_one_of_its_components_type(bundle, value):
    made = gather(bundle, {"tint": value})["tint"]
    assert (made.dtype, made.tolist()) == (np.float32, TINT.tolist())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (TINT[0], "tint has shape [3], this bundle takes [1, 3]; use its own"),
        (TINT[:, :2], "tint has shape [1, 2], this bundle takes [1, 3]; use its own"),
        (2.0, "tint has shape [], this bundle takes [1, 3]; use its own"),
        ("warm", "tint is no tensor of float32; use this bundle's own"),
        ([[1, 2], [3]], "tint is no tensor of float32; use this bundle's own"),
        ({}, "tint is no tensor of float32; use this bundle's own"),
        ([[0, np.nan, np.inf]], "tint holds nan as float32; give finite numbers"),
        ([[0, 1, -1e39]], "tint holds -inf as float32; give finite numbers"),
    ],
)
def test_a_value_of_another_form_is_refused_before_any_work(bundle, value, message):
    assert refusal(UsageError, gather, bundle, {"tint": value}) == message


# Tensors


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from("abcd"),
        st.tuples(
            st.sampled_from(["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]),
            st.lists(st.integers(1, 4), max_size=3),
        ),
    )
)
def test_tensors_are_those_that_the_safetensors_package_reads(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("tensors") / "t.safetensors"
    arrays = {
        name: np.random.default_rng(i).integers(0, 2**8, shape).astype(dtype)
        for i, (name, (dtype, shape)) in enumerate(tensors.items())
    }
    save_file(arrays, path)
    found, expected = read_tensors(path), load_file(path)
    assert found.keys() == expected.keys() == arrays.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found[name], array)


def test_every_bfloat16_is_the_float32_with_its_bits_before_zeros(tmp_path):
    halves = np.arange(2**16, dtype=np.uint16)
    path = written(tmp_path / "t", odd=("U8", [1], b"\1"), all=("BF16", [2, 2**15], halves.tobytes()))
    found = read_tensors(path)["all"]
    expected = struct.unpack(f"<{2**16}f", b"".join(b"\0\0" + struct.pack("<H", half) for half in range(2**16)))
    assert (found.dtype, found.shape) == (np.float32, (2, 2**15))
    np.testing.assert_array_equal(found.ravel(), np.float32(expected))  # NaN for NaN
    assert np.isnan(found).any() and np.isinf(found).any()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "I64"])
def test_tensors_that_lie_askew_in_their_file_are_read(tmp_path, dtype):
    blocks = {
        "F32": struct.pack("<2f", 1.5, -2),
        "F16": struct.pack("<2e", 1.5, -2),
        "BF16": bfloat16(1.5, -2),
        "I64": struct.pack("<2q", 3, -2),
    }
    path = written(tmp_path / "t", odd=("U8", [1], b"\1"), askew=(dtype, [2], blocks[dtype]))
    assert read_tensors(path)["askew"].tolist() == ([3, -2] if dtype == "I64" else [1.5, -2])


def test_tensors_of_a_file_are_those_asked_for(tmp_path):
    save_file({"a": TINT, "b": -TINT, "c": TINT}, tmp_path / "t.safetensors")
    held = tensors_of(tmp_path / "t.safetensors", ("b", "a"))
    assert list(held) == ["b", "a"]
    np.testing.assert_array_equal(held["b"], -TINT)


def test_a_constant_that_numpy_cannot_hold_is_a_matter_of_the_bundle(tmp_path):
    path = written(tmp_path / "t", small=("F8_E4M3", [1], b"\0"))
    said = refusal(BundleError, read_tensors, path)
    assert said == f"{path}: 'small' is float8_e4m3fn, which NumPy has not; store it as float32"
