"""Opening a bundle, and restoring images with it."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy.typing as npt

from tilewright.runtime.bundle.arguments import Argument
from tilewright.runtime.bundle.manifest import EngineSpec
from tilewright.runtime.bundle.read import Bundle, read_bundle
from tilewright.runtime.bundle.weights import checked_folder
from tilewright.runtime.cluster.join import join
from tilewright.runtime.engines.choose import shortest_tile
from tilewright.runtime.errors import ResourceError, UsageError
from tilewright.runtime.execute.devices import OpenEngines
from tilewright.runtime.execute.executor import Executor
from tilewright.runtime.execute.walk import Job, Walk, layout
from tilewright.runtime.images.canvas import Enlarged
from tilewright.runtime.images.color import COLORS
from tilewright.runtime.images.on_disk import require_room
from tilewright.runtime.images.read import Picture, read_image
from tilewright.runtime.images.vips import BITS, check_large_format, installed, read_large
from tilewright.runtime.inputs import check_names, read_tensors, seconds, whole
from tilewright.runtime.memory.estimate import MEMORY_MODES, Estimate, estimate
from tilewright.runtime.memory.machine import bytes_of
from tilewright.runtime.plan.lower import moves
from tilewright.runtime.plan.noise import WORD_MAX
from tilewright.runtime.plan.passes import least_px
from tilewright.runtime.setup import open_here, set_up
from tilewright.runtime.sitting import Clock, Restoration, Sitting, Ticket

__all__ = ["Restorer", "load"]

SIZES = 4  # sizes of images whose tiles and nodes are kept for the next image


@dataclass
class Restorer:
    """A bundle with its engines. It is a context manager."""

    bundle: Bundle
    engines: OpenEngines  # of the first device; it is empty if a cluster runs them
    executor: Executor
    specs: Mapping[str, EngineSpec]  # component -> the engine that was chosen
    constants: Mapping[str, Any] = field(default_factory=dict)
    memory: str = "fast"
    memory_limit: int | None = None
    threads: int = 1  # of a device
    tile: int | None = None  # the side of tiles, for images that name no other

    def __post_init__(self) -> None:
        self.lay = lru_cache(SIZES)(partial(layout, self.bundle.program))

    def __enter__(self) -> "Restorer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End what runs, and close the engines."""
        self.executor.close()
        for device in self.executor.devices:
            device.close()

    @property
    def ran(self) -> dict[str, Any]:
        """The name of each component's engine, and the devices, for reports."""
        engines = {name: spec.name for name, spec in self.specs.items()}
        return {"engines": engines, "devices": [device.name for device in self.executor.devices]}

    @property
    def arguments(self) -> dict[str, Argument]:
        """The bundle's arguments by name: kind, default, choices, range, one line of help."""
        return self.bundle.arguments

    def __call__(self, image: Any, **options: Any) -> Any:
        """The restored image as uint8, with the layout of the source.

        `image`: a path, bytes, a binary file, a Pillow image or a uint8 array. Options as for `restore`. For a file or
        bytes of it: `write_image("out.png", pixels)`, `encode_image(pixels, ".png")`.
        """
        return self.restore(image, **options).image

    def restore(self, image: Any, **options: Any) -> Restoration:
        """Restore an image and measure it; options as for `sitting`."""
        return self.submit(image, **options).result()

    def submit(self, image: Any, **options: Any) -> "Ticket":
        """Begin to restore an image, and return at once; options as for `sitting`. Safe from any thread."""
        return self.sitting(image, **options).begin({}, keep=False)

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
        resume: str | os.PathLike[str] | None = None,
        on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
        on_part: Callable[[int, int, npt.NDArray[Any]], None] = lambda top, left, pixels: None,
        beside: str | os.PathLike[str] | None = None,
        bits: int = 8,
        color: str = "off",
        jitter: bool = False,
        **arguments: Any,
    ) -> "Sitting":
        """An image that can be restored several times, with other arguments. Sizes are in output pixels.

        `arguments` are the bundle's, see `Restorer.arguments`: `prompt="a stone bridge"`. A round may choose others.
        `on_progress` gets the name of a pass, how many of its tiles are done, and how many it has. `on_part` gets each
        part of the picture (RGB) as soon as it is final. Both are called on threads of the devices, one call at a time.
        An exception that they raise ends the job. If the memory does not suffice for a tile, the image begins anew with
        smaller tiles, and all parts come again. `resume`: the file where `Ticket.keeping` kept the finished parts of
        the same restoration; the first round goes on from there, and does not hand these parts on again. Without that
        file it starts from the beginning. `beside`: the file that the result will be written to. If the image does not
        fit in memory, its pixels and those of the result lie in files beside that one; this needs the extra `large`.
        `bits`: 16 keeps 16 bits of a channel, in files too. `color`: "wavelet" takes the low frequencies of the
        enlarged image, "adain" the mean and spread of its channels; `on_part` gets the parts before that. `jitter`:
        the borders of tiles move from step to step, where tiles are joined after every step.
        """
        check_names(self.bundle, arguments)
        seed = whole("seed", seed, 0, WORD_MAX)
        max_pixels = whole("max_pixels", max_pixels, 1)
        tile = self.tile if tile is None else tile
        sizes = {"tile": tile, "overlap": overlap, "steps": steps, "scale": scale}
        tile, overlap, steps, scale = (n if n is None else whole(name, n, 0) for name, n in sizes.items())
        if steps is not None and not any(p.steps for p in self.bundle.program.passes):
            raise UsageError(f"steps={steps}: {self.bundle.manifest.system} has no steps; leave it out")
        if jitter and not any(moves(self.bundle.program, p) for p in self.bundle.program.passes):
            system = self.bundle.manifest.system
            raise UsageError(f"jitter=True: {system} has no pass that joins its tiles after every step; leave it out")
        if color not in COLORS:
            raise UsageError(f"color={color!r} is not one of {', '.join(COLORS)}")
        clock = Clock()
        size = cache(partial(self.estimate, tile=tile, overlap=overlap, scale=scale, steps=steps))
        place = None if beside is None else Path(beside)
        picture, needs = self._picture(image, place, bits, max_pixels, size)
        clock.lap("read")
        program = self.bundle.program
        shortest = shortest_tile(self.specs.values())
        enlarged = Enlarged(picture.rgb, needs.scale, program.multiple_px, least_px(program, tile, shortest))
        job = Job(enlarged, seed, tile, overlap, steps, on_progress=on_progress, shortest_px=shortest)
        job = replace(job, jitter=jitter, depth_first=needs.on_disk)
        walk = Walk(program, self.executor, self.constants, job, self.lay)
        file = None if resume is None else Path(resume)
        place = place if needs.on_disk else None
        ran, threads = self.ran, self.threads
        sitting = Sitting(self.bundle, picture, needs, walk, arguments, clock, ran, threads, file, on_part)
        return replace(sitting, beside=place, bits=bits, color=color)

    def _picture(
        self, image: Any, beside: Path | None, bits: int, max_pixels: int, size: Callable[..., Estimate]
    ) -> tuple[Picture, Estimate]:
        """An image in memory, or in a file beside the result's if it does not fit or has more than 8 bits."""
        from_file = isinstance(image, (str, os.PathLike)) and beside is not None
        if bits not in BITS:
            raise UsageError(f"bits={bits} is no depth of a channel; use 8 or 16")
        if bits > 8 and not from_file:
            raise UsageError(f"bits={bits} works from a file to a file only; name both, or use bits=8")
        try:
            if bits == 8:
                picture = read_image(image, max_pixels=max_pixels, check=lambda *sides: size(*sides).require())
                needs = size(picture.rgb.shape[1], picture.rgb.shape[0])
                needs.require()
                return picture, needs
        except ResourceError as error:
            if not from_file:
                raise
            if not installed():
                raise ResourceError(
                    f"{error}; or pip install 'tilewright[large]', which keeps pixels on the disk"
                ) from None
        assert beside is not None

        def check(width: int, height: int) -> None:
            needs = size(width, height, on_disk=True)
            needs.require()
            shape = needs.height, needs.width, 3
            check_large_format(beside, shape, bits)
            depth = bits // 8
            sizes = {"the image": 4 * width * height * depth, "the pixels of the result": math.prod(shape) * depth}
            require_room(beside.resolve().parent, sizes | {"its file": math.prod(shape) * depth})

        available = size(1, 1, on_disk=True).available_bytes
        folder = beside.resolve().parent
        picture = read_large(Path(image), folder, bits=bits, max_pixels=max_pixels, check=check, memory=available)
        return picture, size(picture.rgb.shape[1], picture.rgb.shape[0], on_disk=True)

    def estimate(self, width: int, height: int, **options: Any) -> Estimate:
        """What an image of this size would need here; options as for `estimate`."""
        if options.get("tile") is None:
            options["tile"] = self.tile
        return estimate(
            self.bundle,
            width,
            height,
            memory=self.memory,
            opened=tuple(self.engines.opened),
            devices=len(self.executor.devices),
            shared=self.threads == 1,
            elsewhere=not self.engines,
            memory_limit=self.memory_limit,
            engines=self.specs,
            **options,
        )


def load(
    path: str | os.PathLike[str] | Bundle,
    *,
    engine: str | None = None,
    memory: str = "fast",
    devices: Sequence[str] = ("cpu:0",),
    cluster: str | None = None,
    threads: int = 0,
    batch: int | None = None,
    tile: int | None = None,
    weights_dir: str | os.PathLike[str] | None = None,
    expect: str | None = None,
    fresh: bool = False,
    memory_limit: int | str | None = None,
    deadline_s: float | None = None,
) -> Restorer:
    """Check a bundle, choose an engine for every component that its program calls, and open it on every device.

    `path`: a folder, or the result of `read_bundle`, for which `expect` and `fresh` have no effect.
    `expect` and `fresh` as for `read_bundle`. `engine`: the name, precision or backend of the engines; without it the
    best that fit the machine are chosen. `devices`: `cpu:0`, `cpu:1`, ... run tiles at the same time, each with
    `threads` threads. With 0 threads the devices share the cores. `cluster`: the address of a Ray cluster, or `auto`
    for the one that runs on this machine; every machine of it then has these devices. `batch`: most tiles in a call of
    an engine, of any steps and any images, instead of the bundle's. `tile`: the side of the tiles of every image that
    names no other; engines that do not take it are not chosen. `memory_limit`: bytes, or a text like "2GiB", that a
    restoration may need with all that the process holds. `deadline_s`: a call of an engine that takes longer hangs, and
    its device is not used again; by default 20 times the slowest call of its kind, and a minute at least.
    """
    if memory not in MEMORY_MODES:
        raise UsageError(f"memory={memory!r} is not one of {', '.join(MEMORY_MODES)}")
    deadline_s = None if deadline_s is None else seconds("deadline_s", deadline_s)
    limit = bytes_of(memory_limit) if isinstance(memory_limit, str) else memory_limit
    limit = None if limit is None else whole("memory_limit", limit, 1)
    bundle = path if isinstance(path, Bundle) else read_bundle(path, expect=expect, fresh=fresh)
    folder = checked_folder(weights_dir)
    options: dict[str, Any] = {"engine": engine, "threads": threads, "batch": batch, "tile": tile}
    if cluster is None:
        there = open_here(set_up(bundle, devices=devices, **options), memory, folder, limit)
    else:
        there = join(cluster, bundle, devices=devices, memory=memory, weights_dir=folder, **options)
    signatures = bundle.manifest.components
    executor = Executor(there.devices, pass_by_pass=not there.fits, signatures=signatures, deadline_s=deadline_s)
    bundle, constants = there.bundle, _constants(bundle)
    return Restorer(bundle, there.engines, executor, there.specs, constants, memory, limit, there.threads, tile)


def _constants(bundle: Bundle) -> dict[str, Any]:
    """The arrays of a bundle's constants."""
    file = bundle.manifest.constants
    return read_tensors(bundle.path(file)) if file else {}
