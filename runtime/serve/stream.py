"""The answer of a request with stream=true: server-sent events in OpenAI's shape, with progress and parts.

`image_edit.partial_image` and `image_edit.completed` are OpenAI's, `image_edit.progress` and `image_edit.part` ours.
"""

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import numpy as np
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tilewright.runtime.images.read import Pixels
from tilewright.runtime.images.write import encode_image
from tilewright.runtime.serve.form import Wish
from tilewright.runtime.serve.orders import Order
from tilewright.runtime.serve.refusals import refusal_of
from tilewright.runtime.serve.service import Service

__all__ = ["Events", "closed", "future_of"]

LOOK_S = 0.1  # between two looks at the progress
QUIET_S = 10.0  # after which something is sent all the same, so that no proxy closes the connection
Part = tuple[int, int, Pixels]
NO_TOKENS = dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), 0)


def future_of(order: Order) -> "asyncio.Future[Any]":
    """The end of an order, to wait for. Nobody has to take its error."""
    future = asyncio.wrap_future(order.future)
    future.add_done_callback(lambda ended: ended.exception())
    return future


async def closed(receive: Receive) -> None:
    """Wait until the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Events(Response):
    """The events of one order. The order is cancelled if the client hangs up."""

    media_type = "text/event-stream"

    def __init__(
        self, service: Service, order: Order, wish: Wish, close: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.service, self.order, self.wish, self.close = service, order, wish, close
        self.parts: asyncio.Queue[Part] = asyncio.Queue()
        self.canvas: Pixels | None = None
        loop = asyncio.get_running_loop()

        def on_part(top: int, left: int, pixels: Pixels) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and so has the client
                loop.call_soon_threadsafe(self.parts.put_nowait, (top, left, pixels))

        if wish.parts or wish.partial_images:
            order.on_part = on_part

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        gone = asyncio.ensure_future(closed(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events(gone):
                data = json.dumps(event, separators=(",", ":"))
                body = f"event: {event['type']}\ndata: {data}\n\n".encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()
            self.service.cancel(self.order)
            await self.close()

    async def _events(self, gone: "asyncio.Future[None]") -> AsyncIterator[dict[str, Any]]:
        order = self.order
        result = future_of(order)
        sent: dict[str, Any] = {}
        sent_at, partial = time.monotonic(), 0
        while not result.done():
            waits: set[asyncio.Future[Any]] = {result, gone}
            await asyncio.wait(waits, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                return
            if time.monotonic() > order.ends:
                self.service.cancel(order, late=True)
            progress = self._progress()
            if not result.done() and (progress != sent or time.monotonic() - sent_at > QUIET_S):
                sent, sent_at = progress, time.monotonic()
                yield progress
            async for event in self._parts():
                yield event
            due = int(progress["share"] * (self.wish.partial_images + 1))
            if partial < min(due, self.wish.partial_images) and self.canvas is not None:
                yield await run_in_threadpool(self._partial, partial)
                partial += 1
        try:
            answer = await result
        except Exception as error:
            yield {"type": "error", **refusal_of(error).body}
            return
        async for event in self._parts():
            yield event
        yield {
            "type": "image_edit.completed",
            "b64_json": base64.b64encode(answer.data).decode(),
            **self._usual(),
            "usage": NO_TOKENS,
            "notes": answer.notes,
        }

    def _usual(self) -> dict[str, Any]:
        size = f"{self.order.width}x{self.order.height}"
        created = int(time.time())
        return {
            "created_at": created,
            "size": size,
            "quality": "auto",
            "background": "auto",
            "output_format": self.order.format,
        }

    def _progress(self) -> dict[str, Any]:
        return {"type": "image_edit.progress", **self.service.progress(self.order)}

    async def _parts(self) -> AsyncIterator[dict[str, Any]]:
        while not self.parts.empty():
            top, left, pixels = self.parts.get_nowait()
            if self.wish.partial_images:
                await run_in_threadpool(self._place, top, left, pixels)
            if self.wish.parts:
                data = await run_in_threadpool(encode_image, pixels, ".png")
                height, width = pixels.shape[:2]
                yield {
                    "type": "image_edit.part",
                    "b64_json": base64.b64encode(data).decode(),
                    "top": top,
                    "left": left,
                    "width": width,
                    "height": height,
                    "size": f"{self.order.width}x{self.order.height}",
                }

    def _place(self, top: int, left: int, pixels: Pixels) -> None:
        if self.canvas is None and (ticket := self.order.ticket) is not None:
            source = Image.fromarray(ticket.sitting.picture.rgb)
            size = (self.order.width, self.order.height)
            self.canvas = np.array(source.resize(size, Image.Resampling.BICUBIC))
        if self.canvas is not None:
            self.canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels

    def _partial(self, index: int) -> dict[str, Any]:
        """The picture so far: the enlarged source with the parts that are final."""
        assert self.canvas is not None
        data = base64.b64encode(encode_image(self.canvas, self.order.format)).decode()
        return {
            "type": "image_edit.partial_image",
            "b64_json": data,
            "partial_image_index": index,
            **self._usual(),
        }
