"""Headers of safetensors files, against the safetensors package; whatever lies is refused."""

import json
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from support.forged import refusal, reseal
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.bundle.safetensors import safetensors_header

WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}
TENSORS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda t: t != "__metadata__"),
    st.tuples(st.sampled_from(list(WIDTHS)), st.lists(st.integers(1, 4), max_size=4)),
    max_size=6,
)
METADATA = st.dictionaries(st.text(max_size=3), st.text(max_size=3), min_size=1, max_size=2)


@settings(deadline=None, max_examples=100)
@given(tensors=TENSORS, metadata=st.none() | METADATA)
def test_a_header_says_what_the_safetensors_package_says(tmp_path_factory, tensors, metadata):
    arrays = {n: np.frombuffer(os.urandom(WIDTHS[d] * math.prod(shape)), np.uint8) for n, (d, shape) in tensors.items()}
    fed = {
        name: safetensors.TensorSpec(
            dtype=dtype, shape=shape, data_ptr=arrays[name].ctypes.data, data_len=arrays[name].nbytes
        )
        for name, (dtype, shape) in tensors.items()
    }
    data = safetensors.serialize(fed, metadata)
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(data)
    header = safetensors_header(path)
    wanted = dict(safetensors.deserialize(data))
    assert header.keys() == wanted.keys()
    for name, (spec, offset, length) in header.items():
        assert (spec.dtype, list(spec.shape)) == (tensors[name][0], wanted[name]["shape"])
        assert data[offset : offset + length] == bytes(wanted[name]["data"]) == arrays[name].tobytes()


def safetensors_file(path: Path, header: object, body: bytes = b"\0" * 8, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2**70], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": ["two"], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": "ab", "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": None, "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": "08"},
        {"dtype": "F32", "shape": [2]},
        {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
        {"shape": [2], "data_offsets": [0, 8]},
        [],
        None,
    ],
    ids=json.dumps,
)
def test_a_header_that_lies_is_refused(tmp_path, entry):
    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert safetensors_header(safetensors_file(tmp_path / "good", {"a": good}))["a"][2] == 8
    path = safetensors_file(tmp_path / "bad", {"b": good, "a": entry})
    assert refusal(safetensors_header, path).startswith(f"{path}: unreadable safetensors header (")


@pytest.mark.parametrize(
    ("header", "length"),
    [
        ([], None),
        (3, None),
        (b"", None),
        (b"{", None),
        (b"\xff\xff", None),
        (b"[" * 200_000, None),
        (b"{}", 11),
        (b"{}", 2**63),
        (b"{}", 2**64 - 1),
        ({"x" * 10_000: 3}, None),
        ({"a": {"dtype": "F32", "shape": [1] * 1000 + [0], "data_offsets": [0, 0]}}, None),
    ],
)
def test_a_header_that_is_none_is_refused(tmp_path, header, length):
    path = safetensors_file(tmp_path / "bad", header, length=length)
    assert refusal(safetensors_header, path).startswith(str(path))


def test_a_truncated_safetensors_file_is_refused_at_every_length(weights_dir, tmp_path):
    data = (weights_dir / "sharpen.safetensors").read_bytes()
    path = tmp_path / "cut"
    for kept in range(len(data)):
        path.write_bytes(data[:kept])
        assert refusal(safetensors_header, path).startswith(str(path))
    path = safetensors_file(path, b"{}", body=b"", length=3)
    assert refusal(safetensors_header, path) == f"{path}: not a safetensors file, or cut short; copy it again"


def test_a_bundle_whose_constants_are_damaged_is_refused(bundle):
    reseal(bundle, "constants.safetensors", b"\xff" * 64)
    assert refusal(read_bundle, bundle).startswith(f"{bundle / 'constants.safetensors'}: not a safetensors file")
