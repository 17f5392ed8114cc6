"""Images for training and for judging, and their degradation.

Half of the crops come from the photographs inside scikit-image's package. The others are drawn: dead leaves, polygons,
gratings, text, gradients, textures. Every image belongs to one split only. A batch depends on its split, seed and
number alone, so training that was stopped continues with the same images.
"""

import io
import math
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import skimage
from numpy.random import Generator, Philox
from PIL import Image, ImageDraw, ImageFilter, ImageFont

__all__ = ["FAMILIES", "PHOTOGRAPHS", "batch", "degrade", "images", "kept_back", "random", "sample", "squares"]

SCALE = 4
SIDE = 256  # side of drawn images, in pixels
PHOTOGRAPHS = {
    "train": (
        "astronaut.png",
        "brick.png",
        "clock_motion.png",
        "coins.png",
        "color.png",
        "grass.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "page.png",
        "retina.jpg",
    ),
    "calibration": ("rocket.jpg", "gravel.png"),
    "held-out": ("chelsea.png", "coffee.png", "camera.png", "text.png"),
}
DRAWN = {"train": 70, "calibration": 4, "held-out": 2}  # drawn images of every family
SAMPLE = "chelsea.png", (48, 8, 320, 256)
SEEDS = {"train": 1, "calibration": 2, "held-out": 3}


def random(*key: int) -> Generator:
    """A random generator that depends on this key alone."""
    return Generator(Philox(np.random.SeedSequence(key)))


def colour(rng: Generator) -> np.ndarray:
    """A random colour, often dull, as in photographs."""
    grey = rng.uniform(0.05, 0.95)
    return np.clip(grey + rng.normal(0, rng.choice([0.03, 0.1, 0.3]), 3), 0, 1)


def spectrum(rng: Generator, power: float, channels: int = 3) -> np.ndarray:
    """Noise between 0 and 1 whose amplitude falls with frequency**power."""
    frequency = np.hypot(*np.meshgrid(np.fft.rfftfreq(SIDE), np.fft.fftfreq(SIDE)))
    frequency[0, 0] = 1
    waves = np.fft.rfft2(rng.standard_normal((channels, SIDE, SIDE))) / frequency**power
    field = np.fft.irfft2(waves, (SIDE, SIDE)).transpose(1, 2, 0)
    low, high = field.min((0, 1)), field.max((0, 1))
    return (field - low) / (high - low)


def drawn(rng: Generator, draw: Callable[[ImageDraw.ImageDraw, int], None], ground: np.ndarray) -> np.ndarray:
    """Draw at three times the size and shrink the result, so that edges lie between pixels."""
    side = 3 * SIDE
    canvas = Image.fromarray((np.clip(ground, 0, 1) * 255).astype(np.uint8)).resize((side, side))
    draw(ImageDraw.Draw(canvas), side)
    return np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX)) / 255.0


def rgb(values: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (int(v) for v in np.clip(values, 0, 1) * 255)
    return red, green, blue


def leaves(rng: Generator) -> np.ndarray:
    """Dead leaves: shapes of all sizes that cover each other, with the statistics of foliage."""
    tone, spread = colour(rng), rng.uniform(0.05, 0.3)

    def draw(canvas: ImageDraw.ImageDraw, side: int) -> None:
        smallest = rng.uniform(3, 14)
        for _ in range(int(rng.integers(300, 1200))):
            radius = min(smallest / math.sqrt(rng.uniform(1e-3, 1)), side / 3)
            x, y, turn = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0, 2 * math.pi)
            slim = rng.uniform(0.15, 1)
            t = np.linspace(0, 2 * math.pi, 24)
            across = slim * np.sin(t) * np.abs(np.sin(t)) ** rng.uniform(0, 1)
            points = np.stack([np.cos(t) * math.cos(turn) - across * math.sin(turn),
                               np.cos(t) * math.sin(turn) + across * math.cos(turn)], 1)  # fmt: skip
            fill = rgb(tone + rng.normal(0, spread) + rng.normal(0, spread / 2, 3))
            canvas.polygon([(x + radius * a, y + radius * b) for a, b in points], fill=fill)

    return drawn(rng, draw, np.broadcast_to(tone, (SIDE, SIDE, 3)))


def polygons(rng: Generator) -> np.ndarray:
    """Triangles, rectangles and lines over a gradient."""

    def draw(canvas: ImageDraw.ImageDraw, side: int) -> None:
        for _ in range(int(rng.integers(5, 40))):
            points = [tuple(p) for p in rng.uniform(-0.1, 1.1, (int(rng.integers(3, 6)), 2)) * side]
            if rng.random() < 0.4:
                canvas.line(points[:2], fill=rgb(colour(rng)), width=int(rng.integers(2, 24)))
            elif rng.random() < 0.4:
                (x0, y0), (x1, y1) = np.sort(np.array(points[:2]), 0)
                canvas.rectangle((x0, y0, x1, y1), fill=rgb(colour(rng)))
            else:
                canvas.polygon(points, fill=rgb(colour(rng)))

    return drawn(rng, draw, gradients(rng))


def gratings(rng: Generator) -> np.ndarray:
    """Stripes, checks and rings, sharp or smooth, with slightly bent lines."""
    y, x = np.mgrid[:SIDE, :SIDE] + 6 * (spectrum(rng, 2, 2).transpose(2, 0, 1) - 0.5) * rng.integers(0, 8)
    waves = np.zeros((SIDE, SIDE))
    for _ in range(int(rng.integers(1, 4))):
        turn, wavelength = rng.uniform(0, math.pi), 2 ** rng.uniform(2.2, 6)
        along = x * math.cos(turn) + y * math.sin(turn)
        if rng.random() < 0.25:
            along = np.hypot(x - rng.uniform(0, SIDE), y - rng.uniform(0, SIDE))
        waves += np.sin(2 * math.pi * along / wavelength + rng.uniform(0, 6))
    sharp = np.tanh(waves * rng.choice([0.8, 3, 12]))[..., None] / 2 + 0.5
    return sharp * colour(rng) + (1 - sharp) * colour(rng)


def words(rng: Generator) -> np.ndarray:
    """Rotated lines of letters over a smooth background."""

    def draw(canvas: ImageDraw.ImageDraw, side: int) -> None:
        ink = rgb(colour(rng))
        y = 0.0
        while y < side:
            size = float(rng.uniform(28, 110))
            letters = "".join(chr(c) for c in rng.integers(33, 123, 40))
            spaced = " ".join(letters[i : i + 5] for i in range(0, 40, 5))
            canvas.text((rng.uniform(-60, 20), y), spaced, fill=ink, font=ImageFont.load_default(size))
            y += size * rng.uniform(1, 1.6)

    page = Image.fromarray((drawn(rng, draw, gradients(rng)) * 255).astype(np.uint8))
    turned = page.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC)
    return np.asarray(turned) / 255.0


def gradients(rng: Generator) -> np.ndarray:
    """Smooth clouds between two colours."""
    clouds = spectrum(rng, rng.uniform(1.6, 2.6), 1)
    return clouds * colour(rng) + (1 - clouds) * colour(rng)


def textures(rng: Generator) -> np.ndarray:
    """Coloured noise of any roughness, sometimes cut into two phases."""
    field = spectrum(rng, rng.uniform(0.6, 1.6))
    common = spectrum(rng, rng.uniform(0.8, 1.8), 1)
    mixed = np.clip(0.25 * field + 0.75 * common, 0, 1)
    if rng.random() < 0.3:
        mixed = 1 / (1 + np.exp(-40 * (mixed - mixed.mean())))
    return mixed * colour(rng) + (1 - mixed) * colour(rng)


FAMILIES = {f.__name__: f for f in (leaves, polygons, gratings, words, gradients, textures)}


@cache
def images(split: str) -> dict[str, list[np.ndarray]]:
    """The images of a split: `photographs` and every family, as lists of uint8 [H, W, 3]."""
    folder = Path(skimage.__file__).parent / "data"
    photographs = [np.asarray(Image.open(folder / name).convert("RGB")) for name in PHOTOGRAPHS[split]]
    drawings = {
        name: [(family(random(SEEDS[split], number, i)) * 255).round().astype(np.uint8) for i in range(DRAWN[split])]
        for number, (name, family) in enumerate(FAMILIES.items())
    }
    return {"photographs": photographs} | drawings


def degrade(rng: Generator, image: np.ndarray) -> np.ndarray:
    """Degrade uint8 [H, W, 3] to [H/4, W/4, 3]: blur, shrink with one of several filters, add noise, save as JPEG."""
    sharp = Image.fromarray(image)
    blurred = sharp.filter(ImageFilter.GaussianBlur(rng.uniform(0, 2.4)))
    size = (image.shape[1] // SCALE, image.shape[0] // SCALE)
    filters = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
    small = np.asarray(blurred.resize(size, filters[rng.integers(4)])).astype(np.float64)
    strength = rng.uniform(1, 30)
    shape = small.shape if rng.random() < 0.6 else (*small.shape[:2], 1)
    of_light = np.sqrt(np.maximum(small, 1) / 128) if rng.random() < 0.5 else 1  # shot noise grows with light
    noisy = np.clip(small + strength * of_light * rng.standard_normal(shape), 0, 255).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=int(rng.integers(30, 96)))
    return np.asarray(Image.open(file))


def crop(rng: Generator, split: str, kind: int, side: int) -> np.ndarray:
    """A piece of an image, uint8 [side, side, 3], mirrored and rotated; photographs are also shrunk."""
    pool = list(images(split).values())[kind]
    image = pool[rng.integers(len(pool))]
    source_side = side
    if kind == 0:
        source_side = min(int(side * rng.choice([1, 1, 1.5, 2, 2.7])), *image.shape[:2])
    top, left = (int(rng.integers(0, size - source_side + 1)) for size in image.shape[:2])
    piece = image[top : top + source_side, left : left + source_side]
    if source_side != side:
        piece = np.asarray(
            Image.fromarray(piece).resize(
                (side, side), Image.Resampling.BOX if source_side > side else Image.Resampling.BICUBIC
            )
        )
    piece = np.rot90(piece, int(rng.integers(4)))
    piece = piece[:, ::-1] if rng.random() < 0.5 else piece
    return np.ascontiguousarray(piece[..., rng.permutation(3)] if rng.random() < 0.3 else piece)


def batch(seed: int, number: int, count: int, side: int, split: str = "train") -> tuple[np.ndarray, ...]:
    """Sharp crops, the same crops degraded and enlarged again by bicubic, and their kinds; 0 is a photograph.

    uint8 [count, side, side, 3] twice, and int64 [count].
    """
    rng = random(SEEDS[split], seed, number)
    kinds = np.where(rng.random(count) < 0.5, 0, rng.integers(1, 1 + len(FAMILIES), count))
    sharp = [crop(rng, split, kind, side) for kind in kinds]
    return np.stack(sharp), np.stack([enlarged(degrade(rng, image)) for image in sharp]), kinds


def enlarged(small: np.ndarray) -> np.ndarray:
    """Enlarge four times, as the runtime does."""
    height, width = small.shape[:2]
    return np.asarray(Image.fromarray(small).resize((width * SCALE, height * SCALE), Image.Resampling.BICUBIC))


def squares(image: np.ndarray, side: int) -> np.ndarray:
    """Cut an image into as many squares as fit, [count, side, side, 3]."""
    rows, columns = (size // side for size in image.shape[:2])
    whole = image[: rows * side, : columns * side].reshape(rows, side, columns, side, 3)
    return whole.swapaxes(1, 2).reshape(-1, side, side, 3)


def kept_back(split: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, sharp image and degraded image for all images of a split without training."""
    for kind, members in images(split).items():
        for i, image in enumerate(members):
            name = Path(PHOTOGRAPHS[split][i]).stem if kind == "photographs" else f"{kind}-{i}"
            height, width = (size // 32 * 32 for size in image.shape[:2])
            sharp = image[:height, :width]
            yield name, sharp, degrade(random(SEEDS[split], *name.encode()), sharp)


def sample(folder: Path) -> None:
    """The picture of `make demo`: a held-out photograph and its degraded quarter."""
    folder.mkdir(parents=True, exist_ok=True)
    name, (left, top, width, height) = SAMPLE
    whole = images("held-out")["photographs"][PHOTOGRAPHS["held-out"].index(name)]
    sharp = np.ascontiguousarray(whole[top : top + height, left : left + width])
    Image.fromarray(sharp).save(folder / "original.png")
    Image.fromarray(degrade(random(SEEDS["held-out"], 7), sharp)).save(folder / "sample.png")


if __name__ == "__main__":
    sample(Path(sys.argv[1]))
