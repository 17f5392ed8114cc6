"""The command that lays pictures side by side."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from train.metrics import measures

TOOL = Path(__file__).parents[2] / "tools" / "compare.py"


@pytest.fixture
def pictures(tmp_path) -> dict[str, Path]:
    random = np.random.default_rng(0)
    sizes = {"small": (8, 12), "original": (32, 48), "restored": (32, 48)}
    files = {name: tmp_path / f"{name}.png" for name in sizes}
    for name, (height, width) in sizes.items():
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(files[name])
    return files


def compare(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *map(str, words)], capture_output=True, text=True)


def test_the_sheet_holds_every_picture_and_the_table_its_measures(pictures, tmp_path):
    out = tmp_path / "deep" / "sheet.png"
    done = compare(pictures["small"], pictures["original"], f"mine={pictures['restored']}", "-o", out)
    assert done.returncode == 0, done.stderr
    sheet = np.asarray(Image.open(out))
    held = {name: np.asarray(Image.open(path)) for name, path in pictures.items()}
    bicubic = np.asarray(Image.open(pictures["small"]).resize((48, 32), Image.Resampling.BICUBIC))
    nearest = held["small"].repeat(4, 0).repeat(4, 1)
    for i, image in enumerate((nearest, bicubic, held["restored"], held["original"])):
        top, left = i // 3 * 54 + 18, i % 3 * 52
        assert np.array_equal(sheet[top : top + 32, left : left + 48], image)
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    for name, image in (("bicubic", bicubic), ("mine", held["restored"])):
        assert lines[name] == [f"{value:#.4g}" for value in measures(image, held["original"]).values()]


def test_another_size_is_refused_in_one_line(pictures, tmp_path):
    done = compare(pictures["small"], pictures["original"], f"mine={pictures['small']}", "-o", tmp_path / "sheet.png")
    assert done.returncode == 2 and "mine is 12x8 px" in done.stderr and not (tmp_path / "sheet.png").exists()
