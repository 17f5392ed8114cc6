"""`make demo` in an empty directory: the shipped weights restore better than bicubic."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tilewright.export.verify.engines import verify
from tilewright.export.verify.gate import require
from tilewright.export.verify.seams import PICTURES
from tilewright.runtime.errors import AccuracyError

ROOT = Path(__file__).parents[2]
LIMITS = {"hitoksr": 12e6, "in-token": 16e6}  # bytes of weights


@pytest.fixture(scope="module")
def made(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The directory, and all that is printed. Pages that build the same networks find them in the cache."""
    folder = tmp_path_factory.mktemp("demo")
    for name in ("Makefile", "constraints.txt", "demo", "pyproject.toml", "tools"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "ready").touch()
    command = ["make", "--no-print-directory", "demo", f"BIN={Path(sys.executable).parent}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout.splitlines()


@pytest.mark.slow
def test_every_restored_picture_is_nearer_to_the_original_than_bicubic(made):
    folder, lines = made
    table = next(i for i, line in enumerate(lines) if line.split() == ["psnr", "ssim", "gmsd"])
    header, *rows = (line.split() for line in lines[table : table + 2 + len(LIMITS)])
    found = {name: dict(zip(header, map(float, values), strict=True)) for name, *values in rows}
    for system in LIMITS:
        assert found[system]["psnr"] > found["bicubic"]["psnr"] + 0.5
        assert found[system]["ssim"] > found["bicubic"]["ssim"]
    assert lines[-1] == "out/demo.png"
    assert Image.open(folder / "out" / "demo.png").height > 256


@pytest.mark.slow
@pytest.mark.parametrize("system", LIMITS)
def test_tiles_that_do_not_fade_into_each_other_are_refused(made, system, monkeypatch):
    def as_they_are(starts: Sequence[int], tile: int, overlap: int) -> list[np.ndarray]:
        count = np.zeros(starts[-1] + tile, np.float32)
        for start in starts:
            count[start : start + tile] += 1
        return [1 / count[start : start + tile] for start in starts]

    monkeypatch.setattr("tilewright.runtime.plan.tiles._axis_weights", as_they_are)
    monkeypatch.setattr("tilewright.export.verify.engines.PICTURES", {"flat": PICTURES["flat"]})  # the one that is told
    monkeypatch.setattr("tilewright.export.verify.sample.FEW_STEPS", 1)  # of engines beside PyTorch, which agree
    with pytest.raises(AccuracyError, match="tiles show on the flat picture"):
        require(verify(made[0] / "out" / f"{system}-demo"))


@pytest.mark.parametrize("system", LIMITS)
def test_the_weights_are_as_small_as_promised(system):
    sizes = [path.stat().st_size for path in (ROOT / "demo" / system).rglob("*.safetensors")]
    assert 1e6 < sum(sizes) <= LIMITS[system]
