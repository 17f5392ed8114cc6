"""Counter-based noise: normal values that depend only on the seed and the position.

Philox4x32-10 with key (seed, region) and counter (x, y, channel, stream) gives words, and Box and Muller's formula
makes normal values of w0 and w1 in float64. Region 0 is the noise of grids, region 1 + index the noise of one tile.
Stream 0 is the initial noise, stream 1 + step the noise of a step. The words are equal on every machine. `log` and
`cos` may differ in the last bit of a float64, which the rounding to float32 almost always hides.
"""

import numpy as np
import numpy.typing as npt

from tilewright.runtime.errors import UsageError

__all__ = ["normal", "philox4x32"]

UInt64s = npt.NDArray[np.uint64]

WORD_MAX = 0xFFFFFFFF
ROUNDS = 10
BLOCK = 1 << 15  # positions computed at once, so that the temporary uint64 arrays stay in the CPU's cache

# these constants have types because NumPy below 2 turns a uint64 scalar and a Python int into a float64
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL = 0x9E3779B9, 0xBB67AE85
LOW = np.uint64(WORD_MAX)
SHIFT = np.uint64(32)


def philox4x32(counter: npt.NDArray[np.uint32], key: tuple[int, int]) -> npt.NDArray[np.uint32]:
    """Return the four words of Philox4x32-10 for each counter of shape [..., 4]."""
    words = np.asarray(counter, dtype=np.uint64)
    return np.stack(_rounds(words[..., 0], words[..., 1], words[..., 2], words[..., 3], key), axis=-1).astype(np.uint32)


def normal(
    seed: int, *, region: int, stream: int, channels: int, top: int, left: int, height: int, width: int
) -> npt.NDArray[np.float32]:
    """Return the crop [C, H, W] at (top, left) of an endless field of normal noise."""
    for name, value in {"seed": seed, "region": region, "stream": stream, "top": top, "left": left}.items():
        if not 0 <= value <= WORD_MAX:
            raise UsageError(f"{name}={value} does not fit in 32 bits; use a whole number from 0 to {WORD_MAX}")
    field = np.empty((channels, height, width), dtype=np.float32)
    # x and y are broadcast, so the first two of the ten rounds work on small arrays
    x, y = _span(left, width)[None], _span(top, height)[:, None]
    c, s = _span(0, channels)[:, None, None], _span(stream, 1)[None]
    rows = max(1, min(height, BLOCK // max(1, width)))
    planes = max(1, BLOCK // max(1, rows * width))
    for channel in range(0, channels, planes):
        for row in range(0, height, rows):
            w0, w1, _, _ = _rounds(x, y[row : row + rows], c[channel : channel + planes], s, (seed, region))
            field[channel : channel + planes, row : row + rows] = _normal_from_words(w0, w1)
    return field


def _span(first: int, count: int) -> UInt64s:
    return np.arange(first, first + count, dtype=np.uint64)


def _rounds(
    c0: UInt64s, c1: UInt64s, c2: UInt64s, c3: UInt64s, key: tuple[int, int]
) -> tuple[UInt64s, UInt64s, UInt64s, UInt64s]:
    """Return the four output words as uint64. The words of the counters may broadcast against each other."""
    for i in range(ROUNDS):
        k0, k1 = (np.uint64((int(k) + i * w) & WORD_MAX) for k, w in zip(key, WEYL, strict=True))
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> SHIFT) ^ (c1 ^ k0), p1 & LOW, (p0 >> SHIFT) ^ (c3 ^ k1), p0 & LOW
    return c0, c1, c2, c3


def _normal_from_words(w0: UInt64s, w1: UInt64s) -> npt.NDArray[np.float64]:
    """Return the cosine half of Box and Muller's pair; w0 + 1 keeps the logarithm finite."""
    u1, u2 = (w0.astype(np.float64) + 1) * 2.0**-32, w1.astype(np.float64) * 2.0**-32
    value: npt.NDArray[np.float64] = np.sqrt(-2 * np.log(u1)) * np.cos(2 * np.pi * u2)
    return value
