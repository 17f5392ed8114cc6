"""The settings of a service, and the checks that they can be used."""

import ipaddress
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tilewright.runtime.errors import EnvironmentMismatch, InputError, UsageError
from tilewright.runtime.inputs import seconds, whole

__all__ = ["Settings", "is_loopback", "listen", "name_of", "read_token"]

TOKEN = re.compile(r"[!-~]+")
LONGEST_TOKEN = 4096


@dataclass(frozen=True)
class Settings:
    """How a service runs."""

    bundles: Sequence[Path]
    engines: Mapping[str, Any] = field(default_factory=dict)  # options of `load`
    memory_limit: int | None = None  # of everything together; None: a share of what is free at the start
    max_queue: int = 64  # requests that wait
    max_pixels: int = 100_000_000  # of an input
    max_body: int = 64 << 20  # bytes of a request
    deadline_s: float = 3600.0  # of a request, from its arrival to its end
    upload_s: float = 60.0  # for the body of a request to arrive
    token: bytes | None = None
    state_dir: Path | None = None  # where jobs are kept; None: in a temporary folder, for as long as the service runs
    checkpoint_s: float = 60.0  # between two times that finished parts of a job are kept there; 0: at a stop
    keep_s: float = 86_400.0  # how long the result of a job is kept
    hosts: Sequence[str] = ()  # names by which clients may call; none: all

    def __post_init__(self) -> None:
        whole("max_queue", self.max_queue, 0, 100_000)
        whole("max_pixels", self.max_pixels, 1)
        whole("max_body", self.max_body, 1)
        seconds("deadline", self.deadline_s)
        seconds("keep", self.keep_s)
        seconds("checkpoint", self.checkpoint_s, none=True)
        names = [name_of(path) for path in self.bundles]
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"two bundles are named {name!r}, after their folders; rename one")


def name_of(bundle: Path) -> str:
    """The name by which requests call a bundle: that of its folder."""
    name = (Path.cwd() / bundle).name  # of a link, not of its target
    return name if name not in ("", "..") else bundle.resolve().name or "bundle"


def read_token(path: Path) -> bytes:
    """The secret in a file that nobody but its owner can read."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(LONGEST_TOKEN + 2)
    except OSError as error:
        raise InputError(f"token file {path} cannot be read ({error.strerror}); check the path") from None
    if mode & 0o077:
        raise UsageError(f"token file {path} can be read by others (mode {mode & 0o777:o}); run chmod 600 on it")
    token = text.strip().decode("latin-1")
    if not TOKEN.fullmatch(token) or len(token) > LONGEST_TOKEN:
        raise UsageError(f"token file {path} must hold one word of visible ASCII characters; write a new one")
    return token.encode()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Port 0 is any that is free."""
    whole("port", port, 0, 65535)
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # with the protocol named, asyncio sends small answers at once; otherwise they wait 40 ms for an acknowledgement
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        advice = (
            "stop what uses it, or choose another --port" if error.errno == 98 else "choose another --host or --port"
        )
        raise EnvironmentMismatch(f"{host} port {port} cannot be used ({error.strerror}); {advice}") from None
    return listener
