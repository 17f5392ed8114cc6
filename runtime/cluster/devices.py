"""Workers as devices. Constants are sent to a machine once."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from tilewright.runtime.cluster.answers import answers_of
from tilewright.runtime.execute.devices import finite_only

__all__ = ["LARGE", "RemoteDevice"]

LARGE = 64 * 1024  # bytes; smaller arrays travel inside of a call


@dataclass(frozen=True)
class Sent:
    """An array that Ray's object store holds, where each machine fetches it once."""

    array: Any
    reference: Any
    holder: "RemoteDevice"

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the array."""
        shape: tuple[int, ...] = self.array.shape
        return shape


class RemoteDevice:
    """A worker on a machine of the cluster."""

    def __init__(self, name: str, ray: ModuleType, worker: Any) -> None:
        self.name, self.ray, self.worker = name, ray, worker

    def put(self, array: Any) -> Any:
        """The array, in the cluster's object store if it is large."""
        return Sent(array, self.ray.put(array), self) if array.nbytes >= LARGE else array

    def get(self, buffer: Any) -> Any:
        """The array."""
        return buffer.array if isinstance(buffer, Sent) else buffer

    def finite(self, buffer: Any) -> bool:
        """Whether all numbers are finite."""
        return finite_only(self.get(buffer))

    def run(self, component: str, inputs: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Any]:
        """Run the component there. Arrays of the object store cannot be written, so they are copied."""
        values = [value.reference if isinstance(value, Sent) else value for value in inputs.values()]
        answer = self.worker.run.remote(component, list(inputs), list(outputs), *values)
        return {name: array.copy() for name, array in answers_of(self.ray, {self.name: answer})[self.name].items()}

    def stop(self) -> None:
        """End the call that runs, if its engine can."""
        self.worker.stop.remote()

    def close(self, components: Iterable[str] | None = None) -> None:
        """Close engines; without names, end the process."""
        if components is None:
            self.ray.kill(self.worker)
        elif names := list(components):
            self.worker.close.remote(names)
