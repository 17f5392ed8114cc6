"""Tiny real bundles, and folders of pictures."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.stepped import stepped


@pytest.fixture
def stepping(tmp_path: Path) -> Path:
    """A bundle that takes steps."""
    return stepped(tmp_path / "steps.bundle")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with five pictures of one tile or four, and a file that is none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for place in range(5):
        pixels = np.random.default_rng(place).integers(0, 200 + 10 * place, (16, 16 + 16 * (place % 2), 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{place}.png")
    (folder / "notes.txt").write_text("taken on a rainy day")
    return folder
