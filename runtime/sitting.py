"""One image that is restored: its rounds, a ticket for each of them, and their results."""

import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.errors import InputError, ResourceError, UsageError
from tilewright.runtime.execute.walk import Walk
from tilewright.runtime.images.canvas import Enlarged, fill
from tilewright.runtime.images.color import recolored
from tilewright.runtime.images.on_disk import PixelFile, Rectangle, disk_error
from tilewright.runtime.images.read import Picture
from tilewright.runtime.images.seams import borders, seam_excess
from tilewright.runtime.images.vips import BITS
from tilewright.runtime.images.write import PictureOnDisk, assemble
from tilewright.runtime.inputs import gather, seconds
from tilewright.runtime.memory.estimate import Estimate
from tilewright.runtime.memory.machine import peak_bytes
from tilewright.runtime.plan.forecast import Forecast
from tilewright.runtime.plan.passes import least_px
from tilewright.runtime.resume.checkpoint import (
    DIGITS,
    Checkpoint,
    Outdated,
    beside,
    lies_on_disk,
    pixels_beside,
    plain,
    read_checkpoint,
    require_same,
    share_in,
    value_of_picture,
)
from tilewright.runtime.resume.keeper import Keeper

__all__ = ["Clock", "Restoration", "Sitting", "Ticket"]


class Clock:
    """Wall time between laps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a phase."""
        now = time.perf_counter()
        self.seconds[name] = now - self.last
        self.seconds["total"] = sum(spent for phase, spent in self.seconds.items() if phase != "total")
        self.last = now


@dataclass(frozen=True)
class Restoration:
    """A restored image, with times, tiles and memory."""

    image: Any  # an array, or a `PictureOnDisk`, which `write_image` takes too
    scale: int
    icc: bytes | None  # of the source, as is `exif`; both for `write_image` and `encode_image`
    exif: bytes | None
    seconds: dict[str, float]  # phase -> time; the phase of an engine has its component's name
    tiles: dict[str, int]  # pass -> tiles
    peak_bytes: int
    engines: dict[str, str]  # component -> the name of its engine
    devices: tuple[str, ...]  # where the engines ran
    notes: tuple[str, ...] = ()  # devices that failed, batches and tiles that had to be smaller


@dataclass
class Sitting:
    """One image, restored again for each change of arguments. Passes that do not depend on the change run once."""

    bundle: Bundle
    picture: Picture
    estimate: Estimate
    walk: Walk
    arguments: Mapping[str, Any]
    clock: Clock
    ran: Mapping[str, Any]  # the engines and the devices, as `Restorer.ran`
    threads: int  # of a device
    resume: Path | None  # the file with what the first round has finished
    on_part: Callable[[int, int, npt.NDArray[Any]], None] = lambda top, left, pixels: None
    beside: Path | None = None  # the file of the result, if pixels lie on the disk
    bits: int = 8  # of a channel of the result
    color: str = "off"  # where its colours come from

    def __post_init__(self) -> None:
        self.at_first = (self.walk, self.estimate)
        self.ticket: Ticket | None = None  # of the last round

    @property
    def shape(self) -> tuple[int, int, int]:
        """The height, the width and the channels of the result."""
        channels = (1 if self.picture.grey else 3) + (self.picture.alpha is not None)
        return self.estimate.height, self.estimate.width, channels

    def __call__(self, **arguments: Any) -> Any:
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
        inputs = gather(self.bundle, {**self.arguments, **arguments})
        rgb = self._canvas()
        job.on_final = partial(self._part, rgb)
        asked = self.asked(arguments)
        ticket = Ticket(self, rgb, partial(self._begin_smaller, inputs, keep=keep), asked)
        checkpoint = None
        if self.resume is not None and (checkpoint := read_checkpoint(self.resume)):
            self._go_on(checkpoint, ticket)
        self.walk.begin(inputs, keep=keep, finished=checkpoint.finished if checkpoint else None)
        self.resume, self.ticket = None, ticket
        return ticket

    def _canvas(self) -> Any:
        """The pixels of a result: an array, or a file of them."""
        shape = self.estimate.height, self.estimate.width, 3
        if self.beside is None:
            return np.empty(shape, np.uint8)
        file = pixels_beside(self.beside)
        if self.resume is None and lies_on_disk(beside(self.beside)):
            share = f"{share_in(beside(self.beside)) or 0:.0%}"
            raise UsageError(
                f"{file} holds pixels of an earlier restoration, of which {share} is done; go on with resume, or"
                " remove the file"
            )
        try:
            return PixelFile(file, shape, BITS[self.bits])
        except OSError as error:
            raise disk_error(file, error) from error

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
                "bits=": self.bits,
                "color=": self.color,
                "jitter=": job.jitter,
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
        self._take_stored(checkpoint, ticket)
        notes = self.walk.job.notes
        notes += checkpoint.notes
        if checkpoint.threads != self.threads:
            notes.append(
                f"each device has {self.threads} thread(s) and had {checkpoint.threads}: values may differ by one"
                " level of 255"
            )

    def _take_stored(self, checkpoint: Checkpoint, ticket: "Ticket") -> None:
        """Check the pixels of a checkpoint that lie on the disk, and take them."""
        assert self.resume is not None
        if not checkpoint.sums:
            return
        path = pixels_beside(self.resume.with_suffix(""))
        stored = (
            ticket.rgb if isinstance(ticket.rgb, PixelFile) else PixelFile(path, ticket.rgb.shape, ticket.rgb.dtype)
        )
        for (top, left, bottom, right), total in checkpoint.sums.items():
            if not stored.holds((top, left, bottom, right), total):
                raise InputError(f"{path} lacks pixels that {self.resume} counts as done; remove both to begin anew")
            if stored is not ticket.rgb:
                ticket.rgb[top:bottom, left:right] = stored[top:bottom, left:right]

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

    def _part(self, rgb: Any, top: int, left: int, part: npt.NDArray[np.float32]) -> None:
        pixels = fill(rgb, top, left, part)
        if pixels.size:  # a part that is all padding has no pixels
            self.on_part(top, left, pixels)

    def finish(self, rgb: Any) -> Restoration:
        """The result of a round whose passes have ended."""
        self.clock.lap("passes")
        recoloured = recolored(self.color, rgb, self.picture.rgb, self.estimate.scale)
        pixels: Any = None
        if isinstance(rgb, PixelFile):
            pixels = PictureOnDisk(recoloured, self.picture, self.estimate.scale, rgb)
        else:
            pixels = assemble(recoloured[0 : rgb.shape[0], 0 : rgb.shape[1]], self.picture)
        self.clock.lap("assemble")
        tiles = {p.name: plan.count for p, plan in self.estimate.passes}
        seconds = self.clock.seconds | self.walk.job.seconds
        notes = tuple(dict.fromkeys(self.walk.job.notes))
        scale, icc, exif = self.estimate.scale, self.picture.icc, self.picture.exif
        engines, devices = self.ran["engines"], tuple(self.ran["devices"])
        return Restoration(pixels, scale, icc, exif, seconds, tiles, peak_bytes(), engines, devices, notes)


class Ticket:
    """A restoration that runs: wait for its `result`, `await` it, or `cancel` it."""

    def __init__(
        self,
        sitting: Sitting,
        rgb: Any,
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
            pixels, sums = self._pixels(walk.values.all_handed_on({*finished.regions}))
            notes = tuple(dict.fromkeys(walk.job.notes))
            tile, threads = walk.job.tile_px, self.sitting.threads
            checkpoint = Checkpoint(
                self.asked(), threads, walk.share(finished.done), tile, notes, finished, pixels, sums
            )
            try:
                checkpoint.write(Path(path), still_right=partial(self._runs, walk))
                return
            except Outdated:  # smaller tiles overwrite the pixels
                continue

    def _pixels(self, final: Sequence[Rectangle]) -> tuple[dict[tuple[int, int], Any], dict[Rectangle, int]]:
        """The final pixels in memory, and the CRC-32 of those on the disk. The padding has no pixels."""
        height, width = self.rgb.shape[:2]
        places = [(t, e, min(b, height), min(r, width)) for t, e, b, r in final if t < height and e < width]
        if isinstance(self.rgb, PixelFile):
            self.rgb.sync()
            return {}, {place: self.rgb.sums[place] for place in places}
        return {(t, e): self.rgb[t:b, e:r] for t, e, b, r in places}, {}

    def drop(self) -> None:
        """Remove the file with the pixels of the result, if there is one."""
        if isinstance(self.rgb, PixelFile):
            self.rgb.close(remove=True)

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

    def seam_excess(self) -> float:
        """How much more the result changes across the borders of tiles than beside them; 0 means no seam.

        It is of the pixels before their colours were changed, at the nominal borders of all passes.
        """
        sitting = self.sitting
        tiled = [plan for p, plan in sitting.estimate.passes if p.tiles]
        tops, lefts = (
            sorted({place for pairs in axis for place in borders(*pairs)})
            for axis in ([(p.tops, p.tile_height) for p in tiled], [(p.lefts, p.tile_width) for p in tiled])
        )
        return seam_excess(self.rgb, tops, lefts, sitting.bundle.program.multiple_px)

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
        import asyncio  # it takes 20 ms, and only a program that awaits has it already

        return asyncio.get_running_loop().run_in_executor(None, self.result).__await__()
