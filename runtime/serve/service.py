"""A queue of requests, threads that carry them out, and a ledger of the memory that they may take.

The ledger holds what the estimates say, from before a request begins until it has ended. The free memory is looked at
once, when the service starts. Requests begin in the order of their arrival.
"""

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import CancelledError
from threading import Condition, Thread
from typing import Any

from tilewright.runtime.errors import DeviceError, InputError, ResourceError, TilewrightError, UsageError, amount
from tilewright.runtime.folder import PER_DEVICE
from tilewright.runtime.images.write import encode_image
from tilewright.runtime.memory.estimate import INTERPRETER_BYTES
from tilewright.runtime.memory.machine import available_bytes
from tilewright.runtime.restore import Restorer
from tilewright.runtime.serve.bundles import Bundles, ServedBundle
from tilewright.runtime.serve.image_request import Answer, ImageRequest
from tilewright.runtime.serve.masks import masked
from tilewright.runtime.serve.metrics import Metrics
from tilewright.runtime.serve.refusals import Refusal, refusal_of
from tilewright.runtime.serve.settings import Settings
from tilewright.runtime.sitting import Sitting, Ticket

__all__ = ["Service"]

LOG = logging.getLogger("tilewright")
SHARE = 0.8  # of the memory that is free at the start
PX_BYTES = 10  # a pixel of a result: its file, the file as text, and a channel of alpha
LAYER_BYTES = 8  # of a pixel: the enlarged source, and what it is mixed by
LONGEST_RETRY_S = 3600


class Service:
    """Restores images with several bundles. Any thread may call it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        free = available_bytes()
        self.limit = settings.memory_limit or (2**62 if free is None else int(SHARE * free))
        self.changed = Condition()
        self.bundles = Bundles(settings, self.limit, self.changed)
        self.metrics = Metrics(self)
        self.held = INTERPRETER_BYTES  # the ledger
        self.queue: deque[ImageRequest] = deque()
        self.running: set[ImageRequest] = set()
        self.draining = self.closed = False
        self.usual_s = 1.0  # that a request runs
        self.places = 0  # requests that run: one is computed while another is read or written
        self.threads: list[Thread] = []
        self._use(max(len(served.setup.devices) for served in self.bundles.served.values()))

    def _use(self, devices: int) -> None:
        """Have threads for so many devices, if it has fewer."""
        self.places = max(self.places, PER_DEVICE * devices)
        while len(self.threads) < self.places:
            self.threads.append(Thread(target=self._serve, name=f"request/{len(self.threads)}", daemon=True))
            self.threads[-1].start()

    @property
    def first(self) -> str:
        """The bundle that requests get if they name none."""
        return next(iter(self.bundles.roots))

    def open_first(self) -> None:
        """Open the first bundle. Every bundle must fit, alone."""
        for served in self.bundles.served.values():
            if (needed := INTERPRETER_BYTES + served.base_bytes) > self.limit:
                raise ResourceError(
                    f"the service needs about {amount(needed)} of memory for {served.name}, and may take"
                    f" {amount(self.limit)}; allow it more with memory_limit"
                )
        served = self.bundles.current(self.first)
        with self.changed:
            self._hold(served)
        self._use(len(served.open().executor.devices))  # a cluster has more than this machine

    def ready(self) -> str | None:
        """Why no request can be accepted now, or nothing."""
        return "the service is stopping" if self.draining else self.dead()

    def dead(self) -> str | None:
        """Why only a new start helps, or nothing."""
        with self.changed:
            executors = {b.name: b.restorer.executor for b in self.bundles.all() if b.restorer}
        names = [name for name, executor in executors.items() if not executor.answers()]
        return f"no device of {' and '.join(names)} answers; start the service anew" if names else None

    def room_for(
        self, served: ServedBundle, size: tuple[int, int], sizes: Mapping[str, Any], *, layers: int, file: int
    ) -> tuple[int, int, int]:
        """Width and height of the result for an image of this size, and the memory that it needs.

        `sizes`: options that decide them. `layers`: how often pixels are mixed, by a mask or by colours. `file`: the
        bytes of the image file.
        """
        needs = served.estimate(*size, **sizes)
        px = needs.width * needs.height
        needed = (
            needs.needed_bytes - INTERPRETER_BYTES - served.base_bytes + (PX_BYTES + LAYER_BYTES * layers) * px + file
        )
        if INTERPRETER_BYTES + served.base_bytes + needed > self.limit:
            raise Refusal(
                413,
                f"the result of {needs.width}x{needs.height} px needs about {amount(served.base_bytes + needed)} of"
                f" memory with its networks, and the service has {amount(self.limit)}; send a smaller image",
                "image_too_large",
                "image",
            )
        return needs.width, needs.height, max(0, needed)

    def accept(self, request: ImageRequest, *, always: bool = False) -> None:
        """Put a request into the queue. `always`: it was accepted before a restart."""
        with self.changed:
            if self.draining:
                raise Refusal(503, "the service is stopping; send the request again", "stopping", retry_s=5)
            if not always and len(self.queue) >= self.settings.max_queue + max(0, self.places - len(self.running)):
                self.metrics.refused.labels("queue").inc()
                raise Refusal(
                    429,
                    f"{len(self.queue)} requests wait already; try again later",
                    "queue_full",
                    retry_s=self.retry_s(),
                )
            self.queue.append(request)
            self.changed.notify_all()

    def retry_s(self) -> int:
        """The seconds after which a place in the queue is likely to be free."""
        rounds = (len(self.queue) + len(self.running)) / self.places
        return max(1, min(LONGEST_RETRY_S, math.ceil(self.usual_s * rounds / 2)))

    def place(self, request: ImageRequest) -> int:
        """How many requests are before this one in the queue."""
        with self.changed:
            return list(self.queue).index(request) if request in self.queue else 0

    def cancel(self, request: ImageRequest, *, late: bool = False) -> None:
        """Take a request out of the queue, or stop it. One that has ended stays as it is."""
        with self.changed:
            if request.state not in ("queued", "running") or request.cancelled:
                return
            request.cancelled, request.late = True, late
            if request in self.queue:
                self.queue.remove(request)
                self._end(request, self._why(request))
                self.changed.notify_all()
            elif request.ticket is not None:
                request.ticket.cancel()

    def drain(self) -> None:
        """Accept nothing from now on. What was accepted goes on."""
        with self.changed:
            self.draining = True

    def stop(self) -> None:
        """End what runs and what waits."""
        self.drain()
        with self.changed:
            requests = [*self.queue, *self.running]
        for request in requests:
            self.cancel(request)

    def close(self) -> None:
        """Wait until what was accepted has ended, and close the engines."""
        with self.changed:
            if self.closed:
                return
            self.draining = True
            while self.queue or self.running:
                self.changed.wait(0.5)  # a signal is handled meanwhile
            self.closed = True
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()
        for served in self.bundles.all():
            served.close()

    def _serve(self) -> None:
        while (taken := self._take()) is not None:
            request, served, idle = taken
            for restorer in idle:
                restorer.close()
            begun = time.monotonic()
            end: Answer | BaseException
            try:
                end = self._carry_out(request, served)
            except BaseException as error:
                end = error
            with self.changed:
                self.running.discard(request)
                self.held -= request.needed_bytes
                served.users -= 1
                if isinstance(end, Answer):
                    self.usual_s += (time.monotonic() - begun - self.usual_s) / 8
                last = self._put_away(served) if served.outdated and not served.users else None
            if last is not None:
                last.close()
            with self.changed:
                self._end(request, end)
                self.changed.notify_all()
            del taken, request, served, idle, end, last  # otherwise the picture stays until the next request

    def _take(self) -> tuple[ImageRequest, ServedBundle, list[Restorer]] | None:
        """The next request, its bundle, and what to close before. None: the service is closed."""
        while True:
            with self.changed:
                while not self.queue and not self.closed:
                    self.changed.wait()
                if self.closed:
                    return None
                request = self.queue[0]
            try:
                served, error = self.bundles.current(request.model), None  # reads files, so outside of the lock
            except Exception as caught:
                served, error = None, caught
            with self.changed:
                if not self.queue or self.queue[0] is not request:
                    continue
                if error is not None or served is None:
                    self.queue.popleft()
                    self._end(request, error or RuntimeError(request.model))
                    continue
                if served.outdated:
                    continue
                if (idle := self._room(request, served)) is None:
                    self.changed.wait(1.0)
                    continue
                self.queue.popleft()
                self._hold(served)
                self.held += request.needed_bytes
                self.bundles.took(served)
                self.running.add(request)
                request.state = "running"
                return request, served, idle

    def _room(self, request: ImageRequest, served: ServedBundle) -> list[Restorer] | None:
        """What to close so that there is room for a request; none if it has to wait."""
        lacks = self.held + request.needed_bytes + (0 if served.held else served.base_bytes) - self.limit
        alone = self.bundles.options.get("cluster") is not None and not served.held  # a bundle takes all cores there
        idle = []
        for other in self.bundles.idle(served):
            if lacks <= 0 and not other.outdated and not alone:
                break
            idle.append(other)
            lacks -= other.held
        others = sum(bool(other.held) for other in self.bundles.all() if other is not served)
        if (lacks > 0 and self.running) or (alone and others > len(idle)):
            return None
        return [restorer for other in idle if (restorer := self._put_away(other)) is not None]

    def _put_away(self, served: ServedBundle) -> Restorer | None:
        """Take a bundle that nobody uses out of the ledger; its engines, to be closed. The lock is held."""
        self.held -= served.held
        served.held = 0
        if served.outdated:
            self.bundles.outdated.remove(served)
        restorer, served.restorer = served.restorer, None  # a new request opens others
        if restorer is not None:
            self.metrics.forget(served.name, restorer)
            LOG.info("%s is closed", served.name)
        return restorer

    def _hold(self, served: ServedBundle) -> None:
        if not served.held:
            served.held = served.base_bytes
            self.held += served.held

    def _carry_out(self, request: ImageRequest, served: ServedBundle) -> Answer:
        restorer = served.open()
        sitting, ticket = self._begin(request, restorer)
        request.height, request.width = sitting.shape[:2]  # upright, unlike in the header of a turned photo
        with self.changed:
            request.ticket = ticket
            if request.cancelled:
                ticket.cancel()
        with self._keeping(request, ticket):
            restoration = ticket.result()
        served.require_same()
        self.metrics.restored(request, restoration)
        pixels = restoration.image
        if request.mask is not None:
            pixels = masked(pixels, sitting.picture, request.mask)
        data = encode_image(pixels, request.format, icc=restoration.icc, exif=restoration.exif)
        notes = restoration.notes
        if ticket.resumed:
            notes = (f"a restart of the service interrupted the job; {ticket.resumed[1]:.0%} was done before", *notes)
        return Answer(data, request.width, request.height, request.format, notes)

    def _begin(self, request: ImageRequest, restorer: Restorer) -> tuple[Sitting, Ticket]:
        """Begin to restore an image, from its finished parts if an earlier service has kept any."""
        options: dict[str, Any] = {"max_pixels": self.settings.max_pixels, **request.options}
        if request.on_part:
            options["on_part"] = request.on_part
        request.image.seek(0)
        image = request.image.read()
        sitting = restorer.sitting(image, resume=request.parts, **options)
        try:
            return sitting, sitting.begin({}, keep=False)
        except (UsageError, InputError):
            if request.parts is None or not request.parts.exists():
                raise
        LOG.warning("request %s begins anew: its finished parts are damaged, or of another bundle", request.id[:8])
        request.parts.unlink()
        sitting = restorer.sitting(image, **options)
        return sitting, sitting.begin({}, keep=False)

    def _keeping(self, request: ImageRequest, ticket: Ticket) -> contextlib.AbstractContextManager[object]:
        """A context manager that keeps the finished parts of a job."""
        if request.parts is None:
            return contextlib.nullcontext()
        return ticket.keeping(request.parts, every_s=self.settings.checkpoint_s)

    def _end(self, request: ImageRequest, end: Answer | BaseException) -> None:
        """Give a request its end. The lock is held."""
        request.ticket = None
        if isinstance(end, Answer):
            request.state = "done"
        elif request.cancelled or isinstance(end, CancelledError):
            request.state, end = "cancelled", self._why(request)
        else:
            request.state = "failed"
            if not isinstance(end, (TilewrightError, Refusal, MemoryError)):
                LOG.error("request %s: internal error", request.id[:8], exc_info=end)
            elif not isinstance(end, (Refusal, InputError, UsageError)):  # theirs may hold what the client has sent
                LOG.warning("request %s failed: %s", request.id[:8], end)
            if isinstance(end, DeviceError):
                LOG.error("%s: start the service anew", end)
        self.metrics.ended(request, end)
        if isinstance(end, Answer):
            request.future.set_result(end)
        else:
            request.future.set_exception(refusal_of(end))  # without its traceback, which would hold the picture

    def _why(self, request: ImageRequest) -> BaseException:
        """The error of a request that was cancelled."""
        return self.late(request) if request.late else refusal_of(CancelledError())

    def late(self, request: ImageRequest) -> Refusal:
        """The answer to a request whose time is over."""
        text = f"the request has not ended after {request.seconds:g} s, and was cancelled; send a smaller image"
        return Refusal(504, text, "deadline_exceeded")

    def progress(self, request: ImageRequest) -> dict[str, Any]:
        """The state of a request, the share of its work that is done, and the seconds that are left, if known."""
        ticket, share, left_s = request.ticket, 0.0, None
        if ticket is not None:
            with contextlib.suppress(RuntimeError):
                forecast = ticket.forecast()
                share, left_s = forecast.share, forecast.left_s
        share = 1.0 if request.state == "done" else round(share, 3)
        left_s = None if left_s is None else round(left_s, 1)
        return {"state": request.state, "before": self.place(request), "share": share, "left_s": left_s}
