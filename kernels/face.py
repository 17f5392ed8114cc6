"""An op's face in ONNX: the node that graphs hold, and what it means in standard operators."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

__all__ = ["DOMAIN", "VERSION", "Face", "plain"]

DOMAIN, VERSION = "tilewright", 1


def plain(names: Iterable[str]) -> list[str]:
    """The names of a face's inputs, outputs or attributes, without marks and types."""
    return [name.split(":")[0].rstrip("?") for name in names]


@dataclass(frozen=True)
class Face:
    """A node `tilewright::name`, or `tilewright::name_without_bias`, which does not take that input.

    An overload would say the same, but TensorRT chooses plugins by name alone, and NVIDIA's tools drop overloads.
    Attributes are in `attributes` with their types (`int`, `float`).
    """

    name: str
    inputs: tuple[str, ...]  # `bias?` may be left out
    outputs: tuple[str, ...]  # `indices:int32`; without a type, that of the first input
    body: Callable[[frozenset[str]], str]  # nodes of opset 23 in ONNX's text form, for the inputs that are given
    attributes: tuple[str, ...] = ()

    def called(self, given: Collection[str]) -> str:
        """The node's name with these inputs, which are all it then takes."""
        missing = [name for name in plain(self.inputs) if name not in given]
        return "_".join((self.name, "without", *missing)) if missing else self.name
