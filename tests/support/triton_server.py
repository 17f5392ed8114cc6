"""NVIDIA Triton Inference Server as nvidia-pytriton packs it, and requests to it over HTTP."""

import contextlib
import importlib.util
import json
import os
import shutil
import site
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from support.modules import module_at

__all__ = ["NO_MESSAGES", "ask", "model_config", "served", "server"]

NAME = "TRITON_SERVER"
INSTALL = "pip install --no-deps --target FOLDER nvidia-pytriton==0.7.0 numpy==1.26.4"
NO_MESSAGES = "tritonclient is not installed: pip install --no-deps -c constraints.txt tritonclient"
WAIT_S = 120


def model_config() -> Any:
    """The message that config.pbtxt holds, as NVIDIA's client defines it; none where that is not installed."""
    found = importlib.util.find_spec("tritonclient")
    if found is None or found.origin is None:
        return None
    file = Path(found.origin).parent / "grpc" / "model_config_pb2.py"  # its package would load grpc
    return module_at(file).ModelConfig


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The server's command, without the repository and the port. Its Python has the packages of this one."""
    packages = os.environ.get(NAME)
    if not packages:
        pytest.skip(f"{NAME} names no folder with Triton Inference Server; {INSTALL}")
    packed, version = Path(packages) / "pytriton" / "tritonserver", f"{sys.version_info[0]}.{sys.version_info[1]}"
    folder = tmp_path_factory.mktemp("triton")
    shutil.copytree(packed / "backends" / "python", folder / "backends" / "python")
    shutil.copy(packed / "python_backend_stubs" / version / "triton_python_backend_stub", folder / "backends/python")
    venv.create(folder / "venv", symlinks=True)
    (lib,) = folder.glob("venv/lib/python*/site-packages")
    ours = (path for path in site.getsitepackages())
    # NumPy 1 comes first: this server knows no other
    (lib / "ours.pth").write_text("\n".join([packages, *(f"import site; site.addsitedir({p!r})" for p in ours)]))
    for file in (packed / "bin" / "tritonserver", folder / "backends" / "python" / "triton_python_backend_stub"):
        file.chmod(0o755)
    options = ("--allow-grpc=false", "--allow-metrics=false", "--http-address=127.0.0.1")
    environment = (
        f"PATH={folder}/venv/bin:{os.environ['PATH']}",
        f"LD_LIBRARY_PATH={Path(packages) / 'nvidia_pytriton.libs'}",
    )
    command = [packed / "bin" / "tritonserver", f"--backend-directory={folder}/backends", *options]
    return ["env", *environment, *map(str, command)]


@contextlib.contextmanager
def served(server: list[str], repository: Path) -> Iterator[str]:
    """The address of the model of a repository, while the server runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = repository.with_suffix(".log")
    command = [*server, f"--model-repository={repository}", f"--http-port={port}"]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            ends = time.monotonic() + WAIT_S
            while not _ready(f"http://127.0.0.1:{port}/v2/health/ready"):
                assert process.poll() is None and time.monotonic() < ends, log.read_text(errors="replace")[-3000:]
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v2/models/tilewright"
        finally:
            process.terminate()
            try:
                process.wait(WAIT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _ready(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url) as answer:
        return bool(answer.status == 200)
    return False


def ask(url: str, inputs: Mapping[str, Any]) -> dict[str, bytes] | str:
    """The outputs for inputs of one value each, or the message of an error."""
    listed, data = [], b""
    for name, value in inputs.items():
        if isinstance(value, bytes):
            block, kind = struct.pack("<I", len(value)) + value, "BYTES"
        else:
            block, kind = (struct.pack("<q", value), "INT64") if isinstance(value, int) else _double(value)
        size = {"binary_data_size": len(block)}
        listed.append({"name": name, "shape": [1], "datatype": kind, "parameters": size})
        data += block
    head = json.dumps({"inputs": listed, "parameters": {"binary_data_output": True}}).encode()
    length = "Inference-Header-Content-Length"
    request = urllib.request.Request(f"{url}/infer", head + data, {length: str(len(head))})
    try:
        with urllib.request.urlopen(request) as answer:
            split, body = int(answer.headers[length]), answer.read()
    except urllib.error.HTTPError as error:
        return str(json.loads(error.read())["error"])
    outputs, at = {}, split
    for output in json.loads(body[:split])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        outputs[output["name"]] = body[at + 4 : at + size]
        at += size
    return outputs


def _double(value: float) -> tuple[bytes, str]:
    return struct.pack("<d", value), "FP64"
