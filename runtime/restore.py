"""Restore images with a bundle: image in, image out, with progress and timings."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from tilewright.runtime import images
from tilewright.runtime.bundle import Bundle, read, safetensors_header
from tilewright.runtime.engines import Engine, backend
from tilewright.runtime.errors import BundleError, ResourceError, UsageError
from tilewright.runtime.memory import available_bytes, needed_bytes, peak_bytes
from tilewright.runtime.program import Pass
from tilewright.runtime.scheduler import Job, plan_of, run
from tilewright.runtime.tiles import Plan

__all__ = ["MEMORY_MODES", "Estimate", "Restoration", "Restorer", "estimate", "load"]

MEMORY_MODES = ("fast", "low")  # re-packed weights, mapped weights


@dataclass(frozen=True)
class Restoration:
    """A restored image and what it cost."""

    image: npt.NDArray[np.uint8]
    icc: bytes | None
    seconds: dict[str, float]  # phase -> time; the engines' phases carry their component's name
    tiles: dict[str, int]  # pass -> tiles
    peak_bytes: int


@dataclass(frozen=True)
class Estimate:
    """What restoring an image of some size would take."""

    width: int  # of the result
    height: int
    passes: list[tuple[Pass, Plan]]
    needed_bytes: int
    available_bytes: int | None

    def require(self) -> None:
        """Refuse work that would not fit in memory."""
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
) -> Estimate:
    """Plan an input image of that size; nothing is run."""
    program = bundle.program
    if width < 1 or height < 1:
        raise UsageError(f"{width}x{height} is no image size; use 1x1 or more")
    wide, high = (-(-side * program.scale // program.multiple_px) * program.multiple_px for side in (width, height))
    passes = [(p, plan_of(program, p, high, wide, tile, overlap)) for p in program.passes]
    needed = needed_bytes(bundle, passes, high, wide, memory)
    return Estimate(width * program.scale, height * program.scale, passes, needed, available_bytes())


@dataclass
class Restorer:
    """A bundle with its engines open; a context manager."""

    bundle: Bundle
    engines: Mapping[str, Engine]
    constants: Mapping[str, Any] = field(default_factory=dict)
    memory: str = "fast"
    workers: int = 1

    def __enter__(self) -> "Restorer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the engines."""
        for engine in self.engines.values():
            engine.close()

    def __call__(self, image: Any, **options: Any) -> npt.NDArray[np.uint8]:
        """The restored image of a path, PIL image or uint8 array; options as for `restore`."""
        return self.restore(image, **options).image

    def restore(
        self,
        image: Any,
        *,
        tile: int | None = None,
        overlap: int | None = None,
        seed: int = 0,
        steps: int | None = None,
        inputs: Mapping[str, Any] | None = None,
        max_pixels: int = 100_000_000,
        on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    ) -> Restoration:
        """Restore an image and say what it cost; sizes are in output pixels."""
        clock = _Clock()
        picture = images.read(image, max_pixels=max_pixels)
        height, width = picture.rgb.shape[:2]
        plans = estimate(self.bundle, width, height, tile=tile, overlap=overlap, memory=self.memory)
        plans.require()
        clock.lap("read")
        program = self.bundle.program
        enlarged = images.Enlarged(picture.rgb, program.scale, program.multiple_px)
        rgb = np.empty((height * program.scale, width * program.scale, 3), np.uint8)
        job = Job(enlarged, seed, tile, overlap, steps, dict(inputs or {}), self.workers, on_progress)
        job.on_final = partial(images.fill, rgb)
        run(program, self.engines, self.constants, job)
        clock.lap("passes")
        pixels = images.assemble(rgb, picture)
        clock.lap("assemble")
        tiles = {p.name: len(plan.tiles) for p, plan in plans.passes}
        return Restoration(pixels, picture.icc, clock.seconds | job.seconds, tiles, peak_bytes())


class _Clock:
    """Wall time between laps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.start = self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self.last
        self.seconds["total"] = now - self.start
        self.last = now


def load(
    path: str | os.PathLike[str],
    *,
    memory: str = "fast",
    threads: int = 0,
    workers: int = 1,
    weights_dir: str | os.PathLike[str] | None = None,
) -> Restorer:
    """Open a bundle: check it, then open an engine for every component its program calls."""
    if memory not in MEMORY_MODES:
        raise UsageError(f"memory={memory!r} is not one of {', '.join(MEMORY_MODES)}")
    if threads < 0 or workers < 1:
        raise UsageError(f"threads={threads} and workers={workers} must be at least 0 and 1")
    bundle = read(path)
    engines: dict[str, Engine] = {}
    for name in sorted(bundle.program.components()):
        module = backend(bundle.manifest.components[name].engines[0].backend)
        engines[name] = module.open_engine(
            bundle, name, memory=memory, threads=threads, weights_dir=Path(weights_dir) if weights_dir else None
        )
    return Restorer(bundle, engines, _constants(bundle), memory, workers)


def _constants(bundle: Bundle) -> dict[str, Any]:
    if bundle.manifest.constants is None:
        return {}
    path = bundle.path(bundle.manifest.constants)
    data = np.memmap(path, np.uint8, "r")
    header = safetensors_header(path)
    if foreign := sorted(name for name, (spec, _, _) in header.items() if spec.dtype == "bfloat16"):
        raise BundleError(f"{path}: constant {foreign[0]!r} is bfloat16, which NumPy has not; rebuild it as float32")
    return {
        name: data[start : start + length].view(np.dtype(spec.dtype)).reshape([int(d) for d in spec.shape])
        for name, (spec, start, length) in header.items()
    }
