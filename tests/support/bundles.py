"""Tiny real bundles: a filter a colour whose weights lie outside, one led by words, one with weights in two folders."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from tilewright.runtime.bundle.digests import sha256_of_bytes
from tilewright.runtime.bundle.manifest import SCHEMA_VERSION, Component, EngineSpec, File, Manifest, Memory
from tilewright.runtime.bundle.program import ANY, Call, Grid, Input, Pass, Program, TensorFile, TensorSpec, Text, Tiles
from tilewright.runtime.bundle.safetensors import safetensors_header
from tilewright.runtime.bundle.strict import to_json
from tilewright.runtime.bundle.weights import Folder, Reference, Weights
from tilewright.runtime.bundle.write import seal

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


def engine(*files: str, name: str = "ort-float32") -> EngineSpec:
    """A float32 engine of ONNX Runtime."""
    return EngineSpec(name, "ort", "cpu", "float32", files, memory=Memory(fixed=1_000_000, per_px=24))


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
        staging.mkdir(parents=True)
        data = (weights_dir / "sharpen.safetensors").read_bytes()
        if packed:
            (staging / "weights" / "sharpen").mkdir(parents=True)
            (staging / "weights" / "sharpen" / "sharpen.safetensors").write_bytes(data)
        weight = _reference(data, "conv.weight")
        files = {"sharpen.safetensors": File(len(data), sha256_of_bytes(data))}
        folder = Folder(None if packed else str(weights_dir), files)
        weights = Weights({"sharpen": folder}, {"sharpen": {"weight": weight}})
        (staging / "weights.json").write_text(to_json(weights))
        (staging / "program.json").write_text(to_json(program))
        save_file({"shift": np.zeros(3, np.float32)}, staging / "constants.safetensors")
        onnx.save(_graph(weight), staging / "sharpen.onnx")
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


# A bundle that is led by words: their first three ids are the tint, in eighths.

VOCABULARY = {"<pad>": 0, "</s>": 1, "?": 2, "dim": 3, "warm": 4, "red": 5, "bright": 6, "--x": 7}
IDS, TINT = TensorSpec("int64", ("batch", 6)), TensorSpec("float32", ("batch", 3))
READ_TINT, NUMBER = TensorSpec("float32", (ANY, 3)), TensorSpec("float32", (ANY,))
SEEN = TensorSpec("float32", ("batch", 3, 1, 1))
TINTING = Program(
    scale=1,
    any_scale=True,
    multiple_px=8,
    grids={"image": Grid(1, 3, "input"), "result": Grid(1, 3)},
    inputs={"ids": Input("int64", (1, 6)), "gain": Input("float32", default=1.0, help="100% is 1", least=-8, most=8)},
    texts={"prompt": Text({"ids": "tokenizers/words.json"}, "bright bright bright", "the tint in words")},
    files={"look": TensorFile({"look.tint": "tint"}, "what a prompt becomes")},
    passes=(
        Pass("text", once=(Call("words", {"ids": "$ids"}, {"tint": "tint"}),)),
        Pass("see", Tiles(32, 8), once=(Call("see", {"image": "image"}, {"mean": "mean"}),)),
        Pass(
            "paint",
            Tiles(32, 8),
            once=(
                Call(
                    "paint", {"image": "image", "mean": "mean", "tint": "tint", "gain": "$gain"}, {"painted": "result"}
                ),
            ),
        ),
    ),
)


@pytest.fixture
def tinting() -> Program:
    """The program of `tinted`."""
    return TINTING


def tint_bundle(root: Path, program: Program = TINTING) -> Path:
    """Build a bundle that a prompt, a file of what a prompt becomes and a number lead."""
    tokenizers = pytest.importorskip("tokenizers", reason="a text input needs them")
    staging = root.with_name(f".{root.name}")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCABULARY, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    made.enable_padding(length=6, pad_id=0, pad_token="<pad>")
    (staging / "tokenizers").mkdir(parents=True)
    made.save(str(staging / "tokenizers" / "words.json"))
    components = {}
    for component, (inputs, outputs, model) in _tint_components().items():
        file = f"{component}.onnx"
        onnx.save(model, staging / file)
        engines = (engine(file),)
        components[component] = Component(file, inputs, outputs, engines)
    (staging / "weights.json").write_text(to_json(Weights({}, {})))
    (staging / "program.json").write_text(to_json(program))
    listed = tuple(sorted({file for text in program.texts.values() for file in text.ids.values()}))
    seal(staging, replace(MANIFEST, components=components, constants=None, tokenizers=listed), root)
    return root


@pytest.fixture
def tint(tmp_path) -> Callable[..., Path]:
    """Build that bundle; return its directory."""

    def build(name: str = "tint.bundle", *, program: Program = TINTING) -> Path:
        return tint_bundle(tmp_path / name, program)

    return build


@pytest.fixture
def tinted(tint) -> Path:
    """That bundle."""
    return tint()


def _tint_components() -> dict[str, tuple[dict[str, TensorSpec], dict[str, TensorSpec], onnx.ModelProto]]:
    node = helper.make_node
    eighths = np.zeros((6, 3), np.float32)
    eighths[range(3), range(3)] = 1 / 8
    numbers = {
        "eighths": eighths,
        "shape": np.array([-1, 3, 1, 1]),
        "number": np.array([-1, 1, 1, 1]),
        "sides": np.array([2, 3]),
        "quarter": np.array(0.25, np.float32),
    }
    tables = [numpy_helper.from_array(array, name) for name, array in numbers.items()]
    nodes = {
        "words": [
            node("Cast", ["ids"], ["floats"], to=TensorProto.FLOAT),
            node("MatMul", ["floats", "eighths"], ["tint"]),
        ],
        "see": [node("ReduceMean", ["image", "sides"], ["mean"], keepdims=1)],
        "paint": [
            node("Reshape", ["tint", "shape"], ["factors"]),
            node("Reshape", ["gain", "number"], ["strength"]),
            node("Mul", ["factors", "strength"], ["gains"]),
            node("Mul", ["image", "gains"], ["tinted"]),
            node("Mul", ["mean", "quarter"], ["haze"]),
            node("Add", ["tinted", "haze"], ["painted"]),
        ],
    }
    signatures: dict[str, tuple[dict[str, TensorSpec], dict[str, TensorSpec]]] = {
        "words": ({"ids": IDS}, {"tint": TINT}),
        "see": ({"image": IMAGE}, {"mean": SEEN}),
        "paint": ({"image": IMAGE, "mean": SEEN, "tint": READ_TINT, "gain": NUMBER}, {"painted": IMAGE}),
    }
    made = {}
    for name, (inputs, outputs) in signatures.items():
        used = {source for n in nodes[name] for source in n.input}
        made[name] = (
            inputs,
            outputs,
            _model(name, nodes[name], inputs, outputs, [t for t in tables if t.name in used]),
        )
    return made


# A bundle whose component reads weights of two folders: image * scale + (single + half + brain)

TWO_FOLDERS = {  # folder -> tensor -> type and numbers that each of these types can hold
    "base": {"scale": ("float32", [0.5, 0.25, 0.125])},
    "extra": {
        "single": ("float32", [0.125, 0.0, -0.0625]),
        "half": ("float16", [0.0625, 0.25, 0.5]),
        "brain": ("bfloat16", [0.03125, -0.125, 0.0078125]),
    },
}


@pytest.fixture
def two_folders(tmp_path) -> dict[str, dict[str, tuple[str, list[float]]]]:
    """The weights of `two_folder_bundle`, written as their owners keep them: models/base and other/extra."""
    for folder, tensors in TWO_FOLDERS.items():
        path = tmp_path / ("models" if folder == "base" else "other") / folder / "weights.safetensors"
        path.parent.mkdir(parents=True)
        header, data = {}, b""
        for name, (dtype, numbers) in tensors.items():
            block = _bytes(dtype, numbers)
            kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
            header[name] = {"dtype": kind, "shape": [3, 1, 1], "data_offsets": [len(data), len(data) + len(block)]}
            data += block
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return TWO_FOLDERS


def _bytes(dtype: str, numbers: list[float]) -> bytes:
    single = struct.pack("<3f", *numbers)
    if dtype == "bfloat16":
        return b"".join(single[i + 2 : i + 4] for i in range(0, 12, 4))  # the high halves
    return struct.pack("<3e", *numbers) if dtype == "float16" else single


@pytest.fixture
def two_folder_bundle(tmp_path, two_folders) -> Callable[..., Path]:
    """Build a bundle on weights in two folders, or packed with them; return its directory."""

    def build(name: str = "two.bundle", *, packed: bool = False) -> Path:
        staging = tmp_path / f".{name}"
        staging.mkdir(parents=True)
        folders, references = {}, {}
        for folder in two_folders:
            at = tmp_path / ("models" if folder == "base" else "other") / folder
            data = (at / "weights.safetensors").read_bytes()
            if packed:
                (staging / "weights" / folder).mkdir(parents=True)
                (staging / "weights" / folder / "weights.safetensors").write_bytes(data)
            sealed = {"weights.safetensors": File(len(data), sha256_of_bytes(data))}
            folders[folder] = Folder(None if packed else str(at), sealed)
            for tensor, (spec, offset, length) in safetensors_header(at / "weights.safetensors").items():
                shape = tuple(int(d) for d in spec.shape)
                references[tensor] = Reference("weights.safetensors", spec.dtype, shape, offset, length, folder)
        (staging / "weights.json").write_text(to_json(Weights(folders, {"add": references})))
        onnx.save(_adding(references), staging / "add.onnx")
        engines = (engine("add.onnx"),)
        components = {"add": Component("add.onnx", {"image": IMAGE}, {"sum": IMAGE}, engines)}
        once = (Call("add", {"image": "image"}, {"sum": "result"}),)
        program = replace(PROGRAM, scale=1, passes=(Pass("add", Tiles(64, 16), once=once),))
        (staging / "program.json").write_text(to_json(program))
        seal(staging, replace(MANIFEST, components=components, constants=None), tmp_path / name)
        return tmp_path / name

    return build


def _adding(references: dict[str, Reference]) -> onnx.ModelProto:
    kinds = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
    node = helper.make_node
    weights = [_external(name, kinds[r.dtype], r) for name, r in references.items()]
    nodes = [
        node("Mul", ["image", "scale"], ["scaled"]),
        node("Cast", ["half"], ["half.wide"], to=TensorProto.FLOAT),
        node("Cast", ["brain"], ["brain.wide"], to=TensorProto.FLOAT),
        node("Add", ["half.wide", "brain.wide"], ["both"]),
        node("Add", ["both", "single"], ["all"]),
        node("Add", ["scaled", "all"], ["sum"]),
    ]
    return _model("add", nodes, {"image": IMAGE}, {"sum": IMAGE}, weights)


def _external(name: str, kind: int, reference: Reference) -> TensorProto:
    tensor = TensorProto(name=name, data_type=kind, dims=reference.shape, data_location=TensorProto.EXTERNAL)
    place = f"weights/{reference.folder}/{reference.file}"
    for key, value in {"location": place, "offset": reference.offset, "length": reference.length}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _model(
    name: str,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, TensorSpec],
    outputs: dict[str, TensorSpec],
    initializers: list[TensorProto],
) -> onnx.ModelProto:
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    ends = (
        [
            # ONNX Runtime takes sizes of the same name as equal
            helper.make_tensor_value_info(end, kinds[s.dtype], [f"{end}_rows" if d == ANY else d for d in s.shape])
            for end, s in specs.items()
        ]
        for specs in (inputs, outputs)
    )
    graph = helper.make_graph(nodes, name, *ends, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


MANIFEST = Manifest(
    schema_version=SCHEMA_VERSION,
    system="sharpen",
    preset="standard",
    licence="CC0-1.0",
    components={
        "sharpen": Component(
            "sharpen.onnx",
            {"image": IMAGE},
            {"sharp": IMAGE},
            (engine("sharpen.onnx"),),
        )
    },
    files={},
    made_with={"tilewright": "0.1.0", "numpy": "2.0.0"},
    options={"weights": "given"},
    constants="constants.safetensors",
)


def _reference(data: bytes, name: str) -> Reference:
    (length,) = struct.unpack("<Q", data[:8])
    entry = json.loads(data[8 : 8 + length])[name]
    start, end = entry["data_offsets"]
    shape, offset = tuple(entry["shape"]), 8 + length + start
    return Reference("sharpen.safetensors", "float32", shape, offset, end - start, "sharpen")


def _graph(weight: Reference) -> onnx.ModelProto:
    """Pad by reflection, filter every colour by itself, clip."""
    external = _external("weight", TensorProto.FLOAT, weight)
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
    return _model("sharpen", nodes, {"image": IMAGE}, {"sharp": IMAGE}, [external, *numbers])
