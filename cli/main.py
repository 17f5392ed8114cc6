"""The command `tilewright`: its start, its signals and its exit codes. Heavy imports come after signal handlers."""

import os
import signal
import sys
from types import FrameType

__all__ = ["ending", "kept", "main"]

KEPT = {  # command -> what stays when it is stopped
    "export build": "; finished stages of a build are kept",
    "calib collect": "; finished images are kept, the same command goes on from there",
}
ENDINGS = {signal.SIGINT: ("interrupted", 130), signal.SIGTERM: ("terminated", 143)}
EXTRAS = {"onnxruntime": "cpu"} | dict.fromkeys(
    ("starlette", "uvicorn", "python_multipart", "prometheus_client"), "serve"
)
RETRY_S = 0.05
UNBROKEN = {"_locked", "keep_at_stop", "staging", "writing"}  # they make and remove temporary files, or keep work
_stopped_by: list[int] = []  # the signals that came; a library may catch the exception that a signal raised


def main(argv: list[str] | None = None) -> int:
    """Run a command, and return its exit code."""
    if argv is None:
        for number in ENDINGS:
            signal.signal(number, _stop)
        if hasattr(signal, "SIGALRM"):
            signal.signal(signal.SIGALRM, _again)
        sys.unraisablehook = _unraisable
    try:
        if argv is None:
            _silence(sys.argv)
        code = _run(sys.argv[1:] if argv is None else argv)
        if _stopped_by:
            raise KeyboardInterrupt
        return code
    except BaseException as error:
        if not _stopped_by and not isinstance(error, KeyboardInterrupt):
            raise
        from tilewright.cli.terminal import say_error

        words = sys.argv[1:] if argv is None else argv
        ending, code = ENDINGS[signal.Signals(_stopped_by[0] if _stopped_by else signal.SIGINT)]
        hint = KEPT.get(" ".join(words[:2]), "")
        say_error(
            f"{ending}{hint}{kept(error)}", code, ending.capitalize(), to=sys.stdout if "--json" in words else None
        )
        return code
    finally:
        if argv is None:
            for number in (*ENDINGS, getattr(signal, "SIGALRM", signal.SIGINT)):  # nothing is left to clean up
                signal.signal(number, signal.SIG_IGN)


def _stop(number: int, frame: FrameType | None) -> None:
    _stopped_by.append(number)
    _again(number, frame)


def _again(number: int, frame: FrameType | None) -> None:
    if hasattr(signal, "setitimer") and _must_end(frame):
        signal.setitimer(signal.ITIMER_REAL, RETRY_S)
        return
    if "--verbose" not in sys.argv:
        import logging

        logging.disable()  # a library may log what it makes of this exception
    raise KeyboardInterrupt


def _must_end(frame: FrameType | None) -> bool:
    """Whether stopping now may crash a library that is being imported, or leave a temporary file."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        if frame.f_globals.get("__name__", "").startswith("tilewright."):
            if frame.f_code.co_name == "_wait_for":  # another build holds the lock, for minutes perhaps
                return False
            if frame.f_code.co_name in UNBROKEN:
                return True
        frame = frame.f_back
    return False


def _unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    if not _stopped_by:
        sys.__unraisablehook__(unraisable)
    elif hasattr(signal, "setitimer") and unraisable.exc_type is KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, RETRY_S)  # it came while Python freed an object, and ended nothing


def _run(words: list[str]) -> int:
    from tilewright.cli.commands import as_typed, parse
    from tilewright.cli.terminal import say_error
    from tilewright.runtime.errors import TilewrightError

    arguments = None
    try:
        arguments = parse(words)
        arguments.run(arguments)
        return 0
    except BrokenPipeError:  # the reader of the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if _stopped_by:
            raise
        if "--verbose" in words:
            import traceback

            traceback.print_exc()
        if isinstance(error, TilewrightError):
            message, code = as_typed(str(error), getattr(arguments, "options", {})), error.exit_code
        else:
            message, code = ending(error)
        message += kept(error)
        if commands := getattr(error, "repeat", ()):
            message += f"; to repeat it without Tilewright: {' && '.join(commands)}"
        picture_goes_there = str(getattr(arguments, "output", "")) == "-"
        to = None if "--json" not in words else sys.stderr if picture_goes_there else sys.stdout
        say_error(message, code, type(error).__name__, getattr(error, "report", None), to=to)
        return code


def _silence(words: list[str]) -> None:
    """Show only our own log lines on stderr; with `--verbose`, those of every library."""
    import logging

    if sys.stderr is None:  # closed by the caller: print would take standard output instead
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sys.stderr = os.fdopen(2, "w")
    if "--verbose" in words:
        logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stderr)
        logging.getLogger("tilewright").setLevel(logging.DEBUG)
        return
    import warnings

    warnings.simplefilter("ignore")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for library in ("TRANSFORMERS", "DIFFUSERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    stderr = os.dup(2)  # libraries in C write to descriptor 2, which from now on leads nowhere
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.stderr = os.fdopen(stderr, "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
    logging.getLogger().addHandler(logging.NullHandler())
    ours, handler = logging.getLogger("tilewright"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("note: %(message)s"))
    ours.addHandler(handler)
    ours.setLevel(logging.ERROR if {"-q", "--quiet"} & set(words) else logging.WARNING)


def kept(error: BaseException | None) -> str:
    """The end of an error's line, if a restoration has kept its finished parts, or could not."""
    while error is not None and getattr(error, "kept", None) is None:
        error = error.__context__
    if error is None:
        return ""
    path, reason = error.kept.path, error.kept.reason  # type: ignore[attr-defined]
    if path is None:
        return f"; what was finished could not be kept ({reason})" if reason else ""
    lost = f"; the last of it could not be kept ({reason})" if reason else ""
    return f"; what was finished is kept in {path}: the same command with --resume goes on from there{lost}"


def ending(error: Exception) -> tuple[str, int]:
    """The line and the exit code for an error that is not ours."""
    import errno

    from tilewright.runtime.bundle.strict import one_line

    if isinstance(error, ModuleNotFoundError):
        needed = EXTRAS.get(str(error.name).partition(".")[0], "export")
        return f"{error.name} is not installed; pip install 'tilewright[{needed}]'", 4
    if isinstance(error, MemoryError):
        return "out of memory; use a smaller --tile or --memory low", 5
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"{where}{error.strerror}; free space there, or choose another place", 5
        return f"{where}{error.strerror or error}; check that the path is right and may be used", 4
    message = one_line(f"internal error, {type(error).__name__}: {error}")
    return f"{message}; repeat with --verbose and report it", 1


if __name__ == "__main__":
    sys.exit(main())
