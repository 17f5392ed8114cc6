"""Smoothing: channels of an input that are much larger than others are divided by a factor, and the rows of the weight
that they meet are multiplied by it. The result stays the same, and the input is easier to quantise.

The division costs nothing where it goes into the scale and shift of a normalisation, or into a modulation, which is as
small as one token. Inputs that come from anywhere else are not smoothed.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from tilewright.calib.observe.observers import Observations
from tilewright.calib.recipe.layers import Layer, StandardGraph
from tilewright.export.graph.rewrites.fold_weights import computed

__all__ = ["divide", "smoothing_factors"]

NORMS = ("LayerNormalization", "RMSNormalization")
LEAST = 1e-5  # of a magnitude, so that channels of zeros get a factor too
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Place:
    """An input of a node that takes the division."""

    node: Any
    input: int


def smoothing_factors(
    graphs: Mapping[str, StandardGraph], layers: Mapping[str, Layer], observed: Observations, strength: float
) -> dict[str, Floats]:
    """Input of layers -> the factor of each of its channels, where they can be divided."""
    factors: dict[str, Floats] = {}
    for component, graph in graphs.items():
        readers: dict[str, list[Layer]] = {}
        for layer in layers.values():
            if layer.name.startswith(f"{component}/"):
                for part in layer.parts:
                    readers.setdefault(part.name, []).append(layer)
        for name, of_input in readers.items():
            channels = observed.over(of_input[0].parts[0].tensor).channels
            if channels is None or not _foldable(graph, of_input, channels.size):
                continue
            rows = np.max([np.abs(graph.numbers(layer)).max(1) for layer in of_input], 0)
            powers = np.maximum(channels, LEAST) ** strength / np.maximum(rows, LEAST) ** (1 - strength)
            factors[name] = np.asarray(powers / np.exp(np.log(powers).mean()), np.float32)
    return factors


def divide(graph: StandardGraph, readers: Collection[Layer], factors: Floats) -> bool:
    """Divide the input of these layers, channel by channel, where it costs nothing.

    Returns whether it did: it cannot if others read the input too, such as layers that were returned to float.
    """
    places = _places(graph, readers, factors.size)
    for place in places or ():
        _divide(graph, place, factors)
    return places is not None


def _foldable(graph: StandardGraph, readers: Collection[Layer], channels: int) -> bool:
    linear = all(layer.kind == "linear" and len(layer.parts) == 1 for layer in readers)
    return linear and _places(graph, readers, channels) is not None


def _places(graph: StandardGraph, readers: Collection[Layer], channels: int) -> list[_Place] | None:
    """The places that take the division; none if there is a value on the way that others read too."""
    nodes = [layer.node for layer in readers]
    values = {layer.parts[0].value for layer in readers}
    return _joint(_before(graph, value, nodes, channels) for value in values)


def _before(graph: StandardGraph, value: Any, readers: Collection[Any], channels: int) -> list[_Place] | None:
    others = [use for use in value.uses() if use.node not in readers and use.node.op_type != "Shape"]
    if value.is_graph_output() or others:
        return None
    node = value.producer()
    if node is None or node.domain or not _wide(value, channels):
        return None

    def input_of(place: int) -> list[_Place] | None:
        return _before(graph, node.inputs[place], [node], channels)

    if node.op_type in NORMS:
        shifts = [i for i in (1, 2) if i < len(node.inputs) and node.inputs[i] is not None]
        last = node.attributes.get_int("axis", -1) in (-1, len(value.shape) - 1)
        fits = last and bool(shifts) and all(_constant(node.inputs[i]) for i in shifts)
        return [_Place(node, i) for i in shifts] if fits else None
    if node.op_type in ("Reshape", "Identity", "Slice", "Transpose", "Squeeze", "Unsqueeze"):
        moved = node.op_type == "Transpose" and node.attributes.get_ints("perm")[-1] != len(value.shape) - 1
        return input_of(0) if _wide(node.inputs[0], channels) and not moved else None
    if node.op_type == "Concat" and node.attributes.get_int("axis") not in (-1, len(value.shape) - 1):
        return _joint(input_of(i) for i in range(len(node.inputs)))
    if node.op_type == "Add":
        return _joint(input_of(i) or _small(node, i, channels) for i in (0, 1))
    if node.op_type == "Mul":
        return next((places for i in (0, 1) if (places := input_of(i) or _small(node, i, channels))), None)
    return None


def _joint(parts: Any) -> list[_Place] | None:
    """All places, or none if one part has none."""
    places: list[_Place] = []
    for part in parts:
        if part is None:
            return None
        places += part
    return list(dict.fromkeys(places))


def _wide(value: Any, channels: int) -> bool:
    return value is not None and value.shape is not None and len(value.shape) > 0 and value.shape[-1] == channels


def _small(node: Any, place: int, channels: int) -> list[_Place] | None:
    """The input of a node as a place for the division, if it is as small as one token."""
    value = node.inputs[place]
    small = _wide(value, channels) and (len(value.shape) < 2 or value.shape[-2] == 1)
    return [_Place(node, place)] if small else None


def _constant(value: Any) -> bool:
    node = value.producer()
    return value.is_initializer() if node is None else node.op_type == "Cast" and _constant(node.inputs[0])


def _divide(graph: StandardGraph, place: _Place, factors: Floats) -> None:
    value, whole = place.node.inputs[place.input], graph.model.graph
    name = _free(f"{value.name}.smoothed", lambda n: n in whole.initializers or n in graph.named)
    graph.named.add(name)
    if _constant(value):
        numbers = np.asarray(computed(value, graph.reader, graph.opset), np.float32) / factors
        place.node.replace_input_with(place.input, graph.constant(name, numbers))
        return
    inverse = graph.constant(f"{name}.factors", (1 / factors).astype(np.float32))
    product = ir.node("Mul", [value, inverse], num_outputs=1)
    product.outputs[0].name, product.outputs[0].type, product.outputs[0].shape = name, value.type, value.shape
    whole.insert_before(place.node, product)
    place.node.replace_input_with(place.input, product.outputs[0])


def _free(name: str, used: Callable[[str], bool]) -> str:
    number = 1
    while used(free := name if number == 1 else f"{name}.{number}"):
        number += 1
    return free
