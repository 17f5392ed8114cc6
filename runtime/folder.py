"""Restoring many images with one restorer, several at a time.

Each image has a thread that reads it, waits for its restoration and writes it. So the devices stay busy while files
are read and written. The number of threads, and the memory that images in work may take, are bounded.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Condition
from typing import Any

import numpy as np

from tilewright.runtime.errors import InputError, ResourceError, UsageError
from tilewright.runtime.images.read import SUFFIXES, image_size
from tilewright.runtime.images.write import check_overwrite, check_room, check_writable, write_or_keep
from tilewright.runtime.inputs import gather, seconds
from tilewright.runtime.restore import Restorer
from tilewright.runtime.resume.checkpoint import asked_in, beside, require_same
from tilewright.runtime.resume.keeper import Kept
from tilewright.runtime.resume.results import Results
from tilewright.runtime.sitting import Sitting, Ticket

__all__ = ["Outcome", "images_of", "restore_images"]

PER_DEVICE = 2  # images in work: one runs while another is read or written


@dataclass(frozen=True)
class Outcome:
    """The end of one image: its sizes and times, or the error that stopped it."""

    source: Path
    target: Path
    input_size: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (0, 0)
    tiles: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    error: Exception | None = None
    finished: bool = False  # before this job began


def images_of(folder: Path, into: Path, suffix: str) -> tuple[list[tuple[Path, Path]], int]:
    """The images of a folder with the files that they become, and how many other files it has.

    A file is an image by its suffix; hidden files and folders inside do not count. Each result has another name.
    """
    if into.exists() and not into.is_dir():
        raise UsageError(f"{into} is a file, {folder} a folder: name a folder for the results")
    try:
        files = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_dir())
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}): check the path") from error
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not images:
        raise InputError(f"{folder} holds no images; their suffixes are {', '.join(sorted(SUFFIXES))}")
    sources: dict[Path, Path] = {}
    for path in images:
        other = sources.setdefault(target := into / f"{path.stem}.{suffix}", path)
        if other is not path:
            raise UsageError(f"{other.name} and {path.name} would both become {target}; rename one of them")
    check_writable((into if into.exists() else into.parent) / next(iter(sources)).name)
    return [(source, target) for target, source in sources.items()], len(files) - len(images)


def restore_images(
    restorer: Restorer,
    pairs: Sequence[tuple[Path, Path]],
    *,
    force: bool = False,
    resume: bool = False,
    keep_every_s: float = 0,
    on_progress: Callable[[int, int, float], None] = lambda done, images, share: None,
    **options: Any,
) -> list[Outcome]:
    """Restore each source to its target. An image that fails does not stop the others.

    `on_progress` gets how many images have ended, how many there are, and the share of the work that is done. Options
    as for `Restorer.sitting`; wrong ones are refused before any work. An interrupt ends the images in work within one
    node of a graph; files that are finished stay. Finished parts are kept beside the targets when an image stops, and
    every so many seconds if not 0. `resume` leaves out images whose result is there from the same image and options,
    and goes on with the others from their finished parts.
    """
    job = _Job(restorer, pairs, force, resume, keep_every_s, on_progress, options)
    with ThreadPoolExecutor(PER_DEVICE * len(restorer.executor.devices), "image") as pool:
        try:
            outcomes = [future.result() for future in [pool.submit(job.restore, *pair) for pair in pairs]]
        except BaseException as error:
            job.stop()
            pool.shutdown(cancel_futures=True)
            error.kept = Kept(job.results.path.parent if job.keeps() else None)  # type: ignore[attr-defined]
            raise
    if not resume and not any(outcome.error for outcome in outcomes):
        job.results.remove()
    return outcomes


class _Job:
    """What the threads of a job share."""

    def __init__(
        self,
        restorer: Restorer,
        pairs: Sequence[tuple[Path, Path]],
        force: bool,
        resume: bool,
        keep_every_s: float,
        on_progress: Callable[[int, int, float], None],
        options: dict[str, Any],
    ) -> None:
        self.restorer, self.force, self.on_progress, self.options = restorer, force, on_progress, options
        self.resume, self.keep_every_s, self.pairs = resume, seconds("keep_every_s", keep_every_s, none=True), pairs
        of_any_depth = {name: value for name, value in options.items() if name != "bits"}
        smallest = restorer.sitting(np.zeros((1, 1, 3), np.uint8), **of_any_depth)
        gather(restorer.bundle, smallest.arguments)
        self.asked = {name: value for name, value in smallest.asked({})().items() if name != "image "}
        self.asked["bits="] = options.get("bits", 8)
        self.results = Results(pairs[0][1].parent)
        self.finished = self._finished() if resume else frozenset()
        self.shared_bytes, self.free_bytes = smallest.estimate.needed_bytes, smallest.estimate.available_bytes
        self.changed = Condition()
        self.held: dict[Path, int] = {}  # image in work -> bytes that it needs beside what all share
        self.tickets: dict[Path, Ticket] = {}
        self.ended = 0
        self.stopped = False
        self.pixels = {source: 0 if source in self.finished else _pixels(source) for source, _ in pairs}
        self.done = 0  # pixels of the images that have ended
        self.nodes: dict[Path, int] = {}  # image in work -> nodes of all its passes
        self.ran: dict[Path, dict[str, int]] = {}  # image -> pass -> nodes that are done

    def stop(self) -> None:
        """End the images in work soon, and begin no other."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()
            for ticket in self.tickets.values():
                ticket.cancel()

    def keeps(self) -> bool:
        """Whether finished images or parts lie there for another time."""
        return self.results.path.exists() or any(beside(target).exists() for _, target in self.pairs)

    def _finished(self) -> frozenset[Path]:
        """The images whose results are there. Results and parts that were made with other options are refused."""
        lines, finished = self.results.read(), set()
        for source, target in self.pairs:
            if line := lines.get(target.name):
                self.results.require_same(line, self.asked)
                finished |= {source} if self.results.holds(line, source) else set()
            if source not in finished and (before := asked_in(beside(target))) is not None:
                before.pop("image ", None)  # compared when its turn comes
                require_same(beside(target), before, self.asked)
        return frozenset(finished)

    def restore(self, source: Path, target: Path) -> Outcome:
        """Restore one image."""
        begun = time.perf_counter()
        try:
            if source in self.finished:
                return Outcome(source, target, finished=True)
            target.parent.mkdir(exist_ok=True)
            check_writable(target)
            if not self.force:
                check_overwrite(target, source)
            sitting = self._sitting(source, target)
            if sitting.beside is None:
                check_room(target, sitting.shape)
            ticket = self._begin(source, sitting)
            with ticket.keeping(beside(target), every_s=self.keep_every_s):
                restoration = ticket.result()
                before = time.perf_counter()
                write_or_keep(
                    target, restoration.image, icc=restoration.icc, exif=restoration.exif, stopped=lambda: self.stopped
                )
            self.results.add(target, source, self.asked)
            now = time.perf_counter()
            height, width = restoration.image.shape[:2]
            seconds = restoration.seconds | {"write": now - before, "total": now - begun}
            stored = sitting.picture.rgb.shape
            return Outcome(source, target, (stored[1], stored[0]), (width, height), restoration.tiles, seconds)
        except Exception as error:
            return Outcome(source, target, error=error)
        finally:
            with self.changed:
                self.held.pop(source, None)
                self.tickets.pop(source, None)
                self.ended += 1
                self.done += self.pixels[source]
                self.nodes.pop(source, None)
                self.ran.pop(source, None)
                self.changed.notify_all()
                self._tell()

    def _sitting(self, source: Path, target: Path) -> Sitting:
        """Read an image when there is memory for it. One that does not fit alone lies on the disk."""
        resume = beside(target) if self.resume else None
        on_disk = target if self.options.get("bits", 8) > 8 else None
        while True:
            ended = self.ended
            try:
                sitting = self.restorer.sitting(
                    source, on_progress=partial(self._ran, source), resume=resume, beside=on_disk, **self.options
                )
            except ResourceError:
                with self.changed:
                    if not self.held and self.ended == ended:
                        if on_disk is not None:
                            raise
                        on_disk = target
                        continue
                    while not self.stopped and self.ended == ended:
                        self.changed.wait()
                    self._go_on()
            else:
                with self.changed:
                    needed = sitting.estimate.needed_bytes - self.shared_bytes
                    while not self.stopped and self.held and not self._fits(needed):
                        self.changed.wait()
                    self._go_on()
                    self.held[source] = needed
                return sitting

    def _fits(self, needed: int) -> bool:
        return self.free_bytes is None or self.shared_bytes + sum(self.held.values()) + needed <= self.free_bytes

    def _begin(self, source: Path, sitting: Sitting) -> Ticket:
        blocks = sitting.walk.graph.blocks
        self.nodes[source] = sum(block.size for block in blocks if block.section != "shared")
        ticket = sitting.begin({}, keep=False)
        with self.changed:
            self.tickets[source] = ticket
            if self.stopped:
                ticket.cancel()
        return ticket

    def _ran(self, source: Path, name: str, done: int, total: int) -> None:
        with self.changed:
            if source in self.nodes:  # a call of a job that failed may end later
                self.ran.setdefault(source, {})[name] = done
                self._tell()

    def _tell(self) -> None:
        """Report the share of the work that is done. An image's work is counted by its pixels."""
        ran = {source: sum(passes.values()) / self.nodes[source] for source, passes in self.ran.items()}
        pixels = self.done + sum(self.pixels[source] * share for source, share in ran.items())
        self.on_progress(self.ended, len(self.pixels), pixels / max(1, sum(self.pixels.values())))

    def _go_on(self) -> None:
        if self.stopped:
            raise CancelledError


def _pixels(source: Path) -> int:
    try:
        width, height = image_size(source)
    except InputError:  # reported when its turn comes
        return 0
    return width * height
