"""What a walk over steps and tiles must give, from the formulas in float64, and engines made of functions."""

import math
import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from tilewright.runtime.bundle.program import Call, Grid, Pass, Program, Tiles
from tilewright.runtime.bundle.strict import from_json
from tilewright.runtime.plan.noise import normal

__all__ = [
    "DDPM",
    "PAINT",
    "PAINTING",
    "PROGRAMS",
    "SEED",
    "Canvas",
    "Late",
    "RowByRow",
    "Toy",
    "blurred",
    "boxes",
    "canvas",
    "diffusion",
    "field",
    "flow",
    "grown",
    "joined",
    "mean_of",
    "program_of",
    "ramps",
    "same_arrays",
    "shrunk",
    "starts",
    "toys",
    "under",
    "with_pass",
]

PROGRAMS = Path(__file__).parents[1] / "programs"
SEED = 2026
DDPM = {"betas": "linear", "beta_start": 1e-4, "beta_end": 2e-2, "spacing_offset": 0, "final_alpha": "one"}


def program_of(system):
    return from_json(Program, (PROGRAMS / f"{system}.json").read_bytes(), system)


def with_pass(program, name, **changes):
    return replace(program, passes=tuple(replace(p, **changes) if p.name == name else p for p in program.passes))


class Canvas(np.ndarray):
    """Planes that a job reads by crops."""

    def crop(self, top, left, height, width):
        return np.asarray(self)[:, top : top + height, left : left + width]


def canvas(height, width):
    return np.random.default_rng(0).random((3, height, width), np.float32).view(Canvas)


# The reference: tiles, ramps, joins, noise and schedules from their formulas, in float64


def starts(length, tile, overlap):
    found = [0]
    while found[-1] + tile < length:
        found.append(min(found[-1] + tile - overlap, length - tile))
    return found


def boxes(height, width, tile, overlap):
    """(top, left, height, width) of every tile, row by row."""
    return [
        (top, left, min(tile, height), min(tile, width))
        for top in starts(height, tile, overlap)
        for left in starts(width, tile, overlap)
    ]


def under(grid, box, px=1):
    """A grid's crop under a tile, as a batch of one."""
    top, left, height, width = (side // px for side in box)
    return grid[None, :, top : top + height, left : left + width]


def ramps(start, size, length, overlap):
    """Rising where a neighbour comes before, falling where one comes after."""
    weights = np.ones(size)
    for i in range(overlap):
        weight = 0.5 - 0.5 * math.cos(math.pi * (i + 0.5) / overlap)
        if start > 0:
            weights[i] = weight
        if start + size < length:
            weights[size - 1 - i] = weight
    return weights


def joined(parts, tiles, overlap, height, width, px=1):
    """The weighted mean of all tiles at every cell."""
    cells = (height // px, width // px)
    total, weight = np.zeros((parts[0].shape[1], *cells)), np.zeros(cells)
    for part, box in zip(parts, tiles, strict=True):
        top, left, h, w = (side // px for side in box)
        window = np.outer(ramps(top, h, cells[0], overlap // px), ramps(left, w, cells[1], overlap // px))
        total[:, top : top + h, left : left + w] += part[0] * window
        weight[top : top + h, left : left + w] += window
    return total / weight


def field(region, stream, channels, rows, columns):
    return normal(SEED, region=region, stream=stream, channels=channels, top=0, left=0, height=rows, width=columns)


def flow(count, tokens):
    mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    sigma = [math.exp(mu) / (math.exp(mu) + (1 / (1 - i / count) - 1)) for i in range(count)]
    return np.float32(sigma), np.float32([*sigma[1:], 0])


def diffusion(count, power, first, last, offset, final):
    """The rows (t, alpha, beta, alpha_next, beta_next) of DDIM's steps."""
    rise = np.linspace(first ** (1 / power), last ** (1 / power), 1000) ** power
    bar = np.cumprod(1 - rise)
    stride = 1000 // count
    times = [i * stride + offset for i in reversed(range(count))]
    following = [bar[t - stride] if t >= stride else (1.0 if final == "one" else bar[0]) for t in times]
    rows = [
        (t, bar[t] ** 0.5, (1 - bar[t]) ** 0.5, n**0.5, (1 - n) ** 0.5) for t, n in zip(times, following, strict=True)
    ]
    return np.float32(rows)


# Toy networks. None is the same on a tile as on the whole: the blur wraps around the tile, `mean_of` sees all of it.


class Toy:
    """An engine made of a function; it keeps what it is fed, tile by tile of a phase in any order."""

    def __init__(self, function):
        self.function, self.feeds = function, []

    def run(self, inputs, wanted):
        self.feeds.append(dict(inputs))
        outputs = self.function(**inputs)
        return {name: outputs[name] for name in wanted}

    def close(self):
        pass


class Late(Toy):
    """A toy that takes its time, each time another."""

    def run(self, inputs, wanted):
        outputs = super().run(inputs, wanted)
        time.sleep(random.uniform(0, 0.003))
        return outputs


class RowByRow(Toy):
    """A toy that computes each row by itself, in one type, so that its numbers do not depend on the rest of a call."""

    def run(self, inputs, wanted):
        self.feeds.append(dict(inputs))
        most = max(map(len, inputs.values()))
        row = lambda array, i: np.ascontiguousarray(array[i % len(array), None])  # noqa: E731
        rows = [self.function(**{name: row(array, i) for name, array in inputs.items()}) for i in range(most)]
        return {name: np.float32(np.concatenate([outputs[name] for outputs in rows])) for name in wanted}


def toys(functions, kind=Toy):
    return {name: kind(function) for name, function in functions.items()}


def shrunk(image, px, channels):
    batch, colours, height, width = image.shape
    means = image.reshape(batch, colours, height // px, px, width // px, px).mean((3, 5))
    gains = np.linspace(0.5, 1.5, channels, dtype=image.dtype)[:, None, None]
    return means[:, np.arange(channels) % colours] * gains


def grown(latent, px):
    return latent[:, :3].repeat(px, 2).repeat(px, 3)


def blurred(x):
    return (x + np.roll(x, 1, 2) + np.roll(x, -1, 2) + np.roll(x, 1, 3) + np.roll(x, -1, 3)) / 5


def mean_of(image):
    return image.mean((1, 2, 3))[:, None, None, None]


PAINT = Pass("paint", Tiles(16, 0), once=(Call("paint", {"image": "image"}, {"image": "result"}),))
PAINTING = Program(1, 8, {"image": Grid(1, 3, "input"), "result": Grid(1, 3)}, (PAINT,))


def same_arrays(found, expected):
    """Whether these are the same arrays, in any order."""
    return Counter((a.shape, a.tobytes()) for a in found) == Counter((a.shape, a.tobytes()) for a in expected)
