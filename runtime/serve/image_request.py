"""A request: one image to restore, from its arrival to its result."""

import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tilewright.runtime.sitting import Ticket

__all__ = ["Answer", "ImageRequest"]


@dataclass(frozen=True)
class Answer:
    """A restored image as a file, and what is to be said of it."""

    data: bytes
    width: int
    height: int
    format: str
    notes: tuple[str, ...] = ()


@dataclass(eq=False)
class ImageRequest:
    """One image to restore."""

    model: str  # the name of its bundle
    image: BinaryIO  # an image file, read when its turn comes
    width: int  # of the result
    height: int
    needed_bytes: int  # while it runs, besides the open engines
    format: str = "png"
    options: Mapping[str, Any] = field(default_factory=dict)  # of `Restorer.submit`, and the bundle's arguments
    mask: BinaryIO | None = None
    parts: Path | None = None  # the file that keeps its finished parts for another service
    seconds: float = 3600.0  # that it may take
    on_part: Callable[[int, int, npt.NDArray[np.uint8]], None] | None = None
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    future: "Future[Answer]" = field(default_factory=Future)
    begun: float = field(default_factory=time.monotonic)
    ticket: Ticket | None = None
    state: str = "queued"  # then: running, done, failed, cancelled
    cancelled: bool = False
    late: bool = False  # it was cancelled because its time was over

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # from now on only the service ends it

    @property
    def ends(self) -> float:
        """When its time is over."""
        return self.begun + self.seconds

    def age(self) -> float:
        """Seconds since it arrived."""
        return time.monotonic() - self.begun
