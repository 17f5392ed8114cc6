"""A part of the held-out picture that suffered most from 8 bits, as every engine restores it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tilewright.calib.judge.likeness import psnr

__all__ = ["Crops"]

SIDE = 128
GAIN = 16  # of a difference, so that it is seen
Floats = npt.NDArray[np.floating[Any]]
Pixels = npt.NDArray[np.uint8]


class Crops:
    """The pictures of all engines, of which a part is written in the end."""

    def __init__(self, sources: Sequence[Pixels], exact: Sequence[Floats], originals: Sequence[Floats]) -> None:
        self.sources, self.exact, self.originals = sources, exact, originals
        self.pictures: dict[str, list[Pixels]] = {}
        self.worst = 0.0, 0, 0, 0  # the largest error of a window, its picture, top and left

    def add(self, engine: str, pictures: Sequence[Floats], *, judged: bool) -> None:
        """Add the pictures of an engine. `judged`: the part is where such an engine is at its worst."""
        self.pictures[engine] = [_pixels(picture) for picture in pictures]
        if judged:
            place = int(np.argmin([psnr(*pair) for pair in zip(pictures, self.exact, strict=True)]))
            self.worst = max(self.worst, (*_window(pictures[place] - self.exact[place], place),))

    def write(self, folder: Path) -> list[dict[str, Any]]:
        """Write a PNG for each, and return their names and the captions, in order."""
        _, place, top, left = self.worst
        exact = _pixels(self.exact[place])
        scale = exact.shape[0] // self.sources[place].shape[0]
        source = self.sources[place].repeat(scale, 0).repeat(scale, 1)
        parts = {"input": source, "float32": exact}
        parts |= {"original": _pixels(self.originals[place])} if self.originals else {}
        engines = {name: pictures[place] for name, pictures in self.pictures.items()}
        parts |= engines
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.png"):
            old.unlink()
        written = []
        for name, whole in parts.items():
            part, reference = (p[top : top + SIDE, left : left + SIDE] for p in (whole, exact))
            Image.fromarray(part).save(folder / f"{name}.png")
            row: dict[str, Any] = {"name": name, "picture": place, "top": top, "left": left}
            if name in engines:
                difference = np.abs(part.astype(np.int16) - reference) * GAIN
                Image.fromarray(np.minimum(difference, 255).astype(np.uint8)).save(folder / f"{name}.difference.png")
                row |= {"difference": f"{name}.difference.png", "gain": GAIN}
            written.append(row | {"file": f"{name}.png"})
        return written


def _pixels(planes: Floats) -> Pixels:
    """The picture in 8 bits a colour, [height, width, 3]."""
    return (np.clip(planes, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)


def _window(error: Floats, place: int) -> tuple[float, int, int, int]:
    """The largest squared error of a window, the picture, and the window's top and left."""
    squares = np.square(error, dtype=np.float64).sum(0)
    sums = np.pad(squares.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    rows, columns = (min(SIDE, size) for size in squares.shape)
    windows = sums[rows:, columns:] - sums[:-rows, columns:] - sums[rows:, :-columns] + sums[:-rows, :-columns]
    top, left = np.unravel_index(int(windows.argmax()), windows.shape)
    return float(windows[top, left]), place, int(top), int(left)
