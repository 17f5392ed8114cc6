"""Keeping the finished parts of a restoration in a file: every few minutes, and when it is stopped."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Protocol

from tilewright.runtime.resume.checkpoint import share_in

__all__ = ["Keeper", "Keeps", "Kept"]


@dataclass(frozen=True)
class Kept:
    """Where the finished parts are."""

    path: Path | None  # none: nowhere
    reason: str = ""  # why the last of them are not there


class Keeps(Protocol):
    """A restoration that can write its finished parts to a file."""

    resumed: tuple[Path, float] | None  # the file that it went on from, and the share that was done then
    before_smaller: Callable[[], object]  # called before all begins anew with smaller tiles

    def share(self) -> float:
        """The share of the work that is done."""
        ...

    def keep(self, path: Path) -> None:
        """Write the finished parts."""
        ...

    def note(self, text: str) -> None:
        """Add a note to the result."""
        ...

    def drop(self) -> None:
        """Remove the file with the pixels of the result, if there is one."""
        ...


class Keeper:
    """Keeps the finished parts while a block runs, every so many seconds if not 0, and when an error leaves it.

    The error then has an attribute `kept`. If the block ends well, or the whole picture is kept elsewhere, the file is
    removed. It is replaced only if more of the work is done, also a file of another restoration.
    """

    def __init__(self, ticket: Keeps, path: Path, every_s: float, on_stop: Callable[[], None]) -> None:
        self.ticket, self.path, self.every_s, self.on_stop = ticket, path, every_s, on_stop
        self.written = ticket.resumed[1] if ticket.resumed and ticket.resumed[0] == path else 0.0  # the share in it
        self.lock = Lock()
        self.stopped = Event()
        self.thread = Thread(target=self._keep_often, name="keeper", daemon=True)

    def __enter__(self) -> "Keeper":
        self.ticket.before_smaller = self._keep
        if self.every_s:
            self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.keep_at_stop(error)

    def keep_at_stop(self, error: BaseException | None) -> None:
        """Write the file, or remove it. The command line lets no signal interrupt this."""
        self.stopped.set()
        has_result = error is None or getattr(error, "picture", None) is not None
        if not has_result:
            self.on_stop()
        if self.every_s:
            self.thread.join()
        if error is None or has_result:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
            self.ticket.drop()
        else:
            error.kept = kept = self._keep()  # type: ignore[attr-defined]
            if kept.path is None:
                self.ticket.drop()

    def _keep_often(self) -> None:
        while not self.stopped.wait(self.every_s):
            if reason := self._keep().reason:
                self.ticket.note(f"finished parts could not be kept: {reason}")

    def _keep(self) -> Kept:
        with self.lock:
            before = Kept(self.path if self.written else None)
            try:
                share = self.ticket.share()
                if share <= self.written:  # nothing new; with smaller tiles, all has begun anew
                    return before
                if not self.written and (share_in(self.path) or 0) > share:
                    return Kept(None, f"{self.path} holds more of an earlier restoration")
                self.ticket.keep(self.path)
            except Exception as error:  # the error that stopped the restoration matters more
                reason = (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__
                return Kept(before.path, reason)
            self.written = share
            return Kept(self.path)
