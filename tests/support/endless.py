"""A real bundle whose only call never ends by itself: ONNX Runtime goes round a loop."""

from dataclasses import replace
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from support.bundles import MANIFEST, PROGRAM
from tilewright.runtime.bundle.strict import to_json
from tilewright.runtime.bundle.write import seal

__all__ = ["endless_bundle", "endless_graph"]

TURNS = 2**62


def endless_graph() -> onnx.ModelProto:
    """A graph that multiplies an image by one, again and again."""
    sides = ["batch", 3, "height", "width"]
    flags = [helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("go_on", "goes_on")]
    images = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("before", "after")]
    turn = helper.make_tensor_value_info("turn", TensorProto.INT64, [])
    one = helper.make_tensor("one", TensorProto.FLOAT, [], [1])
    steps = [
        helper.make_node("Identity", ["go_on"], ["goes_on"]),
        helper.make_node("Mul", ["before", "one"], ["after"]),
    ]
    body = helper.make_graph(steps, "body", [turn, flags[0], images[0]], [flags[1], images[1]], [one])
    turns = helper.make_tensor("turns", TensorProto.INT64, [], [TURNS])
    loop = helper.make_node("Loop", ["turns", "", "image"], ["sharp"], body=body)
    ends = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, sides)] for name in ("image", "sharp"))
    graph = helper.make_graph([loop], "endless", *ends, [turns])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def endless_bundle(root: Path) -> Path:
    """Build a bundle with this graph."""
    staging = root.with_name(f".{root.name}")
    staging.mkdir()
    onnx.save(endless_graph(), staging / "sharpen.onnx")
    (staging / "program.json").write_text(to_json(PROGRAM))
    (staging / "weights.json").write_text('{"folders": {}, "tensors": {"sharpen": {}}}')
    seal(staging, replace(MANIFEST, constants=None), root)
    return root
