"""Who runs which tile when: walks a program over an image.

Tiles of one phase are independent, so they run on any number of workers; what they return is joined in tile order,
so the answer does not depend on who finished first. One thread more than there are workers prepares the next tile
while engines run. A pass that writes grids in `each` is joined every step, and every step reads the grids as they were
before it; a pass that keeps its state to itself is one phase.
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
Moment = tuple[str, int]  # section of a pass, step


class Image(Protocol):
    """The padded input [3, H, W] in [0, 1], read by crops."""

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
    tile_px: int | None = None  # of every tiled pass, instead of the program's
    overlap_px: int | None = None
    steps: int | None = None  # of every stepped pass, instead of the program's
    inputs: dict[str, Any] = field(default_factory=dict)
    workers: int = 1
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None
    on_unused: Callable[[set[str]], None] = lambda components: None  # no later pass calls them
    on_final: Callable[[int, int, Floats], None] = lambda top, left, part: None  # a part of the result that stays
    seconds: dict[str, float] = field(default_factory=dict)  # filled in: component -> time in its engine


def run(program: Program, engines: Mapping[str, Engine], constants: Mapping[str, Any], job: Job) -> Floats:
    """The result grid [3, H, W] of a job."""
    return Walk(program, engines, constants, job).run(job.inputs)


def in_order(tasks: Sequence[Callable[[], T]], workers: int) -> Iterator[T]:
    """Results in the order of their tasks, whichever worker finishes first; at most two a worker wait."""
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
    """Tiles blended onto a grid, in the order they are added."""

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
        """Top, left and cells of the part of the grid that this tile is the last to reach."""
        row, column = divmod(tile.index, len(self.plan.lefts))
        bottom = (*self.plan.tops, self.plan.height)[row + 1] // self.px
        right = (*self.plan.lefts, self.plan.width)[column + 1] // self.px
        top, left = tile.top // self.px, tile.left // self.px
        return top, left, self.whole[:, top:bottom, left:right]


def crop(grid: Floats, tile: Tile, px: int) -> Floats:
    """The view of a grid [C, H, W] under a tile."""
    top, left, bottom, right = (v // px for v in (tile.top, tile.left, tile.top + tile.height, tile.left + tile.width))
    return grid[:, top:bottom, left:right]


def _require_finite(where: str, output: Any) -> None:
    """Refuse numbers that would end as a black picture."""
    if output.dtype.kind != "f":
        return
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.sum(output, dtype=np.float32)  # one look, and no array made: finite only where every number is
    if not np.isfinite(total) and not (finite := np.isfinite(output)).all():
        found, count = output[~finite].flat[0], output.size - np.count_nonzero(finite)
        raise AccuracyError(
            f"{where} holds {found}, {count} of {output.size} numbers are not finite; check the weights, and the bundle"
            " with 'tilewright export verify'"
        )


def _batch(parts: list[Floats]) -> Floats:
    """Arrays as the rows of one, contiguous; a single one is not copied needlessly."""
    return np.ascontiguousarray(parts[0][None]) if len(parts) == 1 else np.stack(parts)


@dataclass
class _Group:
    """Tiles that one call takes together, and what they keep to themselves."""

    tiles: tuple[Tile, ...]
    values: dict[str, Any] = field(default_factory=dict)


class Walk:
    """A job while its passes run; run again with other inputs, it repeats only the passes they reach."""

    def __init__(self, program: Program, engines: Mapping[str, Engine], constants: Mapping[str, Any], job: Job) -> None:
        self.program, self.engines, self.constants, self.job = program, engines, constants, job
        self.values: dict[str, Any] = {}
        self.grids: dict[str, Floats] = {}
        self.groups: dict[Tiles, list[_Group]] = {}
        self.given: dict[str, Any] = {}
        self.inputs: dict[str, Any] = {}
        self.height, self.width = job.image.shape[1:]
        self.lock, self.slots = Lock(), BoundedSemaphore(job.workers)
        self.finishing = [p for p in program.passes if "result" in p.writes()][-1]
        self.reached = reached(program)
        self.finished: set[str] = set()

    def run(self, inputs: Mapping[str, Any], *, keep: bool = False) -> Floats:
        """The result [3, H, W] for these inputs; `keep` what a further run may need."""
        skipped = skipped_passes(self.program, inputs.keys())
        before, now = dict(self.given), dict(inputs)
        same = {n for n in before.keys() & now.keys() if np.array_equal(before[n], now[n])}
        changed = (before.keys() | now.keys()) - same
        again = {p.name for p in self.program.passes if self.reached[p.name] & changed} - skipped
        again |= {p.name for p in self.program.passes} - self.finished - skipped
        again = with_other_writers(self.program, again)
        passes = [p for p in self.program.passes if p.name in again]
        self._take(inputs, passes)
        self.finished = self.finished - again - skipped if keep else set()  # what may be built on, should a pass fail
        self.told = False
        grids = self.program.grids.keys()
        self._clear_grids(grids - self.grids.keys() | {name for p in passes for name in p.writes() & grids})
        for i, p in enumerate(passes):
            self.walk(p, None if keep else {name for later in passes[i + 1 :] for name in later.reads()})
            self.finished |= {p.name} if keep else set()
            if unused := {c.run for *_, c in p.calls()} - {c.run for q in passes[i + 1 :] for *_, c in q.calls()}:
                self.job.on_unused(unused)
        if not self.told:
            self.job.on_final(0, 0, self.grids["result"])
        return self.grids["result"]

    def _take(self, inputs: Mapping[str, Any], passes: Sequence[Pass]) -> None:
        """Check the caller's inputs before any work; only what the passes read must be there."""
        values = untiled_values(self.program)
        if unknown := sorted(inputs.keys() - self.program.inputs.keys() - values):
            known = ", ".join([*self.program.inputs, *sorted(values)]) or "none"
            raise UsageError(f"input {unknown[0]!r} is not one of {known}")
        wanted = {s[1:] for p in passes for *_, c in p.calls() for s in c.inputs.values() if s[0] == "$"}
        self.inputs |= {name: value_of(self.program, name, inputs, self.constants) for name in sorted(wanted)}
        self.values |= {name: np.asarray(inputs[name]) for name in inputs.keys() & values}
        self.given = deepcopy(dict(inputs))  # a caller may change its arrays in place

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

    def walk(self, p: Pass, wanted: set[str] | None) -> None:
        """Run one pass and leave its grids and values, all or those that are wanted."""
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
            tasks = [self._task(p, group, phase, tables, shared, wanted) for group in groups]
            for group, written in zip(groups, in_order(tasks, self.job.workers + 1), strict=True):
                for name, parts in written.items():
                    if name not in joins:
                        joins[name] = _Join(tiling, self.program.grids[name].px, parts.shape[1])
                    for tile, part in zip(group.tiles, parts, strict=True):
                        joins[name].add(tile, part)
                        if name == "result" and p is self.finishing and phase is phases[-1]:
                            self.job.on_final(*joins[name].settled(tile))
                            self.told = True
                done += 1
                self.job.on_progress(p.name, done, len(groups) * len(phases))
            self.grids |= {name: join.whole for name, join in joins.items()}
        if p.tiles is None:
            self.values |= {k: v for k, v in groups[0].values.items() if k not in p.state}
        else:
            self.groups[p.tiles] = groups

    def _groups(self, p: Pass, tiling: TilePlan) -> list[_Group]:
        """The tiles of a pass by calls; those of an earlier pass with the same tiles, and what they hold."""
        if p.tiles in self.groups:
            return self.groups[p.tiles]
        size = p.tiles.batch if p.tiles else 1
        return [_Group(tiling.tiles[i : i + size]) for i in range(0, len(tiling.tiles), size)]

    def _shared(self, p: Pass, group: _Group, tables: Mapping[str, Any]) -> list[Call]:
        """Make the calls that read nothing of a tile, once for all tiles; which they were."""
        of_tiles = self.program.grids.keys() | group.values.keys() | p.state.keys()
        made = []
        for call in p.once:
            if call.shared(of_tiles):
                made.append(call)
                self.values |= self._call(p, group, call, ("once", 0), tables)
            else:
                of_tiles = of_tiles | set(call.outputs.values())
        return made

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
        wanted: set[str] | None,
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
            if p.tiles and phase[-1][0] == "last" and wanted is not None:
                for name in group.values.keys() - wanted:
                    del group.values[name]
            return written

        return task

    def _call(self, p: Pass, group: _Group, call: Call, moment: Moment, tables: Mapping[str, Any]) -> dict[str, Any]:
        """What a call gives, by the places it goes to."""
        feed = {name: self._fetch(p, group, source, *moment, tables) for name, source in call.inputs.items()}
        engine = self.engines[call.run]
        with self.slots:  # what the call reads was made ready while others ran
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
        """Global noise under the tile for a grid, the tile's own field for a state."""
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
        """The array behind a source, as `program` spells them."""
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
        known = next(v for v in (group.values, self.values, self.constants) if name in v)
        whole = known[name]
        rows, steps = whole.shape[known is group.values], len(next(iter(tables.values())))
        if rows != steps:  # rows for another number of steps are rows for other sigmas
            raise UsageError(f"table {name!r} has {rows} rows for {steps} steps; use --steps {rows}")
        return whole[:, step] if known is group.values else whole[step]
