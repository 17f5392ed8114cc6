"""Sizes of values in a graph: numbers, and expressions of the free sizes. Equal expressions are equal sizes."""

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

__all__ = ["Sizes", "constant", "rows_of", "sizes_of", "static", "target_of"]

Sizes = tuple[int | str, ...]


def sizes_of(value: ir.Value | None) -> Sizes | None:
    """The sizes of a value, or none if one of them is unknown."""
    if value is None:
        return None
    tensor = value.const_value
    shape = value.shape if value.shape is not None else tensor.shape if tensor is not None else None
    if shape is None:
        return None
    sizes = tuple(d if isinstance(d, int) else d.value for d in shape)
    return None if None in sizes else sizes  # type: ignore[return-value]


def target_of(sizes: Sizes, result: Sizes) -> list[int] | None:
    """The constant that makes a Reshape give `result` from `sizes`, or none if there is no such constant."""
    target = [d if isinstance(d, int) else 0 if d == _at(sizes, i) else -1 for i, d in enumerate(result)]
    return target if target.count(-1) <= 1 else None


def _at(sizes: Sizes, axis: int) -> int | str | None:
    return sizes[axis] if axis < len(sizes) else None


def static(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of a constant that lies in the graph, or none. The weights of a network are no constants."""
    tensor = value.const_value if value is not None and value.is_initializer() else None
    return None if tensor is None or isinstance(tensor, ir.ExternalTensor) else tensor.numpy()


def constant(graph: ir.Graph, numbers: Sequence[int]) -> ir.Value:
    """The initializer of the graph with these integers."""
    name = f"int64.{'_'.join(map(str, numbers))}"
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(numbers, np.int64), name=name)
        shape, kind = ir.Shape([len(numbers)]), ir.TensorType(tensor.dtype)
        graph.register_initializer(ir.Value(name=name, shape=shape, type=kind, const_value=tensor))
    return graph.initializers[name]


def rows_of(sizes: Sizes) -> int | str:
    """The number of rows, when all axes before the last become one."""
    number = math.prod(d for d in sizes[:-1] if isinstance(d, int))
    names = [d if d.isidentifier() else f"({d})" for d in sizes[:-1] if isinstance(d, str)]
    return "*".join([*([str(number)] if number != 1 else []), *names]) if names else number
