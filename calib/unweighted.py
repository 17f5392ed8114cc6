"""A graph in 8 bits without its weights: all layers that can be, with scales of one. It shows where Q and DQ stand."""

from pathlib import Path
from typing import Any

import numpy as np

from tilewright.calib.insertion import Codes, insert
from tilewright.calib.recipe import FORMATS, Entering, LayerRecipe, Recipe
from tilewright.calib.recipe.layers import standard
from tilewright.calib.scales.formats import INT8
from tilewright.export.weights.files import WeightReader
from tilewright.runtime.bundle.manifest import Form
from tilewright.runtime.bundle.weights import Reference

__all__ = ["in_eight_bits"]

NOWHERE = Path("nowhere")


def in_eight_bits(component: str, model: Any, precision: str, form: Form) -> Any:
    """The quantised graph of a portable graph, which is changed too."""
    graph, format = standard(component, model, WeightReader({}, {})), FORMATS[precision]
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    layers = graph.layers(f"{component}/{value.name}" for value in values)
    rows, entering, codes = {}, {}, {}
    for name, layer in layers.items():
        rows[name] = LayerRecipe(format.name, layer.kind, tuple(part.name for part in layer.parts), 0.0)
        for part in layer.parts:
            entering[part.name] = Entering((-1.0, 1.0), "absmax")
            key = layer.key(part)
            scale = np.ones(layer.shape[layer.axis] if format is INT8 else (), np.float32)
            shape = layer.part_shape(part)
            place = Reference(f"{key}.{precision}", format.name, shape, 0, int(np.prod(shape)), precision)
            codes[key] = Codes(place, NOWHERE, scale)
    return insert(graph, Recipe(1, "", "0" * 64, precision, rows, entering), codes, form)
