"""Workers as devices. An array that is used more than once is sent once."""

import itertools
import weakref
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from tilewright.runtime.cluster.answers import LostWorker, answers_of
from tilewright.runtime.cluster.channel import Channel
from tilewright.runtime.cluster.worker import Request
from tilewright.runtime.execute.devices import finite_only

__all__ = ["LARGE", "RemoteDevice"]

LARGE = 64 * 1024  # bytes; smaller arrays are sent with each call


class Kept:
    """An array that a worker keeps from the first call that reads it until this object has gone."""

    def __init__(self, array: Any, number: int, holder: "RemoteDevice") -> None:
        self.array, self.number, self.holder = array, number, holder
        weakref.finalize(self, holder.dropped.append, number).atexit = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the array."""
        shape: tuple[int, ...] = self.array.shape
        return shape


class RemoteDevice:
    """A worker on a machine of the cluster. Without a channel, all values go through Ray."""

    def __init__(self, name: str, ray: ModuleType, worker: Any, channel: Channel | None) -> None:
        self.name, self.ray, self.worker, self.channel = name, ray, worker, channel
        self.numbers = itertools.count()
        self.sent: set[int] = set()  # numbers of the arrays that the worker keeps
        self.dropped: list[int] = []  # numbers that nobody here needs any more
        self.failed = False  # it was lost in a call

    @property
    def lost(self) -> bool:
        """Whether its process has ended, or its machine does not answer. Without a channel, only a call tells."""
        return self.failed or (self.channel is not None and self.channel.ended())

    def put(self, array: Any) -> Any:
        """The array, which the worker keeps if it is large."""
        return Kept(array, next(self.numbers), self) if array.nbytes >= LARGE else array

    def get(self, buffer: Any) -> Any:
        """The array."""
        return buffer.array if isinstance(buffer, Kept) else buffer

    def finite(self, buffer: Any) -> bool:
        """Whether all numbers are finite."""
        return finite_only(self.get(buffer))

    def run(self, component: str, inputs: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Any]:
        """Run the component there."""
        kept = {value.number: value.array for value in inputs.values() if isinstance(value, Kept)}
        new = {number: array for number, array in kept.items() if number not in self.sent}
        dropped = [self.dropped.pop() for _ in range(len(self.dropped))]
        feed = {name: value.number if isinstance(value, Kept) else value for name, value in inputs.items()}
        results = self._answer(Request(component, feed, list(outputs), new, dropped))
        self.sent.difference_update(dropped)
        self.sent.update(new)
        return results

    def _answer(self, request: Request) -> dict[str, Any]:
        try:
            return self._through_ray(request) if self.channel is None else self._ask(self.channel, request)
        except LostWorker:
            self.failed = True
            raise

    def _through_ray(self, request: Request) -> dict[str, Any]:
        results = answers_of(self.ray, {self.name: self.worker.run.remote(request)})[self.name]
        return {name: array.copy() for name, array in results.items()}  # those of Ray cannot be written

    def _ask(self, channel: Channel, request: Request) -> dict[str, Any]:
        try:
            channel.send(request)
            answer = channel.receive()
        except (OSError, EOFError) as error:
            channel.close()
            raise LostWorker(f"{self.name} is lost ({getattr(error, 'strerror', None) or error})") from None
        except BaseException:  # what comes next would be the rest of this answer
            channel.close()
            raise
        if isinstance(answer, Exception):
            raise answer
        outputs: dict[str, Any] = answer
        return outputs

    def stop(self) -> None:
        """End the call that runs, if its engine can."""
        self.worker.stop.remote()

    def close(self, components: Iterable[str] | None = None) -> None:
        """Close engines; without names, end the process."""
        if components is None:
            if self.channel:
                self.channel.close()
            self.ray.kill(self.worker)
        elif names := list(components):
            self.worker.close.remote(names)
