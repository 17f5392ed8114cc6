"""Images as tensors: batches, a loss between pictures, and a score on images without training."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import l1_loss

from train import data
from train.metrics import psnr

__all__ = ["appearance", "crops", "mixed", "pixels", "score"]

JUDGED = 64  # crops in a score in a score


def pixels(images: np.ndarray) -> Tensor:
    """From uint8 [B, H, W, 3] to [B, 3, H, W] between 0 and 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 255


def crops(seed: int, count: int, side: int) -> Callable[[int], tuple[Tensor, ...]]:
    """A function from a batch's number to sharp crops, degraded crops, and their kinds."""

    def batch(number: int) -> tuple[Tensor, ...]:
        sharp, soft, kinds = data.batch(seed, number, count, side)
        return pixels(sharp), pixels(soft), torch.from_numpy(kinds)

    return batch


def appearance(image: Tensor, target: Tensor) -> Tensor:
    """L1 loss of pixels and of their differences to neighbours, which keep edges sharp."""
    right, below = (l1_loss(image.diff(dim=d), target.diff(dim=d)) for d in (-1, -2))
    return l1_loss(image, target) + right + below


def mixed() -> Any:
    """Matrix products in bfloat16, sums and weights in float32."""
    return torch.autocast("cpu", torch.bfloat16)


@torch.no_grad()
def score(side: int, restored: Callable[[Tensor, Tensor], Tensor]) -> dict[str, float]:
    """PSNR of pictures restored from crops of the calibration split, and PSNR of bicubic."""
    sharp, soft, _ = data.batch(0, 0, JUDGED, side, "calibration")
    with mixed():
        images = restored(pixels(sharp), pixels(soft)).clamp(0, 1)
    rounded = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    both = {"psnr": rounded, "bicubic": soft}
    return {k: float(np.mean([psnr(a, b) for a, b in zip(v, sharp, strict=True)])) for k, v in both.items()}
