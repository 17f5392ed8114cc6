"""Where engines run: a device holds buffers, and runs one call at a time.

A buffer of the CPU is a NumPy array. A buffer of another device has a `shape`, and that device as its `holder`. It
stays on its device until another device reads it, or until the host joins tiles.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from threading import Lock, get_ident
from typing import Any, Protocol

import numpy as np

from tilewright.runtime.engines import Engine
from tilewright.runtime.engines.machine import compute_capability, usable_cores
from tilewright.runtime.errors import EnvironmentMismatch, UsageError

__all__ = ["CpuDevice", "Device", "OpenEngines", "cpu_names", "device_names", "finite_only"]


class Device(Protocol):
    """A place with memory where engines run.

    A device may also have `stop()`, which any thread may call: the call that runs, if there is one, raises soon. It may
    have `begin(rows)`, which gets the step and the tile of each row of the call that comes next, and `lost`, which is
    true if it will never run anything again.
    """

    name: str  # "cpu:0"

    def put(self, array: Any) -> Any:
        """A buffer here with the values of a NumPy array."""
        ...

    def get(self, buffer: Any) -> Any:
        """The values of a buffer as a NumPy array."""
        ...

    def finite(self, buffer: Any) -> bool:
        """Whether a buffer holds finite numbers only."""
        ...

    def run(self, component: str, inputs: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Any]:
        """The outputs of a component for buffers of this device; they belong to the caller. One call runs at a time.

        An error is a fault of the device. MemoryError and ResourceError mean too little memory for so large a call.
        """
        ...

    def close(self, components: Iterable[str] | None = None) -> None:
        """Give back the memory of these components' engines, or of all."""
        ...


class OpenEngines(Mapping[str, Engine]):
    """The engine of each component, opened on its first use."""

    def __init__(self, names: Iterable[str], open_engine: Callable[[str], Engine]) -> None:
        self.names, self.open_engine = sorted(names), open_engine
        self.opened: dict[str, Engine] = {}
        self.lock = Lock()

    def __getitem__(self, name: str) -> Engine:
        with self.lock:
            if name not in self.opened:
                self.opened[name] = self.open_engine(name)
            return self.opened[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def close(self, names: Iterable[str]) -> None:
        """Close some engines. They are opened again on their next use."""
        for name in names:
            if engine := self.opened.pop(name, None):
                engine.close()


def finite_only(array: Any) -> bool:
    """Whether an array holds finite numbers only. If it does, one pass over them shows it."""
    if array.dtype.kind != "f":
        return True
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.sum(array, dtype=np.float32)  # allocates nothing; a finite sum proves that all numbers are finite
    return bool(np.isfinite(total)) or bool(np.isfinite(array).all())


class CpuDevice:
    """Processor cores that run engines."""

    def __init__(self, name: str, engines: Mapping[str, Engine]) -> None:
        self.name, self.engines = name, engines
        self.running: tuple[Engine, int] | None = None  # the engine of the call that runs, and its thread

    def put(self, array: Any) -> Any:
        """The array itself."""
        return array

    def get(self, buffer: Any) -> Any:
        """The buffer itself."""
        return buffer

    def finite(self, buffer: Any) -> bool:
        """Whether all numbers are finite."""
        return finite_only(buffer)

    def run(self, component: str, inputs: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Any]:
        """Run the component's engine."""
        engine = self.engines[component]
        self.running = engine, get_ident()
        try:
            return engine.run(inputs, outputs)
        finally:
            self.running = None

    def stop(self) -> None:
        """End the call that runs, if its engine can."""
        if running := self.running:
            stop = getattr(running[0], "stop", None)
            if stop:
                stop(running[1])

    def close(self, components: Iterable[str] | None = None) -> None:
        """Close engines. No call may be using them."""
        if isinstance(self.engines, OpenEngines):
            self.engines.close(self.engines if components is None else components)


def device_names(names: Sequence[str]) -> list[str]:
    """Check the names of devices: cores of the CPU, or the first GPU alone, as all run the same engines."""
    several = isinstance(names, Sequence) and not isinstance(names, str | bytes)
    if not several or not any(str(name).startswith("cuda") for name in names):
        return cpu_names(names)
    if list(names) != ["cuda:0"]:
        raise UsageError(
            f"devices={','.join(map(str, names))!r}: a GPU runs alone, and it must be the first; use cuda:0"
        )
    if compute_capability() is None:
        raise EnvironmentMismatch("device 'cuda:0': no NVIDIA GPU with its driver is here; use cpu:0")
    return ["cuda:0"]


def cpu_names(names: Sequence[str]) -> list[str]:
    """Check the names of CPU devices: each exists, and is named once."""
    cores = usable_cores()
    if isinstance(names, str | bytes) or not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
        raise UsageError(f'devices={names!r} is not a list of names; use ["cpu:0"]')
    for name in names:
        kind, _, number = name.partition(":")
        if kind != "cpu" or not number.isdecimal() or number != str(int(number)):
            raise UsageError(f"device {name!r} is unknown; there are cpu:0 to cpu:{cores - 1}")
        if int(number) >= cores:
            raise UsageError(f"device {name!r}: there are {cores} cores; use cpu:0 to cpu:{cores - 1}")
        if list(names).count(name) > 1:
            raise UsageError(f"device {name!r} is named twice; name it once")
    if not names:
        raise UsageError("no device is named; use cpu:0")
    return list(names)
