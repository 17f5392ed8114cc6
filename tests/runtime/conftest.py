"""A tiny real bundle: one filter a colour as an ONNX graph, whose weights lie in a safetensors file outside."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from tilewright.runtime.bundle import Component, Engine, File, Folder, Manifest, Memory, Reference, Weights, seal
from tilewright.runtime.digests import sha256_of_bytes
from tilewright.runtime.program import Call, Grid, Pass, Program, TensorSpec, Tiles
from tilewright.runtime.strict import to_json

# Sevenths, so that no exact result lies halfway between two levels; without symmetry and each colour its own, so that
# a flip, a turn or a swap of colours shows. Each adds up to one.
KERNELS = np.array(
    [
        [[0, -1, -2], [1, 12, -3], [-1, 2, -1]],
        [[-2, 1, 0], [-1, 10, 1], [-3, 2, -1]],
        [[1, -3, 2], [0, 9, -4], [1, -1, 2]],
    ]
)
IMAGE = TensorSpec("float32", ("batch", 3, "height", "width"))
SHARPEN = Call("sharpen", {"image": "image"}, {"sharp": "result"})
PROGRAM = Program(
    scale=2,
    multiple_px=8,
    grids={"image": Grid(1, 3, "input"), "result": Grid(1, 3)},
    passes=(Pass("restore", Tiles(64, 16), once=(SHARPEN,)),),
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def kernels() -> np.ndarray:
    """The filters [colour, row, column] of the bundle's network, in sevenths."""
    return KERNELS


@pytest.fixture
def weights_dir(tmp_path) -> Path:
    """The folder with the weights, as its owner keeps it: among other tensors, in a file of some other model's."""
    folder = tmp_path / "models" / "sharpen"
    folder.mkdir(parents=True)
    tensors = {"before": np.arange(5, dtype=np.int64), "conv.weight": (KERNELS[:, None] / 7).astype(np.float32)}
    save_file(tensors, folder / "sharpen.safetensors")
    return folder


@pytest.fixture
def staged(tmp_path, weights_dir) -> Callable[..., tuple[Path, Manifest]]:
    """Make a directory as a build leaves it, and the manifest to seal it with."""

    def stage(name: str = "staging", *, packed: bool = False, program: Program = PROGRAM) -> tuple[Path, Manifest]:
        staging = tmp_path / name
        (staging / "sharpen").mkdir(parents=True)
        data = (weights_dir / "sharpen.safetensors").read_bytes()
        if packed:
            (staging / "weights" / "sharpen").mkdir(parents=True)
            (staging / "weights" / "sharpen" / "sharpen.safetensors").write_bytes(data)
        weight = _reference(data, "conv.weight")
        files = {"sharpen.safetensors": File(len(data), sha256_of_bytes(data))}
        folder = Folder(None if packed else str(weights_dir), files)
        weights = Weights({"sharpen": folder}, {"sharpen": "sharpen"}, {"sharpen": {"weight": weight}})
        (staging / "weights.json").write_text(to_json(weights))
        (staging / "program.json").write_text(to_json(program))
        save_file({"shift": np.zeros(3, np.float32)}, staging / "constants.safetensors")
        onnx.save(_graph(weight), staging / "sharpen" / "model.onnx")
        (staging / "README.md").write_text("# sharpen\n")
        return staging, MANIFEST

    return stage


@pytest.fixture
def build(tmp_path, staged) -> Callable[..., Path]:
    """Build a bundle and return its directory; packed: with a copy of its weights."""

    def build(name: str = "sharpen.bundle", *, packed: bool = False, program: Program = PROGRAM) -> Path:
        seal(*staged(f".{name}", packed=packed, program=program), tmp_path / name)
        return tmp_path / name

    return build


@pytest.fixture
def bundle(build) -> Path:
    """A bundle that reads its weights where they lie."""
    return build()


@pytest.fixture
def packed_bundle(build, weights_dir) -> Path:
    """A bundle that carries its weights; the originals are gone."""
    root = build(packed=True)
    (weights_dir / "sharpen.safetensors").unlink()
    return root


MANIFEST = Manifest(
    schema_version=1,
    system="sharpen",
    preset="standard",
    precision="float32",
    licence="CC0-1.0",
    components={
        "sharpen": Component(
            "sharpen/model.onnx",
            {"image": IMAGE},
            {"sharp": IMAGE},
            (Engine("ort", "float32", "sharpen/model.onnx"),),
            Memory(1_000_000, 24, 0),
        )
    },
    files={},
    made_with={"tilewright": "0.1.0", "numpy": "2.0.0"},
    options={"precision": "float32"},
    constants="constants.safetensors",
)


def _reference(data: bytes, name: str) -> Reference:
    (length,) = struct.unpack("<Q", data[:8])
    entry = json.loads(data[8 : 8 + length])[name]
    start, end = entry["data_offsets"]
    return Reference("sharpen.safetensors", "float32", tuple(entry["shape"]), 8 + length + start, end - start)


def _graph(weight: Reference) -> onnx.ModelProto:
    """Pad by reflection, filter every colour by itself, clip."""
    external = TensorProto(
        name="weight", data_type=TensorProto.FLOAT, dims=weight.shape, data_location=TensorProto.EXTERNAL
    )
    for key, value in {"location": weight.file, "offset": weight.offset, "length": weight.length}.items():
        external.external_data.add(key=key, value=str(value))
    numbers = [
        helper.make_tensor("pads", TensorProto.INT64, [8], [0, 0, 1, 1, 0, 0, 1, 1]),
        helper.make_tensor("zero", TensorProto.FLOAT, [], [0]),
        helper.make_tensor("one", TensorProto.FLOAT, [], [1]),
    ]
    nodes = [
        helper.make_node("Pad", ["image", "pads"], ["padded"], mode="reflect"),
        helper.make_node("Conv", ["padded", "weight"], ["filtered"], group=3),
        helper.make_node("Clip", ["filtered", "zero", "one"], ["sharp"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, IMAGE.shape) for name in ("image", "sharp")]
    graph = helper.make_graph(nodes, "sharpen", ends[:1], ends[1:], [external, *numbers])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
