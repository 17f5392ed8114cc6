"""Threads that run ready nodes on devices: batches, progress, cancelling, devices that fail.

Each device has two threads: while one runs an engine, the other prepares the inputs of the next call. A node has no
side effects: its outputs are stored once all of its calls have ended. So it can run again on another device if one
fails.
"""

import itertools
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial
from threading import Condition, Lock, Thread
from typing import Any

import numpy as np

from tilewright.runtime.bundle.program import Call
from tilewright.runtime.errors import AccuracyError
from tilewright.runtime.execute.devices import Device
from tilewright.runtime.execute.queue import Batch, Queue, Work
from tilewright.runtime.execute.values import Outputs, Values, on_host
from tilewright.runtime.plan.lower import Block, Graph

__all__ = ["Executor", "Task"]

LANES = 2  # threads of a device: one runs an engine, one prepares inputs
Node = tuple[Work, Block, int]


@dataclass(eq=False)
class Task:
    """One round of a job: its nodes, the data that they read and write, and the functions to call on progress."""

    graph: Graph
    values: Values
    blocks: frozenset[int]  # the blocks that this round runs
    keep: bool = False
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None
    on_pass: Callable[[str], None] = lambda name: None  # a pass has ended
    seconds: dict[str, float] = field(default_factory=dict)  # component -> time in its engine
    future: "Future[None]" = field(default_factory=Future)
    counts: dict[int, int] = field(default_factory=dict)  # pass -> nodes that are done
    telling: Lock = field(default_factory=Lock)
    number: int = field(default_factory=itertools.count().__next__)


class DeviceFault(Exception):
    """A device failed while it ran a node. The node may run on another device."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Executor:
    """Devices that share one queue of nodes. Any thread may call it."""

    def __init__(self, devices: Sequence[Device], *, pass_by_pass: bool = False) -> None:
        self.devices, self.closes_engines = list(devices), pass_by_pass
        self.queue = Queue(len(self.devices), pass_by_pass=pass_by_pass)
        self.changed = Condition()
        self.closed = False
        self.failed_on: dict[tuple[int, int, int], set[int]] = {}  # node -> devices
        self.retired_by: dict[int, int] = {}  # device -> the task whose node it failed at
        self.uploads: dict[tuple[int, int], tuple[Any, Any]] = {}  # (device, constant) -> the constant, its buffer
        self.tasks: list[tuple[Task, Work]] = []
        self.threads: list[Thread] = []

    def submit(self, task: Task) -> "Future[None]":
        """Run a round. The future ends when all nodes have ended, or raises the error that stopped the round."""
        task.values.begin(task.blocks, keep=task.keep)
        work = Work(task.graph, task.blocks, partial(self._key, task), task)
        with self.changed:
            if self.closed:
                raise RuntimeError("the executor is closed")
            self.queue.add(work)
            self.tasks.append((task, work))
            if work.done():
                self._end(work)
            if not self.threads:
                self.threads = [
                    Thread(target=self._serve, args=(place,), name=f"{device.name}/{lane}", daemon=True)
                    for place, device in enumerate(self.devices)
                    for lane in range(LANES)
                ]
                for thread in self.threads:
                    thread.start()
            self.changed.notify_all()
        return task.future

    def cancel(self, task: Task) -> None:
        """Take a round out of the queue. Calls that are running end, and their outputs are dropped."""
        with self.changed:
            for _, work in [(t, w) for t, w in self.tasks if t is task]:
                self._end(work, CancelledError())

    def close(self) -> None:
        """End all threads; rounds that have not ended are cancelled. Engines stay open."""
        with self.changed:
            self.closed = True
            for _, work in list(self.tasks):
                self._end(work, CancelledError())
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()

    def _key(self, task: Task, block: Block, tile: int) -> Hashable:
        """Nodes of the same key may share a call: their tiles have the same size, of any step and any image."""
        program = task.graph.program
        p, plan = program.passes[block.place], task.graph.plan(block)
        if p.tiles is None or block.section == "shared":
            return task.number, block.number
        bundle = (id(program), id(task.values.constants))
        steps = task.graph.steps.get(p.name)  # the rows of tables outside of `each`
        return *bundle, block.place, block.section, steps, plan.tile_height, plan.tile_width

    def _serve(self, device: int) -> None:
        while True:
            with self.changed:
                while not self.closed and (batch := self.queue.take(device)) is None:
                    self.changed.wait()
                if self.closed:
                    return
                self.changed.notify_all()  # a busy device may have waited until no other was idle
            assert batch is not None
            self._run(batch)
            del batch  # otherwise its values would stay in memory until the next batch

    def _run(self, batch: Batch) -> None:
        work = batch.nodes[0][0]
        try:
            outputs = self._outputs(self.devices[batch.device], batch)
        except DeviceFault as fault:
            if not self._run_apart(batch):
                self._device_failed(batch, fault.error)
        except BaseException as error:  # the job is at fault: another device would fail too
            if not self._run_apart(batch):
                with self.changed:
                    self.queue.put_back(batch)
                    self._end(work, error)
        else:
            with self.changed:
                batches = self.queue.split(batch)
            each_output = iter(outputs)
            for of_job in batches:
                self._count(of_job, [next(each_output) for _ in of_job.nodes])

    def _run_apart(self, batch: Batch) -> bool:
        """Run the nodes of each job by themselves, if there are several jobs: the fault may be that of one."""
        if len(batch.of_works()) == 1:
            return False
        with self.changed:
            batches = self.queue.split(batch)
        for of_job in batches:
            self._run(of_job)
        return True

    def _outputs(self, device: Device, batch: Batch) -> list[Outputs]:
        """Run the calls of a batch one after another."""
        work, block, _ = batch.nodes[0]
        task: Task = work.owner
        outputs = [Outputs(values=w.owner.values.begun(b, tile)) for w, b, tile in batch.nodes]
        for call in block.calls:
            feed = {name: self._input(device, batch, source, outputs) for name, source in call.inputs.items()}
            start = time.perf_counter()
            try:
                results = device.run(call.run, feed, call.outputs)
            except Exception as error:
                raise DeviceFault(error) from error
            seconds = (time.perf_counter() - start) / len(batch.nodes)
            with self.changed:
                for node in batch.nodes:
                    spent = node[0].owner.seconds
                    spent[call.run] = spent.get(call.run, 0.0) + seconds
            for name in call.outputs:
                if not device.finite(results[name]):
                    raise DeviceFault(_not_finite(task, block, call, name, device.get(results[name])))
            for name, target in call.outputs.items():
                self._keep(batch, target, results[name], outputs)
        return outputs

    def _keep(self, batch: Batch, target: str, result: Any, outputs: list[Outputs]) -> None:
        for i, (work, block, tile) in enumerate(batch.nodes):
            array = result if len(batch.nodes) == 1 else on_host(result)[i : i + 1]
            if target in work.graph.program.grids:
                outputs[i].parts[target] = work.owner.values.weighted(block, target, tile, array)
            else:
                outputs[i].values[target] = array

    def _input(self, device: Device, batch: Batch, source: str, outputs: list[Outputs]) -> Any:
        """An input of a call, as one buffer of the device: a row for each node, or one that all nodes share."""
        nodes = zip(batch.nodes, outputs, strict=True)
        fed = [work.owner.values.feed(block, tile, source, its) for (work, block, tile), its in nodes]
        (value, of_tile), others = fed[0], [row for row, _ in fed[1:]]
        if others and (of_tile or not all(_same(value, row) for row in others)):
            return device.put(np.concatenate([on_host(row) for row in (value, *others)]))
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

    def _count(self, batch: Batch, outputs: list[Outputs]) -> None:
        """Store the outputs of a batch, report progress, and end the round if it is done."""
        work, block, _ = batch.nodes[0]
        task: Task = work.owner
        with task.telling:
            with self.changed:
                if work.stopped:
                    self.queue.complete(batch)
                    return
                final = [
                    part
                    for (_, its_block, tile), output in zip(batch.nodes, outputs, strict=True)
                    for part in task.values.commit(its_block, tile, output)
                ]
                for _, its_block, tile in batch.nodes:
                    self.failed_on.pop((task.number, its_block.number, tile), None)
                self._drop_values(task, work, batch)
            try:
                for part in final:
                    task.values.on_final(*part)
                self._tell(task, block, len(batch.nodes))
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
                self.changed.notify_all()

    def _tell(self, task: Task, block: Block, nodes: int) -> None:
        p = task.graph.program.passes[block.place]
        if block.section == "shared":
            return
        blocks = [task.graph.blocks[n] for n in task.graph.of_pass[p.name]]
        total = sum(b.size for b in blocks if b.section != "shared")
        task.counts[block.place] = task.counts.get(block.place, 0) + nodes
        task.on_progress(p.name, task.counts[block.place], total)

    def _drop_values(self, task: Task, work: Work, batch: Batch) -> None:
        """Drop the values of tiles that no later pass reads."""
        block = batch.nodes[0][1]
        passes = task.graph.program.passes
        p = passes[block.place]
        if task.keep or p.tiles is None:
            return
        read = {name for later in passes[block.place + 1 :] for name in later.reads()}
        ended = [tile for _, each, tile in batch.nodes if each.number == task.graph.of_pass[p.name][-1]]
        for tile in ended:
            names = task.values.names_in_tile(p.tiles, tile)
            task.values.forget(block.place, tile, set(names) - read)

    def _pass_ended(self, task: Task, work: Work, block: Block) -> None:
        p = task.graph.program.passes[block.place]
        if any(work.todo[n] for n in task.graph.of_pass[p.name]):
            return
        task.on_pass(p.name)
        if self.closes_engines:
            needed = {call.run for t, w in self.tasks for b in t.graph.blocks if w.todo[b.number] for call in b.calls}
            for device in self.devices:
                device.close({call.run for *_, call in p.calls()} - needed)

    def _device_failed(self, batch: Batch, error: Exception) -> None:
        """Retire a device and run its nodes elsewhere; a node that fails on two devices is itself at fault."""
        with self.changed:
            self.queue.put_back(batch)
            if batch.device in self.queue.retired:  # the other thread of the device has retired it
                self.changed.notify_all()
                return
            for work, block, tile in batch.nodes:
                failed_on = self.failed_on.setdefault((work.owner.number, block.number, tile), set())
                failed_on.add(batch.device)
                if len(failed_on) > 1 or len(self.queue.retired) == len(self.devices) - 1:
                    self.queue.retired -= {d for d, number in self.retired_by.items() if number == work.owner.number}
                    self._end(work, error)
                    return
            self.queue.retired.add(batch.device)
            self.retired_by[batch.device] = batch.nodes[0][0].owner.number
            self.changed.notify_all()

    def _end(self, work: Work, error: BaseException | None = None) -> None:
        self.queue.remove(work)
        self.tasks = [(t, w) for t, w in self.tasks if w is not work]
        task: Task = work.owner
        if not task.future.done():
            if error is None:
                task.future.set_result(None)
            else:
                task.future.set_exception(error)
        self.changed.notify_all()


def _same(one: Any, other: Any) -> bool:
    """Whether two rows are equal. Rows on a device must be the same buffer, as it is costly to look at their values."""
    if one is other or not (isinstance(one, np.ndarray) and isinstance(other, np.ndarray)):
        return one is other
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    place = one.__array_interface__["data"], one.strides
    return place == (other.__array_interface__["data"], other.strides) or np.array_equal(one, other)


def _not_finite(task: Task, block: Block, call: Call, name: str, output: Any) -> AccuracyError:
    p = task.graph.program.passes[block.place]
    when = (
        f"step {block.step + 1}" if block.section == "each" else "once" if block.section == "shared" else block.section
    )
    finite = np.isfinite(output)
    return AccuracyError(
        f"pass {p.name!r}, {when}: {call.run}.{name} holds {output[~finite].flat[0]},"
        f" {output.size - np.count_nonzero(finite)} of {output.size} numbers are not finite; check the weights, and the"
        " bundle with 'tilewright export verify'"
    )
