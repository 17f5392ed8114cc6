"""The HTTP face of a service: routes, who may call, limits on bodies, and answers in OpenAI's shape."""

import asyncio
import base64
import hmac
import json
import logging
import time
from importlib.resources import files
from typing import Any

from h11 import LocalProtocolError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tilewright.runtime.errors import TilewrightError
from tilewright.runtime.serve.form import answer_options, image_request_of
from tilewright.runtime.serve.image_request import Answer, ImageRequest
from tilewright.runtime.serve.jobs import Jobs
from tilewright.runtime.serve.refusals import Refusal, refusal_of
from tilewright.runtime.serve.service import Service
from tilewright.runtime.serve.stream import Events, closed, future_of

__all__ = ["app_of"]

LOG = logging.getLogger("tilewright")
PROBED = ("/v2/health/live", "/v2/health/ready", "/metrics")
OPEN = ("/", "/v2/health/live", "/v2/health/ready")  # without a token
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:;"
    " connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)
MOST_FIELDS, MOST_FILES = 100, 4
TEXT_BYTES = 64 << 10  # of a field without a file


def app_of(service: Service, jobs: Jobs) -> ASGIApp:
    """The application of a service and its jobs."""
    face = _Face(service, jobs)
    routes = [
        Route("/", face.page),
        Route("/v1/images/edits", face.edit, methods=["POST"]),
        Route("/v1/jobs", face.add_job, methods=["POST"]),
        Route("/v1/jobs/{job}", face.job, methods=["GET", "DELETE"]),
        Route("/v1/jobs/{job}/result", face.job_result),
        Route("/v1/models", face.models),
        Route("/v1/models/{name}", face.model),
        Route("/v2/health/live", face.live),
        Route("/v2/health/ready", face.ready),
        Route("/metrics", face.metrics),
    ]
    handlers: dict[Any, Any] = dict.fromkeys((HTTPException, Refusal, TilewrightError, Exception), _refused)
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False  # to a host that the client has named
    return _Guard(app, service)


class _Guard:
    """Decides who may call, limits bodies, counts and logs requests."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service, self.settings = app, service, service.settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status, got = time.monotonic(), 0, 0

        async def limited() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > self.settings.max_body:
                raise self._too_large()
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            try:
                await send(message)
            except LocalProtocolError:  # what the client has sent is no HTTP, and the server has told it so
                raise ClientDisconnect from None

        request = Request(scope)
        try:
            self._check(request)
            await self.app(scope, limited, noted)
        except Refusal as refusal:
            await _answer(refusal)(scope, receive, noted)
        except ClientDisconnect:
            pass
        except Exception as error:  # ours to repair; the client has an answer without a traceback
            LOG.error("%s %r: internal error", scope["method"], scope["path"][:80], exc_info=error)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.service.metrics.requests.labels(route, str(status)).inc()
            if route not in PROBED or status != 200:  # a probe every few seconds would hide all else
                LOG.info("%s %s %s in %.3f s", scope["method"], route, status or "gone", time.monotonic() - begun)

    def _check(self, request: Request) -> None:
        host = request.url.hostname or ""
        if self.settings.hosts and host not in self.settings.hosts:
            raise Refusal(
                403, "the request is for another host; use the address that the service printed", "wrong_host"
            )
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
            raise Refusal(403, "pages of other sites may not call this service", "wrong_origin")
        if self.settings.token is not None and request.url.path not in OPEN:
            kind, _, token = request.headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(token.strip().encode(), self.settings.token)
            if kind.lower() != "bearer" or not same:
                headers = {"WWW-Authenticate": "Bearer"}
                raise Refusal(401, "send the header Authorization: Bearer TOKEN", "invalid_api_key", headers=headers)
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.settings.max_body:
            raise self._too_large()

    def _too_large(self) -> Refusal:
        most = self.settings.max_body
        return Refusal(413, f"the request is over the limit of {most} bytes; send a smaller file", "request_too_large")


class _Face:
    """The answers to requests."""

    def __init__(self, service: Service, jobs: Jobs) -> None:
        self.service, self.jobs = service, jobs
        self.uploads = 0  # requests whose body is still coming
        self.html = files("tilewright.runtime.serve").joinpath("page.html").read_text("utf-8")

    async def page(self, request: Request) -> Response:
        """The page for people."""
        headers = {
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        return Response(self.html, media_type="text/html", headers=headers | {"Cache-Control": "no-cache"})

    async def live(self, request: Request) -> Response:
        """Whether the process should go on: 503 if all devices hang or are lost."""
        reason = self.service.dead()
        return PlainTextResponse(f"{reason or 'live'}\n", 503 if reason else 200)

    async def ready(self, request: Request) -> Response:
        """Whether requests are accepted."""
        reason = self.service.ready()
        return PlainTextResponse(f"{reason or 'ready'}\n", 503 if reason else 200)

    async def metrics(self, request: Request) -> Response:
        """Numbers for Prometheus."""
        return Response(self.service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        """The bundles, in the shape of OpenAI's list of models."""
        names = self.service.bundles.roots
        return JSONResponse({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, request: Request) -> Response:
        """One bundle."""
        name = request.path_params["name"]
        if name not in self.service.bundles.roots:
            raise Refusal(404, "there is no bundle of this name; GET /v1/models lists them", "model_not_found", "model")
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        served = self.service.bundles.served[name]
        program = served.bundle.program
        steps = [p.steps.count for p in program.passes if p.steps]
        return {
            "id": name,
            "object": "model",
            "created": served.created,
            "owned_by": "tilewright",
            "system": served.bundle.manifest.system,
            "licence": served.bundle.manifest.licence,
            "digest": served.bundle.digest,
            "open": served.restorer is not None,
            "scale": program.scale,
            "any_scale": program.any_scale,
            "steps": steps[0] if steps else None,
            "arguments": {
                n: {
                    "kind": a.kind, "help": a.help, "default": a.default, "choices": a.choices,
                    "least": a.least, "most": a.most, "needed": a.needed,
                }
                for n, a in served.bundle.arguments.items()
                if a.kind != "tensors"
            },
        }  # fmt: skip

    async def edit(self, request: Request) -> Response:
        """Restore an image."""
        form = await self._form(request)
        try:
            options = answer_options(form)
            image_request = await run_in_threadpool(image_request_of, form, self.service)
            if options.stream:
                events = Events(self.service, image_request, options, form.close)
                self.service.accept(image_request)
                form = FormData()  # the events close the files
                return events
            self.service.accept(image_request)
            try:
                answer = await self._result(request, image_request)
            finally:
                self.service.cancel(image_request)
        finally:
            await form.close()
        return Response(_json(answer), media_type="application/json")

    async def add_job(self, request: Request) -> Response:
        """Accept an image as a job."""
        form = await self._form(request)
        try:
            if answer_options(form).stream:
                raise Refusal(
                    422, "a job has no stream; ask GET /v1/jobs/ID for its progress", "invalid_value", "stream"
                )
            image_request = await run_in_threadpool(image_request_of, form, self.service)
            job = await run_in_threadpool(self.jobs.add, image_request)
        finally:
            await form.close()
        return JSONResponse(job, 202, {"Location": f"/v1/jobs/{job['id']}"})

    async def job(self, request: Request) -> Response:
        """The state of a job, or its end."""
        name = request.path_params["job"]
        if request.method == "DELETE":
            await run_in_threadpool(self.jobs.delete, name)
            return JSONResponse({"id": name, "object": "job", "deleted": True})
        return JSONResponse(await run_in_threadpool(self.jobs.get, name))

    async def job_result(self, request: Request) -> Response:
        """The picture of a job."""
        path, format_ = await run_in_threadpool(self.jobs.result, request.path_params["job"])
        return FileResponse(path, media_type=f"image/{format_}", headers={"X-Content-Type-Options": "nosniff"})

    async def _form(self, request: Request) -> FormData:
        """The fields of a request. Large files lie on disk."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "multipart/form-data":
            raise Refusal(
                415, "the request is no multipart/form-data; send the image as a file in a form", "wrong_type"
            )
        if self.uploads >= self.service.settings.max_queue + self.service.places:
            text, retry_s = f"{self.uploads} images are being sent already; try again later", self.service.retry_s()
            raise Refusal(429, text, "queue_full", retry_s=retry_s)
        self.uploads += 1
        try:
            form = request.form(max_files=MOST_FILES, max_fields=MOST_FIELDS, max_part_size=TEXT_BYTES)
            return await asyncio.wait_for(form, self.service.settings.upload_s)
        except asyncio.TimeoutError:
            text = f"the request has not arrived within {self.service.settings.upload_s:g} s; send it again"
            raise Refusal(408, text, "timeout") from None
        except (HTTPException, Refusal, ClientDisconnect):
            raise
        except Exception as error:  # what the parser makes of bytes that are no form
            raise Refusal(400, "the form is damaged; build it with a library", "malformed") from error
        finally:
            self.uploads -= 1

    async def _result(self, request: Request, image_request: ImageRequest) -> Answer:
        """Wait for the result. The work is cancelled if the client hangs up, or its time is over."""
        result = future_of(image_request)
        gone = asyncio.ensure_future(closed(request.receive))
        try:
            waits: set[asyncio.Future[Any]] = {result, gone}
            timeout = max(0.0, image_request.ends - time.monotonic())
            await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if not result.done():
                self.service.cancel(image_request, late=not gone.done())
                if gone.done():
                    raise ClientDisconnect
                raise self.service.late(image_request)
            answer: Answer = await result
            return answer
        finally:
            gone.cancel()


def _json(answer: Answer) -> bytes:
    """The body of an answer. The picture is not copied more often than needed."""
    head = {
        "created": int(time.time()),
        "output_format": answer.format,
        "size": f"{answer.width}x{answer.height}",
        "notes": answer.notes,
    }
    start = json.dumps(head, separators=(",", ":")).encode()[:-1]
    return b"".join((start, b',"data":[{"b64_json":"', base64.b64encode(answer.data), b'"}]}'))


def _answer(refusal: Refusal) -> Response:
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


async def _refused(request: Request, error: Exception) -> Response:
    """The answer to an error."""
    if isinstance(error, HTTPException):
        text = f"{request.method} {request.url.path[:80]}: {error.detail}"
        code = {404: "not_found", 405: "method_not_allowed", 400: "malformed"}.get(error.status_code)
        return _answer(Refusal(error.status_code, text, code, headers=dict(error.headers or {})))
    return _answer(refusal_of(error))
