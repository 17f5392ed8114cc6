"""Scenes to restore and their exact results: Pillow, padding by index and an integer convolution of the whole image."""

import numpy as np
import pytest
from PIL import Image

from tilewright.runtime import load
from tilewright.runtime.bundle.program import Call, Grid, Pass, Program, Tiles
from tilewright.runtime.engines.machine import usable_cores

__all__ = [
    "CPUS",
    "FROM_NOISE",
    "SHARPENED",
    "WHOLE",
    "assert_tinted",
    "difference",
    "doubled",
    "expected",
    "mirrored",
    "noise",
    "padded",
    "restorer",
    "scene",
    "tinted_by",
]

CPUS = [f"cpu:{i}" for i in range(min(3, usable_cores()))]
WHOLE = 4096  # a tile larger than any image here
SHARPENED = Program(
    scale=2,
    multiple_px=8,
    grids={"image": Grid(1, 3, "input"), "result": Grid(1, 3)},
    passes=(Pass("restore", Tiles(64, 16), once=(Call("sharpen", {"image": "image"}, {"sharp": "result"}),)),),
)
FROM_NOISE = Program(
    scale=2,
    multiple_px=8,
    grids={"image": Grid(1, 3, "input"), "z": Grid(1, 3, "noise"), "result": Grid(1, 3)},
    passes=(Pass("restore", Tiles(64, 16), once=(Call("sharpen", {"image": "z"}, {"sharp": "result"}),)),),
)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def scene(height: int, width: int) -> np.ndarray:
    """A picture with soft shapes, sharp edges and a little noise."""
    y, x = np.mgrid[:height, :width]
    soft = np.stack([120 + 60 * np.sin(y / 7 + c) * np.cos(x / 9) for c in range(3)], axis=2)
    soft[(x // 13 + y // 11) % 2 == 0] += 30
    return (soft + noise(height, width, 3) / 16).clip(0, 255).astype(np.uint8)


def doubled(plane: np.ndarray) -> np.ndarray:
    height, width = plane.shape[:2]
    return np.asarray(Image.fromarray(plane).resize((2 * width, 2 * height), Image.Resampling.BICUBIC))


def padded(length: int, least: int = 1, multiple: int = 8) -> list[int]:
    """Where each row (or column) of the padded image comes from."""
    whole = max(-(-length // multiple) * multiple, least)
    mirrored = whole - length <= length - 1
    return [i if i < length else 2 * (length - 1) - i if mirrored else length - 1 for i in range(whole)]


def mirrored(length: int, shift: int) -> list[int]:
    return [length - 2 if i == length else abs(i) for i in range(shift, length + shift)]


def expected(rgb: np.ndarray, kernels: np.ndarray, least: int = 1) -> np.ndarray:
    """The restoration of a whole image in integers: sevenths of a level, rounded at the end."""
    large = doubled(rgb)
    canvas = large[np.ix_(padded(large.shape[0], least), padded(large.shape[1], least))].astype(int)
    height, width = canvas.shape[:2]
    total = np.zeros_like(canvas)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            total += canvas[np.ix_(mirrored(height, dy), mirrored(width, dx))] * kernels[:, dy + 1, dx + 1]
    levels = (2 * total + 7) // 14
    return levels.clip(0, 255).astype(np.uint8)[: large.shape[0], : large.shape[1]]


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    assert one.shape == other.shape
    assert one.dtype == other.dtype == np.uint8
    return np.abs(one.astype(int) - other.astype(int))


@pytest.fixture
def restorer(bundle):
    with load(bundle, threads=1) as restorer:
        yield restorer


def tinted_by(rgb: np.ndarray, eighths, gain: float = 1.0) -> np.ndarray:
    """What the bundle that words lead must make of an image of one tile, in levels."""
    canvas = rgb[np.ix_(padded(rgb.shape[0]), padded(rgb.shape[1]))]
    return np.clip(rgb * (np.array(eighths) / 8 * gain) + canvas.mean((0, 1)) / 4, 0, 255)


def assert_tinted(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 0.501  # rounded to the nearest level
