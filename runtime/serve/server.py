"""Running a service: a socket, an event loop, and signals that end it."""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from tilewright.runtime.serve.app import app_of
from tilewright.runtime.serve.jobs import Jobs
from tilewright.runtime.serve.service import Service
from tilewright.runtime.serve.settings import Settings

__all__ = ["serve", "server_of"]

LOG = logging.getLogger("tilewright")
MOST_CONNECTIONS = 1000
IDLE_S = 30
LAST_S = 1.0  # for the answers to requests that a second signal has cancelled
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Server(uvicorn.Server):
    """A server that leaves signals to `serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def server_of(service: Service, jobs: Jobs) -> uvicorn.Server:
    """The server of a service and its jobs. It leaves signals alone."""
    config = uvicorn.Config(
        app_of(service, jobs),
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=IDLE_S,
    )
    return _Server(config)


def serve(settings: Settings, listener: socket.socket, on_ready: Callable[[], None] = lambda: None) -> None:
    """Answer requests at a socket until a signal comes.

    The first signal ends the service after all that was accepted. The second ends what runs, too.
    """
    with contextlib.closing(Service(settings)) as service, contextlib.closing(Jobs(service)) as jobs:
        _until_signals(service, server_of(service, jobs), listener, on_ready)


def _until_signals(
    service: Service, server: uvicorn.Server, listener: socket.socket, on_ready: Callable[[], None]
) -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=ending, daemon=True).start()  # a signal's handler may hold no lock

    def ending() -> None:
        if server.should_exit:
            LOG.warning("a second signal: what runs is cancelled")
            service.stop()
            service.close()
            time.sleep(LAST_S)
            server.force_exit = True  # clients that do not read their answers would hold the service for ever
            return
        service.drain()
        LOG.warning("stopping: %d requests are finished first", len(service.queue) + len(service.running))
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        service.open_first()
        on_ready()
        asyncio.run(server.serve([listener]))
        service.close()  # a second signal may come meanwhile
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
