"""How much memory a restoration needs, how much there is, and how much was used."""

import contextlib
import math
import sys
from collections.abc import Iterable
from pathlib import Path

from tilewright.runtime.bundle import Bundle
from tilewright.runtime.program import Pass
from tilewright.runtime.tiles import Plan

__all__ = ["available_bytes", "needed_bytes", "peak_bytes", "reset_peak", "weights_bytes"]

INTERPRETER_BYTES = 120_000_000  # Python, NumPy, Pillow and ONNX Runtime, measured
CONTROL_GROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Memory that can be taken without swapping; none where the system does not tell."""
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
    cached = sum(int(parts.get(name, 0)) for name in ("active_file", "inactive_file"))  # given back when asked for
    return [] if limit.strip() == "max" else [int(limit) - int(used) + cached]


def peak_bytes() -> int:
    """The most memory this process has held, since `reset_peak` where the system can tell; 0 where it tells nothing."""
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
    """Begin to count the peak anew, where the system lets us."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def needed_bytes(
    bundle: Bundle, passes: Iterable[tuple[Pass, Plan]], height: int, width: int, memory: str, *, all_open: bool
) -> int:
    """What restoring a padded image of that many output pixels will hold at its worst moment."""
    passes = list(passes)
    held = [grid for grid in bundle.program.grids.values() if grid.init != "input"]  # the input is read by crops
    cells = sum(g.channels * (height // g.px) * (width // g.px) for g in held)
    cells += 3 * height * width  # the join of the pass that runs, and then the picture in 8 bits
    cells += sum(_kept_cells(bundle, p, plan) for p, plan in passes)
    every = bundle.program.components()
    working = max(
        _pass_bytes(bundle, p, plan)
        + weights_bytes(bundle, every if all_open else {c.run for *_, c in p.calls()}, memory)
        for p, plan in passes
    )
    return int(INTERPRETER_BYTES + 4 * cells + working)


def weights_bytes(bundle: Bundle, components: Iterable[str], memory: str) -> int:
    """What the weights of open components hold: mapped, and for `fast` also re-packed as float32."""
    tensors = [r for name in components for r in bundle.weights.tensors.get(name, {}).values()]
    if memory == "low":
        return 0  # mapped pages are given back when they are asked for
    return sum(r.length + 4 * math.prod(r.shape) for r in tensors)


def _kept_cells(bundle: Bundle, p: Pass, plan: Plan) -> int:
    """Numbers that live with the job or with the tiles of a pass, as far as their shapes are known."""
    sizes = {"batch": len(plan.tiles), "steps": p.steps.count if p.steps else 1}
    cells = 0
    for *_, call in p.calls():
        shapes = [bundle.manifest.components[call.run].outputs[name].shape for name in call.outputs]
        known = [s for s in shapes if all(isinstance(d, int) or d in sizes for d in s)]
        cells += sum(math.prod(d if isinstance(d, int) else sizes[d] for d in shape) for shape in known)
    return cells


def _pass_bytes(bundle: Bundle, p: Pass, plan: Plan) -> float:
    px = plan.tile_height * plan.tile_width * (min(p.tiles.batch, len(plan.tiles)) if p.tiles else 1)
    models = [bundle.manifest.components[call.run].memory for _, _, call in p.calls()]
    return max(m.fixed + m.per_px * px + m.per_px2 * px * px for m in models)
