"""Devices for tests: one counts transfers, one fails at random, one hangs, one is lost, one has little memory."""

import random
import time
from threading import Event, Lock

import numpy as np

from tilewright.runtime.errors import ResourceError

__all__ = ["Apart", "Cramped", "Failing", "Hanging", "Lodged", "Lost", "Stopped"]


class Lodged:
    """An array that only its device may read."""

    def __init__(self, holder, array):
        self.holder, self._array, self.shape = holder, array, array.shape


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


class Over:
    """A device over another one."""

    def __init__(self, device):
        self.device, self.name = device, device.name
        self.put, self.get, self.finite, self.close = device.put, device.get, device.finite, device.close

    def stop(self):
        if stop := getattr(self.device, "stop", None):
            stop()


class Hanging(Over):
    """Hangs in its call number `at`, until `released`; then it goes on as if nothing had been."""

    def __init__(self, device, at=1):
        super().__init__(device)
        self.calls, self.at, self.hangs, self.released, self.late = 0, at, Event(), Event(), Event()

    def run(self, component, inputs, wanted):
        self.calls += 1
        if self.calls != self.at:
            return self.device.run(component, inputs, wanted)
        self.hangs.set()
        self.released.wait(60)
        outputs = self.device.run(component, inputs, wanted)
        self.late.set()
        return outputs


class Lost(Over):
    """Is lost in its call number `at`."""

    def __init__(self, device, at=1):
        super().__init__(device)
        self.calls, self.at = 0, at

    @property
    def lost(self):
        return self.calls >= self.at

    def run(self, component, inputs, wanted):
        self.calls += 1
        if self.lost:
            raise RuntimeError(f"{self.name} is lost")
        return self.device.run(component, inputs, wanted)


class Cramped(Over):
    """Has memory for so many pixels of images in a call."""

    def __init__(self, device, room_px, error=MemoryError):
        super().__init__(device)
        self.room_px, self.error, self.refused = room_px, error, []

    def run(self, component, inputs, wanted):
        shapes = [np.shape(a) for a in inputs.values() if np.ndim(a) == 4]
        if any(batch * height * width > self.room_px for batch, _, height, width in shapes):
            self.refused.append(shapes)
            raise self.error(f"{self.name}: no room")
        return self.device.run(component, inputs, wanted)


class Failing(Over):
    """A CPU device that raises, hangs, gives NaN or has no memory, at random calls."""

    def __init__(self, device, seed, faults, chance=0.05, hang_s=0.5):
        super().__init__(device)
        self.random, self.faults, self.chance, self.hang_s = random.Random(seed), faults, chance, hang_s

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


class Stopped(Over):
    """Runs each call until it is told to stop, or, once `released`, as its device does."""

    def __init__(self, device):
        super().__init__(device)
        self.calls, self.stops = 0, 0
        self.runs, self.told, self.ended, self.released = Event(), Event(), Event(), Event()

    def run(self, component, inputs, wanted):
        self.calls += 1
        self.told.clear()
        self.runs.set()
        while not self.released.is_set():
            if self.told.wait(0.01):
                self.ended.set()
                raise RuntimeError(f"{self.name} was told to stop")
        return self.device.run(component, inputs, wanted)

    def stop(self):
        self.stops += 1
        self.told.set()
