"""`make demo`, line by line, in an empty directory: the shipped weights restore better than bicubic."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
LIMITS = {"hitoksr": 12e6, "in-token": 16e6}  # bytes of weights


@pytest.fixture(scope="module")
def lines() -> list[list[str]]:
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    return [line.split() for line in recipe[1].splitlines()]


def test_every_restored_picture_is_nearer_to_the_original_than_bicubic(lines, tmp_path):
    for name in ("demo", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = {"$(BIN)/tilewright": ["-m", "tilewright.export.cli"], "$(BIN)/python": []}
    for command, *words in lines:
        done = subprocess.run(
            [sys.executable, *commands[command], *words], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    header, *rows = (line.split() for line in done.stdout.splitlines()[: 2 + len(LIMITS)])
    found = {name: dict(zip(header, map(float, values), strict=True)) for name, *values in rows}
    for system in LIMITS:
        assert found[system]["psnr"] > found["bicubic"]["psnr"] + 0.5
        assert found[system]["ssim"] > found["bicubic"]["ssim"]
    assert done.stdout.splitlines()[-1] == "out/demo.png"
    assert Image.open(tmp_path / "out" / "demo.png").height > 256


@pytest.mark.parametrize("system", LIMITS)
def test_the_weights_are_as_small_as_promised(system):
    sizes = [path.stat().st_size for path in (ROOT / "demo" / system).rglob("*.safetensors")]
    assert 1e6 < sum(sizes) <= LIMITS[system]
