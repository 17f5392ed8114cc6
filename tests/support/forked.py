"""Commands of ours in processes of their own, forked from one that has imported our modules.

A process that imports them itself works longer on that than on most commands. Signals, streams, the folder, variables
and the exit code are those of a process that was started.
"""

import ctypes
import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["Forked", "run"]

TESTS = Path(__file__).parents[1]
RUNTIME = ("tilewright.cli.main", "tilewright.cli.runtime", "tilewright.runtime.engines.ort", "PIL.PngImagePlugin")
EXPORT = (*RUNTIME, "tilewright.export.graph.trace", "tilewright.export.verify.engines")
SERVE = "import sys; sys.path.append(sys.argv[1]); from support.forked import serve; serve(*sys.argv[2:])"
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: a process whose parent has gone is then a child of this one


class Forked(subprocess.Popen[Any]):
    """`python -m tilewright WORDS`, without the time to import; `torch` says that the command needs PyTorch."""

    def __init__(self, words: Iterable[object], torch: bool = False, **options: Any) -> None:
        self.torch = torch
        super().__init__([*map(str, words)], **options)

    def __exit__(self, kind: Any, error: Any, at: Any) -> None:
        if error is not None:
            self.kill()  # otherwise a command that should have ended is waited for, without end
        super().__exit__(kind, error, at)

    def _execute_child(self, args: list[str], *rest: Any) -> None:  # type: ignore[override]
        _, _, _, _, cwd, env, _, _, _, *pipes = rest[:15]
        request = {"words": args, "cwd": str(cwd or Path.cwd()), "env": dict(os.environ if env is None else env)}
        streams = [own if there == -1 else there for own, there in enumerate((pipes[0], pipes[3], pipes[5]))]
        server = _server(EXPORT if self.torch else RUNTIME)
        message = json.dumps(request).encode()
        socket.send_fds(server, [len(message).to_bytes(8, "big")], streams)
        server.sendall(message)
        answer = server.recv(8)
        assert len(answer) == 8, "the process that forks has ended"
        self.pid = int.from_bytes(answer, "big")
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def run(words: Iterable[object], timeout: float = 300, input: Any = None, **options: Any) -> Any:
    """What a command answers, as `subprocess.run` with captured streams says it."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if input is not None:
        streams["stdin"] = subprocess.PIPE
    with Forked(words, **streams | options) as running:
        try:
            out, err = running.communicate(input, timeout)
        except subprocess.TimeoutExpired:
            running.kill()
            raise
    return subprocess.CompletedProcess(running.args, running.returncode, out, err)


@cache
def _server(modules: tuple[str, ...]) -> socket.socket:
    """A connection to a process that has imported these modules."""
    assert ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0) == 0
    ours, its = socket.socketpair()
    command = [sys.executable, "-c", SERVE, str(TESTS), str(its.fileno()), *modules]
    subprocess.Popen(command, pass_fds=[its.fileno()], env=os.environ | {"OMP_NUM_THREADS": "1"})  # or NumPy has more
    its.close()
    return ours


def serve(descriptor: str, *modules: str) -> None:
    """Fork for each request, until nobody can ask any more."""
    for module in modules:
        importlib.import_module(module)
    assert len([*Path("/proc/self/task").iterdir()]) == 1, "a process with threads cannot be forked safely"
    connection = socket.socket(fileno=int(descriptor))
    while True:
        length, streams, *_ = socket.recv_fds(connection, 8, 3)
        if not length:
            return
        message = b""
        while len(message) < int.from_bytes(length, "big"):
            message += connection.recv(1 << 16)
        reading, writing = os.pipe()
        between = os.fork()
        if between == 0:  # it ends at once, so that the command becomes a child of the process that asked
            if (command := os.fork()) != 0:
                os.write(writing, command.to_bytes(8, "big"))
                os._exit(0)
            connection.close()
            os.close(reading)
            os.close(writing)
            sys.exit(_command(json.loads(message), streams))
        os.waitpid(between, 0)
        connection.sendall(os.read(reading, 8))
        for number in (*streams, reading, writing):
            os.close(number)


def _command(request: dict[str, Any], streams: list[int]) -> int:
    from tilewright.cli.main import main

    for own, stream in enumerate(streams):
        os.dup2(stream, own)
        os.close(stream)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace")
    paths = request["env"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in paths if path and path not in sys.path]
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = ["tilewright", *request["words"]]
    return main()
