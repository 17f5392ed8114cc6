"""The command `tilewright`: how it begins and how it ends. Nothing heavy is imported before signals are in hand."""

import os
import signal
import sys
from types import FrameType

__all__ = ["main"]

ENDINGS = {signal.SIGINT: ("interrupted", 130), signal.SIGTERM: ("terminated", 143)}
RETRY_S = 0.05
_stopped_by: list[int] = []  # the signals that came; a library may swallow the exception that one raised


def main(argv: list[str] | None = None) -> int:
    """Run a command; its exit code."""
    if argv is None:
        for number in ENDINGS:
            signal.signal(number, _stop)
        if hasattr(signal, "SIGALRM"):
            signal.signal(signal.SIGALRM, _again)
        sys.unraisablehook = _unraisable
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
        if _stopped_by:
            raise KeyboardInterrupt
        return code
    except BaseException as error:
        if not _stopped_by and not isinstance(error, KeyboardInterrupt):
            raise
        said, code = ENDINGS[signal.Signals(_stopped_by[0] if _stopped_by else signal.SIGINT)]
        print(f"tilewright: {said}; finished stages of a build are kept", file=sys.stderr, flush=True)
        return code
    finally:
        if argv is None:
            for number in (*ENDINGS, getattr(signal, "SIGALRM", signal.SIGINT)):  # nothing is left to clean up
                signal.signal(number, signal.SIG_IGN)


def _stop(number: int, frame: FrameType | None) -> None:
    _stopped_by.append(number)
    _again(number, frame)


def _again(number: int, frame: FrameType | None) -> None:
    if hasattr(signal, "setitimer") and _imports(frame):  # a library that is half there may crash: when it is whole
        signal.setitimer(signal.ITIMER_REAL, RETRY_S)
        return
    raise KeyboardInterrupt


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    if not _stopped_by:
        sys.__unraisablehook__(unraisable)


def _run(words: list[str]) -> int:
    import logging
    import traceback

    from tilewright.runtime.errors import TilewrightError

    verbose = "--verbose" in words
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("tilewright").setLevel(logging.DEBUG if verbose else logging.WARNING)
    try:
        from tilewright.cli.commands import run

        run(words)
        return 0
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if _stopped_by:
            raise
        if verbose:
            traceback.print_exc()
        said, code = (str(error), error.exit_code) if isinstance(error, TilewrightError) else _ending(error)
        print(f"tilewright: {said}", file=sys.stderr)
        return code


def _ending(error: Exception) -> tuple[str, int]:
    """What to say of an error that is none of ours, in one line, and the exit code."""
    import errno

    from tilewright.runtime.bundle.strict import one_line

    if isinstance(error, ModuleNotFoundError):
        needed = "cpu" if error.name == "onnxruntime" else "export"
        return f"{error.name} is not installed; pip install 'tilewright[{needed}]'", 4
    if isinstance(error, MemoryError):
        return "out of memory; use a smaller --tile or --memory low", 5
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return f"{error.filename or 'a file'}: {error.strerror}; check space and permissions", 5 if full else 4
    said = one_line(f"internal error, {type(error).__name__}: {error}")
    return f"{said}; repeat with --verbose and report it", 1


if __name__ == "__main__":
    sys.exit(main())
