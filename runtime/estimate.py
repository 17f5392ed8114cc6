"""Memory: how much a restoration needs, how much is free, and how much was used."""

import contextlib
import math
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from tilewright.runtime.bundle.program import Pass, Program
from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.errors import ResourceError, UsageError
from tilewright.runtime.images.canvas import padded
from tilewright.runtime.plan.passes import least_px, plan_of
from tilewright.runtime.plan.tiles import TilePlan

__all__ = [
    "MEMORY_MODES",
    "Estimate",
    "all_open",
    "available_bytes",
    "estimate",
    "needed_bytes",
    "peak_bytes",
    "reset_peak",
    "weights_bytes",
]

INTERPRETER_BYTES = 120_000_000  # Python, NumPy, Pillow and ONNX Runtime, measured
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


def needed_bytes(
    bundle: Bundle, passes: Iterable[tuple[Pass, TilePlan]], height: int, width: int, memory: str, *, all_open: bool
) -> int:
    """The peak memory of restoring a padded image of this size in output pixels."""
    passes = list(passes)
    grids = [grid for grid in bundle.program.grids.values() if grid.init != "input"]  # the input is read crop by crop
    cells = sum(g.channels * (height // g.px) * (width // g.px) for g in grids)
    cells += 3 * height * width  # the joined output of the current pass, and later the picture in 8 bits
    cells += sum(_kept_cells(bundle, p, plan) for p, plan in passes)
    every = bundle.program.components()
    working = max(
        _pass_bytes(bundle, p, plan)
        + weights_bytes(bundle, every if all_open else {c.run for *_, c in p.calls()}, memory)
        for p, plan in passes
    )
    return int(INTERPRETER_BYTES + 4 * cells + working)


def weights_bytes(bundle: Bundle, components: Iterable[str], memory: str) -> int:
    """The memory of open components' weights: mapped, and with `fast` also re-packed as float32."""
    tensors = [r for name in components for r in bundle.weights.tensors.get(name, {}).values()]
    if memory == "low":
        return 0  # the system frees mapped pages when needed
    return sum(r.length + 4 * math.prod(r.shape) for r in tensors)


def _kept_cells(bundle: Bundle, p: Pass, plan: TilePlan) -> int:
    """How many numbers belong to the job or to the tiles of a pass, as far as their shapes are known."""
    sizes = {"batch": plan.count, "steps": p.steps.count if p.steps else 1}
    cells = 0
    for *_, call in p.calls():
        shapes = [bundle.manifest.components[call.run].outputs[name].shape for name in call.outputs]
        fixed_shapes = [s for s in shapes if all(isinstance(d, int) or d in sizes for d in s)]
        cells += sum(math.prod(d if isinstance(d, int) else sizes[d] for d in shape) for shape in fixed_shapes)
    return cells


def _pass_bytes(bundle: Bundle, p: Pass, plan: TilePlan) -> float:
    px = plan.tile_height * plan.tile_width * (min(p.tiles.batch, plan.count) if p.tiles else 1)
    models = [bundle.manifest.components[call.run].memory for _, _, call in p.calls()]
    return max(m.fixed + m.per_px * px + m.per_px2 * px * px for m in models)


MEMORY_MODES = ("fast", "low")  # re-packed weights, mapped weights


OPEN_SHARE = 0.7  # share of the free memory for all engines together; the rest is for work


@dataclass(frozen=True)
class Estimate:
    """The size, tile plans and memory of a restoration."""

    width: int  # width of the result
    height: int
    scale: int
    passes: list[tuple[Pass, TilePlan]]
    needed_bytes: int
    available_bytes: int | None

    def require(self) -> None:
        """Refuse a restoration that does not fit in memory."""
        if self.available_bytes is not None and self.needed_bytes > self.available_bytes:
            raise ResourceError(
                f"{self.width}x{self.height} px needs about {self.needed_bytes / 2**30:.1f} GiB of memory,"
                f" {self.available_bytes / 2**30:.1f} GiB are free; use a smaller --tile or --memory low"
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
) -> Estimate:
    """The estimate for an input image of this size; nothing is run. Memory of `opened` engines counts as free."""
    program = bundle.program
    if width < 1 or height < 1:
        raise UsageError(f"{width}x{height} is no image size; use 1x1 or more")
    scale = _scale(program, scale)
    least = least_px(program, tile)
    wide, high = (padded(side * scale, program.multiple_px, least) for side in (width, height))
    passes = [(p, plan_of(program, p, high, wide, tile, overlap)) for p in program.passes]
    available = available_bytes()
    available = None if available is None else available + weights_bytes(bundle, opened, memory)
    needed = needed_bytes(bundle, passes, high, wide, memory, all_open=all_open(bundle, memory, available))
    return Estimate(width * scale, height * scale, scale, passes, needed, available)


def _scale(program: Program, scale: int | None) -> int:
    if scale is None or scale == program.scale:
        return program.scale
    if not program.any_scale or not 1 <= scale <= 16:
        able = "1 to 16" if program.any_scale else program.scale
        raise UsageError(f"scale={scale} does not work with this bundle; use {able}")
    return scale


def all_open(bundle: Bundle, memory: str, free: int | None) -> bool:
    """Whether all engines are open at once. With `low`, or if they do not fit, only those of one pass are."""
    fits = free is None or weights_bytes(bundle, bundle.program.components(), memory) < OPEN_SHARE * free
    return memory == "fast" and fits
