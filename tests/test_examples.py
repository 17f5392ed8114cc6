"""The examples run as they are."""

import io
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image

from support.bundles import tint_bundle
from support.pages import ROOT
from support.scenes import scene
from support.served import png_of
from tilewright.runtime import load
from tilewright.runtime.serve.settings import listen

EXAMPLES = ROOT / "examples"
IMAGE = scene(24, 40)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tint_bundle(tmp_path_factory.mktemp("tint") / "tint")


@pytest.fixture(scope="module")
def restored(bundle) -> np.ndarray:
    with load(bundle) as restorer:
        return restorer(IMAGE)


def run(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, EXAMPLES / name, *map(str, words)], capture_output=True, text=True)


def test_every_example_is_run_here() -> None:
    names = {path.name for path in EXAMPLES.iterdir()}
    assert names == {"python_service.py", "async_images.py", "batch_folder.py", "cpp_minimal", "cpp_service"}
    assert len((EXAMPLES / "python_service.py").read_text().splitlines()) <= 35


@pytest.mark.slow
def test_a_service_in_thirty_lines(bundle, restored) -> None:
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    command = [sys.executable, EXAMPLES / "python_service.py", bundle, str(port)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(600):
                try:
                    answer = httpx2.post(f"http://127.0.0.1:{port}/", content=png_of(IMAGE), timeout=60)
                    break
                except httpx2.ConnectError:
                    time.sleep(0.05)
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), restored)
            answer = httpx2.post(f"http://127.0.0.1:{port}/", content=b"no image")
            assert answer.status_code == 422 and "is damaged or not an image" in answer.text
        finally:
            process.kill()


def test_several_images_in_an_event_loop(bundle, restored, tmp_path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(png_of(IMAGE))
    ended = run("async_images.py", bundle, *sorted(tmp_path.iterdir()))
    assert ended.returncode == 0 and ended.stdout.count("-restored.png: ") == 3, ended.stderr
    for name in "abc":
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"{name}-restored.png")), restored)


@pytest.mark.slow
def test_a_folder(bundle, restored, tmp_path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png_of(IMAGE))
    (tmp_path / "in" / "b.txt").write_text("")
    ended = run("batch_folder.py", bundle, tmp_path / "in", tmp_path / "out")
    assert ended.returncode == 0 and ended.stdout == "1 images, 1 other files\na.png (40, 24)\n", ended.stderr
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "a.png")), restored)
    (tmp_path / "in" / "c.png").write_text("no image")
    ended = run("batch_folder.py", bundle, tmp_path / "in", tmp_path / "out")
    assert ended.returncode == 1 and "a.png done before" in ended.stdout and "c.png is damaged" in ended.stdout
