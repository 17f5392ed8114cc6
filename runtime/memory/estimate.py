"""How much memory a restoration needs, and whether that much is free."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral

from tilewright.runtime.bundle.manifest import EngineSpec
from tilewright.runtime.bundle.program import Pass, Program
from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.bundle.weights import Reference
from tilewright.runtime.engines.choose import outside, shortest_tile
from tilewright.runtime.errors import ResourceError, UsageError
from tilewright.runtime.images.canvas import padded
from tilewright.runtime.memory.held import Held
from tilewright.runtime.memory.machine import available_bytes
from tilewright.runtime.plan.passes import least_px, plan_of, smaller_tile
from tilewright.runtime.plan.tiles import TilePlan

__all__ = [
    "INTERPRETER_BYTES",
    "MEMORY_MODES",
    "Estimate",
    "all_on_gpu",
    "all_open",
    "estimate",
    "needed_bytes",
    "weights_bytes",
]

MEMORY_MODES = ("fast", "low")  # re-packed weights, mapped weights
OPEN_SHARE = 0.7  # share of the free memory for all engines together; the rest is for work
INTERPRETER_BYTES = 80_000_000  # Python, NumPy, Pillow and ONNX Runtime, measured
# memory for calls in proportion to the values alive, measured: between the values in use lie gaps that are too small
ARENA = 1.4
LIBVIPS_BYTES, LIBVIPS_ROWS = 60_000_000, 1000  # its code, and the rows that it reads or writes at once
OPENVINO_BYTES, MODEL_BYTES = 60_000_000, 25_000_000  # its code; a network that it runs on a device
GRAPH = 30  # bytes of an open engine for each byte of its graph's file, measured 28 to 35


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
        compiled = sum(spec.backend == "openvino" for spec in opened.values())
        code = (OPENVINO_BYTES * (compiled > 0) + MODEL_BYTES * compiled * devices) * (copies > 0)
        engines = weights_bytes(bundle, opened, memory) + GRAPH * _graph_bytes(bundle, opened)
        peak = max(peak, held.at(place) + working + code + copies * engines)
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
