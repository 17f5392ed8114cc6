"""Inputs of a call, put together from the rows of its nodes; and its outputs, taken apart again."""

from typing import Any

import numpy as np

from tilewright.runtime.execute.devices import Device
from tilewright.runtime.execute.queue import Batch
from tilewright.runtime.execute.values import Outputs, on_host

__all__ = ["Feeds"]


class Feeds:
    """Moves values to devices. Constants are moved once."""

    def __init__(self) -> None:
        self.uploads: dict[tuple[int, int], tuple[Any, Any]] = {}  # (device, constant) -> the constant, its buffer

    def keep(self, batch: Batch, target: str, result: Any, outputs: list[Outputs]) -> None:
        for i, (work, block, tile) in enumerate(batch.nodes):
            array = result if len(batch.nodes) == 1 else on_host(result)[i : i + 1]
            if target in work.graph.program.grids:
                outputs[i].parts[target] = work.owner.values.weighted(block, target, tile, array)
            else:
                outputs[i].values[target] = array

    def input(self, device: Device, batch: Batch, source: str, outputs: list[Outputs]) -> Any:
        """An input of a call, as one buffer of the device: a row for each node, or one that all nodes share."""
        nodes = batch.nodes[:1] if source[0] == "#" else batch.nodes  # nodes of a batch share their constants
        rows = [
            work.owner.values.feed(block, tile, source, its)
            for (work, block, tile), its in zip(nodes, outputs, strict=False)
        ]
        value, of_tile = rows[0]
        if len(rows) > 1 and (of_tile or not all(row is value or _same(value, row) for row, _ in rows)):
            return device.put(np.concatenate([on_host(row) for row, _ in rows]))
        if source[0] == "#":
            key = (id(device), id(value))
            if key not in self.uploads:
                self.uploads[key] = (value, device.put(value))
            return self.uploads[key][1]
        if getattr(value, "holder", None) is device:
            return value
        array = on_host(value)
        contiguous = not isinstance(array, np.ndarray) or array.flags.c_contiguous
        return device.put(array if contiguous else np.ascontiguousarray(array))


def _same(one: Any, other: Any) -> bool:
    """Whether two rows are equal that are not one object. Buffers of a device are not, as looking at them is costly."""
    if not (isinstance(one, np.ndarray) and isinstance(other, np.ndarray)):
        return False
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    place = one.__array_interface__["data"], one.strides
    return place == (other.__array_interface__["data"], other.strides) or np.array_equal(one, other)
