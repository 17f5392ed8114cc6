"""Memory: how much a restoration needs, how much is free, and how much was used."""

import contextlib
import math
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from pathlib import Path

from tilewright.runtime.bundle.manifest import EngineSpec
from tilewright.runtime.bundle.program import Pass, Program, Tiles, state_shape
from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.bundle.weights import Reference
from tilewright.runtime.engines.choose import outside, shortest_tile
from tilewright.runtime.errors import ResourceError, UsageError
from tilewright.runtime.images.canvas import padded
from tilewright.runtime.plan.passes import least_px, part_bytes, plan_of, smaller_tile
from tilewright.runtime.plan.tiles import TilePlan

__all__ = [
    "INTERPRETER_BYTES",
    "MEMORY_MODES",
    "Estimate",
    "all_on_gpu",
    "all_open",
    "available_bytes",
    "bytes_of",
    "estimate",
    "needed_bytes",
    "peak_bytes",
    "reset_peak",
    "weights_bytes",
]

MEMORY_MODES = ("fast", "low")  # re-packed weights, mapped weights
OPEN_SHARE = 0.7  # share of the free memory for all engines together; the rest is for work
INTERPRETER_BYTES = 80_000_000  # Python, NumPy, Pillow and ONNX Runtime, measured
# memory for calls in proportion to the values alive, measured: between the values in use lie gaps that are too small
ARENA = 1.4
LIBVIPS_BYTES, LIBVIPS_ROWS = 60_000_000, 1000  # its code, and the rows that it reads or writes at once
GRAPH = 30  # bytes of an open engine for each byte of its graph's file, measured 28 to 35
WIDTHS = {"float64": 8, "int64": 8, "float16": 2, "bfloat16": 2, "int16": 2, "int8": 1, "uint8": 1, "bool": 1}
UNITS = {"": 1, "b": 1} | {
    f"{prefix}{'i' if base == 1024 else ''}b": base**power
    for base in (1000, 1024)
    for power, prefix in enumerate("kmgt", 1)
}
CONTROL_GROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Memory that is free without swapping; none if the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    system = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return min([system, *_control_group_bytes()])


def _control_group_bytes() -> Iterable[int]:
    try:
        limit, used, table = ((CONTROL_GROUP / f"memory.{n}").read_text() for n in ("max", "current", "stat"))
    except OSError:
        return []
    parts = dict(line.split() for line in table.splitlines())
    cached = sum(
        int(parts.get(name, 0)) for name in ("active_file", "inactive_file")
    )  # the system frees it when needed
    return [] if limit.strip() == "max" else [int(limit) - int(used) + cached]


def peak_bytes() -> int:
    """The most memory of this process since `reset_peak`, or since its start; 0 if the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return _peak_of_its_life()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def _peak_of_its_life() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def reset_peak() -> None:
    """Count the peak anew, if the system allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def bytes_of(text: str, name: str = "memory_limit") -> int:
    """The number of bytes in a text like `2GiB`, `1.5 GB` or `800MiB`."""
    parsed = re.fullmatch(r"\s*(\d+\.?\d*)\s*([a-z]*)\s*", text.lower(), re.ASCII)
    size = float(parsed[1]) * UNITS.get(parsed[2], 0) if parsed else 0.0
    if not 1 <= size < 2**63:
        raise UsageError(f"{name}={text!r} is no amount of memory; write 800MiB, 2GiB or 2GB")
    return int(size)


def needed_bytes(
    bundle: Bundle,
    specs: Mapping[str, EngineSpec],
    passes: Iterable[tuple[Pass, TilePlan]],
    height: int,
    width: int,
    memory: str,
    *,
    all_open: bool,
    steps: int | None = None,
    devices: int = 1,
    copies: int = 1,
    on_disk: bool = False,
) -> int:
    """The peak memory of restoring a padded image of this size in output pixels.

    `copies`: how many devices have engines of their own; 0 if other processes run them. `on_disk`: no pixels are held
    in memory, and the picture becomes final from the top to the bottom.
    """
    passes = list(passes)
    held = Held(bundle, passes, steps, devices, depth_first=on_disk and all_open)
    every = bundle.program.components()
    most = partial(_call_bytes, specs)
    peak = 0.0
    for place, (p, plan) in enumerate(passes):
        called = {call.run for *_, call in p.calls()}
        before = passes[: place + 1] if all_open else [(p, plan)]  # the engines keep the memory of the largest calls
        working = (
            (copies > 0)
            * ARENA
            * max(
                _at_once(q, its_plan, devices) * most(call.run, q, its_plan)
                for q, its_plan in before
                for *_, call in q.calls()
            )
        )
        opened = {name: specs[name] for name in (every if all_open else called)}
        engines = weights_bytes(bundle, opened, memory) + GRAPH * _graph_bytes(bundle, opened)
        peak = max(peak, held.at(place) + working + copies * engines)
    picture = 3 * height * width + 3 * height * width // bundle.program.scale**2  # the result and the source, 8 bits
    if on_disk:
        picture = LIBVIPS_BYTES + LIBVIPS_ROWS * 3 * width
    constants = bundle.manifest.constants
    fixed = bundle.path(constants).stat().st_size if constants else 0
    return int(INTERPRETER_BYTES + picture + fixed + peak)


def weights_bytes(bundle: Bundle, engines: Mapping[str, EngineSpec], memory: str) -> int:
    """The memory that the weights of open engines take for themselves: re-packed, or reordered for convolutions."""
    engines = {name: spec for name, spec in engines.items() if spec.device == "cpu"}  # a GPU has its own memory
    if memory == "low":
        return sum(spec.memory.copied for spec in engines.values())
    tables = {spec.weights or name for name, spec in engines.items() if spec.precision == "float32"}
    stored = {spec.weights or name for name, spec in engines.items()} - tables
    wide = sum(4 * math.prod(r.shape) for r in _references(bundle, tables))
    return wide + sum(r.length for r in _references(bundle, stored))


def mapped_bytes(bundle: Bundle, engines: Mapping[str, EngineSpec], memory: str) -> int:
    """The most that a pass reads from mapped files of weights. The system takes this memory back when it needs it."""
    if memory != "low":
        return 0
    most = 0
    for p in bundle.program.passes:
        called = {call.run: engines[call.run] for *_, call in p.calls()}
        tables = {spec.weights or name for name, spec in called.items()}
        stored = sum(r.length for r in set(_references(bundle, tables)))
        most = max(most, stored - weights_bytes(bundle, called, memory))  # what is copied is mapped no longer
    return most


def _references(bundle: Bundle, tables: Iterable[str]) -> list[Reference]:
    """The tensors of tables; those that two tables share count twice, as every engine packs its own."""
    return [r for table in sorted(tables) for r in bundle.weights.tensors.get(table, {}).values()]


def _graph_bytes(bundle: Bundle, engines: Mapping[str, EngineSpec]) -> int:
    return sum(bundle.manifest.files[spec.graph].size for spec in engines.values() if spec.device == "cpu")


def _call_bytes(specs: Mapping[str, EngineSpec], name: str, p: Pass, plan: TilePlan) -> float:
    """The memory inside one call of a component with as many tiles as a call may take."""
    batch = min(p.tiles.batch, plan.count) if p.tiles else 1
    return specs[name].memory.of_call(batch, plan.tile_height * plan.tile_width)


def _at_once(p: Pass, plan: TilePlan, devices: int) -> int:
    """How many devices the tiles of a pass can keep busy."""
    return min(devices, -(-plan.count // (p.tiles.batch if p.tiles else 1)))


def _steps(p: Pass, steps: int | None) -> int:
    return 1 if p.steps is None else p.steps.count if steps is None else steps


class Held:
    """The bytes that a job holds between calls: parts of grids, values of tiles, values of the job."""

    def __init__(
        self,
        bundle: Bundle,
        passes: Sequence[tuple[Pass, TilePlan]],
        steps: int | None,
        devices: int,
        depth_first: bool = False,
    ) -> None:
        self.grids, self.passes, self.devices = bundle.program.grids, passes, devices
        joined = any(p.writes("each") & self.grids.keys() for p, _ in passes)
        self.depth_first = depth_first and not joined  # a joined pass needs all of its tiles at once
        self.job = 0
        self.kept: list[tuple[int, int, int, int]] = []  # written by a pass, read last by a pass, bytes a tile, tiles
        self.open: list[int] = []  # pass -> bytes of an open tile
        shapes: dict[tuple[Tiles | None, str], tuple[int, ...]] = {}
        of_tiles: dict[Tiles | None, set[str]] = {}
        for place, (p, plan) in enumerate(passes):
            shared = self._shared(p, of_tiles.setdefault(p.tiles, set()))
            sizes = self._pass_shapes(bundle, p, plan, _steps(p, steps), shapes)
            of_tile = 0
            for name, size in sizes.items():
                last = max((i for i, (q, _) in enumerate(passes) if name in q.reads()), default=place)
                if p.tiles is None or name in shared:
                    self.job += size
                elif last > place:
                    self.kept.append((place, last, size, plan.count))
                else:
                    of_tile += size
            self.open.append(of_tile)

    def at(self, place: int) -> int:
        """The most that is held while a pass runs."""
        p, plan = self.passes[place]
        stays, goes, comes = self.job, 0, 0
        spans = [*self.kept, *self._parts()]
        for first, last, size, count in spans:
            count = min(count, 2 * self._front(plan)) if self.depth_first else count
            if first < place < last:
                stays += size * count
            elif first < place == last:
                goes += size * count
            elif first == place < last:
                comes += size * count
        joined = bool(p.writes("each") & self.grids.keys())
        ready = (4 * self.devices - 2) if p.each else 2 * self.devices
        tiles = plan.count if joined else min(plan.count, ready * (p.tiles.batch if p.tiles else 1))
        front = self._front(plan)
        parts = {name: part_bytes(self.grids[name], plan) for name in p.writes() & self.grids.keys()}
        written = sum(parts.values())
        generation = plan.count * sum(size for name, size in parts.items() if name in p.writes("each"))
        return stays + max(goes, comes, generation if joined else 0) + front * written + tiles * self.open[place]

    def _shared(self, p: Pass, of_tiles: set[str]) -> set[str]:
        """The values that a pass computes once for all of its tiles; `of_tiles` gets the names of the others."""
        if p.tiles is None:
            return set()
        shared: set[str] = set()
        of_tiles |= self.grids.keys() | p.state.keys()
        for section, *_, call in p.calls():
            targets = set(call.outputs.values())
            if section == "once" and call.shared(of_tiles):
                shared |= targets
            else:
                of_tiles |= targets
        return shared

    def _front(self, plan: TilePlan) -> int:
        """How many parts wait for the next row of tiles."""
        return min(plan.count, len(plan.lefts) + 2 + 2 * self.devices)

    def _parts(self) -> Iterable[tuple[int, int, int, int]]:
        """The parts of grids: first and last pass, bytes a tile, tiles. `result` goes to the picture at once."""
        for place, (p, plan) in enumerate(self.passes):
            for name in p.writes() & self.grids.keys():
                last = max((i for i, (q, _) in enumerate(self.passes) if name in q.reads()), default=place)
                yield place, last, part_bytes(self.grids[name], plan), plan.count

    def _pass_shapes(
        self,
        bundle: Bundle,
        p: Pass,
        plan: TilePlan,
        steps: int,
        shapes: dict[tuple[Tiles | None, str], tuple[int, ...]],
    ) -> dict[str, int]:
        """The bytes of each value that a pass writes for one tile, or for the job; `shapes` gets their shapes."""
        tile = plan.tile_height, plan.tile_width
        sizes = {}
        for name, state in p.state.items():
            shapes[p.tiles, name] = (1, *state_shape(state, *tile))
            sizes[name] = 4 * math.prod(shapes[p.tiles, name])
        for *_, call in p.calls():
            component = bundle.manifest.components[call.run]
            named = {"batch": 1, "steps": steps}
            for input_name, source in call.inputs.items():
                shape = self._source_shape(source.lstrip("~"), p, tile, shapes)
                spec = component.inputs[input_name].shape
                named = {d: n for d, n in zip(spec, shape, strict=False) if isinstance(d, str)} | named
            for output, target in call.outputs.items():
                if target in self.grids:
                    continue
                spec_of = component.outputs[output]
                shapes[p.tiles, target] = tuple(_size(d, named) for d in spec_of.shape)
                sizes[target] = WIDTHS.get(spec_of.dtype, 4) * math.prod(shapes[p.tiles, target])
        return sizes

    def _source_shape(
        self, source: str, p: Pass, tile: tuple[int, int], shapes: Mapping[tuple[Tiles | None, str], tuple[int, ...]]
    ) -> tuple[int, ...]:
        if grid := self.grids.get(source):
            return (1, grid.channels, tile[0] // grid.px, tile[1] // grid.px)
        return shapes.get((p.tiles, source), shapes.get((None, source), ()))


def _size(dim: int | str, named: Mapping[str, int]) -> int:
    """A size of a shape; `h/2` is half of `h`. One that no input has counts as 1."""
    if isinstance(dim, int):
        return dim
    whole, _, part = dim.partition("/")
    return named.get(dim, named.get(whole, 1) // int(part or 1))


@dataclass(frozen=True)
class Estimate:
    """The size, tile plans and memory of a restoration."""

    width: int  # width of the result
    height: int
    scale: int
    passes: list[tuple[Pass, TilePlan]]
    needed_bytes: int
    mapped_bytes: int  # the most of mapped weights, which the system keeps in memory while there is room
    available_bytes: int | None
    limited: bool = False  # what is available is what the caller allows
    on_disk: bool = False  # its pixels lie on a disk
    # the least bytes, and the options with which so few suffice
    least: "Callable[[], tuple[int, str]]" = field(default=lambda: (0, ""), compare=False)

    def require(self) -> None:
        """Refuse a restoration that does not fit in memory."""
        if self.available_bytes is None or self.needed_bytes <= self.available_bytes:
            return
        there = f"{_gib(self.available_bytes)} are {'allowed' if self.limited else 'free'}"
        least, options = self.least()
        advice = f"the least is {_gib(least)}, with {options}" if options else "use a smaller image"
        raise ResourceError(
            f"{self.width}x{self.height} px needs about {_gib(self.needed_bytes)} of memory, {there}; {advice}"
        )


def estimate(
    bundle: Bundle,
    width: int,
    height: int,
    *,
    tile: int | None = None,
    overlap: int | None = None,
    memory: str = "fast",
    scale: int | None = None,
    opened: Collection[str] = (),
    steps: int | None = None,
    devices: int = 1,
    shared: bool = False,
    elsewhere: bool = False,
    memory_limit: int | None = None,
    engines: Mapping[str, EngineSpec] | None = None,
    on_disk: bool = False,
) -> Estimate:
    """The estimate for an input image of this size; nothing is run. Memory of `opened` engines counts as free.

    `engines`: the engine of each component; by default the first that the bundle lists. `shared`: the devices share
    their engines. `elsewhere`: other processes run them. `memory_limit`: bytes that all of the process may take.
    `on_disk`: the pixels lie on a disk.
    """
    program = bundle.program
    if not all(isinstance(n, Integral) and not isinstance(n, bool) and n >= 1 for n in (width, height)):
        raise UsageError(f"{width}x{height} is no image size; use 1x1 or more")
    width, height = int(width), int(height)  # small integers of NumPy would overflow
    scale = _scale(program, scale)
    listed = bundle.manifest.components
    specs = engines or {name: listed[name].engines[0] for name in program.components()}
    shortest = shortest_tile(specs.values())
    side = least_px(program, tile, shortest)
    wide, high = (padded(n * scale, program.multiple_px, side) for n in (width, height))
    passes = [(p, plan_of(program, p, high, wide, tile, overlap)) for p in program.passes]
    _require_tiles(specs, passes)
    copies = 0 if elsewhere else 1 if shared else devices
    available = available_bytes()
    if available is not None:
        available += copies * weights_bytes(bundle, {name: specs[name] for name in opened}, memory)
    limited = memory_limit is not None and (available is None or memory_limit < available)
    available = memory_limit if limited else available
    needs = partial(needed_bytes, bundle, specs, steps=steps, devices=devices, copies=copies, on_disk=on_disk)
    needed = needs(passes, high, wide, memory, all_open=all_open(bundle, specs, memory, available, copies))

    def least() -> tuple[int, str]:
        """The bytes in low memory with the smallest tiles, and the options that ask for both."""
        size, plans, sides = tile, passes, (high, wide)
        while (smaller := smaller_tile(program, plans, overlap, shortest)) is not None:
            size = smaller
            side = least_px(program, size, shortest)
            sides = tuple(padded(n * scale, program.multiple_px, side) for n in (height, width))  # type: ignore[assignment]
            plans = [(p, plan_of(program, p, *sides, size, overlap)) for p in program.passes]
        options = [f"--tile {size}"] * (size != tile) + ["--memory low"] * (memory != "low")
        return needs(plans, *sides, "low", all_open=False), " and ".join(options)

    mapped = mapped_bytes(bundle, specs, memory)
    return Estimate(width * scale, height * scale, scale, passes, needed, mapped, available, limited, on_disk, least)


def _require_tiles(specs: Mapping[str, EngineSpec], passes: Iterable[tuple[Pass, TilePlan]]) -> None:
    """Refuse tiles that an engine was not made for."""
    for p, plan in passes:
        for name in sorted({call.run for *_, call in p.calls()}) if p.tiles else ():
            for side in (plan.tile_height, plan.tile_width):
                if reason := outside(specs[name], side):
                    raise UsageError(f"engine {specs[name].name} of {name} {reason}; use another --tile or --engine")


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _scale(program: Program, scale: int | None) -> int:
    if scale is None or scale == program.scale:
        return program.scale
    if not program.any_scale or not 1 <= scale <= 16:
        able = "1 to 16" if program.any_scale else program.scale
        raise UsageError(f"scale={scale} does not work with this bundle; use {able}")
    return scale


def all_open(bundle: Bundle, engines: Mapping[str, EngineSpec], memory: str, free: int | None, copies: int) -> bool:
    """Whether all engines are open at once. With `low`, or if they do not fit, only those of one pass are.

    `copies`: how many devices have engines of their own.
    """
    fits = free is None or copies * weights_bytes(bundle, engines, memory) < OPEN_SHARE * free
    return memory == "fast" and fits


def all_on_gpu(bundle: Bundle, engines: Mapping[str, EngineSpec], memory: str, free: int) -> bool:
    """Whether all engines are open at once on a GPU with so much free memory; it holds weights as they are stored."""
    tables = {spec.weights or name for name, spec in engines.items()}
    return memory == "fast" and sum(r.length for r in _references(bundle, tables)) < OPEN_SHARE * free
