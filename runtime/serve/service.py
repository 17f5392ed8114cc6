"""A queue of orders, threads that carry them out, and a ledger of the memory that they may take.

The ledger holds what the estimates say, from before an order begins until it has ended. The free memory is looked at
once, when the service starts. Orders begin in the order of their arrival.
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
from tilewright.runtime.serve.masks import masked
from tilewright.runtime.serve.metrics import Metrics
from tilewright.runtime.serve.orders import Answer, Order
from tilewright.runtime.serve.refusals import Refusal, refusal_of
from tilewright.runtime.serve.settings import Settings
from tilewright.runtime.serve.shelf import Shelf, Volume

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
        self.shelf = Shelf(settings, self.limit, self.changed)
        self.metrics = Metrics(self)
        self.held = INTERPRETER_BYTES  # the ledger
        self.queue: deque[Order] = deque()
        self.running: set[Order] = set()
        self.draining = self.closed = False
        self.usual_s = 1.0  # that an order runs
        devices = max(len(volume.setup.devices) for volume in self.shelf.volumes.values())
        self.places = PER_DEVICE * devices  # orders that run: one is computed while another is read or written
        self.threads = [Thread(target=self._serve, name=f"order/{i}", daemon=True) for i in range(self.places)]
        for thread in self.threads:
            thread.start()

    @property
    def first(self) -> str:
        """The bundle that requests get if they name none."""
        return next(iter(self.shelf.roots))

    def open_first(self) -> None:
        """Open the first bundle. Every bundle must fit, alone."""
        for volume in self.shelf.volumes.values():
            if (needed := INTERPRETER_BYTES + volume.base_bytes) > self.limit:
                raise ResourceError(
                    f"the service needs about {amount(needed)} of memory for {volume.name}, and may take"
                    f" {amount(self.limit)}; allow it more with memory_limit"
                )
        volume = self.shelf.current(self.first)
        with self.changed:
            self._hold(volume)
        volume.open()

    def ready(self) -> str | None:
        """Why no request can be accepted now, or nothing."""
        if self.draining:
            return "the service is stopping"
        return None if self.alive() else "no device answers"

    def alive(self) -> bool:
        """Whether there are devices that answer."""
        with self.changed:
            open_ones = [v.restorer.executor for v in self.shelf.all() if v.restorer]
        return not any(len(executor.hung) == len(executor.devices) for executor in open_ones)

    def room_for(
        self, volume: Volume, size: tuple[int, int], sizes: Mapping[str, Any], *, layers: int, file: int
    ) -> tuple[int, int, int]:
        """Width and height of the result for an image of this size, and the memory that it needs.

        `sizes`: options that decide them. `layers`: how often pixels are mixed, by a mask or by colours. `file`: the
        bytes of the image file.
        """
        needs = volume.estimate(*size, **sizes)
        px = needs.width * needs.height
        needed = (
            needs.needed_bytes - INTERPRETER_BYTES - volume.base_bytes + (PX_BYTES + LAYER_BYTES * layers) * px + file
        )
        if INTERPRETER_BYTES + volume.base_bytes + needed > self.limit:
            raise Refusal(
                413,
                f"the result of {needs.width}x{needs.height} px needs about {amount(volume.base_bytes + needed)} of"
                f" memory with its networks, and the service has {amount(self.limit)}; send a smaller image",
                "image_too_large",
                "image",
            )
        return needs.width, needs.height, max(0, needed)

    def accept(self, order: Order, *, always: bool = False) -> None:
        """Put an order into the queue. `always`: it was accepted before a restart."""
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
            self.queue.append(order)
            self.changed.notify_all()

    def retry_s(self) -> int:
        """The seconds after which a place in the queue is likely to be free."""
        rounds = (len(self.queue) + len(self.running)) / self.places
        return max(1, min(LONGEST_RETRY_S, math.ceil(self.usual_s * rounds / 2)))

    def place(self, order: Order) -> int:
        """How many orders are before this one in the queue."""
        with self.changed:
            return list(self.queue).index(order) if order in self.queue else 0

    def cancel(self, order: Order, *, late: bool = False) -> None:
        """Take an order out of the queue, or stop it. One that has ended stays as it is."""
        with self.changed:
            if order.state not in ("queued", "running") or order.cancelled:
                return
            order.cancelled, order.late = True, late
            if order in self.queue:
                self.queue.remove(order)
                self._end(order, self._why(order))
                self.changed.notify_all()
            elif order.ticket is not None:
                order.ticket.cancel()

    def drain(self) -> None:
        """Accept nothing from now on. What was accepted goes on."""
        with self.changed:
            self.draining = True

    def stop(self) -> None:
        """End what runs and what waits."""
        self.drain()
        with self.changed:
            orders = [*self.queue, *self.running]
        for order in orders:
            self.cancel(order)

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
        for volume in self.shelf.all():
            volume.close()

    def _serve(self) -> None:
        while (taken := self._take()) is not None:
            order, volume, idle = taken
            for restorer in idle:
                restorer.close()
            begun = time.monotonic()
            end: Answer | BaseException
            try:
                end = self._carry_out(order, volume)
            except BaseException as error:
                end = error
            with self.changed:
                self.running.discard(order)
                self.held -= order.needed_bytes
                volume.users -= 1
                if isinstance(end, Answer):
                    self.usual_s += (time.monotonic() - begun - self.usual_s) / 8
                last = self._put_away(volume) if volume.outdated and not volume.users else None
            if last is not None:
                last.close()
            with self.changed:
                self._end(order, end)
                self.changed.notify_all()
            del taken, order, volume, idle, end, last  # otherwise the picture stays until the next order

    def _take(self) -> tuple[Order, Volume, list[Restorer]] | None:
        """The next order, its bundle, and what to close before. None: the service is closed."""
        while True:
            with self.changed:
                while not self.queue and not self.closed:
                    self.changed.wait()
                if self.closed:
                    return None
                order = self.queue[0]
            try:
                volume, error = self.shelf.current(order.model), None  # reads files, so outside of the lock
            except Exception as caught:
                volume, error = None, caught
            with self.changed:
                if not self.queue or self.queue[0] is not order:
                    continue
                if error is not None or volume is None:
                    self.queue.popleft()
                    self._end(order, error or RuntimeError(order.model))
                    continue
                if volume.outdated:
                    continue
                if (idle := self._room(order, volume)) is None:
                    self.changed.wait(1.0)
                    continue
                self.queue.popleft()
                self._hold(volume)
                self.held += order.needed_bytes
                self.shelf.took(volume)
                self.running.add(order)
                order.state = "running"
                return order, volume, idle

    def _room(self, order: Order, volume: Volume) -> list[Restorer] | None:
        """What to close so that there is room for an order; none if it has to wait."""
        lacks = self.held + order.needed_bytes + (0 if volume.held else volume.base_bytes) - self.limit
        idle = []
        for other in self.shelf.idle(volume):
            if lacks <= 0 and not other.outdated:
                break
            idle.append(other)
            lacks -= other.held
        if lacks > 0 and self.running:
            return None
        return [restorer for other in idle if (restorer := self._put_away(other)) is not None]

    def _put_away(self, volume: Volume) -> Restorer | None:
        """Take a bundle that nobody uses out of the ledger; its engines, to be closed. The lock is held."""
        self.held -= volume.held
        volume.held = 0
        if volume.outdated:
            self.shelf.outdated.remove(volume)
        restorer, volume.restorer = volume.restorer, None  # a new order opens others
        if restorer is not None:
            self.metrics.forget(volume.name, restorer)
            LOG.info("%s is closed", volume.name)
        return restorer

    def _hold(self, volume: Volume) -> None:
        if not volume.held:
            volume.held = volume.base_bytes
            self.held += volume.held

    def _carry_out(self, order: Order, volume: Volume) -> Answer:
        restorer = volume.open()
        order.image.seek(0)
        options: dict[str, Any] = {"max_pixels": self.settings.max_pixels, **order.options}
        if order.on_part:
            options["on_part"] = order.on_part
        sitting = restorer.sitting(order.image.read(), **options)
        order.height, order.width = sitting.shape[:2]  # upright, unlike in the header of a turned photo
        ticket = sitting.begin({}, keep=False)
        with self.changed:
            order.ticket = ticket
            if order.cancelled:
                ticket.cancel()
        restoration = ticket.result()
        volume.require_same()
        self.metrics.restored(order, restoration)
        pixels = restoration.image
        if order.mask is not None:
            pixels = masked(pixels, sitting.picture, order.mask)
        data = encode_image(pixels, order.format, icc=restoration.icc)
        return Answer(data, order.width, order.height, order.format, restoration.notes)

    def _end(self, order: Order, end: Answer | BaseException) -> None:
        """Give an order its end. The lock is held."""
        order.ticket = None
        if isinstance(end, Answer):
            order.state = "done"
        elif order.cancelled or isinstance(end, CancelledError):
            order.state, end = "cancelled", self._why(order)
        else:
            order.state = "failed"
            if not isinstance(end, (TilewrightError, Refusal, MemoryError)):
                LOG.error("order %s: internal error", order.id[:8], exc_info=end)
            elif not isinstance(end, (Refusal, InputError, UsageError)):  # theirs may hold what the client has sent
                LOG.warning("order %s failed: %s", order.id[:8], end)
            if isinstance(end, DeviceError):
                LOG.error("%s: start the service anew", end)
        self.metrics.ended(order, end)
        if isinstance(end, Answer):
            order.future.set_result(end)
        else:
            order.future.set_exception(refusal_of(end))  # without its traceback, which would hold the picture

    def _why(self, order: Order) -> BaseException:
        """The error of an order that was cancelled."""
        return self.late(order) if order.late else refusal_of(CancelledError())

    def late(self, order: Order) -> Refusal:
        """The answer to an order whose time is over."""
        text = f"the request has not ended after {order.seconds:g} s, and was cancelled; send a smaller image"
        return Refusal(504, text, "deadline_exceeded")

    def progress(self, order: Order) -> dict[str, Any]:
        """The state of an order, the share of its work that is done, and the seconds that are left, if known."""
        ticket, share, left_s = order.ticket, 0.0, None
        if ticket is not None:
            with contextlib.suppress(RuntimeError):
                forecast = ticket.forecast()
                share, left_s = forecast.share, forecast.left_s
        share = 1.0 if order.state == "done" else round(share, 3)
        left_s = None if left_s is None else round(left_s, 1)
        return {"state": order.state, "before": self.place(order), "share": share, "left_s": left_s}
