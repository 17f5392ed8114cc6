"""A tiny real bundle with layers of every kind: convolutions, products after a normalisation, two joined inputs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from support.bundles import IMAGE, MANIFEST, engine
from tilewright.runtime.bundle.digests import sha256_of_file
from tilewright.runtime.bundle.manifest import Component, File
from tilewright.runtime.bundle.program import Call, Grid, Pass, Program, Tiles
from tilewright.runtime.bundle.safetensors import safetensors_header
from tilewright.runtime.bundle.strict import to_json
from tilewright.runtime.bundle.weights import Folder, Reference, Weights, location
from tilewright.runtime.bundle.write import seal

__all__ = ["LAYERS", "TILE", "WIDTH", "layered", "numbers"]

TILE, WIDTH, HIDDEN = 16, 16, 24
LAYERS = ["show/stem.weight", "show/up.weight", "show/gate.weight", "show/down.weight", "show/out.weight"]


def numbers() -> dict[str, np.ndarray]:
    """The weights. The normalisation makes one channel much larger than the others."""
    rng = np.random.default_rng(0)
    scale = np.ones(WIDTH, np.float32)
    scale[3] = 40
    shapes = {
        "stem.weight": (WIDTH, 3, 3, 3),
        "up.weight": (HIDDEN, WIDTH),
        "up.bias": (HIDDEN,),
        "gate.weight": (HIDDEN, WIDTH),
        "down.weight": (WIDTH, 2 * HIDDEN),
        "out.weight": (3, WIDTH, 1, 1),
    }
    drawn = {
        n: rng.standard_normal(s).astype(np.float32) / np.float32(np.prod(s[1:]) ** 0.5) for n, s in shapes.items()
    }
    return drawn | {"norm.scale": scale, "norm.shift": rng.standard_normal(WIDTH).astype(np.float32)}


def layered(root: Path) -> Path:
    """Build the bundle; its weights lie beside it."""
    folder, staging = root.with_name(f"{root.name}.weights"), root.with_name(f".{root.name}")
    folder.mkdir()
    staging.mkdir()
    save_file(numbers(), folder / "model.safetensors")
    references = {
        name: Reference("model.safetensors", spec.dtype, tuple(map(int, spec.shape)), offset, length, "layers")
        for name, (spec, offset, length) in safetensors_header(folder / "model.safetensors").items()
    }
    file = folder / "model.safetensors"
    weights = Weights(
        {"layers": Folder(str(folder), {file.name: File(file.stat().st_size, sha256_of_file(file))})},
        {"show": references},
    )
    program = Program(
        scale=1,
        multiple_px=8,
        grids={"image": Grid(1, 3, "input"), "result": Grid(1, 3)},
        passes=(Pass("show", Tiles(TILE, 0), once=(Call("show", {"image": "image"}, {"picture": "result"}),)),),
    )
    onnx.save(_model(references), staging / "show.onnx")
    (staging / "program.json").write_text(to_json(program))
    (staging / "weights.json").write_text(to_json(weights))
    component = Component("show.onnx", {"image": IMAGE}, {"picture": IMAGE}, (engine("show.onnx"),))
    seal(staging, replace(MANIFEST, components={"show": component}, constants=None), root)
    return root


def _model(references: dict[str, Reference]) -> onnx.ModelProto:
    node = helper.make_node
    nodes = [
        node("Conv", ["image", "stem.weight"], ["features"], pads=[1, 1, 1, 1]),
        node("Transpose", ["features"], ["tokens"], perm=[0, 2, 3, 1]),
        node("LayerNormalization", ["tokens", "norm.scale", "norm.shift"], ["normal"], axis=-1),
        node("Shape", ["normal"], ["sizes"], end=3),
        node("Reshape", ["normal", "rows"], ["matrix"]),
        node("Gemm", ["matrix", "up.weight", "up.bias"], ["high"], transB=1),
        node("Transpose", ["gate.weight"], ["turned"], perm=[1, 0]),
        node("MatMul", ["matrix", "turned"], ["gated"]),
        node("Gelu", ["high"], ["active"]),
        node("Mul", ["gated", "tens"], ["large"]),
        node("Concat", ["active", "large"], ["joined"], axis=-1),
        node("Gemm", ["joined", "down.weight"], ["low"], transB=1),
        node("Concat", ["sizes", "width"], ["shape"], axis=0),
        node("Reshape", ["low", "shape"], ["back"]),
        node("Transpose", ["back"], ["planes"], perm=[0, 3, 1, 2]),
        node("Conv", ["planes", "out.weight"], ["change"]),
        node("Mul", ["change", "fiftieth"], ["little"]),
        node("Add", ["image", "little"], ["picture"]),
    ]
    constants = {
        "rows": np.array([-1, WIDTH]),
        "width": np.array([WIDTH]),
        "tens": np.float32(10),
        "fiftieth": np.float32(0.02),
    }
    tensors = [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    for name, r in references.items():
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=r.shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", location(r)), ("offset", r.offset), ("length", r.length)):
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3, "height", "width"])
        for name in ("image", "picture")
    ]
    graph = helper.make_graph(nodes, "layers", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
