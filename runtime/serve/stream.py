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
from tilewright.runtime.serve.form import AnswerOptions
from tilewright.runtime.serve.image_request import ImageRequest
from tilewright.runtime.serve.refusals import refusal_of
from tilewright.runtime.serve.service import Service

__all__ = ["Events", "closed", "future_of"]

LOOK_S = 0.1  # between two looks at the progress
QUIET_S = 10.0  # after which something is sent all the same, so that no proxy closes the connection
Part = tuple[int, int, Pixels]
NO_TOKENS = dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), 0)


def future_of(request: ImageRequest) -> "asyncio.Future[Any]":
    """The end of a request, to wait for. Nobody has to take its error."""
    future = asyncio.wrap_future(request.future)
    future.add_done_callback(lambda ended: ended.exception())
    return future


async def closed(receive: Receive) -> None:
    """Wait until the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Events(Response):
    """The events of one request. The work is cancelled if the client hangs up."""

    media_type = "text/event-stream"

    def __init__(
        self,
        service: Service,
        request: ImageRequest,
        options: AnswerOptions,
        close: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.service, self.request, self.options, self.close = service, request, options, close
        self.parts: asyncio.Queue[Part] = asyncio.Queue()
        self.canvas: Pixels | None = None
        loop = asyncio.get_running_loop()

        def on_part(top: int, left: int, pixels: Pixels) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and so has the client
                loop.call_soon_threadsafe(self.parts.put_nowait, (top, left, pixels))

        if options.parts or options.partial_images:
            request.on_part = on_part

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
            self.service.cancel(self.request)
            await self.close()

    async def _events(self, gone: "asyncio.Future[None]") -> AsyncIterator[dict[str, Any]]:
        request = self.request
        result = future_of(request)
        sent: dict[str, Any] = {}
        sent_at, partial = time.monotonic(), 0
        while not result.done():
            waits: set[asyncio.Future[Any]] = {result, gone}
            await asyncio.wait(waits, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                return
            if time.monotonic() > request.ends:
                self.service.cancel(request, late=True)
            progress = self._progress()
            if not result.done() and (progress != sent or time.monotonic() - sent_at > QUIET_S):
                sent, sent_at = progress, time.monotonic()
                yield progress
            async for event in self._parts():
                yield event
            due = int(progress["share"] * (self.options.partial_images + 1))
            if partial < min(due, self.options.partial_images) and self.canvas is not None:
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
        size = f"{self.request.width}x{self.request.height}"
        created = int(time.time())
        return {
            "created_at": created,
            "size": size,
            "quality": "auto",
            "background": "auto",
            "output_format": self.request.format,
        }

    def _progress(self) -> dict[str, Any]:
        return {"type": "image_edit.progress", **self.service.progress(self.request)}

    async def _parts(self) -> AsyncIterator[dict[str, Any]]:
        while not self.parts.empty():
            top, left, pixels = self.parts.get_nowait()
            if self.options.partial_images:
                await run_in_threadpool(self._place, top, left, pixels)
            if self.options.parts:
                data = await run_in_threadpool(encode_image, pixels, ".png")
                height, width = pixels.shape[:2]
                yield {
                    "type": "image_edit.part",
                    "b64_json": base64.b64encode(data).decode(),
                    "top": top,
                    "left": left,
                    "width": width,
                    "height": height,
                    "size": f"{self.request.width}x{self.request.height}",
                }

    def _place(self, top: int, left: int, pixels: Pixels) -> None:
        if self.canvas is None and (ticket := self.request.ticket) is not None:
            source = Image.fromarray(ticket.sitting.picture.rgb)
            size = (self.request.width, self.request.height)
            self.canvas = np.array(source.resize(size, Image.Resampling.BICUBIC))
        if self.canvas is not None:
            self.canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels

    def _partial(self, index: int) -> dict[str, Any]:
        """The picture so far: the enlarged source with the parts that are final."""
        assert self.canvas is not None
        data = base64.b64encode(encode_image(self.canvas, self.request.format)).decode()
        return {
            "type": "image_edit.partial_image",
            "b64_json": data,
            "partial_image_index": index,
            **self._usual(),
        }
