"""The page on serving: its commands and its snippet run against a service that its first command has started."""

import base64
import re
import shlex
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import tomllib
from PIL import Image

from support.pages import ROOT, assert_flags_exist, blocks, page
from support.scenes import scene
from support.served import png_of
from tilewright.runtime import load
from tilewright.runtime.serve.settings import listen

TEXT = page("serving")


@pytest.fixture
def folder(hitoksr_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "demo").mkdir()
    (tmp_path / "out" / "b").symlink_to(hitoksr_tiny)
    (tmp_path / "demo" / "sample.png").write_bytes(png_of(scene(16, 16)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def serving(line: str) -> "subprocess.Popen[str]":
    """A service that the page begins; it has printed its address."""
    words = [sys.executable, "-m", *shlex.split(line)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None and process.stdout.readline().startswith("serving b at http://"), line
    return process


@pytest.mark.slow
def test_the_commands_and_the_snippet_run(folder: Path) -> None:
    ports = {}
    for port in ("8080", "8081"):
        with listen("127.0.0.1", 0) as free:
            ports[port] = str(free.getsockname()[1])
    text = re.sub("808[01]", lambda m: ports[m[0]], TEXT)
    with ExitStack() as stack:
        for block in blocks(text, "sh", "python"):
            if block.language == "python":
                exec(compile(block.text, "serving", "exec"), {})
                continue
            for line in block.lines if block.mark == "serves" else ():
                if line.startswith("tilewright "):
                    port = "" if "--port" in line else f" --port {ports['8080']}"
                    process = stack.enter_context(serving(line + port))
                    stack.callback(process.send_signal, signal.SIGTERM)
                    continue
                ended = subprocess.run(["bash", "-euo", "pipefail", "-c", line], capture_output=True, text=True)
                assert ended.returncode == 0, f"{line}: {ended.stderr}"
    with load("out/b") as restorer:
        expected = restorer("demo/sample.png")
    for name in ("restored.png", "result.png"):
        assert np.array_equal(np.asarray(Image.open(name)), expected), name
    assert base64.b64decode(re.findall(r'"b64_json":"([^"]+)"', Path("answer.json").read_text())[0])
    assert Path("token").stat().st_mode & 0o077 == 0


def test_every_path_option_and_status_of_the_page_exists() -> None:
    assert_flags_exist(re.sub("^curl .*$", "", TEXT, flags=re.MULTILINE))
    source = (ROOT / "runtime" / "serve" / "app.py").read_text()
    routes = {re.sub("{.*?}", "ID", path) for path in re.findall(r'Route\("([^"]+)"', source)}
    listed = set(re.findall(r"(/(?:v[12]/[\w/]+|metrics|(?=`)))", TEXT.replace("NAME", "ID"))) - {"/v2/health"}
    assert {path.rstrip("/") for path in listed} == {path.rstrip("/") for path in routes}
    for status in re.findall(r"^\| (\d{3})(?:, (\d{3}))? \|", TEXT, re.MULTILINE):
        sources = "".join(file.read_text() for file in (ROOT / "runtime" / "serve").glob("*.py"))
        for number in filter(None, status):
            assert number in sources or number == "400", number


def test_the_extra_is_in_the_page_on_installing() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "serve" in extras and re.search(r"^\| `serve` \|", page("install"), re.MULTILINE)
