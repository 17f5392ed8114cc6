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
    """A node `tilewright::name`. Attributes are in `attributes` with their types (`int`, `float`)."""

    name: str
    inputs: tuple[str, ...]  # `bias?` may be left out
    outputs: tuple[str, ...]  # `indices:int32`; without a type, that of the first input
    body: Callable[[frozenset[str]], str]  # nodes of opset 23 in ONNX's text form, for the inputs that are given
    attributes: tuple[str, ...] = ()

    def variant(self, given: Collection[str]) -> str:
        """The name of its form with these inputs: empty where none is left out."""
        missing = [name for name in plain(self.inputs) if name not in given]
        return f"without_{'_'.join(missing)}" if missing else ""
