"""Make one sheet of restored pictures, the input and the original, and print how near they are to the original.

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
ACROSS = 3  # pictures in a row; web pages shrink wider sheets


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def panel(name: str, image: np.ndarray) -> Image.Image:
    """A picture with its name above it."""
    height, width = image.shape[:2]
    whole = Image.new("RGB", (width, height + BAR_PX), "white")
    whole.paste(Image.fromarray(image), (0, BAR_PX))
    ImageDraw.Draw(whole).text((2, 2), name, fill="black")
    return whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("small", type=Path, help="the degraded input")
    parser.add_argument("original", type=Path, help="the picture that the input was made from")
    parser.add_argument("restored", nargs="+", metavar="NAME=PICTURE")
    parser.add_argument("-o", dest="out", type=Path, required=True)
    arguments = parser.parse_args()
    small, original = Image.open(arguments.small).convert("RGB"), read(arguments.original)
    size = (original.shape[1], original.shape[0])
    before = np.asarray(small.resize(size, Image.Resampling.NEAREST))
    pictures = {"bicubic": np.asarray(small.resize(size, Image.Resampling.BICUBIC))}
    pictures |= {name: read(Path(path)) for name, _, path in (word.partition("=") for word in arguments.restored)}
    for name, image in pictures.items():
        if image.shape != original.shape:
            parser.error(f"{name} is {image.shape[1]}x{image.shape[0]} px, {arguments.original} is {size[0]}x{size[1]}")
    panels = [panel(*item) for item in ({"before": before} | pictures | {"original": original}).items()]
    width, height = (side + GAP_PX for side in panels[0].size)
    rows = -(-len(panels) // ACROSS)
    sheet = Image.new("RGB", (min(ACROSS, len(panels)) * width - GAP_PX, rows * height - GAP_PX), "white")
    for i, part in enumerate(panels):
        sheet.paste(part, (i % ACROSS * width, i // ACROSS * height))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(arguments.out)
    print(f"{'':<12}" + "".join(f"{name:>10}" for name in MEASURES))
    for name, image in pictures.items():
        print(f"{name:<12}" + "".join(f"{value:>#10.4g}" for value in measures(image, original).values()))
    print(", ".join(f"{name}: {what}" for name, what in MEASURES.items()))
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
