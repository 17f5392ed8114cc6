"""A tiny real bundle that takes steps: z becomes gain * (z + image + lift), through two convolutions of one weight."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from support.bundles import IMAGE, MANIFEST, NUMBER, engine
from tilewright.runtime.bundle.manifest import Component
from tilewright.runtime.bundle.program import Call, Grid, Input, Pass, Program, Steps, TensorSpec, Tiles
from tilewright.runtime.bundle.strict import to_json
from tilewright.runtime.bundle.weights import Weights
from tilewright.runtime.bundle.write import seal

__all__ = ["GAIN", "STEPS", "TILE", "stepped"]

GAIN, STEPS, TILE = 2.0, 3, 16


def stepped(root: Path, gain: float = GAIN) -> Path:
    """Build the bundle. Its numbers grow with each step; they are cut off before they are returned."""
    staging = root.with_name(f".{root.name}")
    staging.mkdir()
    step = ({"image": IMAGE, "z": IMAGE, "sigma": NUMBER, "lift": NUMBER}, {"next": IMAGE})
    show = ({"z": IMAGE}, {"picture": IMAGE})
    onnx.save(_model(*step, _step(), gain), staging / "step.onnx")
    onnx.save(_model(*show, [helper.make_node("Clip", ["z", "zero", "one"], ["picture"])], gain), staging / "show.onnx")
    tiles = Tiles(TILE, 0)
    program = Program(
        scale=1,
        multiple_px=8,
        inputs={"lift": Input("float32", default=0.0, help="added to the image", least=0, most=1)},
        grids={"image": Grid(1, 3, "input"), "z": Grid(1, 3, "zeros"), "result": Grid(1, 3)},
        passes=(
            Pass(
                "sample",
                tiles,
                Steps("flow_shift", STEPS),
                each=(Call("step", {"image": "image", "z": "z", "sigma": "@sigma", "lift": "$lift"}, {"next": "z"}),),
            ),
            Pass("show", tiles, once=(Call("show", {"z": "z"}, {"picture": "result"}),)),
        ),
    )
    signatures = {"step": step, "show": show}
    components = {n: Component(f"{n}.onnx", *ends, (engine(f"{n}.onnx"),)) for n, ends in signatures.items()}
    (staging / "program.json").write_text(to_json(program))
    (staging / "weights.json").write_text(to_json(Weights({}, {})))
    seal(staging, replace(MANIFEST, components=components, constants=None), root)
    return root


def _step() -> list[onnx.NodeProto]:
    node = helper.make_node
    return [
        node("Add", ["image", "z"], ["both"]),
        node("Add", ["both", "lift"], ["sum"]),
        node("Conv", ["sum", "gains"], ["grown"]),
        node("Conv", ["grown", "ones"], ["same"]),
        node("Clip", ["same", "least", "most"], ["cut"]),
        node("Mul", ["sigma", "zero"], ["nothing"]),  # ONNX Runtime keeps an input that is read
        node("ReduceSum", ["nothing"], ["none"], keepdims=0),
        node("Add", ["cut", "none"], ["next"]),
    ]


def _model(
    inputs: dict[str, TensorSpec], outputs: dict[str, TensorSpec], nodes: list[onnx.NodeProto], gain: float
) -> onnx.ModelProto:
    each_colour = np.eye(3, dtype=np.float32)[:, :, None, None]
    numbers = {
        "gains": each_colour * np.float32(gain),
        "ones": each_colour,
        "zero": np.array(0, np.float32),
        "one": np.array(1, np.float32),
        "least": np.array(-1e30, np.float32),
        "most": np.array(1e30, np.float32),
    }
    used = {name for node in nodes for name in node.input}
    weights = [numpy_helper.from_array(array, name) for name, array in numbers.items() if name in used]
    ends = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * len(s.shape)) for name, s in specs.items()]
        for specs in (inputs, outputs)
    )
    graph = helper.make_graph(nodes, "steps", *ends, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
