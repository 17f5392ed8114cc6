"""Restoring images with a bundle, with progress and timings."""

import asyncio
import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from tilewright.runtime.bundle.arguments import Argument
from tilewright.runtime.bundle.manifest import EngineSpec
from tilewright.runtime.bundle.measured import on_processor
from tilewright.runtime.bundle.read import Bundle, read_bundle
from tilewright.runtime.bundle.weights import checked_folder
from tilewright.runtime.engines import Engine, backend
from tilewright.runtime.engines.choose import choose_all, largest_batch, require, shortest_tile, tile_sides
from tilewright.runtime.engines.machine import this_machine, usable_cores
from tilewright.runtime.errors import InputError, ResourceError, UsageError
from tilewright.runtime.estimate import (
    MEMORY_MODES,
    Estimate,
    all_open,
    available_bytes,
    bytes_of,
    estimate,
    peak_bytes,
)
from tilewright.runtime.execute.devices import CpuDevice, OpenEngines, cpu_names
from tilewright.runtime.execute.executor import Executor
from tilewright.runtime.execute.walk import Job, Walk, layout
from tilewright.runtime.images.canvas import Enlarged, fill
from tilewright.runtime.images.read import Picture, read_image
from tilewright.runtime.images.write import assemble
from tilewright.runtime.inputs import check_names, gather, read_tensors, seconds, whole
from tilewright.runtime.plan.forecast import Forecast
from tilewright.runtime.plan.noise import WORD_MAX
from tilewright.runtime.plan.passes import least_px
from tilewright.runtime.resume.checkpoint import (
    DIGITS,
    Checkpoint,
    Outdated,
    plain,
    read_checkpoint,
    require_same,
    value_of_picture,
)
from tilewright.runtime.resume.keeper import Keeper

__all__ = ["Restoration", "Restorer", "Setup", "Sitting", "Ticket", "load", "set_up"]

MOST_THREADS = 1024
SIZES = 4  # sizes of images whose tiles and nodes are kept for the next image


@dataclass(frozen=True)
class Restoration:
    """A restored image, with times, tiles and memory."""

    image: npt.NDArray[np.uint8]
    scale: int
    icc: bytes | None
    seconds: dict[str, float]  # phase -> time; the phase of an engine has its component's name
    tiles: dict[str, int]  # pass -> tiles
    peak_bytes: int
    engines: dict[str, str]  # component -> the name of its engine
    devices: tuple[str, ...]  # where the engines ran
    notes: tuple[str, ...] = ()  # devices that failed, batches and tiles that had to be smaller


@dataclass
class Restorer:
    """A bundle with its engines. It is a context manager."""

    bundle: Bundle
    engines: OpenEngines  # of the first device
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

    def __call__(self, image: Any, **options: Any) -> npt.NDArray[np.uint8]:
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
        on_part: Callable[[int, int, npt.NDArray[np.uint8]], None] = lambda top, left, pixels: None,
        **arguments: Any,
    ) -> "Sitting":
        """An image that can be restored several times, with other arguments. Sizes are in output pixels.

        `arguments` are the bundle's, see `Restorer.arguments`: `prompt="a stone bridge"`. A round may choose others.
        `on_progress` gets the name of a pass, how many of its tiles are done, and how many it has. `on_part` gets each
        part of the picture (RGB) as soon as it is final. Both are called on threads of the devices, one call at a time.
        An exception that they raise ends the job. If the memory does not suffice for a tile, the image begins anew with
        smaller tiles, and all parts come again. `resume`: the file where `Ticket.keeping` kept the finished parts of
        the same restoration; the first round goes on from there, and does not hand these parts on again. Without that
        file it starts from the beginning.
        """
        check_names(self.bundle, arguments)
        seed = whole("seed", seed, 0, WORD_MAX)
        max_pixels = whole("max_pixels", max_pixels, 1)
        tile = self.tile if tile is None else tile
        sizes = {"tile": tile, "overlap": overlap, "steps": steps, "scale": scale}
        tile, overlap, steps, scale = (n if n is None else whole(name, n, 0) for name, n in sizes.items())
        if steps is not None and not any(p.steps for p in self.bundle.program.passes):
            raise UsageError(f"steps={steps}: {self.bundle.manifest.system} has no steps; leave it out")
        clock = _Clock()
        size = cache(partial(self.estimate, tile=tile, overlap=overlap, scale=scale, steps=steps))
        picture = read_image(image, max_pixels=max_pixels, check=lambda *sides: size(*sides).require())
        height, width = picture.rgb.shape[:2]
        needs = size(width, height)
        needs.require()
        clock.lap("read")
        program = self.bundle.program
        shortest = shortest_tile(self.specs.values())
        enlarged = Enlarged(picture.rgb, needs.scale, program.multiple_px, least_px(program, tile, shortest))
        job = Job(enlarged, seed, tile, overlap, steps, shortest_px=shortest, on_progress=on_progress)
        walk = Walk(program, self.executor, self.constants, job, self.lay)
        file = None if resume is None else Path(resume)
        return Sitting(self.bundle, picture, needs, walk, arguments, clock, self.ran, self.threads, file, on_part)

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
            memory_limit=self.memory_limit,
            engines=self.specs,
            **options,
        )


@dataclass
class Sitting:
    """One image, restored again for each change of arguments. Passes that do not depend on the change run once."""

    bundle: Bundle
    picture: Picture
    estimate: Estimate
    walk: Walk
    arguments: Mapping[str, Any]
    clock: "_Clock"
    ran: Mapping[str, Any]  # the engines and the devices, as `Restorer.ran`
    threads: int  # of a device
    resume: Path | None  # the file with what the first round has finished
    on_part: Callable[[int, int, npt.NDArray[np.uint8]], None] = lambda top, left, pixels: None

    def __post_init__(self) -> None:
        self.at_first = (self.walk, self.estimate)
        self.ticket: Ticket | None = None  # of the last round

    @property
    def shape(self) -> tuple[int, int, int]:
        """The height, the width and the channels of the result."""
        channels = (1 if self.picture.grey else 3) + (self.picture.alpha is not None)
        return self.estimate.height, self.estimate.width, channels

    def __call__(self, **arguments: Any) -> npt.NDArray[np.uint8]:
        """The image restored with these arguments of the bundle: `sitting(prompt="a stone bridge")`."""
        return self.restore(**arguments).image

    def restore(self, **arguments: Any) -> Restoration:
        """The same, with measurements."""
        return self.round(arguments, keep=True)

    def round(self, arguments: Mapping[str, Any], *, keep: bool) -> Restoration:
        """The same. `keep` the values that another round can use."""
        return self.begin(arguments, keep=keep).result()

    def begin(self, arguments: Mapping[str, Any], *, keep: bool) -> "Ticket":
        """Begin a round, and return at once. The next round may begin when this one has its result."""
        job = self.walk.job
        job.seconds.clear()
        job.notes.clear()
        self.clock.last = time.perf_counter()  # the caller's time between rounds does not count
        rgb = np.empty((self.estimate.height, self.estimate.width, 3), np.uint8)
        job.on_final = partial(self._part, rgb)
        inputs = gather(self.bundle, {**self.arguments, **arguments})
        asked = self.asked(arguments)
        ticket = Ticket(self, rgb, partial(self._begin_smaller, inputs, keep=keep), asked)
        checkpoint = None
        if self.resume is not None and (checkpoint := read_checkpoint(self.resume)):
            self._go_on(checkpoint, ticket)
        self.walk.begin(inputs, keep=keep, finished=checkpoint.finished if checkpoint else None)
        self.resume, self.ticket = None, ticket
        return ticket

    def asked(self, arguments: Mapping[str, Any]) -> Callable[[], dict[str, Any]]:
        """All that decides the result of a round. The digest of the image is computed when it is first needed."""
        job, listed = self.walk.job, self.bundle.arguments
        values = {name: argument.default for name, argument in listed.items()}
        values |= {name: value for name, value in {**self.arguments, **arguments}.items() if value is not None}
        files = {name for name, argument in listed.items() if argument.kind == "tensors" and values[name] is not None}
        plain_values = {f"{name}=": plain(Path(str(v)) if name in files else v) for name, v in values.items()}

        @cache
        def asked() -> dict[str, Any]:
            return {
                "Tilewright ": version("tilewright"),
                "bundle ": self.bundle.digest[:DIGITS],
                "image ": value_of_picture(self.picture),
                **{f"engine of {name} ": engine for name, engine in self.ran["engines"].items()},
                "seed=": job.seed,
                "tile=": self.at_first[0].job.tile_px,
                "overlap=": job.overlap_px,
                "steps=": job.steps,
                "scale=": self.estimate.scale,
                "batch=": sorted({p.tiles.batch for p in self.bundle.program.passes if p.tiles}),
                **plain_values,
            }

        return asked

    def _go_on(self, checkpoint: Checkpoint, ticket: "Ticket") -> None:
        """Prepare to go on from a checkpoint."""
        assert self.resume is not None
        require_same(self.resume, checkpoint.asked, ticket.asked())
        if checkpoint.tile != self.walk.job.tile_px:
            self._use_tile(checkpoint.tile)
        sizes = [block.size for block in self.walk.graph.blocks]
        if [len(tiles) for tiles in checkpoint.finished.done] != sizes:
            raise InputError(f"{self.resume} has other steps or tiles than this version makes; remove it to begin anew")
        ticket.resumed = self.resume, checkpoint.share
        for (top, left), pixels in checkpoint.pixels.items():
            ticket.rgb[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
        notes = self.walk.job.notes
        notes += checkpoint.notes
        if checkpoint.threads != self.threads:
            notes.append(
                f"each device has {self.threads} thread(s) and had {checkpoint.threads}: values may differ by one"
                " level of 255"
            )

    def _begin_smaller(self, inputs: Mapping[str, Any], *, keep: bool) -> bool:
        """Begin anew with smaller tiles, if the memory did not suffice for one tile. Whether it has begun."""
        if (tile := self.walk.smaller_tile()) is None:
            return False
        self._use_tile(tile)
        self.walk.job.notes.append(f"too little memory: the image began anew with --tile {tile}")
        self.walk.begin(inputs, keep=keep)
        return True

    def _use_tile(self, tile: int | None) -> None:
        walk, program = self.walk, self.bundle.program
        least = least_px(program, tile, walk.job.shortest_px)
        enlarged = Enlarged(self.picture.rgb, self.estimate.scale, program.multiple_px, least)
        self.walk = Walk(program, walk.executor, walk.constants, replace(walk.job, image=enlarged, tile_px=tile))
        self.estimate = replace(self.estimate, passes=[(p, self.walk.graph.plans[p.name]) for p in program.passes])

    def _part(self, rgb: npt.NDArray[np.uint8], top: int, left: int, part: npt.NDArray[np.float32]) -> None:
        fill(rgb, top, left, part)
        pixels = rgb[top : top + part.shape[1], left : left + part.shape[2]]
        if pixels.size:  # a part that is all padding has no pixels
            self.on_part(top, left, pixels)

    def finish(self, rgb: npt.NDArray[np.uint8]) -> Restoration:
        """The result of a round whose passes have ended."""
        self.clock.lap("passes")
        pixels = assemble(rgb, self.picture)
        self.clock.lap("assemble")
        tiles = {p.name: plan.count for p, plan in self.estimate.passes}
        seconds = self.clock.seconds | self.walk.job.seconds
        notes = tuple(dict.fromkeys(self.walk.job.notes))
        scale, icc = self.estimate.scale, self.picture.icc
        engines, devices = self.ran["engines"], tuple(self.ran["devices"])
        return Restoration(pixels, scale, icc, seconds, tiles, peak_bytes(), engines, devices, notes)


class Ticket:
    """A restoration that runs: wait for its `result`, `await` it, or `cancel` it."""

    def __init__(
        self,
        sitting: Sitting,
        rgb: npt.NDArray[np.uint8],
        begin_smaller: Callable[[], bool],
        asked: Callable[[], dict[str, Any]],
    ) -> None:
        self.sitting, self.rgb, self.begin_smaller, self.asked = sitting, rgb, begin_smaller, asked
        self.lock = Lock()
        self.cancelled = False
        self.restoration: Restoration | None = None
        self.resumed: tuple[Path, float] | None = None  # the file that it went on from, and the share done then
        self.before_smaller: Callable[[], object] = lambda: None
        self.gave_up: Walk | None = None  # the walk that found too little memory for any tile

    def result(self) -> Restoration:
        """Wait for the restoration, and return it. An interrupt during the wait cancels it."""
        with self.lock:
            while self.restoration is None:
                try:
                    self.sitting.walk.end()
                except (MemoryError, ResourceError):
                    if not self._goes_on():
                        self.gave_up = self.sitting.walk
                        self.sitting.walk, self.sitting.estimate = self.sitting.at_first  # for a further round
                        raise
                else:
                    self.restoration = self.sitting.finish(self.rgb)
            return self.restoration

    def keeping(
        self, path: str | os.PathLike[str], *, every_s: float = 0, on_stop: Callable[[], None] = lambda: None
    ) -> Keeper:
        """A context manager that keeps the finished parts in a file, which is removed if its block ends well.

        It writes the file if an error leaves the block; `error.kept.path` then names it. With `every_s` it also writes
        it whenever so many seconds have passed. `on_stop` is called before the write after an error.
        """
        return Keeper(self, Path(path), seconds("every_s", every_s, none=True), on_stop)

    def keep(self, path: str | os.PathLike[str]) -> None:
        """Write the finished parts to a file, from which `submit` can go on with `resume`. The restoration goes on."""
        while True:
            walk = self._walk()
            finished = walk.copy()
            pixels = {(t, e): self.rgb[t:b, e:r] for t, e, b, r in walk.values.all_handed_on({*finished.regions})}
            pixels = {place: part for place, part in pixels.items() if part.size}  # the padding has no pixels
            notes = tuple(dict.fromkeys(walk.job.notes))
            tile, threads = walk.job.tile_px, self.sitting.threads
            checkpoint = Checkpoint(self.asked(), threads, walk.share(finished.done), tile, notes, finished, pixels)
            try:
                checkpoint.write(Path(path), still_right=partial(self._runs, walk))
                return
            except Outdated:  # smaller tiles overwrite the pixels
                continue

    def share(self) -> float:
        """The share of the work that is done."""
        walk = self._walk()
        return walk.share(walk.values.done)

    def forecast(self) -> Forecast:
        """The share of the work that is done, and the seconds that are left, by the time that calls have taken."""
        return self._walk().forecast()

    def note(self, text: str) -> None:
        """Add a note to the restoration."""
        self._walk().job.notes.append(text)

    def _walk(self) -> Walk:
        if self.sitting.ticket is not self:
            raise RuntimeError("another round has begun")
        return self.gave_up or self.sitting.walk

    def _runs(self, walk: Walk) -> bool:
        return self._walk() is walk

    def done(self) -> bool:
        """Whether `result` would return at once."""
        if not self.lock.acquire(blocking=False):
            return False  # a thread waits for the result
        try:
            if self.restoration is not None:
                return True
            return self.sitting.walk.ended() and not self._goes_on()
        finally:
            self.lock.release()

    def _goes_on(self) -> bool:
        """Whether a restoration that has ended begins anew with smaller tiles."""
        if self.cancelled or not self.sitting.walk.task.lacked_memory:
            return False
        self.before_smaller()
        return self.begin_smaller()

    def cancel(self) -> None:
        """Stop within one node of a graph. `result` then raises CancelledError, unless it had a result already."""
        self.cancelled = True
        self.sitting.walk.cancel()

    def __await__(self) -> Generator[Any, None, Restoration]:
        return asyncio.get_running_loop().run_in_executor(None, self.result).__await__()


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


@dataclass(frozen=True)
class Setup:
    """The engines and devices for a bundle on this machine. Nothing is open."""

    bundle: Bundle  # with the batch that is asked for
    specs: dict[str, EngineSpec]  # component -> its engine
    devices: list[str]
    threads: int  # of a device; 0: all cores

    @property
    def shared(self) -> bool:
        """Whether the devices share their engines."""
        return self.threads == 1


def set_up(
    bundle: Bundle,
    *,
    engine: str | None = None,
    devices: Sequence[str] = ("cpu:0",),
    threads: int = 0,
    batch: int | None = None,
    tile: int | None = None,
) -> Setup:
    """Choose engines and devices; options as for `load`."""
    threads = whole("threads", threads, 0, MOST_THREADS)
    side = None if tile is None else whole("tile", tile, 0)
    names = cpu_names(devices)
    if len(names) > 1 and not threads:
        threads = max(1, usable_cores() // len(names))
    components = {name: bundle.manifest.components[name] for name in sorted(bundle.program.components())}
    packages = {package for c in components.values() for spec in c.engines for package in spec.needs.packages}
    machine = this_machine(packages, {name.partition(":")[0] for name in names})
    known, sides = on_processor(bundle.root, machine.processor), tile_sides(bundle.program, side)
    specs = require(choose_all(components, machine, engine, measured=known, sides=sides))
    most = largest_batch(specs.values())
    if batch is not None:
        bundle = replace(bundle, program=bundle.program.batched(whole("batch", batch, 1, most)))
    elif any(p.tiles.batch > most for p in bundle.program.passes if p.tiles):
        bundle = replace(bundle, program=bundle.program.batched(most))
    return Setup(bundle, specs, names, threads)


def load(
    path: str | os.PathLike[str] | Bundle,
    *,
    engine: str | None = None,
    memory: str = "fast",
    devices: Sequence[str] = ("cpu:0",),
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
    `threads` threads. With 0 threads the devices share the cores. `batch`: most tiles in a call of an engine, of any
    steps and any images, instead of the bundle's. `tile`: the side of the tiles of every image that names no other;
    engines that do not take it are not chosen. `memory_limit`: bytes, or a text like "2GiB", that a restoration may
    need with all that the process holds. `deadline_s`: a call of an engine that takes longer hangs, and its device is
    not used again; by default 20 times the slowest call of its kind, and a minute at least.
    """
    if memory not in MEMORY_MODES:
        raise UsageError(f"memory={memory!r} is not one of {', '.join(MEMORY_MODES)}")
    deadline_s = None if deadline_s is None else seconds("deadline_s", deadline_s)
    limit = bytes_of(memory_limit) if isinstance(memory_limit, str) else memory_limit
    limit = None if limit is None else whole("memory_limit", limit, 1)
    bundle = path if isinstance(path, Bundle) else read_bundle(path, expect=expect, fresh=fresh)
    folder = checked_folder(weights_dir)
    setup = set_up(bundle, engine=engine, devices=devices, threads=threads, batch=batch, tile=tile)
    bundle, specs, names, threads = setup.bundle, setup.specs, setup.devices, setup.threads

    def open_engine(name: str) -> Engine:
        module = backend(specs[name].backend)
        opened: Engine = module.open_engine(
            bundle, name, specs[name], memory=memory, threads=threads, weights_dir=folder
        )
        return opened

    # engines of one thread run on the thread that calls them, so devices of one thread can share them
    shared = OpenEngines(bundle.program.components(), open_engine)
    engines_of_device = [shared] + [
        shared if setup.shared else OpenEngines(shared.names, open_engine) for _ in names[1:]
    ]
    constants = read_tensors(bundle.path(bundle.manifest.constants)) if bundle.manifest.constants else {}
    free = available_bytes()
    free = limit if free is None or (limit is not None and limit < free) else free
    fits = all_open(bundle, specs, memory, free, 1 if setup.shared else len(names))
    cpus = [CpuDevice(name, engines) for name, engines in zip(names, engines_of_device, strict=True)]
    executor = Executor(cpus, pass_by_pass=not fits, signatures=bundle.manifest.components, deadline_s=deadline_s)
    if fits:
        for engines in engines_of_device:
            for name in engines:
                engines[name]
    return Restorer(bundle, shared, executor, specs, constants, memory, limit, threads or usable_cores(), tile)
