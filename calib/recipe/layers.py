"""The layers of a graph that can compute in 8 bits: matrix products and convolutions with a weight.

A layer has the name of its weight. If several layers read the same weight, the second one's name ends with `:2`, and
so on. A layer that reads two tensors joined along their channels has an input for each of them, because their numbers
may differ in size.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from tilewright.export.graph.rewrites.fold_weights import MOVES, computed
from tilewright.export.weights.files import WeightReader
from tilewright.runtime.bundle.read import Bundle

__all__ = ["Layer", "Part", "StandardGraph", "standard", "standard_graph"]

SAME_NUMBERS = {"Identity", "Reshape", "Squeeze", "Unsqueeze"}
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Part:
    """A tensor that enters a layer, and the rows of the layer's weight that it meets."""

    name: str  # of the observed tensor, with a range of channels if they are not all
    tensor: str  # the observed tensor
    value: Any  # the value in the graph
    start: int = 0
    stop: int | None = None

    @property
    def rows(self) -> slice:
        """The channels of the observed tensor, and the rows of the weight."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Layer:
    """One layer of a component."""

    name: str  # COMPONENT/WEIGHT
    kind: str  # linear | convolution
    node: Any
    parts: tuple[Part, ...]
    weight: Any  # the value that the node reads
    shape: tuple[int, ...]  # of the weight: [inputs, outputs], or that of the convolution

    @property
    def axis(self) -> int:
        """The axis of the output channels."""
        return 1 if self.kind == "linear" or self.node.op_type == "ConvTranspose" else 0

    def key(self, part: Part) -> str:
        """The name of the weight that meets a part."""
        return self.name if part.stop is None else f"{self.name}[{part.start}:{part.stop}]"

    def part_shape(self, part: Part) -> tuple[int, ...]:
        """The shape of the weight that meets a part."""
        return self.shape if part.stop is None else (part.stop - part.start, self.shape[1])

    def work(self, elements: int) -> float:
        """The multiplications of the layer, for so many numbers that entered it."""
        if self.kind == "linear":
            return elements * self.shape[1]
        each = float(np.prod(self.shape[2:], dtype=np.float64))
        if self.node.op_type == "ConvTranspose":
            return elements * self.shape[1] * each
        strides = self.node.attributes.get_ints("strides") or (1,)
        groups = self.node.attributes.get_int("group", 1)
        return elements * self.shape[0] * each / float(np.prod(strides)) / groups


class StandardGraph:
    """A component's graph in standard operators, with its weights and its layers."""

    def __init__(self, component: str, model: Any, reader: WeightReader) -> None:
        self.component, self.model, self.reader = component, model, reader
        self.opset = model.opset_imports[""]
        self.named = set(model.graph.initializers) | {v.name for node in model.graph for v in node.outputs}

    def numbers(self, layer: Layer) -> Floats:
        """The weight of a layer: [inputs, outputs], or as the convolution reads it."""
        array = np.asarray(computed(layer.weight, self.reader, self.opset), np.float32)
        return array.T if _turned(layer.node) else array

    def layers(self, observed: Iterable[str]) -> dict[str, Layer]:
        """The layers whose inputs are among these tensors, by name."""
        layers, prefix = dict[str, Layer](), f"{self.component}/"
        seen = {name.removeprefix(prefix) for name in observed if name.startswith(prefix)}
        for node in self.model.graph:
            if (weight := _weight(node)) is None:
                continue
            stem = prefix + _source(weight)
            number = 1 + sum(name.partition(":")[0] == stem for name in layers)
            name, shape = stem if number == 1 else f"{stem}:{number}", self._shape(node, weight)
            parts = tuple(_parts(node.inputs[0], seen, prefix, shape[0] if node.op_type in PRODUCTS else None))
            if parts:
                kind = "linear" if node.op_type in PRODUCTS else "convolution"
                layers[name] = Layer(name, kind, node, parts, weight, shape)
        return layers

    def _shape(self, node: ir.Node, weight: ir.Value) -> tuple[int, ...]:
        """The shape of a weight, without its numbers where the graph tells it."""
        known = [size for size in weight.shape or () if isinstance(size, int)]
        whole = weight.shape is not None and len(known) == len(weight.shape)
        sizes = tuple(known) if whole else _shape_of(weight, self)
        return sizes[::-1] if _turned(node) else sizes

    def constant(self, name: str, numbers: Any) -> Any:
        """A new initializer with these numbers."""
        tensor = ir.tensor(numbers, name=name)
        shape = ir.Shape(list(np.shape(numbers)))
        value = ir.Value(name=name, const_value=tensor, shape=shape, type=ir.TensorType(tensor.dtype))
        self.model.graph.register_initializer(value)
        return value

    def copy(self) -> "StandardGraph":
        """The same graph, which may be changed."""
        return StandardGraph(self.component, self.model.clone(), self.reader)


PRODUCTS = ("MatMul", "Gemm")
CONVOLUTIONS = ("Conv", "ConvTranspose")


def standard_graph(bundle: Bundle, component: str, weights_dir: Path | None = None) -> StandardGraph:
    """The portable graph of a component in standard operators."""
    model = ir.load(bundle.path(bundle.manifest.components[component].graph))
    references = bundle.weights.tensors.get(component, {})
    folders = {name: bundle.folder(name, weights_dir) for name in bundle.weights.folders_of(component)}
    return standard(component, model, WeightReader(references, folders))


def standard(component: str, model: Any, reader: WeightReader) -> StandardGraph:
    """A portable graph in standard operators. It is changed in place."""
    from onnx_ir.passes.common import ShapeInferencePass

    from tilewright.export.graph.ops import inline
    from tilewright.export.graph.rewrites.fold import fold

    if model.functions:
        inline(model)
    ShapeInferencePass(data_prop=True)(model)  # some weights are cut to sizes that only shapes tell
    fold(model)
    return StandardGraph(component, model, reader)


def _weight(node: ir.Node) -> ir.Value | None:
    """The weight of a node that may be a layer."""
    if node.domain or node.op_type not in PRODUCTS + CONVOLUTIONS:
        return None
    weight, x = node.inputs[1], node.inputs[0]
    plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    plain = plain and not node.attributes.get_int("transA", 0)
    if weight is None or x is None or not plain or not _from_weights(weight) or _from_weights(x):
        return None
    # a product with a table of two axes; others are no layers, and neither are numbers that the graph holds itself
    two = node.op_type in CONVOLUTIONS or weight.shape is None or len(weight.shape) == 2
    return weight if two and _source(weight) else None


def _turned(node: ir.Node) -> bool:
    """Whether a node reads its weight as [outputs, inputs]."""
    return node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))


def _from_weights(value: ir.Value) -> bool:
    """Whether a value is a weight, with its numbers moved or cast at most."""
    if value.is_initializer():
        return True
    node = value.producer()
    moved = node is not None and node.op_type in MOVES and not node.domain
    return moved and node is not None and all(v is None or _from_weights(v) for v in node.inputs)


def _source(value: ir.Value) -> str:
    """The name of the first initializer with several axes that a value is made of."""
    node = value.producer()
    if node is None:
        return str(value.name) if value.shape is not None and len(value.shape) > 1 else ""
    return next((name for v in node.inputs if v is not None and (name := _source(v))), "")


def _shape_of(value: ir.Value, graph: StandardGraph) -> tuple[int, ...]:
    node = value.producer()
    if node is not None and node.op_type in ("Cast", "Identity") and node.inputs[0] is not None:
        return _shape_of(node.inputs[0], graph)
    if node is None and value.shape is not None:
        return tuple(int(size) for size in value.shape if isinstance(size, int))
    return tuple(computed(value, graph.reader, graph.opset).shape)


def _parts(value: Any, seen: set[str], prefix: str, rows: int | None) -> Iterator[Part]:
    """The observed tensors that a layer reads. `rows` of its weight; none: a convolution."""
    tensor = _traced(value, lambda v: v.name in seen)
    if tensor is None:
        return
    name = prefix + str(tensor.name)
    sizes = _joined(value, rows) if rows else []
    if not sizes:
        yield Part(name, name, value)
    start = 0
    for part, size in sizes:
        yield Part(f"{name}[{start}:{start + size}]", name, part, start, start + size)
        start += size


def _traced(value: Any, found: Callable[[Any], bool]) -> Any:
    """The nearest value with the same numbers, for which `found` holds."""
    while value is not None and not found(value):
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type in SAME_NUMBERS and not node.domain else None
    return value


def _joined(value: Any, rows: int) -> list[tuple[Any, int]]:
    """The values that are joined along their channels into this one, with the number of channels of each."""

    def by_concat(v: Any) -> bool:
        node = v.producer()
        return node is not None and node.op_type == "Concat"

    concat = _traced(value, by_concat)
    if concat is None:
        return []
    node = concat.producer()
    ranks = {len(v.shape) for v in (*node.inputs, concat) if v is not None and v.shape is not None}
    axis = node.attributes.get_int("axis")
    if len(ranks) != 1 or axis not in (-1, ranks.pop() - 1) or len(node.inputs) < 2:
        return []
    sizes: list[Any] = [v.shape[-1] if v is not None and v.shape is not None else None for v in node.inputs]
    if not all(isinstance(size, int) for size in sizes) or sum(sizes) != rows:
        return []
    return list(zip(node.inputs, sizes, strict=True))
