"""Quantised graphs: pairs of QuantizeLinear and DequantizeLinear (Q and DQ), placed where TensorRT fuses them.

An input of layers gets one pair, and all its layers read it. A weight is stored as 8-bit numbers with a DQ, one scale
for each output channel in int8 and one for the whole weight in fp8. It lies as the product reads it, so nothing stands
between its DQ and the product. Biases, and all that is no layer, stay as they are.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from tilewright.calib.recipe import FORMATS, KEPT, Recipe
from tilewright.calib.recipe.layers import Layer, Part, StandardGraph
from tilewright.calib.recipe.smoothing import divide
from tilewright.calib.scales.formats import E4M3FN, INT8, Format, of_channels, quantise, symmetric
from tilewright.export.weights.files import find
from tilewright.export.weights.writing import write_tensors
from tilewright.runtime.bundle.manifest import Form
from tilewright.runtime.bundle.program import TensorSpec
from tilewright.runtime.bundle.weights import Reference, location
from tilewright.runtime.errors import InputError

__all__ = ["Codes", "check_layers", "insert", "quantised_weights", "table", "tensors_of"]

TYPES = {INT8.name: ir.DataType.INT8, E4M3FN.name: ir.DataType.FLOAT8E4M3FN}
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Codes:
    """A weight, or a part of one, in 8 bits."""

    reference: Reference
    path: Path  # of the file
    scale: Floats  # [], or one for each output channel


def check_layers(recipe: Recipe, layers: Mapping[str, Layer]) -> None:
    """Refuse a recipe that names a layer which the graphs do not have, or gives a layer other inputs."""
    if unknown := sorted(recipe.layers.keys() - layers.keys()):
        raise InputError(
            f"layer {unknown[0]!r} of the recipe is none of this bundle's {len(layers)}; correct its name, or make the"
            " recipe anew"
        )
    for name in sorted(recipe.quantised):
        inputs = tuple(part.name for part in layers[name].parts)
        if inputs != recipe.layers[name].inputs:
            raise InputError(f"layer {name!r} of the recipe reads {', '.join(inputs)}; correct its inputs")


def tensors_of(recipe: Recipe) -> set[str]:
    """The observed tensors that the recipe's layers read."""
    return {name.partition("[")[0] for layer in recipe.layers.values() for name in layer.inputs}


def quantised_weights(graphs: Mapping[str, StandardGraph], recipe: Recipe, folder: Path, name: str) -> dict[str, Codes]:
    """Write the weights of all layers in 8 bits into a file, one after the other; returns them by layer and part."""
    layers = {n: layer for g in graphs.values() for n, layer in g.layers(tensors_of(recipe)).items()}
    check_layers(recipe, layers)
    format, scales = FORMATS[recipe.format], dict[str, Floats]()
    places = {layers[n].key(part): (layers[n], part) for n in sorted(recipe.quantised) for part in layers[n].parts}
    specs = {key: TensorSpec(format.name, layer.part_shape(part)) for key, (layer, part) in places.items()}

    def tensors() -> Iterator[bytes]:
        for key, (layer, part) in places.items():
            numbers = graphs[layer.name.partition("/")[0]].numbers(layer)
            if layer.kind == "linear":
                numbers = numbers[part.rows]
                if factors := recipe.inputs[part.name].factors:
                    numbers = numbers * np.asarray(factors, np.float32)[:, None]
            scaling = _scaling(format, numbers, layer.axis)
            scales[key] = scaling.scale
            yield quantise(numbers, scaling).tobytes()

    write_tensors(folder / f"{name}.safetensors", specs, tensors(), "quantised by tilewright")
    if not specs:
        return {}
    stored = find(folder).tensors.items()
    return {key: Codes(replace(r, folder=name), folder / r.file, scales[key]) for key, r in stored}


def _scaling(format: Format, numbers: Floats, axis: int) -> Any:
    if format is INT8:
        return of_channels(format, numbers, axis)
    return symmetric(format, np.abs(numbers).max(initial=0.0))


def insert(graph: StandardGraph, recipe: Recipe, codes: Mapping[str, Codes], form: Form | None = None) -> Any:
    """A copy of a component's graph whose layers compute in 8 bits as the recipe says."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    from tilewright.export.graph.rewrites.forget_shapes import forget_shapes

    form, graph = form or Form(FORMATS[recipe.format].name), graph.copy()
    layers = {n: layer for n, layer in graph.layers(tensors_of(recipe)).items() if n in recipe.layers}
    layers = {n: layer for n, layer in layers.items() if recipe.layers[n].weight != KEPT}
    if not form.convolutions:
        layers = {n: layer for n, layer in layers.items() if layer.kind == "linear"}
    inserted = _Inserted(graph, recipe, codes, form)
    for name in dict.fromkeys(part.name for layer in layers.values() for part in layer.parts):
        if factors := recipe.inputs[name].factors:
            readers = [layer for layer in layers.values() if any(part.name == name for part in layer.parts)]
            if not divide(graph, readers, np.asarray(factors, np.float32)):
                inserted.undivided.add(name)
    for layer in layers.values():
        inserted.layer(layer)
    RemoveUnusedNodesPass()(graph.model)
    forget_shapes(graph.model)
    return graph.model


class _Inserted:
    """Adds nodes to a graph."""

    def __init__(self, graph: StandardGraph, recipe: Recipe, codes: Mapping[str, Codes], form: Form) -> None:
        self.graph, self.recipe, self.codes, self.form = graph, recipe, codes, form
        self.format = FORMATS[recipe.format]
        self.pairs: dict[tuple[Any, str], Any] = {}  # value and input -> the dequantised value
        self.undivided = set[str]()  # inputs whose smoothing is a node of its own
        self.replaced: dict[Any, Any] = {}  # the result of a layer -> the value in its place

    def layer(self, layer: Layer) -> None:
        """Let a layer compute in 8 bits."""
        if layer.kind == "convolution":
            value = self.replaced.get(layer.parts[0].value, layer.parts[0].value)
            layer.node.replace_input_with(0, self._pair(value, layer.parts[0], layer.node))
            layer.node.replace_input_with(1, self._weight(layer, layer.parts[0]))
            layer.node.name = layer.name
            return
        node, result = layer.node, layer.node.outputs[0]
        sums = []
        for part in layer.parts:
            value = self.replaced.get(part.value, part.value)
            if part.stop is not None and node.op_type == "Gemm":  # which reads matrices
                shape = self.graph.constant(self._name(f"{value.name}.rows"), np.array([-1, part.stop - part.start]))
                value = self._op("Reshape", [value, shape], node, f"{value.name}.matrix")
            factors = [self._pair(value, part, node), self._weight(layer, part)]
            sums.append(self._op("MatMul", factors, node, f"{layer.key(part)}.product"))
            sums[-1].producer().name = layer.key(part)  # backends tell by it what they computed in 8 bits
        total = sums[0]
        bias = [node.inputs[2]] if len(node.inputs) > 2 and node.inputs[2] is not None else []
        for term in (*sums[1:], *bias):
            total = self._op("Add", [total, term], node, f"{result.name}.sum")
        name, total.type, total.shape = result.name, result.type, result.shape
        result.replace_all_uses_with(total, replace_graph_outputs=True)
        self.graph.model.graph.remove(node, safe=True)
        total.name = name
        self.replaced[result] = total

    def _pair(self, value: Any, part: Part, before: Any) -> Any:
        """The value after a Q and a DQ, which all readers with the same range share."""
        if (value, part.name) in self.pairs:
            return self.pairs[value, part.name]
        scaling = self.recipe.inputs[part.name].scaling(self.format, unsigned=self.form.inputs == "uint8")
        stem = f"{value.name}.quantised"
        scale = self.graph.constant(self._name(f"{stem}.scale"), scaling.scale)
        dtype = ir.DataType.UINT8 if scaling.format.name == "uint8" else TYPES[self.format.name]
        zeros = np.asarray(scaling.zero_point, np.float32).astype(dtype.numpy())
        zero = self.graph.constant(self._name(f"{stem}.zero"), zeros)
        first, numbers = self._first(value, before), value
        if part.name in self.undivided:
            factors = (1 / np.asarray(self.recipe.inputs[part.name].factors)).astype(np.float32)
            divisors = self.graph.constant(self._name(f"{stem}.factors"), factors)
            numbers = self._op("Mul", [value, divisors], first, f"{stem}.smoothed")
        codes = self._op("QuantizeLinear", [numbers, scale, zero], first, stem)
        self.pairs[value, part.name] = result = self._op(
            "DequantizeLinear", [codes, scale, zero], first, f"{stem}.back"
        )
        return result

    def _first(self, value: Any, before: Any) -> Any:
        """The first node that reads a value, as others may read the pair too."""
        readers = {use.node for use in value.uses()}
        if len(readers) < 2:
            return before
        return next(node for node in self.graph.model.graph if node in readers)

    def _weight(self, layer: Layer, part: Part) -> Any:
        """The dequantised weight."""
        key = layer.key(part)
        codes = self.codes[key]
        name = self._name(f"{key.partition('/')[2]}.{self.format.name}")
        r = codes.reference
        stored = ir.Value(name=name, shape=ir.Shape(r.shape), type=ir.TensorType(TYPES[self.format.name]))
        place = location(r)
        stored.const_value = ir.ExternalTensor(
            place, r.offset, r.length, TYPES[self.format.name], shape=ir.Shape(r.shape), name=name
        )
        self.graph.model.graph.register_initializer(stored)
        scale = self.graph.constant(self._name(f"{name}.scale"), codes.scale)
        axis = {"axis": layer.axis} if codes.scale.ndim else {}
        return self._op("DequantizeLinear", [stored, scale], layer.node, f"{name}.back", **axis)

    def _op(self, kind: str, inputs: list[Any], before: Any, name: str, **attributes: int) -> Any:
        node = ir.node(kind, inputs, attributes=attributes, num_outputs=1)
        node.outputs[0].name = self._name(name)
        self.graph.model.graph.insert_before(before, node)
        return node.outputs[0]

    def _name(self, name: str) -> str:
        """A name that no other value has."""
        number, used = 1, self.graph.named
        while (free := name if number == 1 else f"{name}.{number}") in used:
            number += 1
        used.add(free)
        return free


def table(codes: Mapping[str, Codes], model: Any, references: Mapping[str, Reference]) -> dict[str, Reference]:
    """Initializer -> its bytes, for a quantised graph."""
    stored = {(location(c.reference), c.reference.offset): c.reference for c in codes.values()}
    read = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            read[name] = references.get(name) or stored[str(tensor.location), int(tensor.offset or 0)]
    return read
