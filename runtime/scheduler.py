"""Running a program on an image: its passes, steps and tiles.

Tiles of one phase do not depend on each other, so any number of workers may run them. Their outputs are joined in the
order of tiles, so the result does not depend on which finishes first. There is one thread more than workers, to prepare
the next tile while engines run. A pass that writes grids in `each` joins them after every step, and each step reads the
grids of the step before. Any other pass is a single phase.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from threading import BoundedSemaphore, Lock
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from tilewright.runtime.bundle.program import Call, Pass, Program, Tiles, state_shape, untiled_values
from tilewright.runtime.engines import Engine
from tilewright.runtime.errors import AccuracyError, UsageError
from tilewright.runtime.inputs import value_of
from tilewright.runtime.plan.noise import normal
from tilewright.runtime.plan.passes import of_tokens, plan_of
from tilewright.runtime.plan.rounds import reached, skipped_passes, with_other_writers
from tilewright.runtime.plan.schedules import SCHEDULES
from tilewright.runtime.plan.tiles import Tile, TilePlan, weights

__all__ = ["Job", "Walk", "in_order", "run"]

T = TypeVar("T")
Floats = npt.NDArray[np.float32]
Moment = tuple[str, int]  # section of a pass, and step


class Image(Protocol):
    """The padded input [3, H, W] in [0, 1], which is read crop by crop."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height, width."""

    def crop(self, top: int, left: int, height: int, width: int) -> Floats:
        """The planes of a rectangle."""


@dataclass
class Job:
    """One image and how to restore it."""

    image: "Image"
    seed: int = 0
    tile_px: int | None = None  # for every pass with tiles, instead of the program's
    overlap_px: int | None = None
    steps: int | None = None  # for every pass with steps, instead of the program's
    inputs: dict[str, Any] = field(default_factory=dict)
    workers: int = 1
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None
    on_unused: Callable[[set[str]], None] = lambda components: None  # called with components that are not needed again
    on_final: Callable[[int, int, Floats], None] = lambda top, left, part: None  # called with finished parts
    seconds: dict[str, float] = field(default_factory=dict)  # result: component -> time in its engine


def run(program: Program, engines: Mapping[str, Engine], constants: Mapping[str, Any], job: Job) -> Floats:
    """The result grid [3, H, W] of a job."""
    return Walk(program, engines, constants, job).run(job.inputs)


def in_order(tasks: Sequence[Callable[[], T]], workers: int) -> Iterator[T]:
    """The results of tasks in their order. At most two tasks for each worker wait."""
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(task))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class _Join:
    """Blends tiles into a grid, in the order in which they are added."""

    def __init__(self, plan: TilePlan, px: int, channels: int) -> None:
        self.plan, self.px = plan, px
        self.rows, self.columns = weights(plan, px)
        self.whole = np.zeros((channels, plan.height // px, plan.width // px), np.float32)

    def add(self, tile: Tile, part: Floats) -> None:
        if len(self.plan.tiles) == 1:
            self.whole = np.ascontiguousarray(part)
            return
        row, column = divmod(tile.index, len(self.plan.lefts))
        weighted = part * self.columns[column]
        weighted *= self.rows[row][:, None]
        crop(self.whole, tile, self.px)[...] += weighted

    def settled(self, tile: Tile) -> tuple[int, int, Floats]:
        """Top, left and cells of the part of the grid that no later tile changes."""
        row, column = divmod(tile.index, len(self.plan.lefts))
        bottom = (*self.plan.tops, self.plan.height)[row + 1] // self.px
        right = (*self.plan.lefts, self.plan.width)[column + 1] // self.px
        top, left = tile.top // self.px, tile.left // self.px
        return top, left, self.whole[:, top:bottom, left:right]


def crop(grid: Floats, tile: Tile, px: int) -> Floats:
    """The part of a grid [C, H, W] under a tile, as a view."""
    top, left, bottom, right = (v // px for v in (tile.top, tile.left, tile.top + tile.height, tile.left + tile.width))
    return grid[:, top:bottom, left:right]


def _require_finite(where: str, output: Any) -> None:
    """Refuse numbers that are not finite, which would give a black picture."""
    if output.dtype.kind != "f":
        return
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.sum(
            output, dtype=np.float32
        )  # one pass without a temporary array; a finite sum means finite numbers
    if not np.isfinite(total) and not (finite := np.isfinite(output)).all():
        bad, count = output[~finite].flat[0], output.size - np.count_nonzero(finite)
        raise AccuracyError(
            f"{where} holds {bad}, {count} of {output.size} numbers are not finite; check the weights, and the bundle"
            " with 'tilewright export verify'"
        )


def _batch(parts: list[Floats]) -> Floats:
    """Stack arrays into one contiguous array. A single contiguous array is not copied."""
    return np.ascontiguousarray(parts[0][None]) if len(parts) == 1 else np.stack(parts)


@dataclass
class _Group:
    """The tiles of one call, and their values."""

    tiles: tuple[Tile, ...]
    values: dict[str, Any] = field(default_factory=dict)


class Walk:
    """Runs a job. When it runs again with other inputs, only the passes that depend on them are repeated."""

    def __init__(self, program: Program, engines: Mapping[str, Engine], constants: Mapping[str, Any], job: Job) -> None:
        self.program, self.engines, self.constants, self.job = program, engines, constants, job
        self.values: dict[str, Any] = {}
        self.grids: dict[str, Floats] = {}
        self.groups: dict[Tiles, list[_Group]] = {}
        self.last_inputs: dict[str, Any] = {}
        self.inputs: dict[str, Any] = {}
        self.height, self.width = job.image.shape[1:]
        self.lock, self.slots = Lock(), BoundedSemaphore(job.workers)
        self.finishing = [p for p in program.passes if "result" in p.writes()][-1]
        self.reached = reached(program)
        self.finished: set[str] = set()

    def run(self, inputs: Mapping[str, Any], *, keep: bool = False) -> Floats:
        """The result [3, H, W] for these inputs. `keep` the values that another run may need."""
        skipped = skipped_passes(self.program, inputs.keys())
        before, now = dict(self.last_inputs), dict(inputs)
        same = {n for n in before.keys() & now.keys() if np.array_equal(before[n], now[n])}
        changed = (before.keys() | now.keys()) - same
        again = {p.name for p in self.program.passes if self.reached[p.name] & changed} - skipped
        again |= {p.name for p in self.program.passes} - self.finished - skipped
        again = with_other_writers(self.program, again)
        passes = [p for p in self.program.passes if p.name in again]
        self._take(inputs, passes)
        self.finished = (
            self.finished - again - skipped if keep else set()
        )  # passes that a later run may build on if one fails now
        self.result_reported = False
        grids = self.program.grids.keys()
        self._clear_grids(grids - self.grids.keys() | {name for p in passes for name in p.writes() & grids})
        for i, p in enumerate(passes):
            self.walk(p, None if keep else {name for later in passes[i + 1 :] for name in later.reads()})
            self.finished |= {p.name} if keep else set()
            if unused := {c.run for *_, c in p.calls()} - {c.run for q in passes[i + 1 :] for *_, c in q.calls()}:
                self.job.on_unused(unused)
        if not self.result_reported:
            self.job.on_final(0, 0, self.grids["result"])
        return self.grids["result"]

    def _take(self, inputs: Mapping[str, Any], passes: Sequence[Pass]) -> None:
        """Check the caller's inputs before any work. Only inputs that the passes read are required."""
        values = untiled_values(self.program)
        if unknown := sorted(inputs.keys() - self.program.inputs.keys() - values):
            names = ", ".join([*self.program.inputs, *sorted(values)]) or "none"
            raise UsageError(f"input {unknown[0]!r} is not one of {names}")
        needed = {s[1:] for p in passes for *_, c in p.calls() for s in c.inputs.values() if s[0] == "$"}
        self.inputs |= {name: value_of(self.program, name, inputs, self.constants) for name in sorted(needed)}
        self.values |= {name: np.asarray(inputs[name]) for name in inputs.keys() & values}
        self.last_inputs = deepcopy(dict(inputs))  # a caller may change its arrays in place

    def _clear_grids(self, names: set[str]) -> None:
        for name in names:
            grid = self.program.grids[name]
            rows, columns = self.height // grid.px, self.width // grid.px
            if grid.init == "zeros":
                self.grids[name] = np.zeros((grid.channels, rows, columns), np.float32)
            elif grid.init == "noise":
                self.grids[name] = self._field(0, 0, grid.channels, 0, 0, rows, columns)

    def _field(self, region: int, stream: int, channels: int, top: int, left: int, rows: int, columns: int) -> Floats:
        return normal(
            self.job.seed,
            region=region,
            stream=stream,
            channels=channels,
            top=top,
            left=left,
            height=rows,
            width=columns,
        )

    def walk(self, p: Pass, needed: set[str] | None) -> None:
        """Run one pass, and keep its grids and values, all or the `needed` ones."""
        tiling = plan_of(self.program, p, self.height, self.width, self.job.tile_px, self.job.overlap_px)
        tables = self._tables(p, tiling)
        steps = len(next(iter(tables.values()))) if p.each else 0
        moments = [("once", 0), *(("each", step) for step in range(steps)), ("last", steps - 1)]
        joined = bool(p.writes("each") & self.program.grids.keys())
        phases: list[list[Moment]] = [[moment] for moment in moments] if joined else [moments]
        groups = self._groups(p, tiling)
        shared = self._shared(p, groups[0], tables)
        done = 0
        for phase in phases:
            joins: dict[str, _Join] = {}
            tasks = [self._task(p, group, phase, tables, shared, needed) for group in groups]
            for group, written in zip(groups, in_order(tasks, self.job.workers + 1), strict=True):
                for name, parts in written.items():
                    if name not in joins:
                        joins[name] = _Join(tiling, self.program.grids[name].px, parts.shape[1])
                    for tile, part in zip(group.tiles, parts, strict=True):
                        joins[name].add(tile, part)
                        if name == "result" and p is self.finishing and phase is phases[-1]:
                            self.job.on_final(*joins[name].settled(tile))
                            self.result_reported = True
                done += 1
                self.job.on_progress(p.name, done, len(groups) * len(phases))
            self.grids |= {name: join.whole for name, join in joins.items()}
        if p.tiles is None:
            self.values |= {k: v for k, v in groups[0].values.items() if k not in p.state}
        else:
            self.groups[p.tiles] = groups

    def _groups(self, p: Pass, tiling: TilePlan) -> list[_Group]:
        """The groups of tiles of a pass; an earlier pass with the same tiles shares its groups and their values."""
        if p.tiles in self.groups:
            return self.groups[p.tiles]
        size = p.tiles.batch if p.tiles else 1
        return [_Group(tiling.tiles[i : i + size]) for i in range(0, len(tiling.tiles), size)]

    def _shared(self, p: Pass, group: _Group, tables: Mapping[str, Any]) -> list[Call]:
        """Run the calls that read nothing of a tile, once for all tiles, and return them."""
        of_tiles = self.program.grids.keys() | group.values.keys() | p.state.keys()
        calls = []
        for call in p.once:
            if call.shared(of_tiles):
                calls.append(call)
                self.values |= self._call(p, group, call, ("once", 0), tables)
            else:
                of_tiles = of_tiles | set(call.outputs.values())
        return calls

    def _tables(self, p: Pass, tiling: TilePlan) -> dict[str, Floats]:
        if p.steps is None:
            return {}
        tokens = tiling.tile_height * tiling.tile_width // p.steps.px_per_token
        options: dict[str, Any] = p.steps.options
        count = p.steps.count if self.job.steps is None else self.job.steps
        return SCHEDULES[p.steps.schedule](count, tokens, **options)

    def _task(
        self,
        p: Pass,
        group: _Group,
        phase: list[Moment],
        tables: dict[str, Floats],
        shared: list[Call],
        needed: set[str] | None,
    ) -> Callable[[], dict[str, Any]]:
        def task() -> dict[str, Any]:
            written: dict[str, Any] = {}
            if phase[0][0] == "once":
                group.values |= {name: self._initial(p, name, group) for name in p.state}
            for moment in phase:
                for call in getattr(p, moment[0]):
                    if any(call is s for s in shared):
                        continue
                    for target, output in self._call(p, group, call, moment, tables).items():
                        (written if target in self.program.grids else group.values)[target] = output
            if p.tiles and phase[-1][0] == "last" and needed is not None:
                for name in group.values.keys() - needed:
                    del group.values[name]
            return written

        return task

    def _call(self, p: Pass, group: _Group, call: Call, moment: Moment, tables: Mapping[str, Any]) -> dict[str, Any]:
        """Run a call; returns its outputs by their targets."""
        feed = {name: self._fetch(p, group, source, *moment, tables) for name, source in call.inputs.items()}
        engine = self.engines[call.run]
        with self.slots:  # inputs are prepared outside, while other calls run
            start = time.perf_counter()
            outputs = engine.run(feed, call.outputs)
            seconds = time.perf_counter() - start
        with self.lock:
            self.job.seconds[call.run] = self.job.seconds.get(call.run, 0.0) + seconds
        when = f"step {moment[1] + 1}" if moment[0] == "each" else moment[0]
        for name in call.outputs:
            _require_finite(f"pass {p.name!r}, {when}: {call.run}.{name}", outputs[name])
        return {target: outputs[name] for name, target in call.outputs.items()}

    def _initial(self, p: Pass, name: str, group: _Group) -> Any:
        state = p.state[name]
        if state.init == "noise":
            return self._noise(p, group, name, 0)
        tile = group.tiles[0]
        shape = (len(group.tiles), *state_shape(state, tile.height, tile.width))
        return np.full(shape, 1.0 if state.init == "ones" else 0.0, np.float32)

    def _noise(self, p: Pass, group: _Group, name: str, stream: int) -> Any:
        """Noise of the grid under the tile, or for a state, noise of the tile."""
        if name in self.program.grids:
            grid = self.program.grids[name]
            corners = [(0, t.top // grid.px, t.left // grid.px) for t in group.tiles]
            shape: tuple[int, ...] = (
                grid.channels,
                group.tiles[0].height // grid.px,
                group.tiles[0].width // grid.px,
            )
        else:
            corners = [(1 + t.index, 0, 0) for t in group.tiles]
            shape = state_shape(p.state[name], group.tiles[0].height, group.tiles[0].width)
        channels, rows, columns = shape
        return _batch([self._field(r, stream, channels, y, x, rows, columns) for r, y, x in corners])

    def _fetch(self, p: Pass, group: _Group, source: str, section: str, step: int, tables: Mapping[str, Any]) -> Any:
        """The array of a source; program.py explains sources."""
        name = source[1:]
        if source[0] == "#":
            return self.constants[name]
        if source[0] == "$":
            return self.inputs[name]
        if source[0] == "~":
            return self._noise(p, group, name, {"once": 0, "each": 1 + step, "last": 2 + step}[section])
        if source[0] == "@":
            return self._row(p, name, group, section, step, tables)
        if source == "image":
            return _batch([self.job.image.crop(t.top, t.left, t.height, t.width) for t in group.tiles])
        if source in self.program.grids:
            px = self.program.grids[source].px
            return _batch([crop(self.grids[source], tile, px) for tile in group.tiles])
        return group.values[source] if source in group.values else self.values[source]

    def _row(self, p: Pass, name: str, group: _Group, section: str, step: int, tables: Mapping[str, Any]) -> Any:
        if name in tables:
            return tables[name] if section != "each" else np.asarray(tables[name][step])
        if table := of_tokens(p, name, group.tiles[0].height * group.tiles[0].width, self.constants):
            name = table
        source = next(v for v in (group.values, self.values, self.constants) if name in v)
        whole = source[name]
        rows, steps = whole.shape[source is group.values], len(next(iter(tables.values())))
        if rows != steps:  # the table was computed for another number of steps, with other sigmas
            raise UsageError(f"table {name!r} has {rows} rows for {steps} steps; use --steps {rows}")
        return whole[:, step] if source is group.values else whole[step]
