"""The embedding of a number as cosines and sines, in which diffusion networks read the time."""

import math

import torch
from torch import Tensor, nn

__all__ = ["Sinusoid"]


class Sinusoid(nn.Module):
    """From [...] to [..., width]. Frequencies are a buffer: computed by a backend, their last bit shows at 30,000."""

    def __init__(self, width: int) -> None:
        super().__init__()
        exponents = -math.log(10_000) * torch.arange(width // 2, dtype=torch.float32) / (width // 2)
        self.frequencies: Tensor
        self.register_buffer("frequencies", exponents.exp(), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[..., None] * self.frequencies
        return torch.cat((angles.cos(), angles.sin()), -1)
