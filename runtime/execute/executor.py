"""Threads that run ready nodes on devices: batches, progress, cancelling, devices that fail.

Each device has two threads: while one runs an engine, the other prepares the inputs of the next call. A node has no
side effects: its outputs are stored once all of its calls have ended. So it can run again on another device if one
fails.
"""

import itertools
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial
from threading import Condition, RLock, Thread
from typing import Any

from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.engines.arena import trim
from tilewright.runtime.errors import DeviceError, ResourceError
from tilewright.runtime.execute.calls import Calls, DeviceFault, Running
from tilewright.runtime.execute.checks import not_finite, wrong_shape
from tilewright.runtime.execute.devices import Device
from tilewright.runtime.execute.feeds import Feeds
from tilewright.runtime.execute.finished import Finished
from tilewright.runtime.execute.queue import LANES, Batch, Queue, Work
from tilewright.runtime.execute.values import Outputs, Values
from tilewright.runtime.plan.lower import Block, Graph

__all__ = ["Executor", "Task"]

MANY = 1000  # nodes of a pass that leave much memory


@dataclass(eq=False)
class Task:
    """One round of a job: its nodes, the data that they read and write, and the functions to call on progress."""

    graph: Graph
    values: Values
    blocks: frozenset[int]  # the blocks that this round runs
    keep: bool = False
    depth_first: bool = False
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None
    on_pass: Callable[[str], None] = lambda name: None  # a pass has ended
    seconds: dict[str, float] = field(default_factory=dict)  # component -> time in its engine
    notes: list[str] = field(default_factory=list)  # faults that the round has survived
    timed: dict[str, tuple[int, float]] = field(default_factory=dict)  # component -> nodes that ran it, and their time
    begun: float = field(default_factory=time.perf_counter)
    lacked_memory: bool = False  # it ended because a call of a single tile found too little memory
    future: "Future[None]" = field(default_factory=Future)
    counts: dict[int, int] = field(default_factory=dict)  # pass -> nodes that are done
    telling: RLock = field(default_factory=RLock)  # held while values change; a callback may ask for a copy of them
    finished: Finished | None = None  # what was finished before an interruption
    number: int = field(default_factory=itertools.count().__next__)


class Executor:
    """Devices that share one queue of nodes. Any thread may call it.

    `signatures`: component -> its inputs and outputs; outputs of another shape are a fault. `deadline_s`: a call that
    takes longer hangs; without it, the deadline follows from the calls that were timed.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        *,
        pass_by_pass: bool = False,
        signatures: Mapping[str, Any] | None = None,
        deadline_s: float | None = None,
    ) -> None:
        self.devices, self.closes_engines = list(devices), pass_by_pass
        self.signatures = signatures or {}
        self.queue = Queue(len(self.devices), pass_by_pass=pass_by_pass)
        lock = RLock()
        self.changed = Condition(lock)
        self.calls = Calls(self.devices, lock, deadline_s, self._lost, self._hangs)
        self.feeds = Feeds()
        self.closed = False
        self.flying: dict[int, Batch] = {}  # id of a batch that a device has -> the batch
        self.hung: set[int] = set()  # devices that will not be used again
        self.lanes = [0 for _ in self.devices]  # threads that have begun and have not ended
        self.suspects: dict[tuple[int, int, int], set[int]] = {}  # node of a call that failed -> devices it failed on
        self.retired_by: dict[int, int] = {}  # device -> the task whose node it failed at
        self.tasks: list[tuple[Task, Work]] = []
        self.threads: list[Thread] = []

    def submit(self, task: Task) -> "Future[None]":
        """Run a round. The future ends when all nodes have ended, or raises the error that stopped the round."""
        if task.finished:
            self._go_on(task, task.finished)
        else:
            task.values.begin(task.blocks, keep=task.keep)
        work = Work(task.graph, task.blocks, partial(self._key, task), task, task.depth_first)
        with self.changed:
            if self.closed:
                raise RuntimeError("the executor is closed")
            if not self.answers():
                raise DeviceError(f"{', '.join(d.name for d in self.devices)}: no device answers; start anew")
            self.queue.add(work, task.values.done)
            self.tasks.append((task, work))
            if work.done():
                self._end(work)
            if not self.threads:
                self.threads = [
                    Thread(target=self._serve, args=(place,), name=f"{device.name}/{lane}", daemon=True)
                    for place, device in enumerate(self.devices)
                    for lane in range(LANES)
                ]
                self.threads.append(Thread(target=self.calls.watch, args=(self._ended,), name="watcher", daemon=True))
            for thread in self.threads:
                if thread.ident is None:  # a signal may have come between two of them
                    thread.start()
            self.changed.notify_all()
        return task.future

    @property
    def gone(self) -> set[int]:
        """The devices that will not run anything again: they hang, or their machines are lost."""
        return self.hung | {place for place, device in enumerate(self.devices) if getattr(device, "lost", False)}

    def answers(self) -> bool:
        """Whether there is a device that may run something."""
        return len(self.gone) < len(self.devices)

    def _go_on(self, task: Task, finished: Finished) -> None:
        """Prepare the rest of an interrupted round."""
        values = task.values
        values.done = [bytearray(tiles) for tiles in finished.done]
        values.take(finished.values)
        values.go_on(task.blocks, finished.regions, keep=task.keep)
        for region in [region for region, lacking in values.waiting.items() if not lacking]:
            values.on_final(*values.region(region))
            values.handed_on(region)
        for place, numbers in enumerate(task.graph.tile_blocks):
            if done := sum(values.done[n].count(1) for n in numbers if n in task.blocks):
                self._tell(task, place, done)

    def cancel(self, task: Task) -> None:
        """Take a round out of the queue. Calls that run for it alone are stopped; outputs of others are dropped."""
        with self.changed:
            for _, work in [(t, w) for t, w in self.tasks if t is task]:
                self._end(work, CancelledError())

    def close(self) -> None:
        """End all threads but those that hang; rounds that have not ended are cancelled. Engines stay open."""
        with self.changed:
            self.closed = True
            for _, work in list(self.tasks):
                self._end(work, CancelledError())
            self.changed.notify_all()
            self.changed.wait_for(lambda: all(not n or device in self.hung for device, n in enumerate(self.lanes)))
        for place, thread in enumerate(self.threads):
            if thread.ident is not None and place // LANES not in self.hung:
                with self.changed:
                    self.calls.wake()  # the watcher is the last: by then all others have ended
                thread.join()

    def _key(self, task: Task, block: Block, tile: int) -> Hashable:
        """Nodes of the same key may share a call: their tiles have the same size, of any step and any image.

        A node that is under suspicion shares calls with nodes of its own job only.
        """
        program = task.graph.program
        p, plan = program.passes[block.place], block.plan
        if p.tiles is None or block.section == "shared":
            return task.number, block.number
        job = task.number if (task.number, block.number, tile) in self.suspects else None
        steps = task.graph.steps.get(p.name)  # outside of `each`, tables have as many rows
        engines = id(program), id(task.values.constants)
        return *engines, block.place, block.section, steps, plan.tile_height, plan.tile_width, job

    def _serve(self, device: int) -> None:
        with self.changed:
            self.lanes[device] += 1
        while True:
            with self.changed:
                while not self.closed and (batch := self.queue.take(device)) is None:
                    self.changed.wait()
                if self.closed:
                    self.lanes[device] -= 1
                    self.changed.notify_all()
                    return
                assert batch is not None
                self.flying[id(batch)] = batch
            self._run(batch)
            del batch  # otherwise its values would stay in memory until the next batch

    def _run(self, batch: Batch) -> None:
        try:
            outputs = self._outputs(self.devices[batch.device], batch)
        except DeviceFault as fault:
            self._device_failed(batch, fault)
        except BaseException as error:  # the job is at fault: another device would fail too
            with self.changed:
                if self._land(batch) and not self._try_apart(batch):
                    self.queue.put_back(batch)
                    self._end(batch.works[0], error, isinstance(error, MemoryError))
        else:
            with self.changed:
                batches = self.queue.split(batch) if self._land(batch) else []
            each_output = iter(outputs)
            for of_one_job in batches:
                self._count(of_one_job, [next(each_output) for _ in of_one_job.nodes])

    def _outputs(self, device: Device, batch: Batch) -> list[Outputs]:
        """Run the calls of a batch one after another."""
        work, block, _ = batch.nodes[0]
        outputs = [Outputs(values=w.owner.values.begun(its_block, tile)) for w, its_block, tile in batch.nodes]
        for call in block.calls:
            feed = {name: self.feeds.input(device, batch, source, outputs) for name, source in call.inputs.items()}
            results = self.calls.run(batch, call, feed)
            wrong = wrong_shape(batch, call, feed, results, self.signatures.get(call.run))
            if error := wrong or not_finite(device, work.graph, block, call, results):
                raise DeviceFault(error, call.run)
            for name, target in call.outputs.items():
                self.feeds.keep(batch, target, results[name], outputs)
        return outputs

    def _lost(self, batch: Batch) -> bool:
        """Whether other devices have its nodes now, because its own hung."""
        return id(batch) not in self.flying

    def _ended(self) -> bool:
        """Whether no thread is left that could run a call."""
        return self.closed and not any(n for device, n in enumerate(self.lanes) if device not in self.hung)

    def _hangs(self, device: int, running: Running) -> None:
        """Retire a device for good, and give its nodes to others."""
        spent = time.perf_counter() - running.start
        error = DeviceError(
            f"{self.devices[device].name}: {running.component} has not ended after {spent:.0f} s; if the call is only"
            " slow, allow it more time with deadline_s"
        )
        self.hung.add(device)
        self.queue.retired.add(device)
        failed_elsewhere = self._failed_elsewhere(running.batch)
        for batch in [b for b in self.flying.values() if b.device == device]:
            del self.flying[id(batch)]
            self.queue.put_back(batch)
        self._note(running.batch, f"{self.devices[device].name} hangs in {running.component}; its tiles run elsewhere")
        if failed_elsewhere:
            self._end_all(running.batch, error)
        self._use_others(error)

    def _use_others(self, error: Exception) -> None:
        """Go on without a device that is gone. If none is left, all rounds end with this error."""
        if not self.answers():
            for _, work in list(self.tasks):
                self._end(work, error)
        elif len(self.queue.retired) == len(self.devices):
            self.queue.retired = self.gone  # the others have only failed: they are tried again
        self.changed.notify_all()

    def _land(self, batch: Batch) -> bool:
        """Take a batch off its device. False if another device has its nodes now, because this one hung."""
        return self.flying.pop(id(batch), None) is batch

    def _note(self, batch: Batch, text: str) -> None:
        for work in batch.works:
            work.owner.notes.append(text)

    def _count(self, batch: Batch, outputs: list[Outputs]) -> None:
        """Store the outputs of one job's nodes, report progress, and end the round if it is done."""
        work, block, _ = batch.nodes[0]
        task: Task = work.owner
        with task.telling:
            with self.changed:
                if work.stopped:
                    self.queue.complete(batch)
                    return
                try:
                    final = [
                        (region, task.values.region(region))
                        for (_, its_block, tile), output in zip(batch.nodes, outputs, strict=True)
                        for region in task.values.commit(its_block, tile, output)
                    ]
                except BaseException as error:  # too little memory to join the parts
                    self.queue.put_back(batch)
                    self._end(work, error, isinstance(error, MemoryError))
                    return
                for _, its_block, tile in batch.nodes:
                    self.suspects.pop((task.number, its_block.number, tile), None)
                self._drop_values(task, batch)
            try:
                for region, part in final:
                    task.values.on_final(*part)
                    task.values.handed_on(region)
                if block.section != "shared":
                    self._tell(task, block.place, len(batch.nodes))
            except BaseException as error:
                with self.changed:
                    self.queue.put_back(batch)
                    self._end(work, error)
                return
            with self.changed:
                self.queue.complete(batch)
                if not work.stopped:
                    self._pass_ended(task, work, block)
                    if work.done():
                        self._end(work)
                if self.queue.waiting:
                    self.changed.notify_all()

    def _tell(self, task: Task, place: int, nodes: int) -> None:
        """Report that so many more nodes of a pass are done."""
        total = sum(task.graph.blocks[n].size for n in task.graph.tile_blocks[place])
        task.counts[place] = task.counts.get(place, 0) + nodes
        task.on_progress(task.graph.program.passes[place].name, task.counts[place], total)

    def _drop_values(self, task: Task, batch: Batch) -> None:
        """Drop the values of tiles that no later pass reads."""
        place = batch.nodes[0][1].place
        p = task.graph.program.passes[place]
        if task.keep or p.tiles is None:
            return
        last = task.graph.of_pass[p.name][-1]
        for tile in [tile for _, block, tile in batch.nodes if block.number == last]:
            names = task.values.names_in_tile(p.tiles, tile)
            task.values.forget(place, tile, set(names) - task.graph.read_later[place])

    def _pass_ended(self, task: Task, work: Work, block: Block) -> None:
        p = task.graph.program.passes[block.place]
        if any(work.todo[n] for n in task.graph.of_pass[p.name]):
            return
        task.on_pass(p.name)
        if sum(task.graph.blocks[n].size for n in task.graph.tile_blocks[block.place]) >= MANY:
            trim()  # the values of a pass lie between those of the next, so their memory would stay
        if self.closes_engines:
            needed = {call.run for t, w in self.tasks for b in t.graph.blocks if w.todo[b.number] for call in b.calls}
            for device in self.devices:
                device.close({call.run for *_, call in p.calls()} - needed)

    def _device_failed(self, batch: Batch, fault: DeviceFault) -> None:
        """Retire a device and run its nodes elsewhere; a node that fails on two devices is itself at fault.

        Nodes of several jobs run again job by job first, so that a job at fault ends alone. A device with too little
        memory for a batch stays, and takes half as many nodes from then on. A machine that is lost says nothing of the
        nodes that it ran.
        """
        name, error, count = self.devices[batch.device].name, fault.error, len(batch.nodes)
        lacks_memory = isinstance(error, (MemoryError, ResourceError))
        with self.changed:
            if not self._land(batch):
                return
            if batch.device in self.gone:
                self.queue.put_back(batch)
                if batch.device not in self.queue.retired:
                    self.queue.retired.add(batch.device)
                    self._note(batch, f"{one_line(str(error))}; its tiles run elsewhere")
                self._use_others(DeviceError(f"{one_line(str(error))}, and no other device is left; start anew"))
                return
            if not lacks_memory and self._try_apart(batch):
                return
            self.queue.put_back(batch)
            self.changed.notify_all()
            if lacks_memory and count > 1:
                key = batch.device, fault.component
                self.queue.most[key] = most = min(count // 2, self.queue.most.get(key, count))
                self._note(batch, f"{name} has too little memory for {count} tiles at once; it takes {most} now")
                return
            if batch.device in self.queue.retired:  # the other thread of the device has retired it
                return
            if self._failed_elsewhere(batch) or len(self.queue.retired) == len(self.devices) - 1:
                self._end_all(batch, error, lacks_memory)
                return
            self.queue.retired.add(batch.device)
            self.retired_by[batch.device] = batch.nodes[0][0].owner.number
            self._note(batch, f"{name} failed ({one_line(str(error))}); its tiles run elsewhere")

    def _end_all(self, batch: Batch, error: Exception, lacked_memory: bool = False) -> None:
        """End the rounds of these nodes. Devices that failed at their nodes are used again, for other rounds."""
        for work in batch.works:
            retired = {d for d, number in self.retired_by.items() if number == work.owner.number}
            self.queue.retired -= retired - self.gone
            self._end(work, error, lacked_memory)

    def _try_apart(self, batch: Batch) -> bool:
        """Run the nodes of a failed call again, each job's by themselves. False if they all are of one job."""
        if len(batch.works) == 1:
            return False
        for work, block, tile in batch.nodes:
            if not work.stopped:
                self.suspects.setdefault((work.owner.number, block.number, tile), set())
        self.queue.put_back(batch)
        self.changed.notify_all()
        return True

    def _failed_elsewhere(self, batch: Batch) -> bool:
        """Remember that these nodes failed on this device; whether one of them has failed on another, too."""
        elsewhere = False
        for work, block, tile in batch.nodes:
            failed_on = self.suspects.setdefault((work.owner.number, block.number, tile), set())
            failed_on.add(batch.device)
            elsewhere |= len(failed_on) > 1
        return elsewhere

    def _end(self, work: Work, error: BaseException | None = None, lacked_memory: bool = False) -> None:
        self.queue.remove(work)
        self.tasks = [(t, w) for t, w in self.tasks if w is not work]
        task: Task = work.owner
        self.suspects = {node: devices for node, devices in self.suspects.items() if node[0] != task.number}
        if not task.future.done():
            if error is None:
                task.future.set_result(None)
            else:
                task.lacked_memory = lacked_memory
                task.future.set_exception(error)
        self.calls.stop_unwanted()
        self.changed.notify_all()
