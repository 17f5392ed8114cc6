"""The names and shapes of a network's parameters, taken from a network without storage and cached."""

import json
import math
from collections.abc import Mapping

from tilewright.export.build.cache import Stage, filling, write
from tilewright.export.build.code import code
from tilewright.export.build.versions import TRACERS, versions
from tilewright.export.system import ComponentSpec

__all__ = ["Shapes", "count", "parameter_shapes"]

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(spec: ComponentSpec) -> Shapes:
    """The shape of every parameter of a component."""
    inputs = {"recipe": spec.recipe} | code("tilewright.export.graph.trace", spec.module) | versions(*TRACERS)
    file = "parameters.json"
    directory = Stage("parameters", inputs, lambda directory: None).directory
    with filling(directory) as folder:
        if folder:
            from tilewright.export.graph.trace import parameter_specs

            shapes = {name: list(spec.shape) for name, spec in parameter_specs(spec).items()}
            write(folder / file, json.dumps(shapes, sort_keys=True))
    return {name: tuple(shape) for name, shape in json.loads((directory / file).read_text()).items()}


def count(parameters: Mapping[str, Shapes]) -> int:
    """How many numbers all parameters have."""
    return sum(math.prod(shape) for shapes in parameters.values() for shape in shapes.values())
