"""Planting faults into a copy of a real graph: a few nodes, or a change of what is there."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

__all__ = ["ALSO", "FAULTS", "HERE", "Fault", "Planted", "T", "fault", "place"]

T = TensorProto
HERE = "planted"  # the name of the node at fault
ALSO = "planted.also"  # the names of nodes beside it


class Planted:
    """A graph into which nodes are planted. They read its first input, of 4 dimensions with fixed channels."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.graph = model, model.graph
        self.x = self.graph.input[0].name
        self.channels = self.graph.input[0].type.tensor_type.shape.dim[1].dim_value
        self.made = 0

    def node(self, op: str, *inputs: str, name: str = HERE, outputs: int = 1, domain: str = "", **options: Any) -> Any:
        """Add a node at the end; returns the name of its output, or of all of them."""
        self.made += 1
        names = [f"{op.lower()}.{self.made}.{i}" for i in range(outputs)]
        self.graph.node.append(helper.make_node(op, list(inputs), names, name=name, domain=domain, **options))
        return names[0] if outputs == 1 else names

    def also(self, op: str, *inputs: str, **options: Any) -> Any:
        """Add a node that is not at fault."""
        return self.node(op, *inputs, name=f"{ALSO}.{self.made}", **options)

    def weight(self, numbers: Any, kind: int = T.FLOAT, shape: list[int] | None = None) -> str:
        """Add an initializer."""
        self.made += 1
        array = np.asarray(numbers)
        name, dims = f"weight.{self.made}", list(array.shape) if shape is None else shape
        self.graph.initializer.append(helper.make_tensor(name, kind, dims, array.flatten().tolist()))
        return name

    def ints(self, *numbers: int) -> str:
        """Add a list of sizes."""
        return self.weight(np.array(numbers, np.int64), T.INT64)

    def cast(self, value: str, kind: int) -> str:
        """Add a cast that is not at fault."""
        return str(self.also("Cast", value, to=kind))

    def first(self, op: str) -> onnx.NodeProto:
        """The first node of an operator, or of one that begins like it."""
        return next(node for node in self.graph.node if node.op_type.startswith(op))

    def external(self) -> TensorProto:
        """The first weight in another file, and not the first in its file."""
        return next(
            t for t in self.graph.initializer if t.data_location == T.EXTERNAL and int(place(t)["offset"].value) > 100
        )

    def input(self, name: str, kind: int, shape: list[Any] | None) -> str:
        """Add an input."""
        self.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def quantized(self, value: str, kind: int = T.INT8, scale: str = "", zero: str = "", *, q: str = HERE) -> str:
        """Add Q and DQ, which share a scale and a zero point."""
        scale = scale or self.weight(0.5)
        zero = zero or self.weight(np.zeros(()), kind)
        return str(self.also("DequantizeLinear", self.node("QuantizeLinear", value, scale, zero, name=q), scale, zero))

    def tokens(self) -> str:
        """The first input as [batch, tokens, channels]."""
        return str(
            self.also("Transpose", self.also("Reshape", self.x, self.ints(0, self.channels, -1)), perm=[0, 2, 1])
        )

    def size(self) -> str:
        """A size that the numbers of the input decide."""
        return self.cast(self.also("ReduceMax", self.x, keepdims=0), T.INT64)

    def four(self) -> str:
        """A list of axes that is computed: [4 - 1]."""
        rank = self.also("Shape", self.also("Shape", self.x))
        return str(self.also("Sub", rank, self.ints(1)))


def place(tensor: TensorProto) -> dict[str, Any]:
    """The entries of external data by key."""
    return {entry.key: entry for entry in tensor.external_data}


@dataclass(frozen=True)
class Fault:
    """A fault; `plant` may return the name of the place where it must be found."""

    rule: str
    says: str
    plant: Callable[[Planted], str | None]


FAULTS: dict[str, Fault] = {}


def fault(rule: str, says: str) -> Callable[[Callable[[Planted], Any]], Callable[[Planted], Any]]:
    """Add a function to the faults."""

    def add(plant: Callable[[Planted], Any]) -> Callable[[Planted], Any]:
        FAULTS[plant.__name__] = Fault(rule, says, plant)
        return plant

    return add
