"""Running a program on one image, once or several times with other inputs."""

import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from tilewright.runtime.bundle.program import Pass, Program, untiled_values
from tilewright.runtime.engines import Engine
from tilewright.runtime.errors import DeviceError, UsageError
from tilewright.runtime.execute.devices import CpuDevice, Device
from tilewright.runtime.execute.executor import Executor, Task
from tilewright.runtime.execute.finished import Finished
from tilewright.runtime.execute.values import Floats, Image, Table, Values
from tilewright.runtime.inputs import value_of
from tilewright.runtime.plan.forecast import Forecast, Part, forecast
from tilewright.runtime.plan.lower import Graph, lower
from tilewright.runtime.plan.passes import plan_of, smaller_tile
from tilewright.runtime.plan.rounds import reached, skipped_passes, with_other_writers
from tilewright.runtime.plan.schedules import SCHEDULES
from tilewright.runtime.plan.tiles import TilePlan

__all__ = ["Job", "Walk", "layout", "run", "run_on"]


@dataclass
class Job:
    """One image and how to restore it."""

    image: Image
    seed: int = 0
    tile_px: int | None = None  # for every tiled pass, instead of the program's
    overlap_px: int | None = None
    steps: int | None = None  # for every stepped pass, instead of the program's
    inputs: dict[str, Any] = field(default_factory=dict)
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None
    on_final: Callable[[int, int, Floats], None] = lambda top, left, part: (
        None
    )  # called with each final part of the result
    seconds: dict[str, float] = field(default_factory=dict)  # filled in: component -> time in its engine
    shortest_px: int = 1  # the shortest side of a tile that all engines take
    jitter: bool = False  # let tiles move from step to step, in passes that join them after every step
    depth_first: bool = False  # let the result become final from the top to the bottom, with the least in memory
    notes: list[str] = field(default_factory=list)  # filled in: what went otherwise than planned


Layout = tuple[Graph, Mapping[str, Mapping[str, Table]]]  # the nodes, and pass -> table -> rows


def layout(
    program: Program,
    height: int,
    width: int,
    tile_px: int | None,
    overlap_px: int | None,
    steps: int | None,
    jitter: int | None = None,
) -> Layout:
    """All that depends on the size of an image and not on its pixels. `steps`: instead of the program's.

    `jitter`: the seed by which tiles move, if they do.
    """
    plans = {p.name: plan_of(program, p, height, width, tile_px, overlap_px) for p in program.passes}
    tables = {p.name: _tables(p, plans[p.name], steps) for p in program.passes}
    counts = {name: len(next(iter(t.values())).rows) for name, t in tables.items() if t}
    return lower(program, plans, counts, jitter), tables


class Walk:
    """A job that can run several times. With other inputs, only the passes that depend on them run again."""

    def __init__(
        self,
        program: Program,
        executor: Executor,
        constants: Mapping[str, Any],
        job: Job,
        lay: Callable[..., Layout] | None = None,
    ) -> None:
        self.program, self.executor, self.constants, self.job = program, executor, constants, job
        lay = lay or partial(layout, program)
        self.graph, tables = lay(
            *job.image.shape[1:], job.tile_px, job.overlap_px, job.steps, job.seed if job.jitter else None
        )
        self.values = Values(self.graph, job.image, job.seed, constants, tables, self._final)
        self.inputs: dict[str, Any] = {}  # as the caller gave them
        self.reached = reached(program)
        self.finished: set[str] = set()
        self.told = False

    def run(self, inputs: Mapping[str, Any], *, keep: bool = False) -> None:
        """Restore with these inputs, and report the final parts. `keep` the values that a further run may need."""
        self.begin(inputs, keep=keep)
        self.end()

    def begin(self, inputs: Mapping[str, Any], *, keep: bool = False, finished: Finished | None = None) -> None:
        """Begin such a run, and return at once. `finished`: what the same run had finished when it was interrupted."""
        if finished:
            again, valid, keep = set(finished.passes), set(finished.ended), keep and finished.keep
        else:
            again = self._changed(inputs)
            valid = self.finished - again - skipped_passes(self.program, inputs.keys())
        self._take(inputs, [p for p in self.program.passes if p.name in again])
        self.finished = valid if keep else set()  # these passes stay valid even if the run fails

        def ended(name: str) -> None:
            self.finished |= {name} if keep else set()

        blocks = frozenset(number for name in again for number in self.graph.of_pass[name])
        final = self.graph.blocks[self.values.final]
        self.told = finished is not None and final.number in blocks and len(finished.regions) < final.size
        job = self.job
        deep = job.depth_first
        self.task = Task(self.graph, self.values, blocks, keep, deep, job.on_progress, ended, job.seconds, job.notes)
        self.task.finished = finished
        self.executor.submit(self.task)

    def _changed(self, inputs: Mapping[str, Any]) -> set[str]:
        """The passes that must run for these inputs."""
        skipped = skipped_passes(self.program, inputs.keys())
        before, now = dict(self.inputs), dict(inputs)
        same = {n for n in before.keys() & now.keys() if np.array_equal(before[n], now[n])}
        changed = (before.keys() | now.keys()) - same
        again = {p.name for p in self.program.passes if self.reached[p.name] & changed} - skipped
        again |= {p.name for p in self.program.passes} - self.finished - skipped
        return with_other_writers(self.program, again)

    def copy(self) -> Finished:
        """What the run has finished so far. A run that goes on is held up only for a moment."""
        task = self.task
        with task.telling:
            finished = Finished(
                frozenset(self.program.passes[self.graph.blocks[n].place].name for n in task.blocks),
                frozenset(self.finished),
                task.keep,
                tuple(map(bytes, self.values.done)),
                tuple(self.values.waiting),
                self.values.live(),
            )
        hung = [self.executor.devices[device] for device in self.executor.hung]
        for device in hung:
            if any(getattr(value, "holder", None) is device for value in finished.values.values()):
                raise DeviceError(f"{device.name} holds values and does not answer; begin anew")
        return finished

    def share(self, done: Sequence[bytes | bytearray]) -> float:
        """The share of the run's nodes that are done."""
        blocks = self.task.blocks
        return sum(done[n].count(1) for n in blocks) / max(1, sum(self.graph.blocks[n].size for n in blocks))

    def forecast(self) -> Forecast:
        """How much of the run's work is done, and how long the rest takes."""
        task, done = self.task, self.values.done
        before = task.finished.done if task.finished else [b""] * len(done)
        parts = [
            Part(tuple(call.run for call in b.calls), b.size, done[b.number].count(1), before[b.number].count(1))
            for b in self.graph.blocks
            if b.number in task.blocks
        ]
        call_s = {name: spent / nodes for name, (nodes, spent) in list(task.timed.items())}
        return forecast(parts, call_s, time.perf_counter() - task.begun)

    def end(self) -> None:
        """Wait until the run has ended. An interrupt during the wait cancels it."""
        try:
            self.task.future.result()
        except BaseException:
            self.cancel()
            raise
        if not self.told:
            self.job.on_final(0, 0, self.values.result())

    def ended(self) -> bool:
        """Whether the run has ended."""
        return self.task.future.done()

    def cancel(self) -> None:
        """Stop the run, and the calls that run for it alone."""
        self.executor.cancel(self.task)

    def smaller_tile(self) -> int | None:
        """The side of the next smaller tiles, if the last run found too little memory for a single tile."""
        plans = [(p, self.graph.plans[p.name]) for p in self.program.passes]
        return (
            smaller_tile(self.program, plans, self.job.overlap_px, self.job.shortest_px)
            if self.task.lacked_memory
            else None
        )

    def _final(self, top: int, left: int, part: Floats) -> None:
        self.told = True
        self.job.on_final(top, left, part)

    def _take(self, inputs: Mapping[str, Any], passes: Sequence[Pass]) -> None:
        """Check the caller's inputs before any work. Only the inputs that these passes read are required."""
        values = untiled_values(self.program)
        if unknown := sorted(inputs.keys() - self.program.inputs.keys() - values):
            accepted = ", ".join([*self.program.inputs, *sorted(values)]) or "none"
            raise UsageError(f"input {unknown[0]!r} is not one of {accepted}")
        names = {s[1:] for p in passes for *_, c in p.calls() for s in c.inputs.values() if s[0] == "$"}
        self.values.inputs |= {name: value_of(self.program, name, inputs, self.constants) for name in sorted(names)}
        self.values.job |= {name: np.asarray(inputs[name]) for name in inputs.keys() & values}
        self.inputs = deepcopy(dict(inputs))  # a caller may change its arrays in place


def run(
    program: Program, engines: Mapping[str, Engine], constants: Mapping[str, Any], job: Job, *, devices: int = 1
) -> Floats:
    """The result grid [3, H, W] of a job, on devices that share these engines."""
    return run_on([CpuDevice(f"cpu:{i}", engines) for i in range(devices)], program, constants, job)


def run_on(devices: Sequence[Device], program: Program, constants: Mapping[str, Any], job: Job) -> Floats:
    """The result grid [3, H, W] of a job, on these devices."""
    executor = Executor(devices)
    height, width = job.image.shape[1:]
    whole = np.empty((program.grids["result"].channels, height, width), np.float32)

    def place(top: int, left: int, part: Floats) -> None:
        whole[:, top : top + part.shape[1], left : left + part.shape[2]] = part
        tell(top, left, part)

    tell, job.on_final = job.on_final, place
    try:
        Walk(program, executor, constants, job).run(job.inputs)
    finally:
        job.on_final = tell
        executor.close()
    return whole


def _tables(p: Pass, plan: TilePlan, steps: int | None) -> dict[str, Table]:
    if p.steps is None:
        return {}
    tokens = plan.tile_height * plan.tile_width // p.steps.px_per_token
    options: dict[str, Any] = p.steps.options
    tables = SCHEDULES[p.steps.schedule](p.steps.count if steps is None else steps, tokens, **options)
    return {name: Table(whole) for name, whole in tables.items()}
