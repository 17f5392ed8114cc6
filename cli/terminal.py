"""What all verbs share: results on stdout, progress and errors on stderr."""

import argparse
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

__all__ = ["Progress", "answer", "expect_argument", "table", "verb"]


def verb(verbs: Any, name: str, summary: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
    """Add a verb with what every verb has."""
    made: argparse.ArgumentParser = verbs.add_parser(name, help=summary, description=summary)
    made.add_argument("--json", action="store_true", help="the answer as JSON")
    made.add_argument("--verbose", action="store_true", help="log more, and show tracebacks")
    made.set_defaults(run=run)
    return made


def answer(arguments: argparse.Namespace, value: Any, text: str) -> None:
    """Print a result in the form that was asked for."""
    print(json.dumps(value, indent=2, sort_keys=True) if arguments.json else text, flush=True)


def expect_argument(parser: argparse.ArgumentParser) -> None:
    """Let a bundle be pinned."""
    parser.add_argument(
        "--expect", metavar="DIGEST", help="refuse any bundle but this, by 12 digits or more of its SHA-256"
    )


class Progress:
    """A bar that redraws itself on a terminal; plain lines, at most one every few seconds, elsewhere."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.start = self.shown = time.monotonic()
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

    def stage(self, name: str, event: str, seconds: float) -> None:
        """A build stage started, was found or is done."""
        self.start = time.monotonic()
        if self.terminal:
            self._draw("")
            self.line = f"{name:<9} running" if event == "started" else ""
        if event != "started" or not self.terminal:
            took = f" in {seconds:.1f} s" if event == "done" else ""
            print(f"{name:<9} {event}{took}", file=sys.stderr, flush=True)

    def tiles(self, name: str, done: int, total: int) -> None:
        """Some tiles of a pass are done."""
        if self.terminal:
            filled = 24 * done // total
            self.line = f"{name:<9} [{'#' * filled}{'.' * (24 - filled)}] {done}/{total}"
        elif time.monotonic() - self.shown > 5:
            self.shown = time.monotonic()
            print(f"{name} {done}/{total} after {self.shown - self.start:.0f} s", file=sys.stderr, flush=True)

    def _tick(self) -> None:
        while not self.stopped.wait(0.2):
            if self.line:
                self._draw(f"{self.line} {time.monotonic() - self.start:.0f} s")

    def _draw(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width]}\x1b[K", end="", file=sys.stderr, flush=True)


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Rows under their heads, in columns."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [heads, *rows])
    return "\n".join(line.rstrip() for line in lines)
