"""The calls that devices run now: one on a device at a time, each with a deadline.

A thread watches for calls that take far too long. A thread that hangs in a call cannot be ended; it is left alone, and
what it may still return is ignored.
"""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from threading import Condition, RLock
from typing import Any

from tilewright.runtime.bundle.program import Call
from tilewright.runtime.execute.devices import Device
from tilewright.runtime.execute.queue import Batch

__all__ = ["Calls", "DeviceFault", "Running"]

FIRST_DEADLINE_S = 3600.0  # for a call that has not been timed yet; it may open its engine
LEAST_DEADLINE_S = 60.0
STOP_AGAIN_S = 0.05
LOOK_S = 1.0  # between two looks at running calls
SLOWER = 20  # a call hangs if it takes so many times as long as the slowest of its kind so far


class DeviceFault(Exception):
    """A device failed while it ran a node. The node may run on another device."""

    def __init__(self, error: Exception, component: str) -> None:
        super().__init__(str(error))
        self.error, self.component = error, component


@dataclass(eq=False)
class Running:
    """A call that a device runs now."""

    batch: Batch
    component: str
    start: float
    ends: float  # after this time it hangs
    looked: float  # when it began, or was last looked at
    stopping: bool = False  # nobody waits for its outputs any more


class Calls:
    """Runs calls, times them, and stops those that hang or that nobody waits for any more.

    The executor's lock guards it. `lost` says whether other devices have the nodes of a batch by now; `hangs` is told
    of a device whose call is over its deadline.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        lock: RLock,
        deadline_s: float | None,
        lost: Callable[[Batch], bool],
        hangs: Callable[[int, Running], None],
    ) -> None:
        self.devices, self.lock, self.deadline_s, self.lost, self.hangs = devices, lock, deadline_s, lost, hangs
        self.free = [Condition(lock) for _ in devices]  # the call that a device ran has ended
        self.watched = Condition(lock)  # there is something to watch
        self.watcher_sleeps = False
        self.running: dict[int, Running] = {}  # device -> the call that it runs
        self.slowest: dict[Hashable, float] = {}  # kind of call -> seconds
        self.busy_s = [0.0 for _ in devices]  # device -> time of all its calls

    def run(self, batch: Batch, call: Call, feed: Mapping[str, Any]) -> dict[str, Any]:
        """Run a component as soon as the batch's device is free."""
        _, block, _ = batch.nodes[0]
        device, plan = self.devices[batch.device], block.plan
        kind = (device.name.partition(":")[0], call.run, plan.tile_height, plan.tile_width, len(batch.nodes))
        with self.lock:
            while batch.device in self.running and not self.lost(batch):
                self.free[batch.device].wait()
            if all(each.stopped for each in batch.works) or self.lost(batch):
                raise CancelledError
            start = time.perf_counter()
            running = Running(batch, call.run, start, start + self._deadline(kind), start)
            self.running[batch.device] = running
            if self.watcher_sleeps:
                self.watched.notify()
        try:
            if begin := getattr(device, "begin", None):
                begin([(its_block.step, tile) for _, its_block, tile in batch.nodes])
            results = device.run(call.run, feed, call.outputs)
        except Exception as error:
            if running.stopping:
                raise CancelledError from error
            raise DeviceFault(error, call.run) from error
        finally:
            with self.lock:
                if self.running.get(batch.device) is running:
                    del self.running[batch.device]
                    self.free[batch.device].notify()
                    self._count(batch, call.run, kind, time.perf_counter() - start)
        return results

    def _count(self, batch: Batch, component: str, kind: Hashable, seconds: float) -> None:
        """Remember how long a call took, and give each of its nodes its share."""
        self.slowest[kind] = max(seconds, self.slowest.get(kind, 0.0))
        self.busy_s[batch.device] += seconds
        share = seconds / len(batch.nodes)
        for work, *_ in batch.nodes:
            task = work.owner
            task.seconds[component] = task.seconds.get(component, 0.0) + share
            nodes, spent = task.timed.get(component, (0, 0.0))
            task.timed[component] = nodes + 1, spent + share

    def _deadline(self, kind: Hashable) -> float:
        if self.deadline_s is not None:
            return self.deadline_s
        return max(LEAST_DEADLINE_S, SLOWER * self.slowest[kind]) if kind in self.slowest else FIRST_DEADLINE_S

    def watch(self, ended: Callable[[], bool]) -> None:
        """Report devices whose call is over its deadline, and stop calls that nobody waits for, until all has ended.

        Nothing wakes this thread while no device runs a call. A call may miss the first stop, because it has not
        reached its engine yet. Time in which the whole process was suspended does not count.
        """
        shortest = min(LOOK_S, LEAST_DEADLINE_S if self.deadline_s is None else self.deadline_s)
        with self.lock:
            while not ended():
                now = time.perf_counter()
                for device, running in list(self.running.items()):
                    late, running.looked = now - running.looked - shortest, now
                    if late > LOOK_S:
                        running.ends += late
                    if running.ends <= now:
                        del self.running[device]
                        self._stop(device)
                        self.hangs(device, running)
                        self.free[device].notify_all()
                    elif running.stopping:
                        self._stop(device)
                # a call that begins meanwhile ends no sooner than after the shortest deadline
                waits = [min(running.ends - now, shortest) for running in self.running.values()]
                waits += [STOP_AGAIN_S for running in self.running.values() if running.stopping]
                self.watcher_sleeps = not waits
                self.watched.wait(min(waits, default=None))

    def wake(self) -> None:
        """Let the watching thread look whether all has ended."""
        self.watched.notify_all()

    def stop_unwanted(self) -> None:
        """Stop the calls whose jobs have all ended."""
        for device, running in self.running.items():
            if not running.stopping and all(each.stopped for each in running.batch.works):
                running.stopping = True
                self._stop(device)
                self.watched.notify()

    def _stop(self, device: int) -> None:
        """Stop the call of a device, if the device can."""
        if stop := getattr(self.devices[device], "stop", None):
            stop()
