"""The command `tilewright runtime serve`: what it prints, what ends it, and what it refuses to begin with."""

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
import pytest

from support.commands import told
from support.endless import endless_bundle
from support.scenes import scene
from support.served import pixels_of, png_of, until
from support.stepped import stepped
from tilewright.runtime import load
from tilewright.runtime.serve.settings import listen


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stepped(tmp_path_factory.mktemp("steps") / "steps")


@contextlib.contextmanager
def serving(*words: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A service in a process of its own, and its address."""
    command = [sys.executable, "-m", "tilewright", "runtime", "serve", "--port", "0", "--json", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = ""
        try:
            while not lines.endswith("\n}\n"):
                line = process.stdout.readline()
                assert line, process.communicate()[1]
                lines += line
            yield process, json.loads(lines)["url"]
        finally:
            process.kill()


def image_of(url: str, image: np.ndarray) -> httpx2.Response:
    return httpx2.post(f"{url}/v1/images/edits", files={"image": ("a.png", png_of(image))}, timeout=60)


@pytest.mark.slow
def test_sigterm_under_load_loses_no_accepted_request(bundle) -> None:
    images = [scene(100 + i, 120) for i in range(12)]
    with (
        serving("--bundle", bundle, "--threads", "1") as (process, url),
        ThreadPoolExecutor(len(images)) as pool,
        load(bundle, threads=1) as restorer,
    ):
        answers = [pool.submit(image_of, url, image) for image in images]
        until(lambda: answers[0].done() or answers[1].done(), "the first has ended")
        numbers = httpx2.get(f"{url}/metrics").text
        accepted = sum(
            int(float(line.split()[1])) for line in numbers.splitlines()
            if line.startswith(("tilewright_queue ", "tilewright_running ", "tilewright_images_total"))
        )  # fmt: skip
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        ends = [f.exception() or f.result() for f in answers]
        good = [(image, end) for image, end in zip(images, ends, strict=True) if getattr(end, "status_code", 0) == 200]
        assert len(good) >= accepted > 1
        assert all(np.array_equal(pixels_of(answer), restorer(image)) for image, answer in good)
        others = [end for end in ends if getattr(end, "status_code", 0) != 200]
        assert all(isinstance(e, httpx2.TransportError) or e.status_code == 503 for e in others)
        assert process.stderr is not None
        said = process.stderr.read()
        assert "requests are finished first" in said and "Traceback" not in said


@pytest.mark.slow
def test_a_second_signal_ends_what_runs(tmp_path) -> None:
    with serving("--bundle", endless_bundle(tmp_path / "endless"), "--threads", "1") as (process, url):
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(image_of, url, scene(24, 40))
            until(lambda: "tilewright_running 1.0" in httpx2.get(f"{url}/metrics").text, "it runs")
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            until(lambda: "finished first" in process.stderr.readline(), "it stops")
            process.send_signal(signal.SIGINT)
            assert answer.result().status_code == 503 and "is stopping" in answer.result().text
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["--bundle", "nowhere"], 3, "nowhere: no bundle.json there"),
        (["--bundle", "B", "--bundle", "B"], 2, "two bundles are named 'steps'"),
        (["--bundle", "B", "--token-file", "open"], 2, "token file open can be read by others (mode 644)"),
        (["--bundle", "B", "--token-file", "none"], 8, "token file none cannot be read"),
        (["--bundle", "B", "--port", "TAKEN"], 4, "stop what uses it, or choose another --port"),
        (["--bundle", "B", "--port", "70000"], 2, "--port 70000 is not a whole number from 0 to 65535"),
        (["--bundle", "B", "--max-body", "much"], 2, "--max-body 'much' is no amount of memory"),
        (["--bundle", "B", "--memory-limit", "much"], 2, "--memory-limit 'much' is no amount of memory"),
        (["--bundle", "B", "--deadline", "0"], 2, "--deadline 0.0 is not a number of seconds above 0"),
        (["--bundle", "B", "--checkpoint", "-1"], 2, "--checkpoint '-1' is not a number of minutes from 0"),
        (["--bundle", "B", "--memory-limit", "50MiB"], 5, "the service needs about"),
        (["--bundle", "B", "--engine", "cuda"], 2, "cuda"),
        (["--bundle", "B", "--state-dir", "open"], 4, "open cannot hold jobs"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(bundle, tmp_path, words, code, part) -> None:
    (tmp_path / "open").write_text("secret")
    (tmp_path / "open").chmod(0o644)
    with listen("127.0.0.1", 0) as taken:
        named = {"B": bundle, "TAKEN": taken.getsockname()[1]}
        port = [] if "--port" in words else ["--port", "0"]
        ended = told("runtime", "serve", *port, *[named.get(word, word) for word in words], cwd=tmp_path)
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("tilewright: ")]
    assert ended.returncode == code and part in line and not ended.stdout, ended.stderr


def test_without_its_packages_the_extra_is_named(bundle, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("tilewright.runtime.serve", "uvicorn"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    ended = told("runtime", "serve", "--bundle", bundle, "--port", "0")
    assert ended.returncode == 4 and "pip install 'tilewright[serve]'" in ended.stderr


def test_an_address_that_others_reach_asks_for_a_token(bundle) -> None:
    with serving("--bundle", bundle, "--host", "0.0.0.0") as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0 and process.stderr is not None
        assert "whoever reaches 0.0.0.0 may use this service; add --token-file" in process.stderr.read()
