"""Restoring images with a bundle, with progress and timings."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from tilewright.runtime.bundle.arguments import Argument
from tilewright.runtime.bundle.read import Bundle, read_bundle
from tilewright.runtime.bundle.weights import checked_folder
from tilewright.runtime.engines import Engine, backend
from tilewright.runtime.errors import UsageError
from tilewright.runtime.estimate import MEMORY_MODES, Estimate, all_open, available_bytes, estimate, peak_bytes
from tilewright.runtime.images.canvas import Enlarged, fill
from tilewright.runtime.images.read import Picture, read_image
from tilewright.runtime.images.write import assemble
from tilewright.runtime.inputs import check_names, gather, read_tensors, whole
from tilewright.runtime.plan.noise import WORD_MAX
from tilewright.runtime.plan.passes import least_px
from tilewright.runtime.scheduler import Job, Walk

__all__ = ["Restoration", "Restorer", "Sitting", "load"]


@dataclass(frozen=True)
class Restoration:
    """A restored image, with times, tiles and memory."""

    image: npt.NDArray[np.uint8]
    scale: int
    icc: bytes | None
    seconds: dict[str, float]  # phase -> time; the phase of an engine has its component's name
    tiles: dict[str, int]  # pass -> tiles
    peak_bytes: int


class _Engines(Mapping[str, Engine]):
    """The engine of each component, opened on its first use."""

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
        """Close some engines; they are opened again on their next use."""
        for name in names:
            if engine := self.opened.pop(name, None):
                engine.close()


@dataclass
class Restorer:
    """A bundle with its engines. It is a context manager."""

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

    @property
    def arguments(self) -> dict[str, Argument]:
        """The bundle's arguments by name: kind, default, choices, range, one line of help."""
        return self.bundle.arguments

    def __call__(self, image: Any, **options: Any) -> npt.NDArray[np.uint8]:
        """The restored image as uint8, with the layout of the source.

        `image`: a path, bytes, a binary file, a Pillow image or a uint8 array. Options as for `restore`. For a file or
        bytes of it: `write_image("out.png", pixels)`, `encode_image(pixels, ".png")`.
        """
        return self.restore(image, **options).image

    def restore(self, image: Any, **options: Any) -> Restoration:
        """Restore an image and measure it; options as for `sitting`."""
        return self.sitting(image, **options).round({}, keep=False)

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
        **arguments: Any,
    ) -> "Sitting":
        """An image that can be restored several times, with other arguments. Sizes are in output pixels.

        `arguments` are the bundle's, see `Restorer.arguments`: `prompt="a stone bridge"`. A round may choose others.
        """
        check_names(self.bundle, arguments)
        whole("seed", seed, 0, WORD_MAX)
        for name, value in {"tile": tile, "overlap": overlap, "steps": steps, "scale": scale}.items():
            if value is not None:
                whole(name, value, 0)
        if steps is not None and not any(p.steps for p in self.bundle.program.passes):
            raise UsageError(f"steps={steps}: {self.bundle.manifest.system} has no steps; leave it out")
        clock = _Clock()
        picture = read_image(image, max_pixels=max_pixels)
        height, width = picture.rgb.shape[:2]
        opened = self.engines.opened if isinstance(self.engines, _Engines) else ()
        needs = estimate(
            self.bundle, width, height, tile=tile, overlap=overlap, memory=self.memory, scale=scale, opened=opened
        )
        needs.require()
        clock.lap("read")
        program = self.bundle.program
        enlarged = Enlarged(picture.rgb, needs.scale, program.multiple_px, least_px(program, tile))
        job = Job(enlarged, seed, tile, overlap, steps, {}, self.workers, on_progress, self.on_unused)
        return Sitting(self.bundle, picture, needs, Walk(program, self.engines, self.constants, job), arguments, clock)


@dataclass
class Sitting:
    """One image, restored again for each change of arguments. Passes that do not depend on the change run once."""

    bundle: Bundle
    picture: Picture
    estimate: Estimate
    walk: Walk
    arguments: Mapping[str, Any]
    clock: "_Clock"

    def __call__(self, **arguments: Any) -> npt.NDArray[np.uint8]:
        """The image restored with these arguments of the bundle: `sitting(prompt="a stone bridge")`."""
        return self.restore(**arguments).image

    def restore(self, **arguments: Any) -> Restoration:
        """The same, with measurements."""
        return self.round(arguments, keep=True)

    def round(self, arguments: Mapping[str, Any], *, keep: bool) -> Restoration:
        """The same. `keep` the values that another round can use."""
        job = self.walk.job
        job.seconds.clear()
        self.clock.last = time.perf_counter()  # the caller's time between rounds does not count
        rgb = np.empty((self.estimate.height, self.estimate.width, 3), np.uint8)
        job.on_final = partial(fill, rgb)
        self.walk.run(gather(self.bundle, {**self.arguments, **arguments}), keep=keep)
        self.clock.lap("passes")
        pixels = assemble(rgb, self.picture)
        self.clock.lap("assemble")
        tiles = {p.name: len(plan.tiles) for p, plan in self.estimate.passes}
        return Restoration(
            pixels, self.estimate.scale, self.picture.icc, self.clock.seconds | job.seconds, tiles, peak_bytes()
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
    path: str | os.PathLike[str] | Bundle,
    *,
    memory: str = "fast",
    threads: int = 0,
    workers: int = 1,
    weights_dir: str | os.PathLike[str] | None = None,
    expect: str | None = None,
    fresh: bool = False,
) -> Restorer:
    """Check a bundle, and open an engine for every component that its program calls.

    `path`: a folder, or the result of `read_bundle`, for which `expect` and `fresh` have no effect.
    `expect` and `fresh` as for `read_bundle`.
    """
    if memory not in MEMORY_MODES:
        raise UsageError(f"memory={memory!r} is not one of {', '.join(MEMORY_MODES)}")
    if threads < 0 or workers < 1:
        raise UsageError(f"threads={threads} and workers={workers} must be at least 0 and 1")
    bundle = path if isinstance(path, Bundle) else read_bundle(path, expect=expect, fresh=fresh)
    folder = checked_folder(weights_dir)

    def open_engine(name: str) -> Engine:
        module = backend(bundle.manifest.components[name].engines[0].backend)
        engine: Engine = module.open_engine(bundle, name, memory=memory, threads=threads, weights_dir=folder)
        return engine

    engines = _Engines(bundle.program.components(), open_engine)
    constants = read_tensors(bundle.path(bundle.manifest.constants)) if bundle.manifest.constants else {}
    if not all_open(bundle, memory, available_bytes()):
        return Restorer(bundle, engines, constants, memory, workers, engines.close)
    for name in engines:
        engines[name]
    return Restorer(bundle, engines, constants, memory, workers)
