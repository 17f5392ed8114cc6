"""Devices for tests: one that counts transfers, and one that fails as it is told."""

import random
import time
from threading import Lock

import numpy as np

from tilewright.runtime.errors import ResourceError

__all__ = ["Apart", "Failing", "Lodged"]


class Lodged:
    """An array that only its device may read."""

    def __init__(self, holder, array):
        self.holder, self._array = holder, array


class Apart:
    """A device with memory of its own: what goes up and comes down is counted by shape."""

    def __init__(self, name, engines):
        self.name, self.engines = name, engines
        self.up, self.down = [], []
        self.lock = Lock()

    def put(self, array):
        self.up.append(np.shape(array))
        return Lodged(self, np.array(array))

    def get(self, buffer):
        assert buffer.holder is self
        self.down.append(buffer._array.shape)
        return buffer._array.copy()

    def finite(self, buffer):
        return buffer._array.dtype.kind != "f" or bool(np.isfinite(buffer._array).all())

    def run(self, component, inputs, wanted):
        assert all(isinstance(b, Lodged) and b.holder is self for b in inputs.values())
        with self.lock:
            outputs = self.engines[component].run({n: b._array for n, b in inputs.items()}, wanted)
        return {name: Lodged(self, np.asarray(output)) for name, output in outputs.items()}

    def close(self, components=None):
        pass


class Failing:
    """A CPU device that raises, hangs, gives NaN or has no memory, at random calls."""

    def __init__(self, device, seed, faults, chance=0.05, hang_s=0.5):
        self.device, self.random, self.faults = device, random.Random(seed), faults
        self.chance, self.hang_s = chance, hang_s
        self.name = device.name
        self.put, self.get, self.finite, self.close = device.put, device.get, device.finite, device.close

    def run(self, component, inputs, wanted):
        fault = self.random.choice(self.faults) if self.random.random() < self.chance else None
        if fault == "raise":
            raise RuntimeError(f"{self.name} fell off the bus")
        if fault == "memory":
            raise ResourceError(f"{self.name}: out of memory")
        if fault == "hang":
            time.sleep(self.hang_s)
        outputs = self.device.run(component, inputs, wanted)
        if fault == "nan":
            return {name: np.full_like(output, np.nan) for name, output in outputs.items()}
        return outputs
