"""Measures of how near a picture is to the original, without trained weights; images are uint8 [H, W, 3]."""

import numpy as np

__all__ = ["MEASURES", "gmsd", "measures", "psnr", "ssim"]

MEASURES = {"psnr": "dB, higher is better", "ssim": "of 1, higher is better", "gmsd": "0 is best"}


def luma(image: np.ndarray) -> np.ndarray:
    """Brightness by BT.601, 0 to 255, float64."""
    return np.asarray(image, np.float64) @ [0.299, 0.587, 0.114]


def psnr(image: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal to noise over all channels."""
    error = np.square(np.asarray(image, np.float64) - np.asarray(truth, np.float64)).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def filtered(field: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """Apply a separable filter, only where it fits completely."""
    for axis in (0, 1):
        field = np.lib.stride_tricks.sliding_window_view(field, len(taps), axis) @ taps
    return field


def ssim(image: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity of luma (Wang et al. 2004): Gaussian window of 11, sigma 1.5."""
    x, y = luma(image), luma(truth)
    taps = np.exp(-np.square(np.arange(-5, 6)) / (2 * 1.5**2))
    taps /= taps.sum()
    mean_x, mean_y = filtered(x, taps), filtered(y, taps)
    var_x, var_y = filtered(x * x, taps) - mean_x**2, filtered(y * y, taps) - mean_y**2
    both = filtered(x * y, taps) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    map_ = (2 * mean_x * mean_y + c1) * (2 * both + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(map_.mean())


def gmsd(image: np.ndarray, truth: np.ndarray) -> float:
    """Gradient magnitude similarity deviation (Xue et al. 2014): Prewitt on luma at half the size, c = 170."""
    x, y = (gradient(halved(luma(picture))) for picture in (image, truth))
    return float(((2 * x * y + 170) / (x * x + y * y + 170)).std())


def halved(field: np.ndarray) -> np.ndarray:
    rows, columns = (size // 2 * 2 for size in field.shape)
    return field[:rows, :columns].reshape(rows // 2, 2, columns // 2, 2).mean((1, 3))


def gradient(field: np.ndarray) -> np.ndarray:
    """The magnitude of Prewitt's gradient."""
    rows = np.lib.stride_tricks.sliding_window_view(field, (3, 3))
    steps = np.array([[1, 0, -1]] * 3) / 3
    return np.hypot((rows * steps).sum((2, 3)), (rows * steps.T).sum((2, 3)))


def measures(image: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """All measures of a picture."""
    return {"psnr": psnr(image, truth), "ssim": ssim(image, truth), "gmsd": gmsd(image, truth)}
