"""A real bundle whose only call never ends by itself: ONNX Runtime goes round a loop."""

from collections.abc import Callable
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from tilewright.runtime.bundle.manifest import Manifest
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


def endless_bundle(staged: Callable[..., tuple[Path, Manifest]], root: Path) -> Path:
    """Seal a bundle with this graph."""
    staging, manifest = staged(".endless")
    onnx.save(endless_graph(), staging / "sharpen.onnx")
    (staging / "weights.json").write_text('{"folders": {}, "tensors": {"sharpen": {}}}')
    seal(staging, manifest, root)
    return root
