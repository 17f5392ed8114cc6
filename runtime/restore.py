"""Restore images with a bundle: image in, image out, with progress and timings."""

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from tilewright.runtime import images
from tilewright.runtime.bundle import Bundle, folder_given, read
from tilewright.runtime.engines import Engine, backend
from tilewright.runtime.errors import ResourceError, UsageError
from tilewright.runtime.inputs import gather, read_tensors
from tilewright.runtime.memory import available_bytes, needed_bytes, peak_bytes, weights_bytes
from tilewright.runtime.program import Pass, Program
from tilewright.runtime.scheduler import Job, Walk, least_px, plan_of
from tilewright.runtime.tiles import Plan

__all__ = ["MEMORY_MODES", "Estimate", "Restoration", "Restorer", "Sitting", "estimate", "load"]

MEMORY_MODES = ("fast", "low")  # re-packed weights, mapped weights
OPEN_SHARE = 0.7  # of the free memory that all engines may take together; the rest is for work


@dataclass(frozen=True)
class Restoration:
    """A restored image and what it cost."""

    image: npt.NDArray[np.uint8]
    scale: int
    icc: bytes | None
    seconds: dict[str, float]  # phase -> time; the engines' phases carry their component's name
    tiles: dict[str, int]  # pass -> tiles
    peak_bytes: int


@dataclass(frozen=True)
class Estimate:
    """What restoring an image of some size would take."""

    width: int  # of the result
    height: int
    scale: int
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
    scale: int | None = None,
    opened: Collection[str] = (),
) -> Estimate:
    """Plan an input image of that size; nothing is run. The memory of engines already `opened` is theirs to use."""
    program = bundle.program
    if width < 1 or height < 1:
        raise UsageError(f"{width}x{height} is no image size; use 1x1 or more")
    scale = _scale(program, scale)
    least = least_px(program, tile)
    wide, high = (images.padded(side * scale, program.multiple_px, least) for side in (width, height))
    passes = [(p, plan_of(program, p, high, wide, tile, overlap)) for p in program.passes]
    there = available_bytes()
    there = None if there is None else there + weights_bytes(bundle, opened, memory)
    needed = needed_bytes(bundle, passes, high, wide, memory, all_open=_all_open(bundle, memory, there))
    return Estimate(width * scale, height * scale, scale, passes, needed, there)


def _scale(program: Program, asked: int | None) -> int:
    if asked is None or asked == program.scale:
        return program.scale
    if not program.any_scale or not 1 <= asked <= 16:
        able = "1 to 16" if program.any_scale else program.scale
        raise UsageError(f"scale={asked} is none that this bundle can enlarge by; use {able}")
    return asked


def _all_open(bundle: Bundle, memory: str, there: int | None) -> bool:
    """Whether all engines are held open at once: in `low` memory, or where they do not fit, one pass's at a time."""
    fits = there is None or weights_bytes(bundle, bundle.program.components(), memory) < OPEN_SHARE * there
    return memory == "fast" and fits


class _Engines(Mapping[str, Engine]):
    """Engines by component, opened when they are asked for."""

    def __init__(self, names: Iterable[str], open_engine: Callable[[str], Engine]) -> None:
        self.names, self.open_engine = sorted(names), open_engine
        self.opened: dict[str, Engine] = {}
        self.lock = Lock()

    def __getitem__(self, name: str) -> Engine:
        with self.lock:
            if name not in self.opened:
                self.opened[name] = self.open_engine(name)
            return self.opened[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def close(self, names: Iterable[str]) -> None:
        """Give the memory of some back; asked for again, they are opened again."""
        for name in names:
            if engine := self.opened.pop(name, None):
                engine.close()


@dataclass
class Restorer:
    """A bundle with its engines; a context manager."""

    bundle: Bundle
    engines: Mapping[str, Engine]
    constants: Mapping[str, Any] = field(default_factory=dict)
    memory: str = "fast"
    workers: int = 1
    on_unused: Callable[[set[str]], None] = lambda components: None

    def __enter__(self) -> "Restorer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the engines."""
        if isinstance(self.engines, _Engines):
            self.engines.close(self.engines.names)

    def __call__(self, image: Any, **options: Any) -> npt.NDArray[np.uint8]:
        """The restored image of a path, PIL image or uint8 array; options as for `restore`."""
        return self.restore(image, **options).image

    def restore(self, image: Any, *, inputs: Mapping[str, Any] | None = None, **options: Any) -> Restoration:
        """Restore an image and say what it cost; options as for `sitting`."""
        return self.sitting(image, **options).restore(inputs or {}, keep=False)

    def sitting(
        self,
        image: Any,
        *,
        tile: int | None = None,
        overlap: int | None = None,
        seed: int = 0,
        steps: int | None = None,
        scale: int | None = None,
        max_pixels: int = 100_000_000,
        on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    ) -> "Sitting":
        """An image ready to be restored, once or round after round with other inputs; sizes are in output pixels."""
        clock = _Clock()
        picture = images.read(image, max_pixels=max_pixels)
        height, width = picture.rgb.shape[:2]
        opened = self.engines.opened if isinstance(self.engines, _Engines) else ()
        plans = estimate(
            self.bundle, width, height, tile=tile, overlap=overlap, memory=self.memory, scale=scale, opened=opened
        )
        plans.require()
        clock.lap("read")
        program = self.bundle.program
        enlarged = images.Enlarged(picture.rgb, plans.scale, program.multiple_px, least_px(program, tile))
        job = Job(enlarged, seed, tile, overlap, steps, {}, self.workers, on_progress, self.on_unused)
        return Sitting(self.bundle, picture, plans, Walk(program, self.engines, self.constants, job), clock)


@dataclass
class Sitting:
    """One image, restored as often as its inputs change; what does not depend on them is done once."""

    bundle: Bundle
    picture: images.Picture
    plans: Estimate
    walk: Walk
    clock: "_Clock"

    def __call__(self, **inputs: Any) -> npt.NDArray[np.uint8]:
        """The image restored with these inputs of the bundle's program: `sitting(prompt="a stone bridge")`."""
        return self.restore(inputs).image

    def restore(self, inputs: Mapping[str, Any], *, keep: bool = True) -> Restoration:
        """The same, and what it cost; `keep` what another round can use."""
        job = self.walk.job
        job.seconds.clear()
        self.clock.last = time.perf_counter()  # what the caller did since is no part of the round
        rgb = np.empty((self.plans.height, self.plans.width, 3), np.uint8)
        job.on_final = partial(images.fill, rgb)
        self.walk.run(gather(self.bundle, inputs), keep=keep)
        self.clock.lap("passes")
        pixels = images.assemble(rgb, self.picture)
        self.clock.lap("assemble")
        tiles = {p.name: len(plan.tiles) for p, plan in self.plans.passes}
        return Restoration(
            pixels, self.plans.scale, self.picture.icc, self.clock.seconds | job.seconds, tiles, peak_bytes()
        )


class _Clock:
    """Wall time between laps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self.last
        self.seconds["total"] = sum(spent for phase, spent in self.seconds.items() if phase != "total")
        self.last = now


def load(
    path: str | os.PathLike[str],
    *,
    memory: str = "fast",
    threads: int = 0,
    workers: int = 1,
    weights_dir: str | os.PathLike[str] | None = None,
    expect: str | None = None,
    fresh: bool = False,
) -> Restorer:
    """Open a bundle: check it, then open an engine for every component its program calls.

    `expect` and `fresh` as for `bundle.read`.
    """
    if memory not in MEMORY_MODES:
        raise UsageError(f"memory={memory!r} is not one of {', '.join(MEMORY_MODES)}")
    if threads < 0 or workers < 1:
        raise UsageError(f"threads={threads} and workers={workers} must be at least 0 and 1")
    bundle = read(path, expect=expect, fresh=fresh)
    folder = folder_given(weights_dir)

    def open_engine(name: str) -> Engine:
        module = backend(bundle.manifest.components[name].engines[0].backend)
        engine: Engine = module.open_engine(bundle, name, memory=memory, threads=threads, weights_dir=folder)
        return engine

    engines = _Engines(bundle.program.components(), open_engine)
    constants = read_tensors(bundle.path(bundle.manifest.constants)) if bundle.manifest.constants else {}
    if not _all_open(bundle, memory, available_bytes()):
        return Restorer(bundle, engines, constants, memory, workers, engines.close)
    for name in engines:
        engines[name]
    return Restorer(bundle, engines, constants, memory, workers)
