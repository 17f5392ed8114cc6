"""Output that all verbs share: results on stdout; progress, notes and errors on stderr."""

import argparse
import contextlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, TextIO

from tilewright.runtime.errors import ResourceError, TilewrightError, amount
from tilewright.runtime.plan.forecast import Forecast

__all__ = [
    "Progress",
    "answer",
    "expect_argument",
    "mebibytes",
    "note",
    "say_error",
    "send_image",
    "span",
    "table",
    "verb",
]

REDRAW_S = 0.2
EVERY_S = 5.0  # between two lines of progress if there is no terminal


def verb(
    verbs: Any, name: str, summary: str, run: Callable[[argparse.Namespace], None], *, json_file: bool = False
) -> argparse.ArgumentParser:
    """Add a verb with the options that every verb has. `json_file`: --json may name a file for the answer."""
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=summary, description=summary)
    help_of_json = "the answer, or the error, as one JSON object"
    if json_file:
        parser.add_argument(
            "--json", nargs="?", const=True, default=False, metavar="FILE", help=f"{help_of_json}; or write it to FILE"
        )
    else:
        parser.add_argument("--json", action="store_true", help=help_of_json)
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress and no notes")
    parser.add_argument("--verbose", action="store_true", help="show the log of every library, and tracebacks")
    parser.set_defaults(run=run)
    return parser


def answer(
    arguments: argparse.Namespace,
    value: Any,
    text: str,
    *,
    fault: TilewrightError | None = None,
    to: TextIO | None = None,
) -> None:
    """Print a result as text or JSON, then raise its fault if it has one. A JSON answer contains the fault."""
    if fault and arguments.json:
        fault.report = value
        raise fault
    _print(json.dumps(value, indent=2, sort_keys=True) if arguments.json else text, to or sys.stdout)
    if fault:
        raise fault


def note(arguments: argparse.Namespace, text: str) -> None:
    """Print a note on stderr, except with --quiet."""
    if not arguments.quiet:
        print(f"note: {text}", file=sys.stderr, flush=True)


def say_error(message: str, code: int, kind: str, report: Any = None, *, to: TextIO | None = None) -> None:
    """Print an error as one line on stderr, and as one JSON object on `to` if there is one."""
    if to is not None:
        error = {"error": {"code": code, "kind": kind, "message": message}}
        _print(json.dumps((report or {}) | error, indent=2, sort_keys=True), to)
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    name = "\x1b[1;31mtilewright:\x1b[0m" if colour else "tilewright:"
    print(f"{name} {message}", file=sys.stderr, flush=True)


def send_image(data: bytes) -> None:
    """Write the bytes of an image to standard output."""
    with _writing("the image", sys.stdout):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def mebibytes(size: int) -> str:
    """A number of bytes, or that it is not known."""
    return f"{size / 2**20:.0f} MiB" if size else "unknown"


def _print(text: str, to: TextIO) -> None:
    with _writing("the answer", to):
        print(text, file=to, flush=True)


@contextlib.contextmanager
def _writing(what: str, to: TextIO) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), to.fileno())  # the rest of the buffer must not fail again
        raise ResourceError(f"{what} cannot be written ({error.strerror}); free space where it goes") from error


def expect_argument(parser: argparse.ArgumentParser) -> None:
    """Add --expect, which pins a bundle."""
    parser.add_argument(
        "--expect", metavar="DIGEST", help="refuse any bundle but this, by 12 digits or more of its SHA-256"
    )


class Progress:
    """Shows the current work and an estimate of the remaining time.

    On a terminal it is a bar that redraws itself, elsewhere plain lines, at most one every few seconds. `parts` are the
    names of all parts that will be counted, in order, if they are known.
    """

    def __init__(self, arguments: argparse.Namespace | None = None, parts: Sequence[str] = ()) -> None:
        self.quiet = arguments is not None and arguments.quiet
        self.terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not self.quiet
        self.parts = list(parts)
        self.part = ""
        self.forecast: Callable[[], Forecast] | None = None  # of the whole job
        self.begun = self.heard = self.shown = time.monotonic()  # this part; the last news; the last line
        self.ends: float | None = None
        self.line = ""
        self.stopped = threading.Event()
        self.ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> "Progress":
        if self.terminal:
            self.ticker.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stopped.set()
        if self.terminal:
            self.ticker.join()
            self._draw("")

    def say(self, text: str) -> None:
        """Print lines above the bar."""
        if self.terminal:
            self._draw("")
            self.line = ""
        print(text, file=sys.stderr, flush=True)

    def stage(self, name: str, event: str, seconds: float, usual: float | None = None) -> None:
        """Report a stage of a build. It took `usual` seconds last time."""
        self.begun = time.monotonic()
        self.ends = self.begun + usual if usual and event == "started" else None
        if self.terminal:
            self._draw("")
            self.line = f"{name:<9} running" if event == "started" else ""
        if (event != "started" or not self.terminal) and not self.quiet:
            duration = f" in {seconds:.1f} s" if event == "done" else ""
            duration = f", about {span(usual)}" if usual and event == "started" else duration
            print(f"{name:<9} {event}{duration}", file=sys.stderr, flush=True)

    def doing(self, what: str) -> None:
        """Report work that cannot be counted."""
        self.part, self.ends = "", None
        self.begun = self.heard = time.monotonic()
        self.line = what
        if self.terminal:
            self._draw(what)

    def follow(self, forecast: Callable[[], Forecast]) -> None:
        """Show one bar for all passes of a job from now on."""
        self.begun, self.forecast = time.monotonic(), forecast

    def tiles(self, name: str, done: int, total: int) -> None:
        """Report finished tiles of a pass, or other countable work."""
        if self.forecast is None:
            self._counted(name, done, total, f"{done}/{total}")
            return
        now = time.monotonic()
        if now - self.heard < REDRAW_S or (not self.terminal and now - self.shown <= EVERY_S):
            return
        forecast, self.heard = self.forecast(), now
        self.ends = None if forecast.left_s is None else now + forecast.left_s
        self._show(f"{forecast.share:.0%} ({name} {done}/{total})", forecast.share, now)

    def images(self, done: int, total: int, share: float) -> None:
        """Report finished images of a job, and the share of the whole job's work that is done."""
        self._counted("images", int(1000 * share), 1000, f"{done}/{total}")

    def share(self, name: str, share: float) -> None:
        """Report the share of some work that is done."""
        self._counted(name, int(1000 * share), 1000, f"{int(100 * share)}%")

    def bytes(self, name: str, done: int, total: int) -> None:
        """Report bytes of a file that are read or written."""
        self._counted(name, done, total, f"{amount(done)} of {amount(total)}")

    def _counted(self, name: str, done: int, total: int, count: str) -> None:
        now = time.monotonic()
        if name != self.part:  # reports come at the end of work, so a part began with the last report before it
            self.part, self.begun = name, self.heard
        self.heard = now
        self.ends = now + (now - self.begun) / done * (total - done) if done > 0 else None
        place = (
            f"{self.parts.index(name) + 1} of {len(self.parts)}: {name}"
            if len(self.parts) > 1 and name in self.parts
            else name
        )
        self._show(count, done / max(1, total), now, place)

    def _show(self, count: str, share: float, now: float, place: str = "") -> None:
        """Show a bar, or a line if there is no terminal and the last one was long ago."""
        if self.terminal:
            filled = int(24 * share)
            self.line = f"{place:<9} [{'#' * filled}{'.' * (24 - filled)}] {count}".lstrip()
        elif not self.quiet and now - self.shown > EVERY_S:
            self.shown = now
            text = f"{place} {count} after {span(now - self.begun)}{self._left(now)}"
            print(text.lstrip(), file=sys.stderr, flush=True)

    def _left(self, now: float) -> str:
        """The remaining time as text; if other parts follow, of this part only."""
        if self.ends is None or self.ends - now < 1:
            return ""
        more = self.part in self.parts[:-1]
        return f", about {span(self.ends - now)} left{f' of {self.part}' if more else ''}"

    def _tick(self) -> None:
        while not self.stopped.wait(REDRAW_S):
            if self.line:
                now = time.monotonic()
                self._draw(f"{self.line} after {span(now - self.begun)}{self._left(now)}")

    def _draw(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width]}\x1b[K", end="", file=sys.stderr, flush=True)


def span(seconds: float) -> str:
    """A time in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A table as text: rows under their heads."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [heads, *rows])
    return "\n".join(line.rstrip() for line in lines)
