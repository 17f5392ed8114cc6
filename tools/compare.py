"""Lay restored pictures beside the input and the original, and say how near they are.

python tools/compare.py SMALL ORIGINAL NAME=RESTORED... -o PICTURE
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from train.metrics import MEASURES, measures

BAR_PX = 18
GAP_PX = 4
ACROSS = 3  # a page shrinks what is wider


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def panel(name: str, image: np.ndarray) -> Image.Image:
    """A picture with its name above."""
    height, width = image.shape[:2]
    whole = Image.new("RGB", (width, height + BAR_PX), "white")
    whole.paste(Image.fromarray(image), (0, BAR_PX))
    ImageDraw.Draw(whole).text((2, 2), name, fill="black")
    return whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("small", type=Path, help="what was restored")
    parser.add_argument("original", type=Path, help="what it was made of")
    parser.add_argument("restored", nargs="+", metavar="NAME=PICTURE")
    parser.add_argument("-o", dest="out", type=Path, required=True)
    asked = parser.parse_args()
    small, original = Image.open(asked.small).convert("RGB"), read(asked.original)
    size = (original.shape[1], original.shape[0])
    before = np.asarray(small.resize(size, Image.Resampling.NEAREST))
    pictures = {"bicubic": np.asarray(small.resize(size, Image.Resampling.BICUBIC))}
    pictures |= {name: read(Path(path)) for name, _, path in (word.partition("=") for word in asked.restored)}
    for name, image in pictures.items():
        if image.shape != original.shape:
            parser.error(f"{name} is {image.shape[1]}x{image.shape[0]} px, {asked.original} is {size[0]}x{size[1]}")
    shown = [panel(*item) for item in ({"before": before} | pictures | {"original": original}).items()]
    width, height = (side + GAP_PX for side in shown[0].size)
    rows = -(-len(shown) // ACROSS)
    sheet = Image.new("RGB", (min(ACROSS, len(shown)) * width - GAP_PX, rows * height - GAP_PX), "white")
    for i, part in enumerate(shown):
        sheet.paste(part, (i % ACROSS * width, i // ACROSS * height))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(asked.out)
    print(f"{'':<12}" + "".join(f"{name:>10}" for name in MEASURES))
    for name, image in pictures.items():
        print(f"{name:<12}" + "".join(f"{value:>#10.4g}" for value in measures(image, original).values()))
    print(", ".join(f"{name}: {what}" for name, what in MEASURES.items()))
    print(asked.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
