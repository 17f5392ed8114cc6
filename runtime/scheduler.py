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
from dataclasses import dataclass, field
from threading import BoundedSemaphore, Lock
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from tilewright.runtime.engines import Engine
from tilewright.runtime.errors import UsageError
from tilewright.runtime.noise import normal
from tilewright.runtime.program import Pass, Program, state_shape
from tilewright.runtime.schedules import SCHEDULES
from tilewright.runtime.tiles import Plan, Tile, plan, weights

__all__ = ["Job", "in_order", "plan_of", "run"]

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
    on_final: Callable[[int, int, Floats], None] = lambda top, left, part: None  # a part of the result that stays
    seconds: dict[str, float] = field(default_factory=dict)  # filled in: component -> time in its engine


def plan_of(program: Program, p: Pass, height: int, width: int, tile: int | None, overlap: int | None) -> Plan:
    """The tile plan of a pass; a pass without tiles, or an image it takes whole, is one tile."""
    whole = plan(width, height, max(width, height), 0, program.multiple_px)
    if p.tiles is None:
        return whole
    direct = p.tiles.whole_up_to_px
    if tile is None and direct and min(height, width) <= min(direct) and max(height, width) <= max(direct):
        return whole
    size = p.tiles.px if tile is None else tile
    fitting = min(p.tiles.overlap_px, size // 2) // program.multiple_px * program.multiple_px
    return plan(width, height, size, fitting if overlap is None else overlap, program.multiple_px)


def run(program: Program, engines: Mapping[str, Engine], constants: Mapping[str, Any], job: Job) -> Floats:
    """The result grid [3, H, W] of a job."""
    walk = _Walk(program, engines, constants, job)
    for p in program.passes:
        walk.walk(p)
    if not walk.told:
        job.on_final(0, 0, walk.grids["result"])
    return walk.grids["result"]


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

    def __init__(self, plan: Plan, px: int, channels: int) -> None:
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


def _batch(parts: list[Floats]) -> Floats:
    """Arrays as the rows of one, contiguous; a single one is not copied needlessly."""
    return np.ascontiguousarray(parts[0][None]) if len(parts) == 1 else np.stack(parts)


@dataclass
class _Group:
    """Tiles that one call takes together, and what they keep to themselves."""

    tiles: tuple[Tile, ...]
    values: dict[str, Any] = field(default_factory=dict)


class _Walk:
    """The grids and values of a job while its passes run."""

    def __init__(self, program: Program, engines: Mapping[str, Engine], constants: Mapping[str, Any], job: Job) -> None:
        self.program, self.engines, self.constants, self.job = program, engines, constants, job
        self.inputs = {name: self._input(name) for name in program.inputs}
        if unknown := sorted(job.inputs.keys() - program.inputs.keys()):
            raise UsageError(f"input {unknown[0]!r} is not one of {', '.join(program.inputs) or 'none'}")
        self.values: dict[str, Any] = {}
        self.grids: dict[str, Floats] = {}
        self.height, self.width = job.image.shape[1:]
        self.lock, self.slots = Lock(), BoundedSemaphore(job.workers)
        self.told = False
        self.finishing = [p for p in program.passes if any("result" in c.outputs.values() for *_, c in p.calls())][-1]
        for name, grid in program.grids.items():
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

    def _input(self, name: str) -> Any:
        wanted = self.program.inputs[name]
        value = self.job.inputs.get(name, wanted.default)
        if value is None:
            raise UsageError(f"input {name!r} has no default; give it a value")
        if isinstance(value, str) and name not in self.job.inputs:
            return self.constants[value[1:]]
        choices = ", ".join(wanted.choices) or "none"
        if isinstance(value, str):
            if value not in wanted.choices:
                raise UsageError(f"input {name!r}: {value!r} is not one of {choices}")
            value = wanted.choices[value]
        try:
            array = np.asarray(value, np.dtype(wanted.dtype))
            fits = array.dtype.kind == "f" or np.array_equal(array, value)  # floats round, the others must not
        except (TypeError, ValueError, OverflowError):
            fits = False
        if not fits:
            raise UsageError(f"input {name!r} takes {wanted.dtype}, which this {type(value).__name__} is not")
        if array.shape != wanted.shape:
            raise UsageError(f"input {name!r} has shape {list(array.shape)}; give {list(wanted.shape)}")
        if wanted.choices and not np.isin(array, list(wanted.choices.values())).all():
            raise UsageError(f"input {name!r}: {array.tolist()} is not one of {wanted.choices}")
        return array

    def walk(self, p: Pass) -> None:
        """Run one pass and leave its grids and, for a pass without tiles, its values."""
        tiling = plan_of(self.program, p, self.height, self.width, self.job.tile_px, self.job.overlap_px)
        tables = self._tables(p, tiling)
        steps = len(next(iter(tables.values()))) if tables else 0
        moments = [("once", 0), *(("each", step) for step in range(steps)), ("last", steps - 1)]
        joined = any(target in self.program.grids for call in p.each for target in call.outputs.values())
        phases: list[list[Moment]] = [[moment] for moment in moments] if joined else [moments]
        size = p.tiles.batch if p.tiles else 1
        groups = [_Group(tiling.tiles[i : i + size]) for i in range(0, len(tiling.tiles), size)]
        done = 0
        for phase in phases:
            joins: dict[str, _Join] = {}
            tasks = [self._task(p, group, phase, tables) for group in groups]
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

    def _tables(self, p: Pass, tiling: Plan) -> dict[str, Floats]:
        if p.steps is None:
            return {}
        tokens = tiling.tile_height * tiling.tile_width // p.steps.px_per_token
        options: dict[str, Any] = p.steps.options
        count = p.steps.count if self.job.steps is None else self.job.steps
        return SCHEDULES[p.steps.schedule](count, tokens, **options)

    def _task(
        self, p: Pass, group: _Group, phase: list[Moment], tables: dict[str, Floats]
    ) -> Callable[[], dict[str, Any]]:
        def task() -> dict[str, Any]:
            written: dict[str, Any] = {}
            if phase[0][0] == "once":
                group.values |= {name: self._initial(p, name, group) for name in p.state}
            for section, step in phase:
                for call in getattr(p, section):
                    feed = {k: self._fetch(p, group, s, section, step, tables) for k, s in call.inputs.items()}
                    with self.slots:  # what the call reads was made ready while others ran
                        outputs = self._timed(call.run, feed, call.outputs)
                    for name, target in call.outputs.items():
                        (written if target in self.program.grids else group.values)[target] = outputs[name]
            if p.tiles and phase[-1][0] == "last":
                group.values.clear()
            return written

        return task

    def _timed(self, component: str, feed: dict[str, Any], wanted: Mapping[str, str]) -> dict[str, Any]:
        start = time.perf_counter()
        outputs = self.engines[component].run(feed, wanted)
        seconds = time.perf_counter() - start
        with self.lock:
            self.job.seconds[component] = self.job.seconds.get(component, 0.0) + seconds
        return outputs

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
            return self._row(name, group, section, step, tables)
        if source == "image":
            return _batch([self.job.image.crop(t.top, t.left, t.height, t.width) for t in group.tiles])
        if source in self.program.grids:
            px = self.program.grids[source].px
            return _batch([crop(self.grids[source], tile, px) for tile in group.tiles])
        return group.values[source] if source in group.values else self.values[source]

    def _row(self, name: str, group: _Group, section: str, step: int, tables: Mapping[str, Any]) -> Any:
        if name in tables:
            return tables[name] if section != "each" else tables[name][step]
        known = next(v for v in (group.values, self.values, self.constants) if name in v)
        whole = known[name]
        rows, steps = whole.shape[known is group.values], len(next(iter(tables.values())))
        if rows != steps:  # rows for another number of steps are rows for other sigmas
            raise UsageError(f"table {name!r} has {rows} rows for {steps} steps; use --steps {rows}")
        return whole[:, step] if known is group.values else whole[step]
