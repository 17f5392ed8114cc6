"""One device of a machine, in a process of its own, in which it opens engines. Ray starts the process."""

import pickle
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from threading import Thread
from typing import Any

from tilewright.runtime.bundle.digests import cache_dir
from tilewright.runtime.bundle.read import Bundle, read_bundle
from tilewright.runtime.cluster.channel import accepted
from tilewright.runtime.errors import DeviceError, TilewrightError
from tilewright.runtime.execute.devices import Device
from tilewright.runtime.setup import Setup, open_here, set_up

__all__ = ["Place", "Request", "Worker"]

COMES_S = 60.0  # the caller that asked for an address connects to it within so many seconds, or not at all


@dataclass(frozen=True)
class Request:
    """One run of a component."""

    component: str
    feed: Mapping[str, Any]  # input -> an array, or the number of one that the worker keeps
    outputs: Sequence[str]
    new: Mapping[int, Any]  # arrays that the worker keeps from now on
    dropped: Sequence[int]  # numbers of arrays that it need not keep any more


class Worker:
    """One device of a machine, in a process of its own."""

    def __init__(self) -> None:
        self.bundle: Bundle | None = None
        self.weights: Path | None = None  # the folder of the weights, if they are not where the bundle says
        self.setup: Setup | None = None
        self.device: Device | None = None
        self.kept: dict[int, Any] = {}  # number of an array -> its buffer on the device

    def version(self) -> str:
        """The version of Tilewright on this machine."""
        return metadata.version("tilewright")

    def find(self, root: str, digest: str, weights: str | None) -> bool:
        """Whether the bundle and its weights lie on this machine: where the caller has them, or as an earlier copy."""
        copy = _copy_of(digest)
        for place, folder in ((Path(root), weights and Path(weights)), (copy, None)):
            try:
                bundle = read_bundle(place, expect=digest)
                for name in bundle.weights.folders:
                    bundle.folder(name, folder or None)
            except (TilewrightError, OSError):
                continue
            self.bundle, self.weights = bundle, folder or None
            return True
        return False

    def receive(self, digest: str, token: str, name: str, data: bytes) -> None:
        """Add bytes to a file of a copy that is not complete yet."""
        file = _copy_of(digest, token) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as opened:
            opened.write(data)

    def end(self, digest: str, token: str, *, complete: bool) -> None:
        """Put a copy in its place, or throw it away."""
        copy = _copy_of(digest)
        if complete:
            shutil.rmtree(copy, ignore_errors=True)  # `find` refused it
            _copy_of(digest, token).rename(copy)
        else:
            shutil.rmtree(_copy_of(digest, token), ignore_errors=True)

    def choose(self, device: str, options: Mapping[str, Any]) -> Setup:
        """Choose engines for this machine."""
        assert self.bundle is not None
        self.setup = set_up(self.bundle, devices=[device], **options)
        return self.setup

    def open(self, memory: str, workers: int) -> bool:
        """Open the engines, if those of all workers of this machine fit in its memory; whether they do."""
        setup = self.setup
        assert setup is not None
        opened = open_here(setup, memory, self.weights, copies=workers)
        (self.device,) = opened.devices
        return opened.fits

    def listen(self, key: bytes) -> tuple[str, int]:
        """Answer the requests of the one connection that knows the key; its address."""
        from ray.util import get_node_ip_address

        listener = socket.create_server((get_node_ip_address(), 0))
        listener.settimeout(COMES_S)
        Thread(target=self._serve, args=(listener, key), name="channel", daemon=True).start()
        host, port = listener.getsockname()[:2]
        return host, port

    def _serve(self, listener: socket.socket, key: bytes) -> None:
        try:
            with listener:
                channel = accepted(listener, key)
        except OSError:  # nobody has come
            return
        try:
            while True:
                request = channel.receive()
                answer: Any
                try:
                    answer = self.run(request)
                except Exception as error:
                    answer = _sendable(error)
                channel.send(answer)
        except (OSError, EOFError):  # the caller has gone
            channel.close()

    def run(self, request: Request) -> dict[str, Any]:
        """The outputs of a component, as arrays."""
        device = self.device
        assert device is not None
        for number in request.dropped:
            self.kept.pop(number, None)
        for number, array in request.new.items():
            self.kept[number] = device.put(array)
        feed = {
            name: self.kept[value] if isinstance(value, int) else device.put(value)
            for name, value in request.feed.items()
        }
        results = device.run(request.component, feed, request.outputs)
        return {name: device.get(buffer) for name, buffer in results.items()}

    def stop(self) -> None:
        """End the call that runs, if its engine can."""
        if stop := getattr(self.device, "stop", None):
            stop()

    def close(self, components: Sequence[str]) -> None:
        """Close engines."""
        if self.device is not None:
            self.device.close(components)


@dataclass(frozen=True)
class Place:
    """A worker, and where it is."""

    worker: Any
    node: str
    device: str  # its name on the node
    threads: int


def _copy_of(digest: str, token: str = "") -> Path:
    """The place on a machine of a bundle that was sent there, or is being sent."""
    return cache_dir() / "cluster" / (f".{digest}.{token}.part" if token else digest)


def _sendable(error: Exception) -> Exception:
    """The error, or its text if it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return DeviceError(f"{type(error).__name__}: {error}")
    return error
