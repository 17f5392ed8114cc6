"""How alike two pictures are, [3, height, width] with numbers from 0 to 1."""

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["MOST_DB", "likeness", "psnr", "relative", "ssim"]

MOST_DB = 200.0  # of equal pictures
SIDE = 11  # of the window of SSIM, in pixels
Floats = npt.NDArray[np.floating[Any]]


def psnr(ours: Floats, reference: Floats) -> float:
    """The peak signal to noise ratio, in dB."""
    error = float(np.mean((np.clip(ours, 0, 1).astype(np.float64) - np.clip(reference, 0, 1)) ** 2))
    return MOST_DB if error == 0 else min(MOST_DB, -10 * float(np.log10(error)))


def ssim(ours: Floats, reference: Floats) -> float:
    """The structural similarity of the brightness (Wang et al. 2004): a Gaussian window, sigma 1.5. Equal: 1."""
    x, y = (np.tensordot([0.299, 0.587, 0.114], np.clip(p, 0, 1).astype(np.float64), 1) for p in (ours, reference))
    taps = np.exp(-((np.arange(SIDE) - SIDE // 2) ** 2) / (2 * 1.5**2))

    def mean(field: Floats) -> Floats:
        """The weighted mean of each window that fits; of a picture smaller than a window, the mean of all."""
        for axis in (0, 1):
            some = taps[: field.shape[axis]] / taps[: field.shape[axis]].sum()
            field = np.lib.stride_tricks.sliding_window_view(field, len(some), axis) @ some
        return field

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y, both = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2, mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    whole = (2 * mean_x * mean_y + c1) * (2 * both + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(whole.mean())


def relative(pairs: list[tuple[Floats, Floats]]) -> float:
    """The relative L2 distance of the first arrays from the second ones, taken together."""
    error = sum(float(np.sum((a.astype(np.float64) - b) ** 2)) for a, b in pairs)
    size = sum(float(np.sum(b.astype(np.float64) ** 2)) for _, b in pairs)
    return float(np.sqrt(error / size)) if size else float(error > 0)


def likeness(db: float) -> str:
    """A PSNR as text."""
    return "equal" if db >= MOST_DB else f"{db:.1f}"
