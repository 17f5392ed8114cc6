"""Pixels to features at half the size, and back."""

import torch.nn.functional as F
from torch import Tensor, nn

from tilewright.export.networks.low_rank import Branches, Strength, add_branches


class See(nn.Module):
    """Image [B, 3, H, W] to features [B, width, H/2, W/2]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.look = nn.Conv2d(3, width, 3, stride=2, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return F.silu(self.look(image))


class Paint(nn.Module):
    """Features to an image, brighter by a gain."""

    def __init__(self, width: int, gain: float, branches: Branches) -> None:
        super().__init__()
        self.gain = gain
        self.mix = nn.Linear(width, 12)
        add_branches(self, branches, Strength())

    def forward(self, features: Tensor) -> Tensor:
        pixels = self.mix(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return (self.gain * F.pixel_shuffle(pixels, 2)).clamp(0, 1)
