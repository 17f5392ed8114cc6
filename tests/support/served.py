"""A service that runs in this process, at a port of its own."""

import asyncio
import base64
import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from PIL import Image

from tilewright.runtime.serve.jobs import Jobs
from tilewright.runtime.serve.server import server_of
from tilewright.runtime.serve.service import Service
from tilewright.runtime.serve.settings import Settings, listen

__all__ = ["Served", "pixels_of", "png_of", "served", "until"]


@dataclass
class Served:
    """A service and a client of it."""

    service: Service
    jobs: Jobs
    client: httpx2.Client

    @property
    def url(self) -> str:
        """Where it listens."""
        return str(self.client.base_url).rstrip("/")

    def edit(self, image: np.ndarray | bytes, path: str = "/v1/images/edits", **fields: Any) -> httpx2.Response:
        """The answer to an image."""
        files = {"image": ("a.png", png_of(image))}
        return self.client.post(path, files=files, data={name: str(value) for name, value in fields.items()})


def png_of(image: np.ndarray | bytes) -> bytes:
    """The file of an image."""
    if isinstance(image, bytes):
        return image
    Image.fromarray(image).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def pixels_of(answer: httpx2.Response) -> np.ndarray:
    """The pixels of an answer."""
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)))


def until(true: Callable[[], bool], what: str) -> None:
    """Wait until something holds."""
    for _ in range(2000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError(what)


@contextlib.contextmanager
def served(*bundles: Path, headers: dict[str, str] | None = None, **settings: Any) -> Iterator[Served]:
    """Run a service of these bundles, each device with one thread."""
    settings = {"engines": {"threads": 1}, "memory_limit": 4 << 30} | settings
    service = Service(Settings(bundles=bundles, **settings))
    try:
        jobs = Jobs(service)
    except BaseException:
        service.close()
        raise
    service.open_first()
    server = server_of(service, jobs)
    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        with httpx2.Client(base_url=url, headers=headers, timeout=60) as client:
            yield Served(service, jobs, client)
    finally:
        service.stop()
        server.should_exit = True
        thread.join()
        jobs.close()
        listener.close()
