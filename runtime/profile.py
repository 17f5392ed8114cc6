"""Measuring latency and memory for each resolution: a warm-up, then runs on a fixed picture.

A percentile needs runs beyond it: median and maximum are always told, p90 from 20 runs, p99 from 200.
"""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import numpy as np

from tilewright.runtime.engines import backend
from tilewright.runtime.engines.machine import processor, usable_cores
from tilewright.runtime.errors import UsageError
from tilewright.runtime.inputs import whole
from tilewright.runtime.memory.machine import peak_bytes, reset_peak
from tilewright.runtime.restore import Restorer

__all__ = ["engines_text", "hardware", "profile", "resolutions"]

PERCENTILES = {"p50": 1, "p90": 20, "p99": 200}  # and how many runs each needs


def resolutions(text: str) -> list[tuple[int, int]]:
    """The output sizes in a text like `512,2560x1440`."""
    sizes = []
    for part in text.split(","):
        sides = part.lower().strip().split("x")
        if len(sides) > 2 or not all(side.isdigit() and int(side) for side in sides):
            raise UsageError(f"--resolutions {part.strip()!r} is no size; write 512 or 2560x1440")
        sizes.append((int(sides[0]), int(sides[-1])))
    return sizes


def hardware() -> dict[str, Any]:
    """The machine of a measurement."""
    return {"cpu": processor(), "cores": usable_cores(), "system": f"{platform.system()} {platform.machine()}"}


def profile(
    restorer: Restorer,
    sizes: Sequence[tuple[int, int]],
    *,
    runs: int = 5,
    tile: int | None = None,
    overlap: int | None = None,
    steps: int | None = None,
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    **arguments: Any,
) -> dict[str, Any]:
    """Measure each output size: seconds, time to the first part, megapixels of output a second, peak memory, tiles.

    `arguments` are the bundle's, as for `Restorer.restore`.
    """
    runs = whole("runs", runs, 5)  # fewer are too few for a median
    rows = []
    for width, height in sizes:
        name = f"{width}x{height}"
        measured, firsts = [], []
        reset_peak()
        for i in range(runs + 1):
            picture, parts = _picture(restorer, width, height), _Parts()
            restoration = restorer.restore(
                picture, tile=tile, overlap=overlap, steps=steps, on_part=parts.take, **arguments
            )
            measured.append(restoration.seconds)
            firsts.append(parts.first_s)
            on_progress(name, i + 1, runs + 1)
        row = _row(measured[1:], restoration.image.shape, restoration.tiles)
        plans = restorer.estimate(picture.shape[1], picture.shape[0], tile=tile, overlap=overlap).passes
        devices, components = len(restorer.executor.devices), restorer.specs.keys()
        busy = [sum(s.get(c, 0.0) for c in components) / (devices * s["passes"]) for s in measured[1:]]
        row["first_part_s"] = float(np.median(firsts[1:]))
        row["outside_engines"] = 1 - float(np.median(busy))
        row["computed_px"] = sum(plan.count * plan.tile_height * plan.tile_width for _, plan in plans)
        row["waste"] = {
            p.name: plan.count * plan.tile_height * plan.tile_width / (row["width"] * row["height"]) - 1
            for p, plan in plans
            if p.tiles
        }
        rows.append(row)
    bundle = restorer.bundle
    backends = sorted({spec.backend for spec in restorer.specs.values()})
    return {
        "bundle": bundle.digest,
        "system": bundle.manifest.system,
        "preset": bundle.manifest.preset,
        "engine": ", ".join(backend(name).version() for name in backends),
        **restorer.ran,
        "batch": max((p.tiles.batch for p in bundle.program.passes if p.tiles), default=1),
        "threads": restorer.threads,
        "memory": restorer.memory,
        "hardware": hardware(),
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "runs": runs,
        "resolutions": rows,
    }


class _Parts:
    """The time until the first part of a picture is final."""

    def __init__(self) -> None:
        self.begun, self.first_s = time.perf_counter(), 0.0

    def take(self, top: int, left: int, pixels: Any) -> None:
        self.first_s = self.first_s or time.perf_counter() - self.begun


def _picture(restorer: Restorer, width: int, height: int) -> Any:
    scale = restorer.bundle.program.scale
    shape = (-(-height // scale), -(-width // scale), 3)
    return np.random.Generator(np.random.Philox(key=0)).integers(0, 256, shape, np.uint8)


def _row(seconds: list[dict[str, float]], shape: tuple[int, ...], tiles: dict[str, int]) -> dict[str, Any]:
    total = np.array([s["total"] for s in seconds])
    shown = {
        name: float(np.percentile(total, int(name[1:]))) for name, least in PERCENTILES.items() if len(total) >= least
    }
    return {
        "width": shape[1],
        "height": shape[0],
        "seconds": shown | {"max": float(total.max())},
        "runs_s": [float(t) for t in total],
        "images_per_second": len(total) / float(total.sum()),
        "megapixels_per_second": shape[0] * shape[1] / 1e6 / shown["p50"],
        "phases": {phase: float(np.median([s[phase] for s in seconds])) for phase in seconds[0] if phase != "total"},
        "peak_bytes": peak_bytes(),
        "tiles": tiles,
    }


def engines_text(engines: Mapping[str, str], devices: Sequence[str]) -> str:
    """The engines and devices of a measurement or a restoration, as text."""
    return f"{', '.join(sorted(set(engines.values())))} on {', '.join(devices)}"
