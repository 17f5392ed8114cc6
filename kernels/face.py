"""An op's face in ONNX: the node that stands for it in graphs, and the same computation in standard operators."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

__all__ = ["DOMAIN", "VERSION", "Face", "plain"]

DOMAIN, VERSION = "tilewright", 1


def plain(names: Iterable[str]) -> list[str]:
    """The names of inputs, outputs or attributes of a face, without marks and types."""
    return [name.split(":")[0].rstrip("?") for name in names]


@dataclass(frozen=True)
class Face:
    """A node `tilewright::NAME`, or `tilewright::NAME_without_bias` if its input `bias` is left out.

    The name tells which inputs are left out, because TensorRT chooses plugins by their names alone, and NVIDIA's tools
    drop ONNX's overloads.
    """

    name: str
    inputs: tuple[str, ...]  # `bias?` may be left out
    outputs: tuple[str, ...]  # `indices:int32`; without a type, the type of the first input
    body: Callable[[frozenset[str]], str]  # inputs that are not left out -> nodes of opset 23 in ONNX's text form
    attributes: tuple[str, ...] = ()  # names and types: `heads:int`, `epsilon:float`

    def node_name(self, inputs: Collection[str]) -> str:
        """The name of the node that has only these inputs."""
        missing = [name for name in plain(self.inputs) if name not in inputs]
        return "_".join((self.name, "without", *missing)) if missing else self.name
